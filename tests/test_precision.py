"""Products in bfloat16 where torch's autocast, or the training settings, ask for them."""

import random

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from patternsearch import Mixer, ops
from patternsearch.errors import ConfigError, KernelError
from patternsearch.evaluation import evaluate
from patternsearch.kernels import _runtime
from patternsearch.layers import FeatureMap, PositionMap
from patternsearch.mixer import build_mixer
from patternsearch.model import build_model
from patternsearch.patterns.banded import Banded
from patternsearch.patterns.dense import Dense
from patternsearch.patterns.low_rank import LowRank
from patternsearch.patterns.semiseparable import Semiseparable
from patternsearch.patterns.sum import Sum
from patternsearch.search.worker import task_on
from patternsearch.sizes import Sizes
from patternsearch.space import load_space
from patternsearch.task import get_task
from patternsearch.train import TrainSettings, TrialRun


def points(space, seed: int, count: int):
    """Every expert design, and random points."""
    rng = random.Random(seed)
    yield from (space.point(params)[1] for params in space.experts.values())
    yield from (space.point({}, rng)[1] for _ in range(count))


@pytest.mark.parametrize("name", ["digits", "mqar", "selective-copy"])
def test_models_run_under_autocast(name):
    """Every product in bfloat16, the gradients in the parameters' own type."""
    task = get_task(name)
    spec, x = task.spec, torch.randint(0, 8, (4, *task.spec.grid))
    if spec.channels is not None:
        x = torch.randn(4, *spec.grid, spec.channels)
    for assignment in points(load_space(task.space), 0, 8):
        model = build_model(assignment, spec)
        torch.nn.init.normal_(next(reversed(list(model.head.numbers.values()))), std=0.1)
        full = model(x)
        with torch.autocast("cpu", torch.bfloat16):
            low = model(x)
        assert low.dtype == torch.bfloat16
        assert (low.float() - full).norm() <= 0.05 * full.norm(), assignment
        low.float().square().mean().backward()
        assert all(p.grad is None or p.grad.dtype == torch.float32 for p in model.parameters())


QKV = {name: Dense() for name in ("query", "key", "value")}


@pytest.mark.parametrize(
    "mixer",
    [
        Mixer(order=3, positions=Semiseparable(normalise=True), maps=QKV),
        Mixer(order=3, positions=Semiseparable(normalise=True), maps={**QKV, "decay": Dense()}),
        Mixer(order=2, positions=Semiseparable(), maps={"decay": Dense()}),
    ],
    ids=["normalised", "normalised with decay", "recurrence of its input"],
)
def test_an_operator_is_given_one_type(mixer, monkeypatch):
    """On CUDA autocast leaves exponentials in float32, on CPU it does not."""
    wide = torch.Tensor.exp
    monkeypatch.setattr(torch.Tensor, "exp", lambda x: wide(x.float()))
    module = build_mixer(mixer, Sizes(out=(6,), inp=(6,), d_in=8, d_out=8))
    with torch.autocast("cpu", torch.bfloat16):
        y = module(torch.randn(2, 6, 8))
    assert y.isfinite().all()
    y.float().sum().backward()


def test_training_in_bfloat16():
    task, splits = task_on("digits", "cpu")
    space = load_space(task.space)
    assignment = space.point(space.experts["cnn"])[1]
    found = {}
    for precision in ("float32", "bfloat16"):
        settings = TrainSettings(epochs=8, batch=50, precision=precision, eval_every=8)
        trial = TrialRun(assignment, task, splits, settings)
        found[precision] = trial.advance()
        assert {p.dtype for p in trial.model.parameters()} == {torch.float32}
        scores = evaluate(trial.model, task, trial.valid)
        assert scores["accuracy"] == found[precision]["accuracy"], "judged as it is exported"
    full, low = found["float32"], found["bfloat16"]
    assert full["train_loss"] != low["train_loss"]
    assert low["train_loss"] == pytest.approx(full["train_loss"], rel=0.05)
    assert low["accuracy"] > full["accuracy"] - 0.05


def test_an_unknown_precision():
    with pytest.raises(ConfigError, match=r"train.precision 'bfloat'.* Did you mean 'bfloat16'"):
        TrainSettings(precision="bfloat")


LENGTH = 1024


@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize(
    "pattern",
    [
        Semiseparable(),
        Semiseparable(two_sided=True, tie="none"),
        Semiseparable(order=2),
        Semiseparable(state=2),
        Sum(terms=(Semiseparable(), LowRank(rank=1))),
    ],
    ids=str,
)
def test_long_memories_last_under_autocast(pattern, impl):
    """A decay of 1 - 1/T is no 1, though bfloat16 has no number between 0.996 and it."""
    torch.manual_seed(0)
    layer = PositionMap(pattern, (LENGTH,), (LENGTH,), 32, 32, heads=32)
    check_lowered(layer, torch.randn(2, LENGTH, 32), impl)


def test_long_memories_last_along_features():
    torch.manual_seed(0)
    check_lowered(FeatureMap(Semiseparable(tie="none"), 512, 512), torch.randn(4, 512), "auto")


@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize(
    "mixer",
    [
        Mixer(order=2, positions=Semiseparable(), maps={"decay": Dense()}),
        Mixer(order=3, positions=Semiseparable(state=4), maps={**QKV, "decay": Dense()}),
        Mixer(order=3, positions=Semiseparable(state=4, normalise=True), maps=QKV),
    ],
    ids=["recurrence of its input", "linear attention with decay", "linear attention"],
)
def test_computed_memories_last_under_autocast(mixer, impl):
    torch.manual_seed(0)
    module = build_mixer(mixer, Sizes(out=(LENGTH,), inp=(LENGTH,), d_in=16, d_out=16))
    check_lowered(module, torch.randn(2, LENGTH, 16), impl)


def check_lowered(module, x, impl):
    """Every channel within the rounding of a bfloat16 product."""
    with torch.no_grad(), ops.implementation(impl):
        full = module(x)
        with torch.autocast("cpu", torch.bfloat16):
            low = module(x.bfloat16())
    assert low.dtype == torch.bfloat16
    channels = tuple(range(x.dim() - 1))
    assert ((low.float() - full).norm(dim=channels) <= 0.02 * full.norm(dim=channels)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_float64_on_cuda_is_left_to_the_reference(dtype, monkeypatch):
    """As if there were a device; no kernel of ours computes in float64 on one."""
    monkeypatch.setitem(_runtime._statuses, "cuda:0", None)
    monkeypatch.setattr(ops, "_status", ops._status.__wrapped__)
    mixer = Mixer(order=3, positions=Banded(lower="full", upper=0), heads=2, maps=QKV)
    module = build_mixer(mixer, Sizes(out=(12,), inp=(12,), d_in=8, d_out=8))
    module.support = None
    with FakeTensorMode():
        q = torch.empty(2, 12, 2, 4, device="cuda:0", dtype=dtype)
        y = module.attend(q, q, q)
        assert (y.shape, y.device, y.dtype) == (q.shape, q.device, dtype)
        if dtype == torch.float64:
            with (
                ops.implementation("kernel"),
                pytest.raises(KernelError, match=r"no kernel for torch.float64 on cuda"),
            ):
                module.attend(q, q, q)


def test_a_map_under_autocast_is_one_graph():
    layer, x = FeatureMap(LowRank(rank=2), 8, 8), torch.randn(3, 8)
    with torch.autocast("cpu", torch.bfloat16):
        compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), layer(x))
