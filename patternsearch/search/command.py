"""What the commands around sweeps do."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from ..config import SweepConfig, load_config
from ..errors import ConfigError
from ..store import default_uri
from .cluster import Cluster, early
from .folders import CONFIG, find_sweep, new_folder, repeated


def sweep(
    name: str | None,
    options: dict[str, Any],
    changes: Sequence[str],
    sweep_name: str | None,
    root: Path,
    repeat: str | None,
    resume: bool,
    dry_run: bool,
) -> None:
    """Run a sweep from the command line."""
    console = Console()
    if repeat is not None:
        name, options = repeated(name, repeat, options, root, resume)
    elif name is None and resume:
        name = str(find_sweep(sweep_name, root) / CONFIG)
    if name is None:
        raise ConfigError("name a sweep of configs/, a YAML file or a task, or give --data PATH")
    config = load_config(name, changes, **options)
    if resume:
        folder = find_sweep(sweep_name, root, config.task if sweep_name is None else None)
    else:
        folder = new_folder(config.task, sweep_name, root)
    with contextlib.ExitStack() as stack:
        cluster = None if dry_run else early(config)
        if cluster is not None:
            stack.callback(cluster.stop)
        _run(config, folder, console, resume, dry_run, cluster)


def _run(
    config: SweepConfig,
    folder: Path,
    console: Console,
    resume: bool,
    dry_run: bool,
    cluster: Cluster | None,
) -> None:
    from .launch import launch, resumed  # slow: torch and Optuna
    from .setup import make_executor, plan
    from .sweep import Sweep

    if resume:
        config = resumed(config, folder)
    job = Sweep(config, folder, console, resume, executor=partial(make_executor, cluster=cluster))
    if job.task.note:
        console.print(job.task.note, soft_wrap=True, markup=False, highlight=False)
    if dry_run:
        text = plan(job.config, job.space, job.task, job.folder)
        console.print(text, soft_wrap=True, markup=False, highlight=False)
        return
    launch(job)
    if (job.best is None and not job.interrupted) or job.tracker.problem is not None:
        sys.exit(1)  # nothing to take away, or not all is in the record: scripts should notice


def export(name: str | None, trial: int | None, output: Path, root: Path) -> None:
    """Write a trial of a finished or running sweep."""
    from .results import export_trial

    print(export_trial(find_sweep(name, root), trial, output))


def export_front(name: str | None, trial: int | None, root: Path) -> None:
    """Write every trial of the front into the sweep's folder."""
    from .results import read_results
    from .settle import FRONT, write_front

    if trial is not None:
        raise ConfigError(f"--front writes every trial of the front; leave out --trial {trial}")
    results = read_results(find_sweep(name, root))
    written = write_front(results, results.folder / FRONT)
    if not written:
        raise ConfigError(f"{results.name} has no finished trial yet; nothing to export")
    print("\n".join(map(str, written)))


def confirm(name: str | None, top: int, seeds: int, executor: str | None, root: Path) -> None:
    """Train the best of a sweep again; what is done already is kept."""
    from .again import again

    if not again(find_sweep(name, root), top, seeds, executor, Console()):
        sys.exit(1)  # not all is in the record


def report(name: str | None, output: Path | None, root: Path) -> None:
    """Write the page of a sweep."""
    from .report import write_report
    from .results import REPORT, read_results

    folder = find_sweep(name, root)
    path = folder / REPORT if output is None else output
    drawn = write_report(read_results(folder), path)
    print("\n".join(map(str, [path, *drawn])))


def ui(root: Path, port: int, uri: str | None) -> None:
    """Run MLflow's server on the store of the sweeps until it is stopped."""
    store = uri or default_uri(root / "any")
    if uri is None and not (root / "mlflow.db").exists():
        raise ConfigError(f"no record in {root}; run a sweep there first, or give --dir")
    with socket.socket() as probe:  # the server says it in ten lines, and may exit with 0
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as e:
            raise ConfigError(f"--port {port}: {e.strerror}; give another") from None
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", store]
    command += ["--port", str(port), "--workers", "1"]
    print(f"http://127.0.0.1:{port} (Ctrl-C stops it)", flush=True)
    environment = {
        "PYTHONWARNINGS": "ignore",  # of other packages, meant for their developers
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # eight processes that judge chats
        **os.environ,
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }
    try:
        done = subprocess.run(command, env=environment, check=False)
    except KeyboardInterrupt:
        return
    if done.returncode:
        raise ConfigError(f"mlflow server ended with {done.returncode}; see what it said")
