"""An Optuna sampler for conditional spaces of ordered, nested and repeated choices.

    optuna.create_study(sampler=StructuredSampler(seed=0))

It first covers the space: every branch, then the values below. Then a Gaussian process over the
parameters (and features, where `Knowledge` has some) scores random points and all points one place
away from the best ones, by expected improvement; the best of them are enumerated place by place
again, as in TnALE (Li et al. 2023, arXiv 2304.12875). Nothing is proposed twice. Of two objectives
the area that is dominated should grow (Emmerich et al. 2006, doi 10.1109/TEVC.2005.859463), more
are joined by random weights (ParEGO, Knowles 2006).

Where an objective is a cost that is known beforehand, the largest point of every branch comes
first: what it misses, everything inside of it misses too, as often as that held so far. What nested
points did bounds the forecast. Until a trial is good enough (`Knowledge.enough`) half of the
proposals try another value in one place of the best point, place by place; from then on most look
for as much at less cost, halving what is unknown in every place.
"""

from __future__ import annotations

import math
import random
from bisect import insort
from collections.abc import Mapping, Sequence
from copy import copy
from typing import Any

from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.samplers import BaseSampler
from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial, TrialState

from ..domains import Choice, Domain, FloatRange, IntRange
from ..space import Params, sample
from .covering import startup
from .known import Knowledge, Memory, Row
from .points import Points, learned_points
from .proposal import Search

_GRID = 1000  # values of a number in steps that are told apart
_LEARN = 300  # trials that conditions are learned from
_NEAR = 0.5  # share of trials around the best ones while nothing was enough
_STALE = 8  # trials without a better one, after which twice as many spread


