"""Published images: the binary records of the CIFAR sets, and a validation set held out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..errors import TaskError
from ..pattern import Dims
from ..task import Array, Data, stratified
from .fetch import check_size

if TYPE_CHECKING:
    from PIL import Image

Pair = tuple[Array, Array]


def held_out(train: Pair, test: Pair, valid: int) -> Data:
    """`valid` of the training images, the same share of every class, to validate on."""
    x, y = train
    rest, chosen, _ = stratified(y, valid, 0)
    return Data((x[rest], y[rest]), (x[chosen], y[chosen]), test)


def read_records(paths: Sequence[Path], records: int, labels: int, classes: int) -> Pair:
    """x uint8 [n, 32, 32, 3] and y int64 [n] of files with `records` records each.

    A record is `labels` label bytes, of which the last counts, and 3x32x32 pixels, colour by colour
    (A. Krizhevsky, Learning multiple layers of features from tiny images, 2009).
    """
    length, found = labels + 3 * 32 * 32, []
    for path in paths:
        check_size(path, records * length, f"{records:,} images of {length:,}")
        rows = np.fromfile(path, np.uint8).reshape(records, length)
        if (most := rows[:, labels - 1].max()) >= classes:
            raise TaskError(f"{path}: expected labels below {classes}, found {most}")
        found.append(rows)
    table = np.concatenate(found)
    x = table[:, labels:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return np.ascontiguousarray(x), table[:, labels - 1].astype(np.int64)


def image_size(path: Path) -> tuple[Dims, bool]:
    """Height and width, and whether it has colours, of a picture; nothing else is read."""
    with _opened(path) as image:
        return (image.height, image.width), image.mode not in ("1", "L", "I", "F", "I;16", "LA")


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    try:
        from PIL import Image, UnidentifiedImageError
    except ModuleNotFoundError:
        raise TaskError(
            "images are read by Pillow; run pip install 'patternsearch[sweep]'"
        ) from None
    try:
        with Image.open(path) as image:
            yield image
    except (OSError, UnidentifiedImageError, SyntaxError, ValueError) as e:
        raise TaskError(f"{path}: expected an image, found {e}; remove or replace it") from None


def read_images(paths: Sequence[Path], grid: Dims, channels: int = 3) -> Array:
    """uint8 [n, *grid, channels]: pictures of any format that Pillow reads, scaled to the grid."""
    x, size = np.empty((len(paths), *grid, channels), np.uint8), (grid[1], grid[0])
    for out, path in zip(x, paths, strict=True):
        with _opened(path) as image:
            plain = image.convert("RGB" if channels == 3 else "L")
            plain = plain if plain.size == size else plain.resize(size)
            out[...] = np.asarray(plain).reshape(*grid, channels)
    return x
