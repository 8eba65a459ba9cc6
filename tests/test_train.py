"""Training: the same numbers again, no leak from the future, costs that are those of the module."""

import dataclasses
import random
import subprocess
import sys

import numpy as np
import pytest
import torch
import yaml

from patternsearch import Assignment, Block, Head, Mixer, Spec, Stem, build_model
from patternsearch.errors import ConfigError, PatternSearchError
from patternsearch.evaluation import evaluate
from patternsearch.export import load, make_export, save
from patternsearch.files import shipped
from patternsearch.mixer import mixer_kinds
from patternsearch.patterns.banded import Banded
from patternsearch.patterns.dense import Dense
from patternsearch.patterns.low_rank import LowRank
from patternsearch.patterns.monarch import Monarch
from patternsearch.patterns.semiseparable import Semiseparable
from patternsearch.retrain import train as retrain
from patternsearch.sizes import model_cost, resolve
from patternsearch.space import load_space
from patternsearch.task import get_task, tasks
from patternsearch.train import (
    Splits,
    TrainSettings,
    TrialFailed,
    TrialRun,
    parameter_groups,
    run,
)

CPU = torch.device("cpu")
MAPS = {name: Dense() for name in ("query", "key", "value", "output")}
SMALL = Assignment(
    width=8,
    stem=Stem(mixer=Mixer(positions=Banded(entry=Dense())), stride=2, activation="relu"),
    blocks=(Block(mixer=Mixer(positions=Dense(), order=3, heads=2, maps=MAPS)),),
    head=Head(regions=2),
)


@pytest.fixture(scope="module")
def digits():
    task = get_task("digits")
    return task, Splits(task.load(), CPU)


def settings(**changes) -> TrainSettings:
    return TrainSettings(**{"epochs": 3, "batch": 50, "lr": 1e-2, **changes})


def test_the_same_bit_for_bit(digits):
    task, splits = digits
    first, one = run(SMALL, task, splits, settings(), seed=3)
    torch.manual_seed(99)  # nothing may depend on the global generator
    torch.rand(7)
    second, two = run(SMALL, task, splits, settings(), seed=3)
    assert one.curve == two.curve and one.metrics == two.metrics
    for (name, a), b in zip(first.named_parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b), name
    assert evaluate(first, task, splits.test) == evaluate(second, task, splits.test)
    other = run(SMALL, task, splits, settings(), seed=4)[1]
    assert other.curve != one.curve


def test_the_same_in_another_process(digits, tmp_path):
    task, splits = digits
    result = run(SMALL, task, splits, settings(), seed=3)[1]
    train = {k: v for k, v in vars(settings()).items() if v is not None}
    metrics = dict(result.metrics)
    path = tmp_path / "best.yaml"
    save(make_export(task, "digits", SMALL.to_dict(), train, 3, metrics, {}), path)
    done = subprocess.run(
        [sys.executable, "-m", "patternsearch", "train", str(path)],
        capture_output=True,
        text=True,
        check=True,
    )
    first, second, third = done.stdout.splitlines()
    value = repr(result.metrics["accuracy"])
    assert first == f"validation accuracy: {value} (equal to the logged {value})"
    assert second.startswith("test accuracy: 0.") and third.endswith("best.safetensors")
    metrics["accuracy"] += 0.01
    save(make_export(task, "digits", SMALL.to_dict(), train, 3, metrics, {}), path)
    assert "differs from the logged" in retrain(path)
    assert "logged" not in retrain(path, seed=4, output=tmp_path / "four.safetensors")


def test_yaml_does_not_change_the_numbers(digits, tmp_path):
    task, splits = digits
    data = yaml.safe_load(yaml.safe_dump(SMALL.to_dict()))
    one = run(SMALL, task, splits, settings(epochs=1))[1]
    two = run(Assignment.from_dict(data), task, splits, settings(epochs=1))[1]
    assert one.curve == two.curve


def test_training_learns_and_never_sees_the_test_set(digits):
    task, splits = digits
    result = run(SMALL, task, splits, settings(epochs=20, lr=2e-2))[1]
    assert result.metrics["accuracy"] > 0.6
    broken = Splits(task.load(), CPU)
    broken.test = (broken.test[0] * float("nan"), broken.test[1] * 0 + 3)
    again = run(SMALL, task, broken, settings(epochs=20, lr=2e-2))[1]
    assert again.curve == result.curve


def test_evaluations_and_the_end(digits):
    task, splits = digits
    result = run(SMALL, task, splits, settings(epochs=5, eval_every=2))[1]
    assert [row["epoch"] for row in result.curve] == [2, 4, 5]
    assert {"train_loss", "valid_loss", "accuracy"} <= result.metrics.keys()
    early = run(SMALL, task, splits, settings(epochs=50, lr=2e-2, stop_at=0.3))[1]
    values = [row["accuracy"] for row in early.curve]
    assert values[-1] >= 0.3 > max(values[:-1], default=0) and len(values) < 50
    assert early.costs["parameters"] == model_cost(resolve(SMALL, task.spec), task.spec).parameters
    assert early.costs["latency_ms"] > 0 and early.costs["memory_mb"] > 0


