"""A user's own arrays, from an .npz file."""

from __future__ import annotations

import difflib
import zipfile
import zlib
from pathlib import Path

import numpy as np

from ..errors import TaskError
from ..kinds import IMAGE_MOVES
from ..sizes import Spec
from ..task import Array, Data, Task, stratified

OWN_SPLITS = ("x_valid", "y_valid", "x_test", "y_test")
KNOWN = ("x", "y", *OWN_SPLITS, "positions")
LEAST = 10  # examples a split: with fewer a metric says nothing
SAVE = "np.savez(path, x=x, y=y)"
RENUMBER = "number the classes from 0 with np.unique(y, return_inverse=True)[1]"
READ_ERRORS = (OSError, ValueError, EOFError, NotImplementedError, zipfile.BadZipFile, zlib.error)


class ArrayTask(Task):
    """Classification of the examples in an .npz file, as np.savez(path, x=x, y=y) writes it.

    x: floats, or uint8 (scaled by 1/255): images [n, H, W, C] or [n, H, W], sequences [n, T, C],
    vectors [n, d] (d positions with one channel). Three axes are images where they are uint8 or
    square, else sequences; an entry positions=2 (images) or 1 (sequences) says otherwise.
    Whole numbers [n, T], of any integer type, are sequences of tokens.
    y [n]: whole numbers from 0, one class an example.
    x_valid, y_valid, x_test, y_test: the same for validation and test. Without them a fifth of the
    examples each, the same in every process, with equal shares of the classes.

    Floats are used as they are: bring them to about unit scale. Raises TaskError, naming the file,
    what was expected and what was found. The file is read once, here; objects are never unpickled.
    """

    def __init__(self, path: str | Path) -> None:
        self.name = str(path)
        arrays = _read(self.name)
        axes = _positions(self.name, arrays)
        self._data = _splits(self.name, arrays, axes)
        self._spec = _spec(self._data)
        self.space = "vision" if axes == 2 else "sequences"
        self.moves = IMAGE_MOVES if axes == 2 else ()

    @property
    def spec(self) -> Spec:
        return self._spec

    def load(self) -> Data:
        return self._data


def _read(path: str) -> dict[str, Array]:
    """The arrays by name: at least x and y, and no name that is not known."""
    if not Path(path).is_file():
        raise TaskError(f"{path}: no such file, seen from {Path.cwd()}; write it with {SAVE}")
    if not zipfile.is_zipfile(path):
        raise TaskError(f"{path}: not an .npz file, or cut off; write it with {SAVE}")
    arrays: dict[str, Array] = {}
    name = "the file"
    try:
        with np.load(path, allow_pickle=False) as file:
            found = list(file.files)
            for name in (k for k in found if k in KNOWN):
                arrays[name] = file[name]
    except READ_ERRORS as e:
        raise TaskError(
            f"{path}: {name} cannot be read as plain numbers of one shape ({e}); write it again "
            f"with {SAVE}; objects and ragged lists are never unpickled"
        ) from None
    _check_names(path, found)
    return arrays


def _check_names(path: str, found: list[str]) -> None:
    for name in (k for k in found if k not in KNOWN):
        plain = name.lower().removesuffix("_train")
        near = difflib.get_close_matches(plain, KNOWN, n=1, cutoff=0.5)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise TaskError(f"{path}: no use for an array {name!r}.{hint} Known: {', '.join(KNOWN)}.")
    own = any(k in found for k in OWN_SPLITS)
    for name in ("x", "y", *(OWN_SPLITS if own else ())):
        if name not in found:
            rest = f"; give all of {', '.join(OWN_SPLITS)}, or none" if name in OWN_SPLITS else ""
            have = ", ".join(found) or "nothing"
            raise TaskError(f"{path}: no array {name!r}, only {have}{rest}")


def _positions(path: str, arrays: dict[str, Array]) -> int:
    """Axes of x that are positions."""
    x = arrays["x"]
    possible = {2: (1,), 3: (1, 2), 4: (2,)}.get(x.ndim)
    if possible is None or 0 in x.shape:
        raise TaskError(
            f"{path}: x must be [n, H, W, C], [n, H, W], [n, T, C] or [n, d], found {list(x.shape)}"
        )
    if (given := arrays.get("positions")) is not None:
        if given.size != 1 or given.item() not in possible:
            raise TaskError(
                f"{path}: positions must be {' or '.join(map(str, possible))} for x "
                f"{list(x.shape)}, found {given.tolist()}"
            )
        return int(given.item())
    image = x.ndim == 3 and (x.dtype == np.uint8 or x.shape[1] == x.shape[2])
    return 2 if image else possible[0]


