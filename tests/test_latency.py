"""The latency a sweep judges by: measured in the worker, on the operators that run there."""

import importlib
import time
import weakref

import torch

from patternsearch import Assignment, Block, Head, Mixer, Stem
from patternsearch.measure import training_memory
from patternsearch.patterns.banded import Banded
from patternsearch.patterns.dense import Dense
from patternsearch.patterns.monarch import Monarch
from patternsearch.search.worker import Job, Worker

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


def test_what_memory_is_measured_of_is_freed() -> None:
    """Without a collection: a graph that holds what it made itself is never found by one."""
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))
    numbers = sum(p.numel() for p in model.parameters())
    kept = 16 * 4 + 16 * 8  # the input, and what tanh made, which the last layer needs too
    found = training_memory(model, torch.randn(16, 4), torch.Tensor.sum)
    assert found == 4 * (4 * numbers + kept) / 2**20
    weights = [weakref.ref(p) for p in model.parameters()]
    del model
    assert not any(weight() is not None for weight in weights)
