"""What a sweep's numbers depend on besides its files: versions, git, the machine."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import time
import uuid
from pathlib import Path
from typing import Any

import torch

from ..config import masked
from ..export import versions


def provenance() -> dict[str, Any]:
    """As environment.yaml of a sweep holds it; `id` names the sweep wherever it is recorded."""
    return {
        "id": uuid.uuid4().hex,
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": [Path(sys.argv[0]).name, *map(masked, sys.argv[1:])],
        "versions": {**versions(), **_libraries()},
        "device": device(),
        "git": {k: v for k, v in _repositories().items() if v},
    }


def device() -> dict[str, Any]:
    """Processor, its cores, and every GPU that torch sees."""
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        lines = info.read_text(errors="replace").splitlines()
        named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
        model = next(named, model)
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {"cpu": model, "cores": os.cpu_count(), "gpus": gpus}


def _libraries() -> dict[str, str]:
    from importlib import metadata

    found = {}
    for name in ("optuna", "ray", "mlflow"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _repositories() -> dict[str, dict[str, Any] | None]:
    """The state of the package's checkout and of the folder the sweep was started in."""
    package = Path(__file__).resolve().parent
    found = {"patternsearch": _git(package), "here": _git(Path.cwd())}
    return {} if not any(found.values()) else found


def _git(folder: Path) -> dict[str, Any] | None:
    """Commit, and the files that differ from it; None where git knows nothing of the folder."""

    def ask(*words: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(folder), *words],
                capture_output=True,
                text=True,
                check=False,
                timeout=10,
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.rstrip("\n") if done.returncode == 0 else None

    commit = ask("rev-parse", "HEAD")
    if commit is None:
        return None
    changed = (ask("status", "--porcelain", "--untracked-files=no") or "").splitlines()
    return {"commit": commit, "changed": [line[3:] for line in changed]}
