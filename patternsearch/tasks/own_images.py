"""A user's own images: a folder for every class, or IDX files."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..data.idx import is_idx, read_idx
from ..data.images import Look, Pair, look, read_images, values
from ..data.tables import shown
from ..errors import TaskError
from ..kinds import Images
from ..pattern import Dims
from ..sizes import Spec
from ..task import Array, Data, stratified
from .own import IMAGES, TABLES, TEXTS, fifths, sizes

SMALLEST, LARGEST = 8, 64  # pixels a side that are kept; others, or several sizes, become SCALED
SCALED = 32
GREY = ("1", "L", "LA", "La")
TRAIN, VALID, TEST = ("train", "training"), ("valid", "val", "validation"), ("test", "t10k")


class OwnImages(Images):
    """Base: uint8 images, standardised by the training images."""

    def __init__(self, path: Path, data: Data, what: str) -> None:
        x = data.train[0]
        if x.min() == x.max():
            raise TaskError(f"{path}: every pixel to train on is {x.max()}; nothing tells classes")
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
    """FOLDER/CLASS/IMAGE; folders such as valid and test beside train, or the classes, are splits.

    Hidden files and folders are left out. Images of 16 bits or of floats are brought to 8 bits by
    the range of those to train on, what is transparent becomes white; `note` says so.
    """

    def __init__(self, path: Path) -> None:
        train, held, beside = _parts(path)
        classes, empty = _classes(train, held)
        listed = {f: _listed(f, classes, train) for f in (train, *held) if f is not None}
        looks = [look(p) for paths, _ in listed.values() for p in paths]
        grid, scaled = _grid({seen.grid for seen in looks})
        channels = 1 if all(seen.mode in GREY or _deep(seen.mode) for seen in looks) else 3
        between = values(listed[train][0]) if _all_deep(path, looks) else None
        read = {f: (read_images(p, grid, channels, between), y) for f, (p, y) in listed.items()}
        valid, test = (read[f] if f is not None else None for f in held)
        super().__init__(path, split(path, read[train], valid, test), "images in a folder a class")
        self.note += scaled
        if between is not None:
            self.note += f"; of {looks[0].mode} images {between[0]:g}..{between[1]:g} became 0..255"
        used = {p for paths, _ in listed.values() for p in paths}
        left = [p.relative_to(path) for p in _files(path) if p not in used]
        for what, n in (
            ("images with transparency, laid on white", sum(seen.transparent for seen in looks)),
            ("moving images, of which the first picture is read", sum(s.moving for s in looks)),
            (f"files left out, such as {left[0] if left else ''}", len(left)),
        ):
            self.note += f"; {what}: {n:,}" if n else ""
        if empty := [*beside, *empty]:
            self.note += f"; folders left out: {shown(empty)}"


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


def _parts(path: Path) -> tuple[Path, list[Path | None], list[str]]:
    """The folder of the training classes, those to validate and to test on, others beside train."""
    folders, found = _folders(path), list[Path | None]()
    for names in (TRAIN, VALID, TEST):
        own = [p for p in folders if p.name.lower() in names]
        if len(own) > 1:
            raise TaskError(f"{path}: one split in {own[0].name} and {own[1].name}; join them")
        if own and not any(_images(p) for p in _folders(own[0])):
            raise TaskError(
                f"{own[0]}: read as a split by its name; expected a folder with images for every "
                "class in it; add them, or rename it where it is a class"
            )
        found.append(own[0] if own else None)
    train = found[0]
    others = [p.name for p in folders if p not in found] if train is not None else []
    return train or path, found[1:], others


def _folders(path: Path) -> list[Path]:
    return sorted(p for p in path.iterdir() if p.is_dir() and not p.name.startswith("."))


def _classes(folder: Path, held: Sequence[Path | None]) -> tuple[list[str], list[str]]:
    """Names of the folders with images, and of those without."""
    own = [p for p in _folders(folder) if p not in held]
    names = [p.name for p in own if _images(p)]
    if len(names) < 2:
        found = f"only {names[0]!r}" if names else "none with images in it"
        files = sorted(p.name for p in folder.iterdir() if p.suffix.lower() in (*TABLES, *TEXTS))
        hint = f"; for {files[0]} give its own path" if files else ""
        raise TaskError(
            f"{folder}: expected a folder for each of two classes or more, found {found}{hint}; a "
            "published set goes by its name, such as: cifar10 --data FOLDER"
        )
    return names, [p.name for p in own if p.name not in names]


def _files(folder: Path) -> list[Path]:
    found = (p for p in folder.rglob("*") if not p.is_dir())
    return sorted(
        p for p in found if not any(n.startswith(".") for n in p.relative_to(folder).parts)
    )


def _images(folder: Path) -> list[Path]:
    return [p for p in _files(folder) if p.suffix.lower() in IMAGES]


def _listed(folder: Path, classes: Sequence[str], train: Path) -> tuple[list[Path], Array]:
    """Images and their classes; TaskError for a class that training does not have."""
    for name in (p.name for p in _folders(folder) if folder != train and _images(p)):
        if name not in classes:
            lower = {known.lower(): known for known in classes}
            near = difflib.get_close_matches(name.lower(), lower, n=1, cutoff=0.5)
            hint = f" Did you mean {lower[near[0]]!r}?" if near else ""
            raise TaskError(
                f"{folder}: class {name!r} has no images in {train}.{hint} Rename or remove it, or "
                "add images to train on."
            )
    found = [(p, i) for i, name in enumerate(classes) for p in _images(folder / name)]
    return [p for p, _ in found], np.array([i for _, i in found], np.int64)


def _grid(grids: set[Dims]) -> tuple[Dims, str]:
    """Grid of all, and what is said where they are scaled."""
    first = next(iter(grids))
    if len(grids) == 1 and SMALLEST <= min(first) and max(first) <= LARGEST:
        return first, ""
    several = f"{len(grids)} sizes" if len(grids) > 1 else f"{first[0]}x{first[1]}"
    return (SCALED, SCALED), f"; scaled to {SCALED}x{SCALED} from {several}"


def _deep(mode: str) -> bool:
    return mode in ("I", "F") or mode.startswith("I;16")


def _all_deep(path: Path, looks: Sequence[Look]) -> bool:
    """Whether the images have more than 8 bits a colour; TaskError where they differ in that."""
    kinds = {seen.mode[0] if _deep(seen.mode) else "8 bits": seen.mode for seen in looks}
    if len(kinds) > 1:
        raise TaskError(
            f"{path}: images of modes {' and '.join(sorted(kinds.values()))}, whose numbers have "
            "no common scale; save all of them in 8 bits, or all in one mode"
        )
    return "8 bits" not in kinds


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