def test_the_rate_rises_and_falls(digits):
    task, splits = digits
    trial = TrialRun(SMALL, task, splits, settings(epochs=10, warmup=0.2))
    seen = []
    plain = trial.optimizer.step

    def step():
        seen.append(trial.optimizer.param_groups[0]["lr"])
        plain()

    trial.optimizer.step = step
    while not trial.finished:
        trial.advance()
    steps = len(seen)
    assert steps == 10 * 4
    top = seen.index(max(seen))
    assert top in (7, 8) and seen[:7] == sorted(seen[:7]) and seen[8:] == sorted(seen[8:])[::-1]
    group = trial.optimizer.param_groups[0]
    assert max(seen) == pytest.approx(group["rate"] * 1e-2, rel=0.01)
    assert seen[-1] < 0.01 * max(seen)


def test_every_parameter_is_trained_once():
    model = build_model(SMALL, get_task("digits").spec)
    groups = parameter_groups(model, settings(weight_decay=0.1))
    grouped = [id(p) for group in groups for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters())
    decayed = {id(p) for g in groups if g["weight_decay"] for p in g["params"]}
    for name, p in model.named_parameters():
        assert (id(p) in decayed) == ("numbers." in name and p.dim() > 1), name


@pytest.mark.parametrize("pattern", [Dense(), LowRank(rank=2), Monarch(blocks=2)])
def test_a_head_starts_at_zero_and_learns(pattern):
    assignment = Assignment(width=8, head=Head(map=pattern))
    model = build_model(assignment, Spec(grid=(3,), channels=2, classes=4))
    output = model(torch.randn(5, 3, 2))
    assert not output.any()
    output.sum().backward()
    assert any(p.grad.any() for n, p in model.named_parameters() if n.startswith("head.numbers"))


def test_nan_fails_the_trial(digits):
    task, splits = digits
    with pytest.raises(TrialFailed, match=r"is (nan|inf) after epoch \d+; a lower lr may help"):
        run(SMALL, task, splits, settings(epochs=3, lr=1e30))


def test_infinite_data_fails_the_trial(digits):
    task, _ = digits
    broken = Splits(task.load(), CPU)
    broken.train[0][0] = float("inf")
    with pytest.raises(TrialFailed, match="train_loss is nan after epoch 1"):
        run(SMALL, task, broken, settings())


def test_examples_an_epoch_and_to_validate(digits):
    task, splits = digits
    trial = TrialRun(SMALL, task, splits, settings(examples=60, valid_examples=70))
    while not trial.finished:
        trial.advance()
    assert trial.steps == 3 * 2 and len(trial.valid[0]) == 70
    again = TrialRun(SMALL, task, splits, settings(valid_examples=70), seed=5)
    assert torch.equal(again.valid[0], trial.valid[0]), "every trial is judged by the same"
    assert not torch.equal(trial.valid[0], splits.valid[0][:70]), "and not by the first"


def test_a_forecast_learns_what_can_be_known():
    """Sines of one period: a linear map of the window knows the rest."""
    from patternsearch.data.series import windows
    from patternsearch.kinds import Forecast
    from patternsearch.task import Data, checked

    t = np.arange(400)[:, None]
    table = np.sin(2 * np.pi * t / 24 + np.arange(2)).astype(np.float32)

    class Sines(Forecast):
        spec = Spec(grid=(48,), channels=2, classes=2, horizon=12)

        def load(self):
            return Data(*(windows(table, 48, 12) for _ in range(3)))

    task = Sines()
    splits = Splits(checked(task), CPU)
    assert splits.train[0].untyped_storage().nbytes() <= table.nbytes, "windows are views"
    linear = Assignment(width=4, head=Head(positions=Dense()))
    model, result = run(linear, task, splits, settings(epochs=8, lr=2e-2))
    assert result.metrics["mse"] < 0.01 and result.metrics["mae"] < 0.1
    cost = model_cost(resolve(linear, task.spec), task.spec)
    assert sum(p.numel() for p in model.parameters()) == cost.parameters
    assert cost.parameters == (2 + 1) * 4 + 12 * 48 + (4 + 1) * 2


@pytest.mark.parametrize(
    "wrong",
    [
        {"epochs": 0},
        {"batch": 0},
        {"lr": 0.0},
        {"lr": float("nan")},
        {"warmup": 1.0},
        {"weight_decay": -1.0},
        {"eval_every": 0},
        {"examples": 0},
    ],
    ids=str,
)
def test_impossible_settings(wrong):
    with pytest.raises(ConfigError, match=f"train.{next(iter(wrong))}=.* must be"):
        TrainSettings(**wrong)


def scrambled(assignment: Assignment, spec: Spec, seed: int = 0):
    """Its model with random numbers everywhere: a fresh head is zero and would hide a leak."""
    model = build_model(assignment, spec, seed)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5, generator=generator)
    return model.double().eval()


