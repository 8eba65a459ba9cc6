"""Images: the binary records of the CIFAR sets, a validation set held out, pictures in files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

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


class Look(NamedTuple):
    """Height and width of a picture, how Pillow keeps it, and what reading it leaves out."""

    grid: Dims
    mode: str
    transparent: bool
    moving: bool


def look(path: Path) -> Look:
    """Facts of a picture from its head; the pixels are not read."""
    with _opened(path) as image:
        moving = getattr(image, "is_animated", False)
        return Look(
            (image.height, image.width), image.mode, image.has_transparency_data, bool(moving)
        )


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    try:
        from PIL import Image
    except ModuleNotFoundError:
        raise TaskError(
            "images are read by Pillow; run pip install 'patternsearch[sweep]'"
        ) from None
    try:
        with Image.open(path) as image:
            yield image
    except TaskError:
        raise
    except Exception as e:  # of a broken file Pillow raises whatever its decoders meet
        found = f"{e or type(e).__name__}"
        raise TaskError(f"{path}: expected an image, found {found}; remove or replace it") from None


def values(paths: Sequence[Path]) -> tuple[float, float]:
    """The lowest and the highest number in pictures of 16 bits or of floats."""
    lows, highs = [], []
    for path in paths:
        with _opened(path) as image:
            x = np.asarray(image)
            if not np.isfinite(x).all():
                raise TaskError(f"{path}: NaN or infinite pixels; write it again without them")
            lows.append(float(x.min()))
            highs.append(float(x.max()))
    return min(lows), max(highs)


def read_images(
    paths: Sequence[Path],
    grid: Dims,
    channels: int = 3,
    between: tuple[float, float] | None = None,
) -> Array:
    """uint8 [n, *grid, channels]: pictures of any format that Pillow reads, scaled to the grid.

    What is transparent becomes white. between: numbers that become 0 and 255, for pictures of 16
    bits or of floats, which Pillow would clip instead.
    """
    x, size = np.empty((len(paths), *grid, channels), np.uint8), (grid[1], grid[0])
    for out, path in zip(x, paths, strict=True):
        with _opened(path) as image:
            plain = _plain(image, between).convert("RGB" if channels == 3 else "L")
            plain = plain if plain.size == size else plain.resize(size)
            out[...] = np.asarray(plain).reshape(*grid, channels)
    return x


def _plain(image: Image.Image, between: tuple[float, float] | None) -> Image.Image:
    """The picture in 8 bits a colour, on white."""
    from PIL import Image

    if between is not None:
        low, high = between
        x = (np.asarray(image).astype(np.float64) - low) * (255 / (high - low or 1.0))
        return Image.fromarray(x.clip(0, 255).round().astype(np.uint8))
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image.convert("RGBA"))
    return image
