"""Files parsed once into arrays, memory-mapped after by every process."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from ..codec import digest
from ..errors import TaskError
from ..task import Array, Data
from .fetch import cache_folder

VERSION = 1  # of what the loaders write


def parsed(
    name: str, files: Sequence[Path], parse: Callable[[], Mapping[str, Array]]
) -> dict[str, Array]:
    """The arrays that `parse` gives for these files, memory-mapped.

    They are kept by the files' places, sizes and times, so that changed files are parsed again.
    Pages are copied where a process writes to them, and shared by all where none does.
    """
    facts = [(str(p.resolve()), p.stat().st_size, p.stat().st_mtime_ns) for p in files]
    folder = cache_folder() / "arrays" / f"{name}-{digest([VERSION, facts])}"
    if not folder.is_dir():
        _write(folder, parse())
    return {p.stem: np.load(p, mmap_mode="c") for p in sorted(folder.glob("*.npy"))}


def _write(folder: Path, arrays: Mapping[str, Array]) -> None:
    """Through a temporary folder; where another process was first, its own stand."""
    temporary = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".part-"))
        for name, array in arrays.items():
            np.save(temporary / f"{name}.npy", array)
        temporary.rename(folder)
    except OSError as e:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
        if not folder.is_dir():
            raise TaskError(
                f"cannot write {folder}: {e.strerror}; set PATTERNSEARCH_CACHE to another folder"
            ) from None


def parsed_data(name: str, files: Sequence[Path], parse: Callable[[], Data]) -> Data:
    """The same for the splits of a task."""

    def arrays() -> dict[str, Array]:
        data = parse()
        pairs = {"train": data.train, "valid": data.valid, "test": data.test}
        return {f"{part}_{s}": a for s, p in pairs.items() for part, a in zip("xy", p, strict=True)}

    found = parsed(name, files, arrays)
    return Data(*((found[f"x_{s}"], found[f"y_{s}"]) for s in ("train", "valid", "test")))