class StructuredSampler(BaseSampler):
    """See the module. All that it draws follows from the seed, the trial's number and the study.

    startup: trials that cover the space before the first forecast (from the space where None).
    explore: share of later trials that go on covering it. spread: share of them that look for
    the best within the branch tried least, for objectives that rise late and at once; twice that
    share while the best so far is old.
    """

    def __init__(
        self,
        seed: int | None = None,
        *,
        knowledge: Knowledge | None = None,
        startup: int | None = None,
        explore: float = 0.05,
        spread: float = 0.0,
    ) -> None:
        self.seed = random.randrange(2**31) if seed is None else seed
        self.knowledge = knowledge or Knowledge()
        self._memory = Memory(self.knowledge)
        self.startup, self.explore, self.spread = startup, explore, spread
        self._study = ""  # whose ended trials are kept here, in the order in which they ended
        self._ended: dict[int, Row] = {}
        self._without: dict[frozenset[Any], int] = {}  # those that came to nothing
        self._numbers: set[int] = set()
        self._seen: set[frozenset[Any]] = set()
        self._learned: tuple[int, Points] = (-1, Points(()))

    def infer_relative_search_space(
        self, study: Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        if self.knowledge.points is not None:
            parameters = self.knowledge.points.parameters.values()
            return {p.name: _distribution(p.domain) for p in parameters}
        found: dict[str, BaseDistribution] = {}
        for other in study.get_trials(deepcopy=False)[-_LEARN:]:
            found |= {n: d for n, d in other.distributions.items() if not d.single()}
        return found

    def sample_independent(
        self,
        study: Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        rng = random.Random(f"{self.seed}/{trial.number}/{param_name}")
        return _legal(param_distribution, sample(as_domain(param_distribution), rng))

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        if not search_space:
            return {}
        trials = [t for t in study.get_trials(deepcopy=False) if t.number != trial.number]
        points = self.knowledge.points or self._learn(search_space, trials)
        rows = self._rows(study, trials)
        # not by the trial's number: one that is cut short and run again must not shift the rest
        rng = random.Random(f"{self.seed}/{len({r.key for r in rows})}")
        fixed = trial.system_attrs.get("fixed_params", {})
        if fixed:
            return points.complete(fixed, rng)
        signs = _signs(study)
        enough = {j: signs[j] * v for j, v in self.knowledge.enough.items()}
        search = Search(self._memory, points, rows, self._seen, rng, enough)
        known = sum(r.values is not None for r in rows)
        least = startup(points) if self.startup is None else self.startup
        covering = len([r for r in rows if r.pending or r.values]) < least or known < 3
        found: Params | None = None
        if covering and self.knowledge.exact:
            found = search.largest()
            covering = known < 3
        if found is None and (covering or rng.random() < self.explore):
            found = search.cover()
        if found is None and search.looking and rng.random() < _NEAR:
            found = search.nearby()
        if found is None:
            often = 1 / 3 if search.reached else 1 + _stale(rows)
            branch = rng.random() < often * self.spread
            found = search.improve(search.branch() if branch else None)
        return {n: _legal(search_space[n], v) for n, v in found.items() if n in search_space}

    def _learn(self, space: Mapping[str, BaseDistribution], trials: list[FrozenTrial]) -> Points:
        count = len(trials) if len(trials) < _LEARN else len(trials) - len(trials) % 50
        if self._learned[0] != count or self._learned[1].parameters.keys() != space.keys():
            domains = {name: as_domain(d) for name, d in space.items()}
            shown = [t.params for t in trials[:count][-_LEARN:] if t.state.is_finished()]
            self._learned = count, learned_points(domains, [p for p in shown if p])
        return self._learned[1]

    def _rows(self, study: Study, trials: Sequence[FrozenTrial]) -> list[Row]:
        """Ended trials in the order in which they ended, then those that run."""
        if study.study_name != self._study:
            self._study = study.study_name
            for kept in (self._ended, self._without, self._numbers, self._seen):
                kept.clear()
        signs = _signs(study)
        new = [t for t in trials if t.number not in self._numbers and t.state.is_finished()]
        for t in sorted(new, key=lambda t: (t.datetime_complete, t.number)):
            key = frozenset(t.params.items())
            self._numbers.add(t.number)
            self._seen.add(key)
            self._ended.pop(self._without.pop(key, -1), None)  # it has been run again
            self._ended[t.number] = row = self._row(t, signs)
            if row.values is None:
                self._without[key] = t.number
        ended = [r for r in list(self._ended.values()) if r.params]
        finished: list[float] = []
        for i, r in enumerate(ended):
            if r.values is None:
                continue
            if not r.pruned:
                insort(finished, r.values[0])
            elif finished:  # it was on the way to be worse than half of those before it
                ended[i] = copy(r)
                ended[i].values = (max(r.values[0], finished[len(finished) // 2]),)
        running = [t for t in trials if t.state == TrialState.RUNNING and t.params]
        return ended + [
            Row(t.params, self._memory.describe(t.params), None, pending=True) for t in running
        ]

    def _row(self, t: FrozenTrial, signs: Sequence[float]) -> Row:
        values: tuple[float, ...] | None = None
        if t.state == TrialState.COMPLETE:
            values = tuple(s * v for s, v in zip(signs, t.values, strict=True))
        elif t.state == TrialState.PRUNED and t.intermediate_values and len(signs) == 1:
            values = (signs[0] * t.intermediate_values[max(t.intermediate_values)],)
        if values is not None and not all(map(math.isfinite, values)):
            values = None
        described = self._memory.describe(t.params) if t.params else None
        return Row(t.params, described, values, pruned=t.state == TrialState.PRUNED)


def _stale(rows: Sequence[Row]) -> bool:
    """Whether none of the latest trials is the best, by the first objective."""
    values = [r.values[0] for r in rows if r.values is not None]
    return values.index(min(values)) < len(values) - _STALE


def _signs(study: Study) -> list[float]:
    """What makes every objective one to minimise."""
    return [-1.0 if d == StudyDirection.MAXIMIZE else 1.0 for d in study.directions]


def as_domain(distribution: BaseDistribution) -> Domain:
    if isinstance(distribution, CategoricalDistribution):
        return Choice(tuple(distribution.choices))
    if isinstance(distribution, IntDistribution):
        return IntRange(distribution.low, distribution.high, distribution.log, distribution.step)
    assert isinstance(distribution, FloatDistribution)
    if (step := distribution.step) is not None:
        count = round((distribution.high - distribution.low) / step) + 1
        if count <= _GRID:
            return Choice(
                tuple(_legal(distribution, distribution.low + i * step) for i in range(count))
            )
    return FloatRange(distribution.low, distribution.high, distribution.log)


def _distribution(domain: Domain) -> BaseDistribution:
    if isinstance(domain, Choice):
        return CategoricalDistribution(domain.options)
    if isinstance(domain, IntRange):
        return IntDistribution(domain.low, domain.high, domain.log, domain.step)
    return FloatDistribution(domain.low, domain.high, domain.log)


def _legal(distribution: BaseDistribution, value: Any) -> Any:
    """A value as the distribution has it: on its grid."""
    if isinstance(distribution, FloatDistribution) and distribution.step is not None:
        steps = round((value - distribution.low) / distribution.step)
        return min(distribution.low + steps * distribution.step, distribution.high)
    return value