def leak(model, spec: Spec) -> float:
    """How much logits change before the first position whose input changes; nan never passes."""
    generator = torch.Generator().manual_seed(1)
    shape, n = (3, *spec.grid), spec.grid[0]
    worst, moved = 0.0, 0.0
    for t in (1, n // 2, n - 1):
        if spec.vocabulary is not None:
            x = torch.randint(spec.vocabulary, shape, generator=generator)
            y = x.clone()
            y[:, t:] = (y[:, t:] + 1) % spec.vocabulary
        else:
            x = torch.randn(*shape, spec.channels, dtype=torch.float64, generator=generator)
            y = x.clone()
            y[:, t:] += 3
        with torch.no_grad():
            change = (model(x) - model(y)).abs()
        worst = max(worst, float(change[:, :t].max()))
        moved = max(moved, float(change[:, t:].max()))
    assert moved > 1e-3, "nothing depends on the input"
    return worst


def shrunk(spec: Spec) -> Spec:
    """With at most 50 tokens and classes, and images of 16x16: more only takes time."""
    return dataclasses.replace(
        spec,
        grid=spec.grid if len(spec.grid) == 1 else tuple(min(n, 16) for n in spec.grid),
        vocabulary=None if spec.vocabulary is None else min(spec.vocabulary, 50),
        classes=min(spec.classes, 50),
    )


ROUNDING = 1e-12  # long bands go through Fourier transforms, which round over the whole length
CAUSAL = sorted(name for name in tasks() if get_task(name).spec.causal)


@pytest.mark.parametrize("name", CAUSAL)
def test_no_model_of_a_causal_task_sees_the_future(name):
    task = get_task(name)
    spec, space, kinds = shrunk(task.spec), load_space(task.space), set()
    points = [space.point(params)[1] for params in space.experts.values()]
    points += [space.point({}, random.Random(i))[1] for i in range(40)]
    for i, point in enumerate(points):
        assignment = resolve(point, spec)
        model = scrambled(assignment, spec, i)
        kinds |= {type(m) for m in model.modules() if isinstance(m, tuple(mixer_kinds()))}
        assert leak(model, spec) <= ROUNDING, assignment
    assert len(kinds) >= 4, "the shipped space leaves out what it should compare"


BANDS = {
    "band": Banded(lower=3, upper="full", entry=Dense()),
    "untied": Banded(lower="full", upper="full", tie="none"),
    "recurrence": Semiseparable(two_sided=True),
    "rnn": Semiseparable(entry=Dense()),
}
KINDS = {
    "linear": {"order": 1},
    "gated": {"order": 2, "maps": {"gate": Dense(), "value": Dense()}},
    "recurrent": {"order": 2, "maps": {"value": Dense(), "decay": Dense()}},
    "rnn": {"order": 2, "gate": "tanh", "maps": {"value": Dense()}},
    "attention": {"order": 3, "heads": 2, "maps": MAPS, "encoding": "rotary"},
}


@pytest.mark.parametrize("kind", KINDS)
def test_mixers_are_made_causal_or_refused(kind):
    """Whatever the pattern wants: resolved for a causal task, nothing comes from the future."""
    spec = Spec(grid=(9,), channels=4, classes=3, per_position=True, causal=True)
    free = dataclasses.replace(spec, causal=False)
    fitted = leaks = 0
    for name, pattern in BANDS.items():
        block = Block(mixer=Mixer(positions=pattern, **KINDS[kind]))
        try:
            assignment = resolve(Assignment(width=4, blocks=(block,)), spec)
            model = scrambled(assignment, spec)
        except PatternSearchError:
            continue
        fitted += 1
        assert leak(model, spec) == 0, name
        model = scrambled(Assignment(width=4, blocks=(block,)), free)
        leaks += leak(model, free) > 1e-6
    assert fitted
    assert leaks or kind in ("rnn", "recurrent"), "the check sees a leak where there is one"


@pytest.mark.parametrize("name", sorted(shipped("spaces")))
def test_costs_are_those_of_the_module(name):
    """200 random points of a space: as many parameters as counted, before it was built."""
    space, built = load_space(name), 0
    fitting = [get_task(t) for t in tasks() if get_task(t).space == name]
    assert fitting, f"no task searches {name} by default"
    for i in range(250):
        spec = shrunk(fitting[i % len(fitting)].spec)
        point = space.point({}, random.Random(i))[1]
        try:
            assignment = resolve(point, spec)
        except PatternSearchError:
            continue
        assert resolve(assignment, spec) == assignment, "resolving is final"
        cost = model_cost(assignment, spec)
        found = sum(p.numel() for p in build_model(assignment, spec).parameters())
        assert cost.parameters == found, assignment
        assert cost.flops > 0 and cost.bytes >= 4 * cost.parameters
        built += 1
        if built == 200:
            return
    pytest.fail(f"only {built} of 250 points fit their task")


def test_loading_an_export_changes_nothing(exported):
    assert load(exported).train == TrainSettings(epochs=2, batch=50)
