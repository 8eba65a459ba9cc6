"""One proposal of the structured sampler: covering a space, or what is likely to improve on it."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import combinations
from typing import Any

import numpy as np

from ..domains import Choice, Domain
from ..space import Params
from .points import Points
from .surrogate import Array, Encoding, GaussianProcess, impute, log_improvement, place_in, warp

_INCUMBENTS = 5  # trials whose neighbours are scored
_RANDOM = 200  # random points beside them
_SHORT = 8  # points whose features are computed exactly before one is chosen
_TRIES = 64  # points looked at to find so many that can be had
_MOST = 200  # trials that a forecast is made from
_EVERY = 5  # trials between two fits of the kernel's widths; more where there are many trials
_DRAWS = 64  # of a forecast, for several objectives
Tokens = tuple[Hashable, ...]


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
class Row:
    """A trial as the sampler sees it; `values` are to be minimised, None while unknown."""

    params: Params
    described: Described | None
    values: tuple[float, ...] | None
    pending: bool = False
    pruned: bool = False

    @cached_property
    def key(self) -> frozenset[Any]:
        """Equal for equal parameters."""
        return frozenset(self.params.items())


class Memory:
    """What need not be computed twice: descriptions of points, and kernels' numbers."""

    def __init__(self, knowledge: Knowledge) -> None:
        self.knowledge = knowledge
        self._described: dict[frozenset[Any], Described | None] = {}
        self._widths: dict[int, tuple[Hashable, Array]] = {}
        self._tokens: tuple[Points | None, dict[frozenset[Any], Tokens]] = None, {}

    def describe(self, params: Params) -> Described | None:
        """As the knowledge does."""
        key = frozenset(params.items())
        if key not in self._described:
            self._described[key] = self.knowledge.describe(params)
        return self._described[key]

    def tokens(self, points: Points, row: Row) -> Tokens:
        """What a trial has tried, of these points."""
        if self._tokens[0] is not points:
            self._tokens = points, {}
        known = self._tokens[1]
        if row.key not in known:
            known[row.key] = tuple(token for token, _ in tokens(points, row.params))
        return known[row.key]

    def widths(self, objective: int, of: Hashable, fit: Callable[[], Array]) -> Array:
        """An objective's kernel's numbers, fitted once for the same trials and parameters."""
        if self._widths.get(objective, (None, None))[0] != of:
            self._widths[objective] = of, fit()
        return self._widths[objective][1]


@dataclass
class _Data:
    """What a forecast is made from: encoded points, their features, outcomes made normal."""

    rows: list[Row]
    x: Array
    features: Array
    y: Array


