"""MNIST: 70,000 handwritten digits, 28x28 pixels, one channel.

Source: Y. LeCun, L. Bottou, Y. Bengio, P. Haffner, Gradient-based learning applied to document
recognition, 1998. The files are those of PyTorch's mirror.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from ..data.cache import parsed_data
from ..data.fetch import Published, Remote, check_count
from ..data.idx import read_idx
from ..data.images import held_out
from ..kinds import Images
from ..sizes import Spec
from ..task import Data

URL = "https://ossci-datasets.s3.amazonaws.com/mnist/"
FILES = {
    "train-images-idx3": "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
    "train-labels-idx1": "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
    "t10k-images-idx3": "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
    "t10k-labels-idx1": "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
}
REMOTES = tuple(Remote(f"{URL}{f}-ubyte.gz", sha256) for f, sha256 in FILES.items())


class Mnist(Images):
    """55,000 digits to train, 5,000 of the same to validate, the field's 10,000 to test."""

    name = "mnist"
    spec = Spec(grid=(28, 28), channels=1, classes=10)
    moves = ("shift",)
    mean, deviation = (0.1307,), (0.3081,)
    published = Published(name, "mnist", tuple(r.file for r in REMOTES), REMOTES)
    counts: ClassVar[tuple[int, int]] = (60_000, 10_000)
    held_out: ClassVar[int] = 5_000

    def load(self) -> Data:
        return parsed_data(self.name, self.published.locate(), self._parse)

    def _parse(self) -> Data:
        paths = self.published.locate()
        read = [read_idx(path) for path in paths]
        for i, (path, array) in enumerate(zip(paths, read, strict=True)):
            check_count(path, "examples", self.counts[i // 2], len(array))
        x, y, x_test, y_test = read
        train, test = (
            (x[..., None], y.astype(np.int64)),
            (x_test[..., None], y_test.astype(np.int64)),
        )
        return held_out(train, test, self.held_out)
