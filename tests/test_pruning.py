"""Which trials stop early, and which of several none beats."""

import random

import pytest

from patternsearch.config import SweepConfig
from patternsearch.search.pareto import dominates, nondominated, turned
from patternsearch.search.pruning import Pruning

ONE = {"accuracy": "maximize"}
TWO = {"accuracy": "maximize", "flops": "minimize"}


def pruning(kind: str, objectives: dict[str, str], epochs: int = 8, **options: int) -> Pruning:
    config = {"task": "digits", "pruner": kind, "objectives": objectives, **options}
    return Pruning(SweepConfig.model_validate({**config, "train": {"epochs": epochs}}))


def run(rules: Pruning, number: int, accuracy: float, epochs: int = 8, **costs: float) -> int:
    """A trial with a flat curve; the epoch it stopped or ended at."""
    for epoch in range(1, epochs + 1):
        if rules.report(number, {"epoch": epoch, "accuracy": accuracy}, costs):
            break
    rules.end(number, epoch == epochs)
    return epoch


def test_the_front_is_what_none_dominates():
    rng = random.Random(0)
    points = [tuple(rng.choice([0.0, 0.5, 1.0, 2.0]) for _ in range(3)) for _ in range(60)]
    front = nondominated(points)
    for i, point in enumerate(points):
        beaten = any(dominates(other, point) for other in points) or point in points[:i]
        assert (i in front) == (not beaten)
    assert turned({"flops": 3, "accuracy": 0.5}, TWO) == (-0.5, 3)


def test_halving_keeps_the_best_half_at_every_rung():
    rules = pruning("halving", ONE)  # rungs at 2 and 4
    assert run(rules, 0, 0.5) == 8  # the first is the best of one
    assert run(rules, 1, 0.4) == 2  # the worse of two
    assert run(rules, 2, 0.6) == 8
    assert [run(rules, n, 0.55) for n in (3, 4)] == [4, 8]  # one of three passes, two of four
    late = [(e, 0.7 if e < 4 else 0.1) for e in range(1, 9)]
    stops = [rules.report(5, {"epoch": e, "accuracy": a}, {}) for e, a in late]
    assert stops.index(True) == 3  # fell behind at the second rung


def test_the_rungs_of_halving_can_be_chosen():
    rules = pruning("halving", ONE, 10, min_epochs=1, reduction_factor=4)  # rungs at 1 and 4
    assert [run(rules, n, 0.5 - 0.01 * n, 10) for n in range(8)] == [10, *[1] * 7]
    assert [run(rules, 8, 0.495, 10), run(rules, 9, 0.48, 10)] == [4, 1]  # second of nine, third


def test_the_median_is_of_finished_trials_at_the_same_epoch():
    rules = pruning("median", ONE)
    assert [run(rules, n, 0.1 * n) for n in range(6)] == [8] * 6
    assert run(rules, 6, 0.24) == 2 and run(rules, 7, 0.26) == 8


def test_hyperband_has_brackets_that_stop_later():
    rules = pruning("hyperband", ONE, 16)
    good = [run(rules, n, 0.9, 16) for n in range(7)]
    assert good == [16] * 7
    assert [run(rules, 7 + n, 0.1, 16) for n in range(7)] == [2, 4, 2, 8, 2, 4, 2]


@pytest.mark.parametrize("kind", ["median", "halving", "hyperband"])
def test_with_several_objectives_what_may_be_on_the_front_goes_on(kind):
    rules = pruning(kind, TWO)
    for n in range(14):
        run(rules, n, 0.8 + 0.01 * n, flops=100)
    assert run(rules, 14, 0.2, flops=100) < 8  # dominated
    assert run(rules, 21, 0.2, flops=50) == 8  # worse, but cheaper than all
    assert run(rules, 28, 0.1, flops=60) < 8  # and this one is dominated by it


def test_objectives_that_are_not_known_yet_stop_nobody():
    rules = pruning("halving", {"accuracy": "maximize", "latency_ms": "minimize"})
    assert [run(rules, n, 0.5 - 0.1 * n) for n in range(4)] == [8] * 4
    assert [run(rules, n, 0.5 - 0.1 * n, latency_ms=1) for n in range(4, 8)] == [8, 2, 2, 2]
    costs = pruning("halving", {"flops": "minimize"})
    assert [run(costs, n, 0.5, flops=100 * n) for n in range(4)] == [8] * 4
