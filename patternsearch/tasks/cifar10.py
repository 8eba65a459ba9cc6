"""CIFAR-10: 60,000 photographs of ten things, 32x32 pixels, three channels.

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
    "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
    "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
)
FILES = (*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin")


class Cifar10(Images):
    """45,000 photographs to train, 5,000 of the same to validate, the field's 10,000 to test."""

    name = "cifar10"
    spec = Spec(grid=(32, 32), channels=3, classes=10)
    mean, deviation = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
    published = Published(name, "cifar-10-batches-bin", FILES, (ARCHIVE,))
    records: ClassVar[int] = 10_000  # in each file
    held_out: ClassVar[int] = 5_000

    def load(self) -> Data:
        return parsed_data(self.name, self.published.locate(), self._parse)

    def _parse(self) -> Data:
        *paths, last = self.published.locate()
        train = read_records(paths, self.records, 1, self.spec.classes)
        test = read_records([last], self.records, 1, self.spec.classes)
        return held_out(train, test, self.held_out)
