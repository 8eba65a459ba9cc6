"""An Optuna sampler for conditional spaces of ordered, nested and repeated choices.

    optuna.create_study(sampler=StructuredSampler(seed=0))

It first covers the space: every branch, then the values below. Then a Gaussian process over the
parameters (and features, where `Knowledge` has some) scores random points and all points one place
away from the best ones, by expected improvement; the best of them are enumerated place by place
again, as in TnALE (Li et al. 2023, arXiv 2304.12875). Nothing is proposed twice. Several objectives
are joined by random weights (ParEGO, Knowles 2006), and points that even an optimistic forecast has
dominated by a trial are left out.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
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
from .points import Points, learned_points
from .surrogate import Array, Encoding, GaussianProcess, impute, log_improvement, place_in, warp

_INCUMBENTS = 5  # trials whose neighbours are scored
_RANDOM = 200  # random points beside them
_SHORT = 8  # points whose features are computed exactly before one is chosen
_TRIES = 64  # points looked at to find so many that can be had
_MOST = 200  # trials that a forecast is made from
_EVERY = 5  # trials between two fits of the kernel's widths
_DRAWS = 64  # of a forecast, for several objectives
_LEARN = 300  # trials that conditions are learned from


@dataclass(frozen=True)
class Described:
    """A point that can be trained: `key` is equal for points that are the same."""

    key: Hashable
    features: Mapping[str, float] = field(default_factory=dict)


class Knowledge:
    """What may be known of a space beyond what trials show. Every part is optional.

    points: its parameters and their conditions. exact: objective's index -> name of the feature
    that equals it, up to a rising function, before anything is trained.
    """

    points: Points | None = None
    exact: Mapping[int, str] = {}

    def describe(self, params: Params) -> Described | None:
        """Identity and features of a point; None where it cannot be trained."""
        return Described(frozenset(params.items()))

    def moves(self, params: Params, rng: random.Random) -> Iterable[Params]:
        """Points near another, beside those that differ in one place."""
        return ()


@dataclass
class _Row:
    """A trial as the sampler sees it; `values` are to be minimised, None while unknown."""

    params: Params
    described: Described | None
    values: tuple[float, ...] | None
    pending: bool


class StructuredSampler(BaseSampler):
    """See the module. All that it draws follows from the seed, the trial's number and the study.

    startup: trials that cover the space before the first forecast (from the space where None).
    explore: share of later trials that go on covering it.
    """

    def __init__(
        self,
        seed: int | None = None,
        *,
        knowledge: Knowledge | None = None,
        startup: int | None = None,
        explore: float = 0.05,
    ) -> None:
        self.seed = random.randrange(2**31) if seed is None else seed
        self.knowledge = knowledge or Knowledge()
        self.startup, self.explore = startup, explore
        self._described: dict[frozenset[Any], Described | None] = {}
        self._learned: tuple[int, Points] = (-1, Points(()))
        self._widths: dict[int, tuple[Hashable, Array]] = {}

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
        rng = random.Random(f"{self.seed}/{trial.number}")
        trials = [t for t in study.get_trials(deepcopy=False) if t.number != trial.number]
        points = self.knowledge.points or self._learn(search_space, trials)
        fixed = trial.system_attrs.get("fixed_params", {})
        if fixed:
            return points.complete(fixed, rng)
        rows = self._rows(trials, study.directions)
        search = _Search(self, points, rows, rng)
        known = sum(r.values is not None for r in rows)
        startup = _startup(points) if self.startup is None else self.startup
        covering = len([r for r in rows if r.pending or r.values]) < startup or known < 3
        if covering or rng.random() < self.explore:
            found = search.cover()
        else:
            found = search.improve()
        return {n: _legal(search_space[n], v) for n, v in found.items() if n in search_space}

    def _learn(self, space: Mapping[str, BaseDistribution], trials: list[FrozenTrial]) -> Points:
        count = len(trials) if len(trials) < _LEARN else len(trials) - len(trials) % 50
        if self._learned[0] != count or self._learned[1].parameters.keys() != space.keys():
            domains = {name: as_domain(d) for name, d in space.items()}
            shown = [t.params for t in trials[:count][-_LEARN:] if t.state.is_finished()]
            self._learned = count, learned_points(domains, [p for p in shown if p])
        return self._learned[1]

    def describe(self, params: Params) -> Described | None:
        """As the knowledge does, computed once a point."""
        key = frozenset(params.items())
        if key not in self._described:
            self._described[key] = self.knowledge.describe(params)
        return self._described[key]

    def _rows(
        self, trials: Sequence[FrozenTrial], directions: Sequence[StudyDirection]
    ) -> list[_Row]:
        """In the order in which trials ended; those that run come last."""
        signs = [-1.0 if d == StudyDirection.MAXIMIZE else 1.0 for d in directions]
        done = [t for t in trials if t.state == TrialState.COMPLETE]
        median = np.median([signs[0] * t.values[0] for t in done]) if done else 0.0
        rows = []
        ended = [t for t in trials if t.datetime_complete is not None]
        ended.sort(key=lambda t: (t.datetime_complete, t.number))
        for t in (*ended, *(t for t in trials if t.state == TrialState.RUNNING)):
            values: tuple[float, ...] | None = None
            if t.state == TrialState.COMPLETE:
                values = tuple(s * v for s, v in zip(signs, t.values, strict=True))
            elif t.state == TrialState.PRUNED and t.intermediate_values and len(signs) == 1:
                last = t.intermediate_values[max(t.intermediate_values)]
                values = (max(signs[0] * last, float(median)),)  # it was on the way to be worse
            pending = t.state == TrialState.RUNNING
            if t.params:
                rows.append(_Row(t.params, self.describe(t.params), values, pending))
        return rows

    def widths(self, objective: int, of: Hashable, fit: Callable[[], Array]) -> Array:
        """An objective's kernel's numbers, fitted once for the same trials and parameters."""
        if self._widths.get(objective, (None, None))[0] != of:
            self._widths[objective] = of, fit()
        return self._widths[objective][1]


@dataclass
class _Data:
    """What a forecast is made from: encoded points, their features, outcomes made normal."""

    rows: list[_Row]
    x: Array
    features: Array
    y: Array


class _Search:
    """One proposal."""

    def __init__(
        self, sampler: StructuredSampler, points: Points, rows: list[_Row], rng: random.Random
    ) -> None:
        self.sampler, self.points, self.rng = sampler, points, rng
        self.rows = rows
        self.seen = {frozenset(r.params.items()) for r in rows}
        self.keys = {r.described.key for r in rows if r.described is not None}
        self.encoding = Encoding(points)
        self.draw = rng.randrange(2**31)
        self.names: list[str] = []  # of the features

    def had(self, ranked: Iterable[Params], most: int) -> Iterator[tuple[Params, Described]]:
        """Of the first points, so many that can be trained and are new."""
        for tried, params in enumerate(ranked):
            if tried == _TRIES or not most:
                return
            described = self.sampler.describe(params)
            if described is not None and described.key not in self.keys:
                most -= 1
                yield params, described

    def cover(self) -> Params:
        """A random point, of what was tried least."""
        tried = Counter(
            token for r in self.rows if r.described for token, _ in self._tokens(r.params)
        )

        def new(params: Params) -> float:
            tokens = self._tokens(params)
            total = sum(weight for _, weight in tokens)
            return -sum(w / (1 + tried[token]) for token, w in tokens) / max(total, 1e-9)

        drawn = [self.points.complete({}, self.rng) for _ in range(_TRIES)]
        drawn.sort(key=new)
        return next((p for p, _ in self.had(drawn, 1)), drawn[0])

    def _tokens(self, params: Params) -> list[tuple[Hashable, float]]:
        """What a point tries, each with a weight: choices that others depend on count more."""
        tokens: list[tuple[Hashable, float]] = []
        for name, value in params.items():
            if (p := self.points.parameters.get(name)) is not None:
                weight = 4.0 ** -self.points.depths[name] * (
                    2 if name in self.points.parents else 1
                )
                tokens.append(((p.kind, _part(p.domain, value)), weight))
        return tokens

    def improve(self) -> Params:
        """The most promising new point of a pool."""
        data, score = self._forecast()
        best = np.argsort(self._joined(data.y, data.y), kind="stable")[:_INCUMBENTS]
        near = [data.rows[i].params for i in best]
        drawn = [self.points.complete({}, self.rng) for _ in range(_RANDOM)]
        pool = {frozenset(p.items()): p for p in drawn}
        ranked: list[tuple[float, int, Params]] = []
        for _ in range(2):
            pool |= {frozenset(q.items()): q for p in near for q in self._moves(p)}
            new = [q for key, q in pool.items() if key not in self.seen]
            self.seen |= pool.keys()
            pool.clear()
            if new:
                x = self.encoding.rows(new)
                values = -score(x, impute(data.x, data.features, x))
                ranked += zip(values, range(len(ranked), len(ranked) + len(new)), new, strict=True)
                ranked.sort()
            near = [q for *_, q in ranked[:3]]
        short = list(self.had((q for *_, q in ranked), _SHORT if self.names else 1))
        if not short:
            return self.cover()
        values = score(
            self.encoding.rows([p for p, _ in short]), self._features(d for _, d in short)
        )
        return short[int(np.argmax(values))][0]

    def _moves(self, params: Params) -> Iterator[Params]:
        yield from self.points.moves(params, self.rng)
        yield from self.sampler.knowledge.moves(params, self.rng)

    def _features(self, described: Iterable[Described]) -> Array:
        found = [[d.features.get(name, 0.0) for name in self.names] for d in described]
        return np.array(found, float).reshape(len(found), len(self.names))

    def _data(self, rows: list[_Row]) -> _Data:
        """Of many trials the best, the latest and some others."""
        values = np.array([r.values for r in rows])
        if len(rows) > _MOST:
            ranks = values.argsort(axis=0).argsort(axis=0).sum(axis=1)
            best = set(np.argsort(ranks, kind="stable")[: _MOST // 2].tolist())
            latest = set(range(len(rows) - _MOST // 4, len(rows)))
            others = sorted(set(range(len(rows))) - best - latest)
            chosen = random.Random(len(rows) // _EVERY).sample(others, _MOST // 4)
            kept = sorted(best | latest | set(chosen))
            rows, values = [rows[i] for i in kept], values[kept]
        features = self._features(r.described for r in rows if r.described)
        y = np.stack([warp(v) for v in values.T], axis=1)
        for j, name in self.sampler.knowledge.exact.items():
            known = features[:, self.names.index(name)]
            y[:, j] = (known - known.mean()) / (known.std() + 1e-12)
        return _Data(rows, self.encoding.rows([r.params for r in rows]), features, y)

    def _forecast(self) -> tuple[_Data, Callable[[Array, Array], Array]]:
        """What is known, and a function (encoded points, features) -> how promising they are."""
        done = [r for r in self.rows if r.values is not None and r.described is not None]
        waiting = [r for r in self.rows if r.pending and r.described is not None]
        self.names = sorted({n for r in done if r.described for n in r.described.features})
        data = self._data(done)
        middle, spread = data.features.mean(axis=0), data.features.std(axis=0) + 1e-12

        def inputs(x: Array, features: Array) -> Array:
            return np.hstack([x, 0.3 * (features - middle) / spread])

        exact = {j: self.names.index(n) for j, n in self.sampler.knowledge.exact.items()}
        pending = inputs(
            self.encoding.rows([r.params for r in waiting]),
            self._features(r.described for r in waiting if r.described),
        )
        models = {
            j: self._model(j, done, data, inputs, pending)
            for j in range(data.y.shape[1])
            if j not in exact
        }

        def score(x: Array, features: Array) -> Array:
            mean = np.zeros((len(x), data.y.shape[1]))
            deviation = np.zeros_like(mean)
            for j, at in exact.items():
                mean[:, j] = (features[:, at] - middle[at]) / spread[at]
            for j, model in models.items():
                mean[:, j], deviation[:, j] = model.predict(inputs(x, features))
            if data.y.shape[1] == 1:
                return log_improvement(mean[:, 0], deviation[:, 0], float(data.y.min()))
            return self._score(data.y, mean, deviation)

        return data, score

    def _model(
        self,
        j: int,
        done: list[_Row],
        data: _Data,
        inputs: Callable[[Array, Array], Array],
        pending: Array,
    ) -> GaussianProcess:
        """The forecast of an objective; trials that run are believed to come out as forecast."""
        count = len(done) - len(done) % _EVERY if len(done) > _EVERY else len(done)

        def fit() -> Array:
            first = data if count == len(done) else self._data(done[:count])
            return GaussianProcess(inputs(first.x, first.features), first.y[:, j]).theta

        theta = self.sampler.widths(j, (count, *self.encoding.start, *self.names), fit)
        x = inputs(data.x, data.features)
        model = GaussianProcess(x, data.y[:, j], theta)
        if len(pending):
            y = np.append(data.y[:, j], model.predict(pending)[0])
            model = GaussianProcess(np.vstack([x, pending]), y, theta)
        return model

    def _joined(self, y: Array, known: Array) -> Array:
        """Objectives (last axis) as one by the proposal's weights, scaled by the known ones."""
        low, high = known.min(axis=0), known.max(axis=0)
        z = (y - low) / (high - low + 1e-12) * self._weights(y.shape[-1])
        joined: Array = z.max(axis=-1) + 0.05 * z.sum(axis=-1)
        return joined

    def _weights(self, objectives: int) -> Array:
        rng = random.Random(self.draw)
        w = np.array([rng.expovariate(1) for _ in range(objectives)])
        weights: Array = w / w.sum()
        return weights

    def _score(self, known: Array, mean: Array, deviation: Array) -> Array:
        """Expected improvement of the joined objectives; far below where surely dominated."""
        noise = np.random.default_rng(self.draw).standard_normal((_DRAWS, 1, mean.shape[1]))
        drawn = self._joined(mean + deviation * noise, known)
        best = self._joined(known, known).min()
        gain = np.log(np.maximum(best - drawn, 0).mean(axis=0) + 1e-12) - 1e-3 * drawn.mean(axis=0)
        hoped = (mean - deviation)[:, None]
        better = np.all(known <= hoped, axis=2) & np.any(known < hoped, axis=2)
        dominated = np.any(better, axis=1)
        scores: Array = np.where(dominated, gain - 100, gain)
        return scores


def _startup(points: Points) -> int:
    """Trials that show every branch twice: of two alike parameters one proposal tries two."""
    sizes = [points.parameters[n].domain.size() for n in points.parents]
    return int(min(24, max([8, *(2 * s for s in sizes)])))


def _part(domain: Domain, value: Any) -> Hashable:
    """The value of a choice or short range, the third of a longer one it lies in."""
    part: Hashable = value
    if isinstance(domain, Choice) or domain.size() <= 4:
        return part
    place = place_in(domain, value)
    return min(2, int(3 * place))


def as_domain(distribution: BaseDistribution) -> Domain:
    if isinstance(distribution, CategoricalDistribution):
        return Choice(tuple(distribution.choices))
    if isinstance(distribution, IntDistribution):
        return IntRange(distribution.low, distribution.high, distribution.log, distribution.step)
    assert isinstance(distribution, FloatDistribution)
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
