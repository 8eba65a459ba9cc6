"""The structured sampler, used as any other sampler of Optuna."""

import random

import numpy as np
import optuna
import pytest

from patternsearch.config import load_config
from patternsearch.domains import Choice, IntRange
from patternsearch.search.knowledge import PatternKnowledge
from patternsearch.search.known import Described, Knowledge
from patternsearch.search.nested import Bounds, Nested
from patternsearch.search.points import Parameter, Points, space_points
from patternsearch.search.sampler import StructuredSampler
from patternsearch.search.surrogate import GaussianProcess, log_improvement, volume_gain, warp
from patternsearch.space import load_space
from patternsearch.task import get_task

BANDS = [(k, n) for k in "ab" for n in "nm"]
KINDS = ("conv", "gated", "recurrent", "attention")


def nested(trial: optuna.Trial) -> float:
    """One to two blocks of four kinds, each with a band of its own; the best are 0."""
    loss, count = 0.0, trial.suggest_int("blocks", 1, 2)
    for i in range(count):
        kind = trial.suggest_categorical(f"block{i}", KINDS)
        band = trial.suggest_int(f"block{i}.{kind}.band", 1, 16, log=True)
        loss += {"conv": 3, "gated": 2, "recurrent": 2.5, "attention": 0}[kind]
        loss += abs(np.log2(band) - (2 if kind == "attention" else 3)) / 4
    rate = trial.suggest_float("rate", 1e-3, 1e-1, log=True)
    return loss / count + abs(np.log10(rate) + 2) + (count == 1) / 2


def search(sampler, trials=40, objective=nested) -> optuna.Study:
    study = optuna.create_study(sampler=sampler)
    study.optimize(objective, n_trials=trials)
    return study


def test_better_than_chance_on_a_nested_space():
    ours, random_ones = (
        [search(make(seed)).best_value for seed in range(4)]
        for make in (StructuredSampler, lambda s: optuna.samplers.RandomSampler(seed=s))
    )
    assert np.mean(ours) < 0.5 * np.mean(random_ones)
    assert max(ours) < min(random_ones)


def test_the_same_trials_from_the_same_seed_also_after_a_resume():
    whole = search(StructuredSampler(3), 30)
    again = search(StructuredSampler(3), 22)
    again.sampler = StructuredSampler(3)  # a new process
    again.optimize(nested, n_trials=8)
    assert [t.params for t in again.trials] == [t.params for t in whole.trials]
    assert whole.trials[-1].params != search(StructuredSampler(4), 30).trials[-1].params


def test_every_branch_is_seen_early():
    study = search(StructuredSampler(0), 9)
    kinds = [t.params[n] for t in study.trials for n in ("block0", "block1") if n in t.params]
    assert min(kinds.count(k) for k in KINDS) >= 2


def test_no_point_twice_and_every_one_of_a_small_space():
    def objective(trial):
        a = trial.suggest_categorical("a", ["x", "y", "z"])
        return trial.suggest_int("b", 1, 4) + (a == "x") + trial.suggest_float("c", 0, 1, step=0.5)

    study = search(StructuredSampler(1), 36, objective)
    assert len({tuple(sorted(t.params.items())) for t in study.trials}) == 36


def test_the_best_of_two_goals():
    def objective(trial):
        x = trial.suggest_int("x", 0, 40) / 10
        y = [trial.suggest_int(f"y{i}", 0, 3) for i in range(3)]
        return x**2 + sum(y), (x - 2) ** 2 + sum(y)

    fronts = []
    for sampler in (StructuredSampler(0), optuna.samplers.RandomSampler(seed=0)):
        study = optuna.create_study(directions=["minimize"] * 2, sampler=sampler)
        study.optimize(objective, n_trials=40)
        fronts.append({t.values[0] for t in study.best_trials if sum(t.values) < 4.1})
    assert len(fronts[0]) >= 8 > 2 * len(fronts[1])


class Costly(Knowledge):
    """Sizes are known beforehand, and large ones cannot be had."""

    exact = {1: "size"}  # noqa: RUF012

    def describe(self, params):
        size = params.get("n", 0) + params.get("m", 0)
        return Described(frozenset(params.items()), {"size": float(size)}) if size <= 12 else None


def test_what_cannot_be_had_is_not_proposed():
    def objective(trial):
        n, m = trial.suggest_int("n", 0, 20), trial.suggest_int("m", 0, 20)
        return (n - 8) ** 2 + abs(m - 3), n + m

    sampler = StructuredSampler(0, knowledge=Costly(), startup=6)
    study = optuna.create_study(directions=["minimize"] * 2, sampler=sampler)
    study.optimize(objective, n_trials=30)
    assert all(sum(t.params.values()) <= 12 for t in study.trials[1:])
    assert any(t.values[0] <= 1 for t in study.trials)
    later = [t for t in study.trials[15:] if t.params["n"] > 8 and t.params["m"] > 3]
    assert len(later) <= 2  # both goals are worse there


