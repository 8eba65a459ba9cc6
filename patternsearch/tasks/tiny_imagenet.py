"""Tiny ImageNet: 110,000 photographs of 200 things, 64x64 pixels, three channels.

Source: Stanford CS231n, 2015, from O. Russakovsky et al., ImageNet large scale visual recognition
challenge, 2015. Labels of its test images were never published: the field tests on `val`.
"""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import numpy as np

from ..data.cache import parsed_data
from ..data.fetch import Published, Remote, check_count
from ..data.images import held_out, read_images
from ..errors import TaskError
from ..kinds import Images
from ..sizes import Spec
from ..task import Array, Data

ARCHIVE = Remote(
    "http://cs231n.stanford.edu/tiny-imagenet-200.zip",
    "6198c8ae015e2b3e007c7841da39ec069199b9aa3bfa943a462022fe5e43c821",
)
FILES = ("wnids.txt", "train", "val/val_annotations.txt")


class TinyImagenet(Images):
    """90,000 photographs to train, 10,000 of the same to validate, the field's 10,000 to test."""

    name = "tiny-imagenet"
    spec = Spec(grid=(64, 64), channels=3, classes=200)
    mean, deviation = (0.4802, 0.4481, 0.3975), (0.2770, 0.2691, 0.2821)
    published = Published(name, "tiny-imagenet-200", FILES, (ARCHIVE,))
    counts: ClassVar[tuple[int, int]] = (500, 10_000)  # of a class to train, in all to test
    held_out: ClassVar[int] = 10_000

    def load(self) -> Data:
        return parsed_data(self.name, self.published.locate(), self._parse)

    def _parse(self) -> Data:
        listing, train, annotations = self.published.locate()
        classes = listing.read_text(encoding="utf-8").split()
        check_count(listing, "classes", self.spec.classes, len(classes))
        paths: list[Path] = []
        for name in classes:
            found = sorted((train / name / "images").glob("*.JPEG"))
            check_count(train / name / "images", "images", self.counts[0], len(found))
            paths += found
        y = np.repeat(np.arange(len(classes)), self.counts[0])
        return held_out(
            (read_images(paths, self.spec.grid), y), self._test(annotations, classes), self.held_out
        )

    def _test(self, annotations: Path, classes: list[str]) -> tuple[Array, Array]:
        numbers = {name: i for i, name in enumerate(classes)}
        rows = [line.split("\t") for line in annotations.read_text(encoding="utf-8").splitlines()]
        check_count(annotations, "lines", self.counts[1], len(rows))
        for i, row in enumerate(rows):
            if len(row) < 2 or row[1] not in numbers:
                raise TaskError(
                    f"{annotations}, line {i + 1}: expected FILE and a class, found {row}"
                )
        x = read_images([annotations.parent / "images" / r[0] for r in rows], self.spec.grid)
        return x, np.array([numbers[row[1]] for row in rows], np.int64)
