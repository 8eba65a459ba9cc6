"""The scripts of benchmarks/ fit the package: they are run by hand, long after it has changed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).parents[1] / "benchmarks"


def test_every_script_finds_what_it_imports() -> None:
    names = sorted(path.stem for path in FOLDER.glob("*.py"))
    assert {"kernels", "planted", "gpu"} <= set(names)
    done = subprocess.run(
        [sys.executable, "-c", f"import importlib; [*map(importlib.import_module, {names})]"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join((str(FOLDER), str(FOLDER.parent)))},
        check=False,
    )
    assert done.returncode == 0, done.stderr