class Search:
    """One proposal."""

    def __init__(
        self,
        memory: Memory,
        points: Points,
        rows: list[Row],
        seen: set[frozenset[Any]],
        rng: random.Random,
    ) -> None:
        self.memory, self.points, self.rng = memory, points, rng
        self.rows, self.seen = rows, seen
        self.keys = {r.described.key for r in rows if r.described is not None}
        self.encoding = Encoding(points)
        self.draw = rng.randrange(2**31)
        self.names: list[str] = []  # of the features

    def had(self, ranked: Iterable[Params], most: int) -> Iterator[tuple[Params, Described]]:
        """Of the first points, so many that can be trained and are new."""
        for tried, params in enumerate(ranked):
            if tried == _TRIES or not most:
                return
            described = self.memory.describe(params)
            if described is not None and described.key not in self.keys:
                most -= 1
                yield params, described

    def cover(self) -> Params:
        """A random point, of what was tried least."""
        tried: Counter[Hashable] = Counter()
        for row in self.rows:
            if row.described:
                tried.update(self.memory.tokens(self.points, row))

        def new(params: Params) -> float:
            own = tokens(self.points, params)
            total = sum(weight for _, weight in own)
            return -sum(w / (1 + tried[token]) for token, w in own) / max(total, 1e-9)

        drawn = [self.points.complete({}, self.rng) for _ in range(_TRIES)]
        drawn.sort(key=new)
        return next((p for p, _ in self.had(drawn, 1)), drawn[0])

    def branch(self) -> Callable[[Params], bool] | None:
        """Whether a point takes the branch tried least; None in a space without branches."""
        known = self.points.parameters
        tried: dict[Hashable, int] = {
            (p.kind, value): 0
            for p in map(known.__getitem__, sorted(self.points.parents))
            if isinstance(p.domain, Choice)
            and not any(isinstance(known[n].domain, Choice) for n, _ in p.when)  # counts alone
            for value in p.domain.options
        }
        for row in self.rows:
            for token in tried.keys() & self.memory.tokens(self.points, row):
                tried[token] += row.described is not None
        least = list(tried)
        if not least:
            return None
        self.rng.shuffle(least)
        chosen = min(least, key=lambda token: tried[token])
        return lambda params: any(token == chosen for token, _ in tokens(self.points, params))

    def improve(self, within: Callable[[Params], bool] | None = None) -> Params:
        """The most promising new point of a pool, `within` a branch where one is given."""
        fits = within or (lambda params: True)
        data, score = self._forecast()
        order = np.argsort(self._joined(data.y, data.y), kind="stable")
        near = [data.rows[i].params for i in order if fits(data.rows[i].params)][:_INCUMBENTS]
        drawn = [p for p in (self.points.complete({}, self.rng) for _ in range(_RANDOM)) if fits(p)]
        pool = {frozenset(p.items()): p for p in drawn}
        ranked: list[tuple[float, int, Params]] = []
        scored: set[frozenset[Any]] = set()
        for _ in range(2):
            moved = (q for p in near for q in self._moves(p) if fits(q))
            pool |= {frozenset(q.items()): q for q in moved}
            new = [q for key, q in pool.items() if key not in self.seen and key not in scored]
            scored |= pool.keys()
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
        yield from self.memory.knowledge.moves(params, self.rng)

    def _features(self, described: Iterable[Described]) -> Array:
        found = [[d.features.get(name, 0.0) for name in self.names] for d in described]
        return np.array(found, float).reshape(len(found), len(self.names))

    def _data(self, rows: list[Row]) -> _Data:
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
        for j, name in self.memory.knowledge.exact.items():
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
        # the kernel's numbers are fitted now and then, always from the same trials
        every = max(_EVERY, len(done) // 20)
        count = len(done) - len(done) % every if len(done) > every else len(done)
        first = data if count == len(done) else self._data(done[:count])
        unit = 0.3 / (first.features.std(axis=0) + 1e-12)

        def inputs(x: Array, features: Array) -> Array:
            return np.hstack([x, unit * (features - first.features.mean(axis=0))])

        exact = {j: self.names.index(n) for j, n in self.memory.knowledge.exact.items()}
        pending = inputs(
            self.encoding.rows([r.params for r in waiting]),
            self._features(r.described for r in waiting if r.described),
        )
        models = {
            j: self._model(j, data, first, count, inputs, pending)
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
        data: _Data,
        first: _Data,
        count: int,
        inputs: Callable[[Array, Array], Array],
        pending: Array,
    ) -> GaussianProcess:
        """The forecast of an objective; trials that run are believed to come out as forecast."""

        def fit() -> Array:
            return GaussianProcess(inputs(first.x, first.features), first.y[:, j]).theta

        theta = self.memory.widths(j, (count, *self.encoding.start, *self.names), fit)
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


def startup(points: Points) -> int:
    """Trials that show every branch twice: of two alike parameters one proposal tries two."""
    sizes = [points.parameters[n].domain.size() for n in points.parents]
    return int(min(24, max([8, *(2 * s for s in sizes)])))


def tokens(points: Points, params: Params) -> list[tuple[Hashable, float]]:
    """What a point tries, each with a weight; choices that others depend on count most.

    Of these every pair is tried as well: one may be of use with another only.
    """
    found: list[tuple[Hashable, float]] = []
    branches: list[tuple[str, Hashable]] = []
    for name, value in params.items():
        if (p := points.parameters.get(name)) is not None:
            weight = 4.0 ** -points.depths[name]
            if name in points.parents:
                branches.append((p.kind, value))
                weight *= 2
            found.append(((p.kind, _part(p.domain, value)), weight))
    return found + [(pair, 1.0) for pair in combinations(sorted(branches), 2)]


def _part(domain: Domain, value: Any) -> Hashable:
    """The value of a choice or short range, the third of a longer one it lies in."""
    part: Hashable = value
    if isinstance(domain, Choice) or domain.size() <= 4:
        return part
    place = place_in(domain, value)
    return min(2, int(3 * place))