class Sized(Costly):
    """Larger numbers express more, and an error of 0 is enough."""

    enough = {0: 0.0}  # noqa: RUF012
    points = Points(
        [Parameter("kind", Choice(("a", "b")))]
        + [Parameter(f"{k}.{n}", IntRange(0, 15), (("kind", frozenset(k)),)) for k, n in BANDS]
    )

    def describe(self, params):
        size = float(sum(v for v in params.values() if isinstance(v, int)))
        return Described(frozenset(params.items()), {"size": size})

    def extent(self, name, value):
        return None if name == "kind" else value


def test_the_least_that_is_enough():
    def objective(trial):
        kind = trial.suggest_categorical("kind", ["a", "b"])
        n, m = (trial.suggest_int(f"{kind}.{n}", 0, 15) for n in "nm")
        return max(0, 9 - n) + max(0, 4 - m) + 5 * (kind == "a"), n + m

    for seed in range(2):
        sampler = StructuredSampler(seed, knowledge=Sized())
        study = optuna.create_study(directions=["minimize"] * 2, sampler=sampler)
        study.optimize(objective, n_trials=20)
        first = [t.params for t in study.trials[:2]]  # the most of both branches
        assert first == [{"kind": k, f"{k}.n": 15, f"{k}.m": 15} for k in "ab"]
        assert min(t.values[1] for t in study.trials if t.values[0] == 0) == 13


def test_what_fails_with_more_freedom_is_forecast_to_fail_with_less():
    places = [Parameter("kind", Choice(("a", "b"))), *(Parameter(k, IntRange(0, 9)) for k in "nm")]
    nested = Nested(Points(places), Sized().extent)
    wide, slim = {"kind": "b", "n": 6, "m": 3}, {"kind": "b", "n": 6, "m": 1}
    other = {"kind": "a", "n": 1, "m": 1}
    assert nested.inside([slim, wide, other], [wide, slim]).tolist() == [[1, 0], [0, 0], [0, 0]]
    bounds = Bounds(nested, [wide, slim], np.array([0.5, 1.0]))
    low, far = bounds.apply([{"kind": "b", "n": 2, "m": 2}, other], np.array([-1.0, -1.0]))
    assert low > -0.6 and far == -1.0
    against = Bounds(nested, [wide, slim], np.array([1.0, 0.5]))
    assert against.belief < bounds.belief


def test_the_area_that_a_point_adds_to_a_front():
    rng = np.random.default_rng(0)
    front, new = rng.random((6, 2)), rng.random((5, 2)) * 1.2 - 0.1
    grid = (np.stack(np.meshgrid(*[np.arange(-0.2, 1.1, 0.002) + 0.001] * 2), -1)).reshape(-1, 2)

    def dominated(points):
        return (grid[:, None] >= points).all(2).any(1)

    more = [(dominated(p[None]) & ~dominated(front)).sum() * 0.002**2 for p in new]
    assert volume_gain(front, new) == pytest.approx(more, abs=0.01)


@pytest.mark.parametrize("name", ["mqar", "digits"])
def test_points_of_the_shipped_spaces(name):
    config = load_config(name)
    space, spec = load_space(config.space), get_task(config.task).spec
    knowledge, rng = PatternKnowledge(config, space, spec), random.Random(0)
    points = space_points(space)
    for _ in range(30):
        params = points.complete({}, rng)
        assert space.point(params)[0] == params  # exactly what the space asks for
        moved = rng.choice(list(points.moves(params, rng)))
        assert moved != params and space.point(moved)[0] == moved
    for expert in space.experts.values():
        described = knowledge.describe(space.point(expert)[0])
        assert described is not None and 0 <= described.features["reach"] <= 1


def test_a_forecast_is_exact_where_it_was_told_and_unsure_elsewhere():
    rng = np.random.default_rng(0)
    x = rng.random((30, 3))
    y = warp(np.sin(4 * x[:, 0]) + x[:, 1])
    model = GaussianProcess(x, y)
    mean, deviation = model.predict(x)
    assert np.abs(mean - y).max() < 0.3
    far, unsure = model.predict(np.full((1, 3), 4.0))
    assert unsure[0] > 3 * deviation.mean()
    assert model.theta[2] < min(model.theta[:2])  # the third column says nothing
    u = log_improvement(np.array([0.0, 1.0, 30.0]), np.ones(3), 0.0)
    assert u[0] == pytest.approx(np.log(0.39894), abs=1e-4) and u[0] > u[1] > u[2] > -500
    assert far.shape == (1,)


def test_outcomes_that_all_agree_or_are_infinite():
    assert np.abs(warp(np.ones(5))).max() < 1e-6
    search(
        StructuredSampler(0), 14, lambda t: t.suggest_int("n", 0, 50) if t.number % 3 else np.inf
    )
    study = search(StructuredSampler(0, startup=4), 12, lambda t: 0 * t.suggest_int("n", 0, 50))
    assert len({t.params["n"] for t in study.trials}) == 12


def test_branches_that_look_bad_are_searched_on():
    least = []
    for spread in (0.0, 0.5):
        study = search(StructuredSampler(0, explore=0, startup=8, spread=spread), 36)
        tried = [{t.params.get(f"block{i}") for i in (0, 1)} for t in study.trials[8:]]
        least.append(min(sum(kind in t for t in tried) for kind in KINDS))
    assert least[1] >= max(3, least[0] + 1), least
