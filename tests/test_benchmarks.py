"""The scripts of benchmarks/ fit the package: they are run by hand, long after it has changed."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """A script by name; its neighbours are found while the test runs."""

    def run(name: str) -> ModuleType:
        spec = importlib.util.spec_from_file_location(f"{name}_script", FOLDER / f"{name}.py")
        assert spec is not None and spec.loader is not None
        script = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(script)
        return script

    monkeypatch.syspath_prepend(str(FOLDER))
    return run


def test_what_a_run_cut_off_had_said_is_kept(load: Callable[[str], ModuleType]) -> None:
    script = load("gpu")
    code = "import sys, time; print('begun', flush=True); time.sleep(float(sys.argv[1]))"
    began = time.monotonic()
    found = script.run([[sys.executable, "-c", code, n] for n in ("0", "99")], 3)
    assert found == [(0, "begun\n"), (None, "begun\n")]
    assert time.monotonic() - began < 30
    assert script.ending(None, "") == {"failed": "the time was over"}


def test_one_way_that_fails_leaves_the_others(load: Callable[[str], ModuleType]) -> None:
    """Little memory is the usual reason, on a GPU."""
    script = load("kernels")

    def too_much(*_: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory | tried\nmore")

    case = script.Case(
        "tiny",
        lambda device, dtype: (torch.ones(2, dtype=dtype),),
        script.Way(lambda x: 2 * x),
        {"greedy": script.Way(too_much), "other": script.Way(lambda x: x + x)},
        lambda x: 2 * x,
        (2, 2),
        (2, 2),
    )
    here = torch.device("cpu"), torch.float32, 1
    ours, greedy, other = rows = script.measure_case(case, *here)
    assert greedy["missing"] == "OutOfMemoryError: CUDA out of memory / tried"
    assert ours["both_ratio"] == 1 and other["both_ratio"] > 0
    assert not script.broken(rows)
    rows = script.measure_case(replace(case, ours=script.Way(too_much)), *here)
    assert script.broken(rows) == [f"tiny, ours: {greedy['missing']}"]


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
