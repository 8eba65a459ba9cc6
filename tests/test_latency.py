"""The latency a sweep judges by: measured in the worker, on the operators that run there."""

import importlib
import time
import weakref

import numpy as np
import torch

from patternsearch import Assignment, Block, Data, Head, Mixer, Spec, Stem, Task
from patternsearch.measure import training_memory
from patternsearch.native import Native
from patternsearch.patterns.banded import Banded
from patternsearch.patterns.dense import Dense
from patternsearch.patterns.monarch import Monarch
from patternsearch.search.worker import Job, Worker, task_on
from patternsearch.train import Splits, TrainSettings, TrialRun

CPU = torch.device("cpu")
BATCH, POSITIONS = 32, 64
WIDE = Assignment(
    width=64,
    stem=Stem(mixer=Mixer(positions=Banded(entry=Dense()))),
    blocks=(Block(mixer=Mixer(positions=Banded()), channel=(Monarch(blocks=8),) * 2),),
    head=Head(),
)


def test_a_structure_that_is_slow_here_loses(monkeypatch):
    """The kernel is run by the measurement, and the time it takes here is in the figure."""
    operator = importlib.import_module("patternsearch.kernels.two_factor")
    kernel, rows, pause = operator._run_forward, [], []

    def run(x, *rest):
        rows.append(len(x))
        time.sleep(pause[-1])
        return kernel(x, *rest)

    monkeypatch.setattr(operator, "_run_forward", run)
    worker, found = Worker(), []
    for seconds in (0.0, 0.05):
        pause.append(seconds)
        settings = {"epochs": 1, "batch": 50}
        worker.start(
            Job(
                0, "digits", WIDE.to_dict(), settings, 0, "cpu", ("latency_ms", "minimize"),
                measure_first=True, latency_batch=BATCH,
            )
        )  # fmt: skip
        assert worker.failed is None
        found.append(worker.measured["latency_ms"])
        worker.stop()
    assert BATCH * POSITIONS in rows
    assert found[1] >= 2 * 50 and found[1] > found[0]


def memory_of(model: torch.nn.Module, x: torch.Tensor) -> float:
    return training_memory(model, lambda: model(x).sum())


def test_what_memory_is_measured_of_is_freed() -> None:
    """Without a collection: a graph that holds what it made itself is never found by one."""
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))
    numbers = sum(p.numel() for p in model.parameters())
    kept = 16 * 4 + 16 * 8  # the input, and what tanh made, which the last layer needs too
    found = memory_of(model, torch.randn(16, 4))
    assert found == 4 * (4 * numbers + kept) / 2**20
    assert all(p.grad is None for p in model.parameters())
    weights = [weakref.ref(p) for p in model.parameters()]
    del model
    assert not any(weight() is not None for weight in weights)


def test_memory_is_that_of_the_step_itself():
    """Half of the type takes less, and logits that are never kept do not count."""
    task, splits = task_on("digits", "cpu")
    trials = [
        TrialRun(WIDE, task, splits, TrainSettings(batch=200, precision=precision))
        for precision in ("float32", "bfloat16")
    ]
    full, low = (trial.measure(1)["memory_mb"] for trial in trials)
    assert low < 0.8 * full

    class Words(Task):
        spec = Spec(grid=(32,), vocabulary=4096, classes=4096, per_position=True, causal=True)

        def load(self):
            x = np.zeros((16, 32), np.int64)
            return Data((x, x), (x, x), (x, x))

    task = Words()
    design = Assignment(width=16, head=Head(tied=True))
    trial = TrialRun(design, task, Splits(task.load(), CPU), TrainSettings(batch=16))
    logits = 4 * 16 * 32 * 4096 / 2**20
    assert trial.large and trial.measure(1)["memory_mb"] < 0.5 * logits
    trial.large = False
    assert trial.measure(1)["memory_mb"] > logits


def test_measuring_memory_changes_nothing():
    """Neither running statistics nor the numbers that dropout draws next, and no gradient stays."""
    task, splits = task_on("digits", "cpu")
    trial = TrialRun(Native(native="cnn", dropout=0.5), task, splits, TrainSettings(batch=50))
    before = {name: t.clone() for name, t in trial.model.state_dict().items()}
    torch.manual_seed(3)
    wanted = torch.rand(3)
    torch.manual_seed(3)
    trial.measure()
    assert torch.equal(torch.rand(3), wanted)
    assert all(torch.equal(t, before[name]) for name, t in trial.model.state_dict().items())
    assert all(p.grad is None for p in trial.model.parameters())
