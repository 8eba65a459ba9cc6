"""The folders of sweeps: one a sweep, named, found again, and held by one process at a time."""

from __future__ import annotations

import re
import time
from pathlib import Path

from ..config import saved_config
from ..errors import ConfigError, unknown

CONFIG, SPACE = "sweep.yaml", "space.yaml"


def new_folder(task: str, name: str | None, root: Path) -> Path:
    """Where a new sweep goes; it is not made yet. Raises ConfigError where the name is taken."""
    if name is None:
        short = re.sub(r"[^\w.-]+", "-", Path(task.removesuffix(".npz")).name)
        first = f"{short}-{time.strftime('%Y%m%d-%H%M%S')}"
        names = [first, *(f"{first}-{n}" for n in range(2, 100))]
        return next(root / n for n in names if not (root / n).exists())
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise ConfigError(f"--name {name!r}: use letters, digits, '-', '_' and '.' only")
    folder = root / name
    if folder.exists():
        raise ConfigError(f"{folder} exists; choose another --name, or go on with --resume")
    return folder


def sweeps(root: Path) -> dict[str, Path]:
    """Name -> folder, the latest last."""
    found = [p.parent for p in root.glob(f"*/{CONFIG}")]
    return {p.name: p for p in sorted(found, key=lambda p: (p / CONFIG).stat().st_mtime)}


def find_sweep(name: str | None, root: Path, task: str | None = None) -> Path:
    """A sweep's folder by name; the latest (of a task) by default."""
    known = sweeps(root)
    if name is not None:
        if name not in known:
            raise ConfigError(f"{unknown('sweep', name, known)} (looked in {root})")
        return known[name]
    fitting = [p for p in known.values() if task is None or saved_config(p / CONFIG).task == task]
    if not fitting:
        what = f"no sweep of {task}" if task else "no sweep"
        raise ConfigError(f"{what} in {root}; start one with `patternsearch sweep`, or give --dir")
    return fitting[-1]
