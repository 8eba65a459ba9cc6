"""The folders of sweeps: one a sweep, named, found again, and held by one process at a time."""

from __future__ import annotations

import re
import shutil
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ..config import masked, saved_config
from ..errors import ConfigError, unknown
from ..yamlfile import write_yaml

CONFIG, SPACE, STARTS = "sweep.yaml", "space.yaml", "start.yaml"
ENVIRONMENT = "environment.yaml"


def create(folder: Path, files: Mapping[str, Any]) -> None:
    """Make a sweep's folder with these YAML files, all at once: a sweep that dies leaves it whole.

    Raises ConfigError where it cannot be made or another sweep has just made it.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    except OSError as e:
        raise ConfigError(
            f"cannot make the folder {folder.parent}: {e.strerror}; give --dir"
        ) from None
    try:
        for name, data in files.items():
            _write(part / name, data)
        part.chmod(0o755)
        part.rename(folder)
    except OSError as e:
        shutil.rmtree(part, ignore_errors=True)
        raise ConfigError(f"{folder}: {e.strerror}; choose another --name") from None


def replace(path: Path, data: Any) -> None:
    """Write one of a folder's YAML files anew, whole or not at all; seen by nobody before."""
    with tempfile.TemporaryDirectory(prefix=".", dir=path.parent) as part:
        _write(Path(part) / path.name, data)
        (Path(part) / path.name).replace(path)


def _write(path: Path, data: Any) -> None:
    write_yaml(path, data)
    if masked(text := path.read_text(encoding="utf-8")) != text:
        path.chmod(0o600)  # a password of the storage, to go on with


def hold(folder: Path) -> FileLock:
    """A sweep's folder for this process alone, until it ends; ConfigError where it is held."""
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ConfigError(
            f"{folder.name} is running in another process; wait for it, or end it first"
        ) from None
    except OSError as e:
        raise ConfigError(f"{folder} cannot be written: {e.strerror}; check its owner") from None
    return lock


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
    found = [p.parent for p in root.glob(f"[!.]*/{CONFIG}")]  # not what a kill left of `create`
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


def repeated(
    name: str | None, sweep: str, options: dict[str, Any], root: Path, resume: bool
) -> tuple[str, dict[str, Any]]:
    """The configuration and options that run a sweep again, from what its folder keeps."""
    if name is not None or resume:
        other = name or "--resume"
        raise ConfigError(f"--from {sweep} and {other} name two sweeps; give one of them")
    folder = find_sweep(sweep, root)
    kept: dict[str, Any] = {"space": str(folder / SPACE)}
    if (folder / STARTS).exists() and not options.get("start_from"):
        kept["start_from"] = [str(folder / STARTS)]
    return str(folder / CONFIG), {**options, **kept}
