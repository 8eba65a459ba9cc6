"""A user's own data by its path: what kind it is, how it is split, how long it may be trained."""

from __future__ import annotations

import os
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

from ..errors import TaskError, unknown
from ..task import Data, Task
from .arrays import LEAST, ArrayTask

IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
TABLES = (".csv", ".tsv", ".parquet")
TEXTS = (".txt", ".text", ".md", ".tokens")
OPTIONS = ("columns", "horizon")
KINDS = (
    "a folder of images per class, a folder of IDX files, .npz arrays, a .csv, .tsv or .parquet "
    "file of series, a .csv of labelled texts, a .txt file"
)


def is_path(name: str) -> bool:
    """Whether a task is named by a path, and not by a name of ours or module:Class."""
    path, _ = _parted(name)
    known = path.suffix.lower() in (".npz", *TABLES, *TEXTS)
    return name.strip() != "" and (known or "/" in name or path.exists())


def own_task(name: str) -> Task:
    """The task of the data at a path, which may end in options: `loads.csv?horizon=24&columns=a,b`.

    Read once a process, while the files stay as they are. Raises TaskError with the remedy.
    """
    path, _ = _parted(name)
    try:
        if not path.exists():
            raise TaskError(
                f"{path}: no such file or folder, seen from {Path.cwd()}; expected {KINDS}"
            )
        return _read(name, changed(name))
    except OSError as e:
        raise TaskError(f"{e.filename or path}: {e.strerror or e}; it must be readable") from None


def _parted(name: str) -> tuple[Path, str]:
    """The path, in which a ? may stand where such a path exists, and the options after it."""
    cuts = [len(name), *(i for i in range(len(name) - 1, 0, -1) if name[i] == "?")]
    try:
        paths = [Path(name[:i]).expanduser() for i in cuts]
        k = next((k for k, path in enumerate(paths) if path.exists()), -1)
    except (OSError, RuntimeError) as e:  # too long, of an unknown user
        raise TaskError(f"{name}: no path: {e}; give it from / on") from None
    return paths[k], name[cuts[k] + 1 :]


def changed(name: str) -> int:
    """When the file, or the folder at any depth, was last changed; 0 where there is none."""
    path, _ = _parted(name)
    folders = (Path(folder) for folder, _, _ in os.walk(path))
    return max(p.stat().st_mtime_ns for p in (path, *folders)) if path.exists() else 0


@lru_cache(maxsize=4)
def _read(name: str, _: int) -> Task:
    path, query = _parted(name)
    options = _options(name, query)
    task = _guess(path, options)
    if options and "series" not in task.space:
        raise TaskError(f"{name}: columns and horizon are for tables of series only")
    task.name = name
    return task


def _options(name: str, query: str) -> dict[str, str]:
    options = dict(parse_qsl(query, keep_blank_values=True))
    for key in options:
        if key not in OPTIONS:
            raise TaskError(f"{name}: {unknown('option', key, OPTIONS)}")
    return options


def _guess(path: Path, options: dict[str, str]) -> Task:
    from ..data.idx import is_idx
    from .own_images import IdxFolder, ImageFolder
    from .own_texts import PlainText

    suffix = path.suffix.lower()
    if path.is_dir():
        idx = any(is_idx(p) for p in sorted(path.iterdir()) if p.is_file())
        return IdxFolder(path) if idx else ImageFolder(path)
    if suffix == ".npz":
        return ArrayTask(path)
    if suffix in TABLES:
        return _table(path, options)
    if suffix in TEXTS:
        return PlainText(path)
    if is_idx(path):
        return IdxFolder(path.parent)
    raise TaskError(f"{path}: expected {KINDS}")


def _table(path: Path, options: dict[str, str]) -> Task:
    from ..data.tables import SAMPLE, prose, read_table
    from .own_series import SeriesTable
    from .own_texts import LabelledTexts

    header, rows = read_table(path)
    if not options and any(prose(column) for column in zip(*rows[:SAMPLE], strict=True)):
        return LabelledTexts(path, header, rows)
    return SeriesTable(path, header, rows, options)


def suggested(task: Task) -> dict[str, Any]:
    """Trials and training for a sweep: about 40,000 examples a trial, at most 10,000 an epoch."""
    data = task.load()
    n = len(data.train[0])
    train: dict[str, Any] = {
        "epochs": max(3, min(40, 40_000 // min(n, 10_000))),
        "batch": 64 if n >= 1_000 else max(4, min(16, n // 8)),
    }
    if n > 10_000:
        train["examples"] = 10_000
    if len(data.valid[0]) > 2_000:
        train["valid_examples"] = 2_000
    caps = {"flops": 4e7} if task.space in ("images", "vision") else {}
    return {"task": task.name, "trials": 32, "train": train, "caps": caps}


def fifths(n: int, what: str) -> tuple[int, int]:
    """How many of n to validate and to test on, a fifth each; TaskError where they are too few."""
    if (fifth := n // 5) < LEAST:
        raise TaskError(
            f"{what}; {5 * LEAST} are the least from which a training, a validation and a test "
            "split can be taken; add more"
        )
    return fifth, fifth


def count(n: int, what: str) -> str:
    return f"{n:,} {what}" + ("" if n == 1 else "s")


def sizes(data: Data) -> str:
    """`60 to train, 20 to validate, 20 to test`."""
    train, valid, test = (len(x) for x, _ in (data.train, data.valid, data.test))
    return f"{train:,} to train, {valid:,} to validate, {test:,} to test"
