"""Trials on a CUDA device: what they leave behind, graphs, precision, shares of the memory."""

import gc

import pytest
import torch

from patternsearch import Assignment, Block, Mixer, from_torch
from patternsearch.patterns.banded import Banded
from patternsearch.patterns.dense import Dense
from patternsearch.task import get_task
from patternsearch.train import Splits, TrainSettings, TrialRun

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

MAPS = {name: Dense() for name in ("query", "key", "value", "output")}
ATTENTION = Mixer(order=3, positions=Banded(lower=31, upper=0), heads=2, maps=MAPS)
BLOCK = Block(mixer=ATTENTION, channel=(Dense(), Dense()), expansion=2.0)
DESIGN = Assignment(width=32, blocks=(BLOCK, BLOCK))


@pytest.fixture(scope="module")
def mqar():
    task = get_task("mqar")
    return task, Splits(task.load(), torch.device("cuda"))


def trial(mqar, **settings) -> TrialRun:
    task, splits = mqar
    base = {"epochs": 2, "batch": 64, "lr": 2e-3, "examples": 1000}
    return TrialRun(DESIGN, task, splits, TrainSettings(**{**base, **settings}))


def test_a_captured_step_gives_the_same_numbers(mqar):
    """The last batch of an epoch is smaller, and runs as it is."""
    plain, graphed = trial(mqar), trial(mqar, cuda_graph=True)
    assert plain.graphed is None and graphed.graphed is not None
    while not plain.finished:
        a, b = plain.advance(), graphed.advance()
        assert b["train_loss"] == pytest.approx(a["train_loss"], rel=1e-5)
    for p, q in zip(plain.model.parameters(), graphed.model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)


def test_a_captured_step_counts_running_statistics_once():
    conv = Mixer(positions=Banded(lower=1, upper=1, entry=Dense()))
    cnn = Assignment(width=8, blocks=(Block(mixer=conv, norm="batch"),))
    task = get_task("digits")
    splits, statistics = Splits(task.load(), torch.device("cuda")), []
    for graph in (False, True):
        run = TrialRun(cnn, task, splits, TrainSettings(epochs=1, batch=500, cuda_graph=graph))
        run.advance()
        statistics.append([b.double() for b in run.model.buffers()])
    for a, b in zip(*statistics, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_a_captured_step_with_the_rest_of_the_recipe(mqar):
    plain = trial(mqar, ema=0.9, clip=0.5, precision="bfloat16")
    graphed = trial(mqar, ema=0.9, clip=0.5, precision="bfloat16", cuda_graph=True)
    while not plain.finished:
        a, b = plain.advance(), graphed.advance()
        assert b["valid_loss"] == pytest.approx(a["valid_loss"], rel=1e-3)


@pytest.mark.parametrize("graph", [False, True])
def test_a_trial_leaves_no_memory_behind(mqar, graph):
    left = []
    for _ in range(4):
        run = trial(mqar, epochs=1, cuda_graph=graph)
        run.advance()
        run.measure()
        del run
        gc.collect()
        torch.cuda.empty_cache()
        left.append(torch.cuda.memory_allocated())
    assert left[1:] == left[:1] * 3


def test_a_share_of_the_memory():
    """More than the share is a trial out of memory, which is run again with less."""
    pytest.importorskip("safetensors")
    from patternsearch.search.worker import Job, Worker

    worker, train = Worker(), {"epochs": 1, "batch": 64, "lr": 1e-3}
    job = Job(0, "mqar", DESIGN.to_dict(), train, 0, "cuda", ("accuracy", "maximize"), share=1e-5)
    gc.collect()
    torch.cuda.empty_cache()  # else what earlier tests left would do
    try:
        worker.start(job)
        step = worker.step()
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert step.done and step.memory and "out of memory" in step.error


def test_float64_runs_by_the_reference():
    layer = torch.nn.MultiheadAttention(8, 2, batch_first=True).double().cuda()
    module = from_torch(layer, (12,), support=Banded(lower="full", upper=0))
    x = torch.randn(2, 12, 8, dtype=torch.float64, device="cuda")
    wanted, _ = layer(x, x, x, attn_mask=~module.support, need_weights=False)
    torch.testing.assert_close(module(x), wanted)
