"""CIFAR-100: 60,000 photographs of a hundred things, 32x32 pixels, three channels.

Source: A. Krizhevsky, Learning multiple layers of features from tiny images, 2009.
"""

from __future__ import annotations

from typing import ClassVar

from ..data.cache import parsed_data
from ..data.fetch import Published, Remote
from ..data.images import held_out, read_records
from ..kinds import Images
from ..sizes import Spec
from ..task import Data

ARCHIVE = Remote(
    "https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz",
    "58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec",
)


class Cifar100(Images):
    """45,000 photographs to train, 5,000 of the same to validate, the field's 10,000 to test."""

    name = "cifar100"
    spec = Spec(grid=(32, 32), channels=3, classes=100)
    mean, deviation = (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)
    published = Published(name, "cifar-100-binary", ("train.bin", "test.bin"), (ARCHIVE,))
    records: ClassVar[tuple[int, int]] = (50_000, 10_000)
    held_out: ClassVar[int] = 5_000

    def load(self) -> Data:
        return parsed_data(self.name, self.published.locate(), self._parse)

    def _parse(self) -> Data:
        """Each record has a coarse label, which is not used, and a fine one."""
        train, test = (
            read_records([path], n, 2, self.spec.classes)
            for path, n in zip(self.published.locate(), self.records, strict=True)
        )
        return held_out(train, test, self.held_out)
