"""The same seed and one worker: the same trials and numbers, also across kills and resumes."""

import os
import signal
import subprocess
import sys
import time

import pytest
from simulated import simulated
from support import ROOT, command, end_session, start
from test_survive import numbers
from test_sweep import recorded, trials

# MLflow's own use of SQLAlchemy, in this process
pytestmark = pytest.mark.filterwarnings("ignore::sqlalchemy.exc.SADeprecationWarning")
CASES = [("gp", "median", 14), ("nsga2", "median", 36), ("tpe", "halving", 16),
         ("structured", "hyperband", 24)]  # fmt: skip


@pytest.mark.parametrize("sampler, pruner, count", CASES)
def test_a_study_goes_on_as_if_nothing_had_happened(here, sampler, pruner, count):
    whole = simulated(here / "whole", sampler, pruner, count, {})
    assert len(whole) == count
    assert pruner == "median" or "PRUNED" in {state for _, state, _ in whole}
    cut = {3: "running", 4: "running", 6: "between", count - 3: "running", count - 1: "running"}
    assert simulated(here / "cut", sampler, pruner, count, cut) == whole


@pytest.mark.parametrize("sampler, pruner, count", CASES)
def test_a_point_half_drawn_is_drawn_again(here, sampler, pruner, count):
    """The driver dies before a trial's record is written: nothing learns from what is left."""
    whole = simulated(here / "whole", sampler, pruner, count, {})
    cut = {0: "drawing", 2: "drawing", 7: "drawn", count - 3: "drawing", count - 2: "drawn"}
    assert simulated(here / "cut", sampler, pruner, count, cut) == whole


def test_the_same_in_every_process(here):
    """What is drawn does not hang on the order of a set, which is another in every process."""
    code = "from simulated import simulated; from pathlib import Path; print(simulated({}))"
    how = "Path('other'), 'structured', 'median', 32, {}"
    done = subprocess.run(
        [sys.executable, "-c", code.format(how)],
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT}/tests", "PYTHONHASHSEED": "1"},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout == f"{simulated(here / 'one', 'structured', 'median', 32, {})}\n"


@pytest.mark.slow
@pytest.mark.parametrize("sampler, pruner, count", [case for case in CASES if case[0] != "tpe"])
def test_a_sweep_goes_on_as_if_nothing_had_happened(stocked, sampler, pruner, count):
    """Killed twice, each time with a trial under way."""
    changes = ("train.epochs=8", f"pruner={pruner}")
    options = ("--trials", str(count), "--sampler", sampler, "--workers", "1")
    options += tuple(part for change in changes for part in ("--set", change))
    done = command(stocked, "sweep", "sweep.yaml", "--name", "whole", *options)
    assert done.returncode == 0, done.stderr
    for part, resume in ((0.4, ()), (0.8, ("--resume",))):
        process = start(stocked, "sweep", "sweep.yaml", "--name", "cut", *options, *resume)
        try:
            while recorded(stocked, "cut").count('"record"') < part * count:
                assert process.poll() is None, process.communicate()
                time.sleep(0.01)
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
        finally:
            end_session(process)
    done = command(stocked, "sweep", "sweep.yaml", "--name", "cut", "--resume", *options)
    assert done.returncode == 0, done.stderr
    whole, cut = trials(stocked, "whole"), trials(stocked, "cut")
    assert len(cut) > len(whole)
    assert numbers(cut) == numbers(whole)