def _spec(data: Data) -> Spec:
    splits = (data.train, data.valid, data.test)
    classes = 1 + max(int(y.max()) for _, y in splits)
    x = data.train[0]
    if x.dtype == np.int64:
        vocabulary = 1 + max(int(x.max()) for x, _ in splits)
        return Spec(grid=x.shape[1:], vocabulary=vocabulary, classes=classes)
    return Spec(grid=x.shape[1:-1], channels=x.shape[-1], classes=classes)


def _splits(path: str, arrays: dict[str, Array], axes: int) -> Data:
    x, y = _pair(path, arrays, axes, "")
    if "x_valid" in arrays:
        data = Data((x, y), *(_pair(path, arrays, axes, split) for split in ("_valid", "_test")))
    elif (fifth := len(y) // 5) < LEAST:
        raise TaskError(
            f"{path}: {len(y)} examples; {5 * LEAST} are the least from which a training, a "
            f"validation and a test split can be taken; add more, or {', '.join(OWN_SPLITS)}"
        )
    else:
        data = Data(*((x[i], y[i]) for i in stratified(y, fifth, fifth)))
    if len(np.unique(y)) < 2:
        raise TaskError(f"{path}: y must hold two classes or more, found only {y[0]}")
    if (most := max(int(y.max()) for _, y in (data.train, data.valid, data.test))) >= len(y):
        raise TaskError(
            f"{path}: y must hold fewer classes than examples, found class {most} with {len(y)} "
            f"examples; {RENUMBER}"
        )
    return data


def _pair(path: str, arrays: dict[str, Array], axes: int, split: str) -> tuple[Array, Array]:
    x, y = arrays[f"x{split}"], arrays[f"y{split}"]
    like = arrays["x"]
    if x.shape[1:] != like.shape[1:] or x.dtype.kind != like.dtype.kind:
        raise TaskError(
            f"{path}: x{split} must be like x, {like.dtype} {['n', *like.shape[1:]]}; "
            f"found {x.dtype} {list(x.shape)}"
        )
    if len(x) < LEAST:
        raise TaskError(f"{path}: x{split} has {len(x)} examples; at least {LEAST} are needed")
    labels = _labels(f"{path}: y{split}", y)
    if len(x) != len(y):
        raise TaskError(
            f"{path}: x{split} and y{split} must be of one length, found {len(x)} and {len(y)}"
        )
    x = _inputs(f"{path}: x{split}", x)
    return x[..., None] if x.dtype == np.float32 and x.ndim == 1 + axes else x, labels


def _inputs(where: str, x: Array) -> Array:
    """float32, or int64 tokens."""
    if x.dtype.kind in "iu" and x.ndim == 2:
        if x.min() < 0 or x.max() >= 2**20:
            raise TaskError(
                f"{where}: tokens must be in [0, 2**20), found {x.min()} to {x.max()}; number "
                "them from 0, or save numbers that are no tokens as float32"
            )
        return x.astype(np.int64)
    if x.dtype == np.uint8:
        return x.astype(np.float32) / np.float32(255)
    if x.dtype.kind != "f":
        raise TaskError(
            f"{where} must be floats, uint8, or integer tokens [n, T]; found {x.dtype} "
            f"{list(x.shape)}; save x.astype('float32')"
        )
    with np.errstate(over="ignore"):  # too large for float32 is infinite, and reported as such
        x = x.astype(np.float32)
    broken = ~np.isfinite(x.reshape(len(x), -1)).all(axis=1)
    if broken.any():
        raise TaskError(
            f"{where} has NaN or infinite values in {broken.sum()} of {len(x)} examples, first in "
            f"example {broken.argmax()}; drop or fill them"
        )
    return x


def _labels(where: str, y: Array) -> Array:
    """int64 classes."""
    if y.ndim != 1:
        raise TaskError(f"{where} must be [n], one class an example; found {list(y.shape)}")
    if y.dtype.kind not in "iub":
        raise TaskError(f"{where} must be whole numbers from 0, found {y.dtype}; {RENUMBER}")
    if len(y) and y.min() < 0:
        raise TaskError(f"{where} must be whole numbers from 0, found {y.min()}; {RENUMBER}")
    return y.astype(np.int64)
