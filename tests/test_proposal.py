"""What the structured sampler makes of nested points, known parts and neighbours."""

from pathlib import Path

import numpy as np
import optuna
import pytest

from patternsearch.config import load_config
from patternsearch.domains import Choice, IntRange
from patternsearch.search.acquisition import latest_start, rest_improvement
from patternsearch.search.knowledge import PatternKnowledge
from patternsearch.search.known import Described, Knowledge
from patternsearch.search.nested import Misses, Nested
from patternsearch.search.points import Parameter, Points
from patternsearch.search.sampler import StructuredSampler
from patternsearch.search.surrogate import impute
from patternsearch.space import load_space
from patternsearch.task import get_task

NAMES = ("a.n", "a.m", "b.n", "b.m")
PLANTED = Path(__file__).parents[1] / "benchmarks" / "planted.yaml"


class Needle(Knowledge):
    """Of kind a every n is inside of larger ones, of kind b none is."""

    exact = {1: "size"}  # noqa: RUF012
    enough = {0: 0.0}  # noqa: RUF012
    points = Points(
        [Parameter("kind", Choice(("a", "b")))]
        + [Parameter(n, IntRange(0, 15), (("kind", frozenset(n[0])),)) for n in NAMES]
    )

    def describe(self, params):
        return Described(frozenset(params.items()), {"size": float(len(params["kind"]))})

    def extent(self, name, value):
        return value if name.startswith("a.") else None


def needle(trial):
    kind = trial.suggest_categorical("kind", ["a", "b"])
    n, m = (trial.suggest_int(f"{kind}.{n}", 0, 15) for n in "nm")
    near = kind == "b" and (n == 6) + (m == 11)
    return (1.0 - near / 2 if near else 0.9 + n / 1500 + (kind == "b") / 10), 1


class Loose(Needle):
    """As if nothing were known of what is inside of what."""

    def extent(self, name, value):
        return None


def test_inside_of_what_missed_is_searched_less():
    inside, best = [], []
    for knowledge in (Needle(), Loose()):
        studies = [
            optuna.create_study(
                directions=["minimize"] * 2,
                sampler=StructuredSampler(seed, knowledge=knowledge, spread=1 / 3),
            )
            for seed in range(3)
        ]
        for study in studies:
            study.optimize(needle, n_trials=50)
        trials = [t for study in studies for t in study.trials[2:]]
        inside.append(sum(t.params["kind"] == "a" for t in trials))
        best.append(max(min(t.values[0] for t in study.trials) for study in studies))
    assert inside[0] < 0.7 * inside[1]
    assert best[0] == 0.0


def test_misses_say_less_where_less_freedom_did_better():
    nested = Nested(Needle.points, Needle().extent)
    known = [{"kind": "a", "a.n": n, "a.m": n} for n in (15, 9, 4)]
    plain = Misses(nested, known, np.array([1.0, 1.0, 0.9]), 0.0)
    assert plain.chance == pytest.approx(1 / 5)
    assert plain.contain([{"kind": "a", "a.n": 3, "a.m": 12}, *known]).tolist() == [1, 0, 1, 1]
    luck = Misses(nested, known, np.array([1.0, 1.0, 0.3]), 0.0)
    assert luck.chance == pytest.approx(3 / 5)
    other = {"kind": "b", "b.n": 3, "b.m": 1}
    assert not plain.contain([other])[0]


class Partly(Knowledge):
    """The size is a known part of the objective; only neighbours are looked at."""

    local, part = True, "share"
    points = Points([Parameter(name, IntRange(1, 7)) for name in "vwxyz"])

    def describe(self, params):
        features = {"share": sum(params.values()) / 100}
        return Described(frozenset(params.items()), features | params)


def test_a_known_part_of_the_objective_and_neighbours_alone():
    goal = np.array([3, 1, 4, 2, 5])

    def objective(trial):
        found = np.array([trial.suggest_int(name, 1, 7) for name in "vwxyz"])
        return found.sum() / 100 + 1e-4 + 0.1 * (np.maximum(goal - found, 0) ** 2).sum()

    for seed in range(3):
        study = optuna.create_study(sampler=StructuredSampler(seed, knowledge=Partly(), explore=0))
        study.optimize(objective, n_trials=50)
        assert study.best_value == pytest.approx(goal.sum() / 100 + 1e-4)
        shown = np.array([list(t.params.values()) for t in study.trials])
        values = [t.value for t in study.trials]
        for i in range(8, 30):
            centres = np.argsort(values[:i], kind="stable")[:2]
            assert (shown[i] != shown[centres]).sum(axis=1).min() == 1


def test_the_expected_improvement_of_a_known_part_and_a_rest():
    rng = np.random.default_rng(0)
    rest = np.log(rng.random(9))
    left, mean, deviation = np.array([0.5, 0.2, -0.1]), np.array([0.3, -1.0, 0]), np.full(3, 0.7)
    found = rest_improvement(left, rest, mean, deviation)
    logs = rest.mean() + rest.std() * (mean[:, None] + 0.7 * rng.standard_normal((3, 400_000)))
    drawn = np.maximum(left[:, None] - np.exp(logs), 0).mean(axis=1)
    assert np.exp(found[:2]) == pytest.approx(drawn[:2], rel=0.02)
    assert found[2] < -600  # the known part alone is worse than the best


def test_a_search_starts_anew_where_nothing_gets_better():
    assert latest_start([5, 4, 3, 3, 3], 3) == 0
    assert latest_start([5, 4, 3, 3, 3, 3], 3) == 6
    assert latest_start([5, 4, 3, 3, 3, 3, 9, 8, 8], 3) == 6


def test_how_far_off_guessed_features_are():
    rng = np.random.default_rng(0)
    x = rng.random((12, 3))
    features = x @ rng.random((3, 2)) + 0.1 * rng.standard_normal((12, 2))
    _, off = impute(x, features, x[:1])
    middle, centre = features.mean(axis=0), x.mean(axis=0)
    missed = []
    for i in range(12):
        rest = np.arange(12) != i
        gram = (x[rest] - centre) @ (x[rest] - centre).T + 0.1 * np.eye(11)
        guess = (
            (x[i] - centre) @ (x[rest] - centre).T @ np.linalg.solve(gram, features[rest] - middle)
        )
        missed.append(features[i] - middle - guess)
    assert off == pytest.approx(np.sqrt(np.mean(np.square(missed), axis=0)))


def test_what_does_not_always_add_parameters_is_inside_of_nothing():
    config = load_config("digits", objectives={"error": "minimize", "parameters": "minimize"})
    knowledge = PatternKnowledge(config, load_space(PLANTED), get_task("digits").spec)
    assert knowledge.extent("block0.fixed.mixer.heads", 4) == 4
    assert knowledge.extent("block0.attention.mixer.heads", 4) is None  # none more within a band
    assert knowledge.extent("block0.attention.mixer.positions.banded.lower", 7) is None
