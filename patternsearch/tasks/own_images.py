"""A user's own images: a folder for every class, or IDX files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..data.idx import is_idx, read_idx
from ..data.images import Pair, image_size, read_images
from ..errors import TaskError
from ..kinds import Images
from ..pattern import Dims
from ..sizes import Spec
from ..task import Array, Data, stratified
from .own import IMAGES, TABLES, TEXTS, fifths, sizes

SMALLEST, LARGEST = 8, 64  # pixels a side that are kept; others, or several sizes, become SCALED
SCALED = 32
TRAIN, VALID, TEST = ("train", "training"), ("valid", "val", "validation"), ("test", "t10k")


class OwnImages(Images):
    """Base: uint8 images, standardised by the training images."""

    def __init__(self, path: Path, data: Data, what: str) -> None:
        x = data.train[0]
        grid, channels = x.shape[1:-1], x.shape[-1]
        classes = 1 + max(int(y.max()) for _, y in (data.train, data.valid, data.test))
        self._data = data
        self._spec = Spec(grid=grid, channels=channels, classes=classes)
        self.space = "images" if min(grid) > 16 else "vision"
        part = x[:: max(1, len(x) // 5_000)].reshape(-1, channels).astype(np.float64) / 255
        self.mean = tuple(part.mean(axis=0).tolist())
        self.deviation = tuple(np.maximum(part.std(axis=0), 1e-3).tolist())
        shape = "x".join(map(str, (*grid, channels)))
        self.note = f"{path}: {what}, {classes} classes, {shape}; images: {sizes(data)}"

    @property
    def spec(self) -> Spec:
        return self._spec

    def load(self) -> Data:
        return self._data


class ImageFolder(OwnImages):
    """FOLDER/CLASS/IMAGE, or FOLDER/train/CLASS/IMAGE with valid and test beside train."""

    def __init__(self, path: Path) -> None:
        parts = {p.name.lower(): p for p in sorted(path.iterdir()) if p.is_dir()}
        train = next((parts[n] for n in TRAIN if n in parts), path)
        held = [next((parts[n] for n in names if n in parts), None) for names in (VALID, TEST)]
        classes = _classes(train)
        folders = [train, *(f for f in held if f is not None and train is not path)]
        listed = [_listed(folder, classes) for folder in folders]
        paths = [p for found, _ in listed for p in found]
        grid, channels, note = _shape(paths)
        read = [(read_images(found, grid, channels), y) for found, y in listed]
        valid = read[1] if held[0] is not None and len(read) > 1 else None
        test = read[-1] if held[1] is not None and len(read) > 1 else None
        super().__init__(path, split(path, read[0], valid, test), "images in a folder a class")
        self.note += note


class IdxFolder(OwnImages):
    """IDX files of images and labels in pairs, such as train-images-idx3-ubyte and its labels."""

    def __init__(self, path: Path) -> None:
        files = [p for p in sorted(path.iterdir()) if p.is_file() and is_idx(p)]
        arrays = {p: read_idx(p) for p in files}
        images = [p for p, a in arrays.items() if a.ndim in (3, 4)]
        pairs = {p.name: (_uint8(p, arrays[p]), _labels(p, arrays)) for p in images}
        if not pairs:
            raise TaskError(
                f"{path}: expected IDX images [n, H, W], found {[f.name for f in files]}"
            )
        tests = [n for n in pairs if n.lower().startswith(TEST)]
        valids = [n for n in pairs if n.lower().startswith(VALID)]
        trains = [n for n in pairs if n not in tests + valids]
        if len(trains) != 1 or len(tests) > 1 or len(valids) > 1:
            raise TaskError(f"{path}: expected one IDX file of training images, found {trains}")
        valid, test = (pairs[n[0]] if n else None for n in (valids, tests))
        data = split(path, pairs[trains[0]], valid, test)
        super().__init__(path, data, "IDX files of images and labels")


def split(path: Path, train: Pair, valid: Pair | None, test: Pair | None) -> Data:
    """What is not given is taken from training: a fifth, with equal shares of every class."""
    x, y = train
    if len(np.unique(y)) < 2:
        raise TaskError(f"{path}: two classes or more are needed, found one")
    fifth = fifths(len(y), f"{path}: {len(y):,} images to train")[0]
    counts = (0 if valid else fifth, 0 if test else fifth)
    rest, chosen_valid, chosen_test = stratified(y, *counts)
    return Data(
        (x[rest], y[rest]),
        valid or (x[chosen_valid], y[chosen_valid]),
        test or (x[chosen_test], y[chosen_test]),
    )


def _classes(folder: Path) -> list[str]:
    names = [p.name for p in sorted(folder.iterdir()) if p.is_dir() and _images(p)]
    if len(names) < 2:
        found = f"only {names[0]!r}" if names else "none with images in it"
        files = sorted(p.name for p in folder.iterdir() if p.suffix.lower() in (*TABLES, *TEXTS))
        hint = f"; for {files[0]} give its own path" if files else ""
        raise TaskError(
            f"{folder}: expected a folder for each of two classes or more, found {found}{hint}; a "
            "published set goes by its name, such as: cifar10 --data FOLDER"
        )
    return names


def _images(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.suffix.lower() in IMAGES)


def _listed(folder: Path, classes: Sequence[str]) -> tuple[list[Path], Array]:
    found = [(p, i) for i, name in enumerate(classes) for p in _images(folder / name)]
    if not found:
        raise TaskError(f"{folder}: expected images in folders {', '.join(classes)}, found none")
    return [p for p, _ in found], np.array([i for _, i in found], np.int64)


def _shape(paths: Sequence[Path]) -> tuple[Dims, int, str]:
    """Grid and channels of all, and what is said where they are scaled."""
    seen = {image_size(path) for path in paths}
    channels = 3 if any(colour for _, colour in seen) else 1
    grids = {grid for grid, _ in seen}
    first = next(iter(grids))
    if len(grids) == 1 and SMALLEST <= min(first) and max(first) <= LARGEST:
        return first, channels, ""
    several = f"{len(grids)} sizes" if len(grids) > 1 else f"{first[0]}x{first[1]}"
    return (SCALED, SCALED), channels, f"; scaled to {SCALED}x{SCALED} from {several}"


def _uint8(path: Path, x: Array) -> Array:
    if x.dtype != np.uint8:
        raise TaskError(f"{path}: expected images of unsigned bytes, found {x.dtype}")
    return x[..., None] if x.ndim == 3 else x


def _labels(path: Path, arrays: dict[Path, Array]) -> Array:
    """The IDX file of one axis named like the images, with `labels` for `images`."""
    stem = path.name.lower().partition("images")[0]
    for other, y in arrays.items():
        if y.ndim == 1 and other.name.lower().partition("labels")[0] == stem:
            if len(y) != len(arrays[path]):
                raise TaskError(f"{other}: expected {len(arrays[path]):,} labels, found {len(y):,}")
            if y.dtype.kind not in "iu" or y.min() < 0:
                raise TaskError(f"{other}: expected labels from 0, found {y.dtype} from {y.min()}")
            return y.astype(np.int64)
    raise TaskError(f"{path}: expected labels beside it, such as {stem}labels-idx1-ubyte")
