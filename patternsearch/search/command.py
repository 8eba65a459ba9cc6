"""What the commands around sweeps do."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console

from ..config import SweepConfig, load_config, saved_config
from ..errors import ConfigError, unknown
from ..tracking import default_uri

_FREE = ("trials", "time", "workers", "executor")  # may differ when a sweep goes on


def sweep(
    name: str,
    options: dict[str, Any],
    changes: Sequence[str],
    sweep_name: str | None,
    root: Path,
    *,
    resume: bool,
    dry_run: bool,
) -> None:
    """Run a sweep from the command line."""
    config = load_config(name, changes, **options)
    console = Console()
    folder = _folder(config, sweep_name, root, resume)
    from .sweep import Sweep

    if resume:
        _same(config, folder)
    job = Sweep(config, folder, console, resume)
    if dry_run:
        console.print(job.plan(), soft_wrap=True, markup=False, highlight=False)
        return
    job.prepare()
    status = "FAILED"
    with _interrupts(job, console):
        try:
            job.run()
            status = "KILLED" if job.interrupted else "FINISHED"
            console.print(job.conclude(), soft_wrap=True, markup=False, highlight=False)
        except KeyboardInterrupt:
            status = "KILLED"
            raise
        finally:
            job.close(status)
    if job.best is None and not job.interrupted:
        sys.exit(1)  # nothing to take away: scripts should notice


def _folder(config: SweepConfig, name: str | None, root: Path, resume: bool) -> Path:
    if resume:
        return find_sweep(name, root, config.task if name is None else None)
    if name is None:
        task = re.sub(r"[^\w.-]+", "-", Path(config.task.removesuffix(".npz")).name)
        name = f"{task}-{time.strftime('%Y%m%d-%H%M%S')}"
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise ConfigError(f"--name {name!r}: use letters, digits, '-', '_' and '.' only")
    folder = root / name
    if folder.exists():
        raise ConfigError(f"{folder} exists; choose another --name, or go on with --resume")
    return folder


def sweeps(root: Path) -> dict[str, Path]:
    """Name -> folder, the latest last."""
    found = [p.parent for p in root.glob("*/sweep.yaml")]
    return {p.name: p for p in sorted(found, key=lambda p: (p / "sweep.yaml").stat().st_mtime)}


def find_sweep(name: str | None, root: Path, task: str | None = None) -> Path:
    """A sweep's folder by name; the latest (of a task) by default."""
    known = sweeps(root)
    if name is not None:
        if name not in known:
            raise ConfigError(f"{unknown('sweep', name, known)} (looked in {root})")
        return known[name]
    fitting = [
        p for p in known.values() if task is None or saved_config(p / "sweep.yaml").task == task
    ]
    if not fitting:
        what = f"no sweep of {task}" if task else "no sweep"
        raise ConfigError(f"{what} in {root}; start one with `patternsearch sweep`, or give --dir")
    return fitting[-1]


def _same(config: SweepConfig, folder: Path) -> None:
    """Refuse to go on with another configuration."""
    old = saved_config(folder / "sweep.yaml")
    for key in type(config).model_fields:
        a, b = getattr(old, key), getattr(config, key)
        empty = key in ("objectives", "space") and not b
        if key not in _FREE and a != b and not empty:
            raise ConfigError(
                f"{folder.name} was started with {key}={a!r}, not {b!r}; resume it as it was, or "
                "start a new sweep"
            )


@contextmanager
def _interrupts(job: Any, console: Console) -> Iterator[None]:
    """Ctrl-C once finishes cleanly, twice stops at once; the record is written unless thrice."""
    presses = 0

    def handler(*_: Any) -> None:
        nonlocal presses
        presses += 1
        if job.closing and presses < 3:
            console.print("writing the record; Ctrl-C again leaves it unfinished")
        elif job.interrupted:
            raise KeyboardInterrupt
        else:
            job.interrupt()
            console.print("stopping after the next reports; Ctrl-C again stops at once")

    old = signal.signal(signal.SIGINT, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, old)


def export(name: str | None, trial: int | None, output: Path, root: Path) -> None:
    """Write a trial of a finished or running sweep."""
    from .results import export_trial

    print(export_trial(find_sweep(name, root), trial, output))


def ui(root: Path, port: int, uri: str | None) -> None:
    """Run MLflow's server on the store of the sweeps until it is stopped."""
    store = uri or default_uri(root / "any")
    if uri is None and not (root / "mlflow.db").exists():
        raise ConfigError(f"no record in {root}; run a sweep there first, or give --dir")
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", store]
    command += ["--port", str(port), "--workers", "1"]
    print(f"http://127.0.0.1:{port} (Ctrl-C stops it)", flush=True)
    environment = {**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true"}
    try:
        done = subprocess.run(command, env=environment, check=False)
    except KeyboardInterrupt:
        return
    if done.returncode:
        raise ConfigError(f"mlflow server ended with {done.returncode}; is port {port} in use?")
