"""When a trial stops early: rules on the metric, right for several objectives too.

Optuna's pruners raise with several objectives and look through every trial at each report. These
decide from the same study, by what is kept of it at each epoch, and spare a trial whose costs may
earn it a place on the front.
"""

from __future__ import annotations

from bisect import insort
from collections import defaultdict
from collections.abc import Iterable, Mapping

from ..config import METRICS, SweepConfig
from .pareto import Point, dominates, turned

STARTUP = 6  # finished trials that a median needs
CYCLE = (0, 1, 0, 2, 0, 1, 0)  # hyperband: brackets of the trials in turn
Values = Mapping[str, float]


class Pruning:
    """Stops trials by `config.pruner`, from the curves of the trials before.

    none: never. median: at any epoch, its best so far worse than the median of the finished trials
    there (as Optuna's; Golovin et al. 2017 have a median of running averages). halving: at a rung,
    not among the best 1 / `reduction_factor` of those that came to it (asynchronous successive
    halving, the form that stops: Li et al. 2020, arXiv 1810.05934). hyperband: the same in three
    brackets, each with its first rung `reduction_factor` times later; by default at an eighth, a
    quarter and half of the epochs, twice the trials for half the epochs (Li et al. 2018, arXiv
    1603.06560). None stops a trial before `min_epochs`.

    With several objectives a trial is stopped only where it is dominated as well by another at the
    same epoch. That compares every objective: what is evaluated then, what is known before
    training, what was measured at its start, and the seconds so far.
    """

    def __init__(self, config: SweepConfig) -> None:
        self.objectives = config.objectives
        self.metric = next(iter(config.objectives))
        self.kind = "none" if self.metric in METRICS else config.pruner  # costs have no curve
        self.epochs, self.factor = config.train.epochs, config.reduction_factor
        share = 8 if self.kind == "hyperband" else 4
        self.first = config.min_epochs or self.epochs / share
        self.losses: dict[tuple[int, int], list[float]] = defaultdict(list)  # by bracket and rung
        self.points: dict[int, list[Point]] = defaultdict(list)  # by rung
        self.curves: dict[int, list[tuple[int, float]]] = {}  # of running trials

    def report(self, number: int, row: Values, costs: Values) -> bool:
        """Take an evaluation of a trial, with its costs so far; whether it should stop."""
        values = {**costs, **row}
        if self.kind == "none" or not self.objectives.keys() <= values.keys():
            return False
        epoch, point = int(row["epoch"]), turned(values, self.objectives)
        curve = self.curves.setdefault(number, [])
        before = curve[-1][0] if curve else 0
        curve.append((epoch, point[0]))
        passed = [r for r in self._rungs(number, epoch) if r > before]
        for rung in passed:
            if len(self.objectives) > 1:
                self.points[rung].append(point)
            if self.kind != "median":
                insort(self.losses[self._bracket(number), rung], point[0])
        if not passed or epoch >= self.epochs or not self._worse(number, passed[-1]):
            return False
        if len(self.objectives) == 1:
            return True
        return any(dominates(other, point) for other in self.points[passed[-1]])

    def end(self, number: int, finished: bool) -> None:
        """A trial is over; whether it trained to its end."""
        curve = self.curves.pop(number, [])
        if finished and self.kind == "median":
            for epoch, loss in curve:
                insort(self.losses[0, epoch], loss)

    def replay(self, number: int, rows: Iterable[Values], costs: Values, finished: bool) -> None:
        """A trial that was over before this process began."""
        for row in rows:
            self.report(number, row, costs)
        self.end(number, finished)

    def _bracket(self, number: int) -> int:
        return CYCLE[number % len(CYCLE)] if self.kind == "hyperband" else 0

    def _rungs(self, number: int, epoch: int) -> list[int]:
        """The epochs up to this one at which the trial may be stopped."""
        first = max(1, int(self.first * self.factor ** self._bracket(number)))
        if self.kind == "median":
            return [epoch] if epoch >= first else []
        rungs = []
        while first <= min(epoch, self.epochs):
            rungs.append(first)
            first *= self.factor
        return rungs

    def _worse(self, number: int, rung: int) -> bool:
        losses = self.losses[self._bracket(number), rung]
        if self.kind == "median":
            best, n = min(loss for _, loss in self.curves[number]), len(losses)
            return n >= STARTUP and best > (losses[(n - 1) // 2] + losses[n // 2]) / 2
        return self.curves[number][-1][1] > losses[max(1, len(losses) // self.factor) - 1]
