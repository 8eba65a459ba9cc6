"""One proposal of the structured sampler: covering a space, or what is likely to improve on it."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from scipy.special import log_ndtr

from ..domains import Choice
from ..space import Params
from .acquisition import (
    enough_up_to,
    joined,
    latest_start,
    log_rest,
    promise,
    rest_improvement,
)
from .covering import grown, tokens, untried
from .known import Described, Memory, Row
from .nested import Bounds, Misses, Nested, Thresholds
from .pareto import nondominated
from .points import Points
from .surrogate import (
    Array,
    Encoding,
    GaussianProcess,
    impute,
    log_improvement,
    warp,
)

_INCUMBENTS = 5  # trials whose neighbours are scored
_PATIENCE = 40  # trials around them without a better one, after which it goes on elsewhere
_ELSEWHERE = 4  # points looked at there first
_CENTRES = 2  # of them where nothing else is scored
_RANDOM = 200  # random points beside them
_SHORT = 8  # points whose features are computed exactly before one is chosen
_TRIES = 64  # points looked at to find so many that can be had
_MOST = 200  # trials that a forecast is made from
_EVERY = 5  # trials between two fits of the kernel's widths; more where there are many trials
_FAR = 1000.0  # below all other logarithms
_FOCUS = 0.9  # share of proposals for what is enough, then for the same at less cost

# how promising points are: of them, encoded, their features, and how far off these are
Score = Callable[[list[Params], Array, Array, Array], Array]


@dataclass
class _Data:
    """What a forecast is made from: encoded points, their features, outcomes made normal."""

    rows: list[Row]
    x: Array
    features: Array
    y: Array
    values: Array  # as they are
    first: int  # of the rows around the best of which is searched


class Search:
    """One proposal."""

    def __init__(
        self,
        memory: Memory,
        points: Points,
        rows: list[Row],
        seen: set[frozenset[Any]],
        rng: random.Random,
        enough: Mapping[int, float],
    ) -> None:
        self.memory, self.points, self.rng = memory, points, rng
        self.rows, self.seen = rows, seen
        self.keys = {r.described.key for r in rows if r.described is not None}
        self.encoding = Encoding(points)
        self.draw = rng.randrange(2**31)
        self.enough = enough if memory.knowledge.exact else {}
        self.reached = {
            j for j, v in self.enough.items() if any(r.values and r.values[j] <= v for r in rows)
        }
        self.focus = len(self.enough) == 1 and rng.random() < _FOCUS
        self.looking = self.focus and not self.reached
        self.names: list[str] = []  # of the features

    def had(
        self, ranked: Iterable[Params], most: int, tries: int = _TRIES
    ) -> Iterator[tuple[Params, Described]]:
        """Of the first points, so many that can be trained and are new."""
        for tried, params in enumerate(ranked):
            if tried == tries or not most:
                return
            described = self.memory.describe(params)
            if described is not None and described.key not in self.keys:
                most -= 1
                yield params, described

    def largest(self) -> Params | None:
        """The most that a branch not tried yet can express; None where all were tried.

        What it misses, everything inside of it misses too.
        """
        tried = {item for r in self.rows if r.described for item in r.params.items()}
        for given in untried(self.points, tried):
            most = grown(self.points, given, self.memory.knowledge.extent, self.rng)
            others = [self.points.complete(given, self.rng) for _ in range(_SHORT)]
            if found := next(self.had([most, *others], 1), None):
                return found[0]
        return None

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
        least = [token for token in tried if not self._missed(token)]
        if not least:
            return None
        self.rng.shuffle(least)
        chosen = min(least, key=lambda token: tried[token])
        return lambda params: any(token == chosen for token, _ in tokens(self.points, params))

    @cached_property
    def misses(self) -> Misses | None:
        """While what is enough is looked for; now and then as if they said nothing of others."""
        if self.reached or len(self.enough) != 1:
            return None
        (j,) = self.enough
        done = [(r.params, r.values[j]) for r in self.rows if r.described and r.values]
        nested = Nested(self.points, self.memory.knowledge.extent)
        y = np.array([value for _, value in done])
        found = Misses(nested, [p for p, _ in done], y, self.enough[j])
        return found if self.rng.random() > found.chance else None

    def _missed(self, token: Hashable) -> bool:
        """Whether a branch seems to lie inside of points that were far from enough."""
        if self.misses is None:
            return False
        drawn = [self.points.complete({}, self.rng) for _ in range(_TRIES)]
        inside = [p for p in drawn if any(t == token for t, _ in tokens(self.points, p))]
        return bool(inside) and bool(self.misses.contain(inside).all())

    def nearby(self) -> Params | None:
        """The best point so far with another value in the place where fewest others were tried.

        None where nothing is left of these that would not surely miss.
        """
        data, score = self._forecast()
        centre = next(iter(self._centres(data)), {})
        tried: Counter[str] = Counter()
        left: dict[str, list[Params]] = {}
        for params in self._moves(centre):
            changed = (n for n in self.points.parameters if centre.get(n) != params.get(n))
            place, described = next(changed, None), self.memory.describe(params)
            if place is None or described is None:
                continue
            if described.key in self.keys:
                tried[place] += 1
            elif self.misses is None or not self.misses.contain([params])[0]:
                left.setdefault(place, []).append(params)
        if not left:
            return None
        return self._first(left[min(left, key=lambda place: tried[place])], score)

    def improve(self, within: Callable[[Params], bool] | None = None) -> Params:
        """The most promising new point of a pool, `within` a branch where one is given."""
        fits, local = within or (lambda params: True), self.memory.knowledge.local
        data, score = self._forecast()
        near = [p for p in self._centres(data) if fits(p)][: _CENTRES if local else _INCUMBENTS]
        drawn = (self.points.complete({}, self.rng) for _ in range(0 if local else _RANDOM))
        pool = {frozenset(p.items()): p for p in drawn if fits(p)}
        ranked: list[tuple[float, int, Params]] = []
        scored: set[frozenset[Any]] = set()
        for _ in range(1 if local else 2):
            moved = (q for p in near for q in self._moves(p) if fits(q))
            pool |= {frozenset(q.items()): q for q in moved}
            new = [q for key, q in pool.items() if key not in self.seen and key not in scored]
            scored |= pool.keys()
            if new:
                x = self.encoding.rows(new)
                new, x, *features = self._described(new, x, data)
                values = -score(new, x, *features)
                ranked += zip(values, range(len(ranked), len(ranked) + len(new)), new, strict=True)
                ranked.sort()
            near = [q for *_, q in ranked[:3]]
        short = list(self.had((q for *_, q in ranked), _SHORT if self.names else 1))
        return self._first([p for p, _ in short], score) if short else self.cover()

    def _first(self, points: list[Params], score: Score) -> Params:
        """The most promising one, by exact features."""
        described = (self.memory.describe(p) for p in points)
        exact = self._features(d for d in described if d is not None)
        off = np.zeros(len(self.names))
        return points[int(np.argmax(score(points, self.encoding.rows(points), exact, off)))]

    def _centres(self, data: _Data) -> list[Params]:
        """Known points, the best first; none where the search has just gone on elsewhere."""
        shown = data.y if self.memory.knowledge.part is None else data.values
        order = np.argsort(joined(shown, shown, self.draw), kind="stable")
        if data.y.shape[1] == 2:
            front = nondominated([tuple(y) for y in data.y.tolist()])
            order = np.array(sorted(front, key=lambda i: tuple(data.y[i])) + list(order))
        if data.first and len(data.rows) < data.first + _ELSEWHERE:
            return []
        return [data.rows[i].params for i in order if i >= data.first]

    def _described(
        self, points: list[Params], x: Array, data: _Data
    ) -> tuple[list[Params], Array, Array, Array]:
        """Points, their features and how far off these are: exact ones of what can be had."""
        if not self.memory.knowledge.local:
            return points, x, *impute(data.x, data.features, x)
        found = list(self.had(points, len(points), len(points)))
        points = [p for p, _ in found]
        exact = self._features(d for _, d in found)
        return points, self.encoding.rows(points), exact, np.zeros(len(self.names))

    def _moves(self, params: Params) -> Iterator[Params]:
        yield from self.points.moves(params, self.rng)
        yield from self.memory.knowledge.moves(params, self.rng)

    def _features(self, described: Iterable[Described]) -> Array:
        found = [[d.features.get(name, 0.0) for name in self.names] for d in described]
        return np.array(found, float).reshape(len(found), len(self.names))

    def _data(self, rows: list[Row]) -> _Data:
        """Of many trials the best, the latest and some others."""
        values = np.array([r.values for r in rows])
        for j, value in self.enough.items():
            values[:, j] = np.maximum(values[:, j], value)
        if len(rows) > _MOST:
            ranks = values.argsort(axis=0).argsort(axis=0).sum(axis=1)
            best = set(np.argsort(ranks, kind="stable")[: _MOST // 2].tolist())
            latest = set(range(len(rows) - _MOST // 4, len(rows)))
            others = sorted(set(range(len(rows))) - best - latest)
            chosen = random.Random(len(rows) // _EVERY).sample(others, _MOST // 4)
            kept = sorted(best | latest | set(chosen))
            rows, values = [rows[i] for i in kept], values[kept]
        features = self._features(r.described for r in rows if r.described)
        if (part := self.memory.knowledge.part) is None:
            y = np.stack([warp(v) for v in values.T], axis=1)
        else:
            y = log_rest(values, features[:, [self.names.index(part)]])
            y = (y - y.mean()) / (y.std() + 1e-12)
        for j, name in self.memory.knowledge.exact.items():
            known = features[:, self.names.index(name)]
            y[:, j] = (known - known.mean()) / (known.std() + 1e-12)
        x = self.encoding.rows([r.params for r in rows])
        shown = joined(values, values, 0).tolist()
        first = latest_start(shown, _PATIENCE) if self.memory.knowledge.local else 0
        return _Data(rows, x, features, y, values, first)

    def _forecast(self) -> tuple[_Data, Score]:
        """What is known, and what that says of others."""
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

        bounds = self._bounds(data, list(models))

        def score(points: list[Params], x: Array, features: Array, off: Array) -> Array:
            mean = np.zeros((len(x), data.y.shape[1]))
            deviation = np.zeros_like(mean)
            for j, at in exact.items():
                mean[:, j] = (features[:, at] - middle[at]) / spread[at]
                deviation[:, j] = off[at] / spread[at]
            for j, model in models.items():
                mean[:, j], deviation[:, j] = model.predict(inputs(x, features))
                if j in bounds:
                    mean[:, j] = bounds[j].apply(points, mean[:, j])
            return self._gain(data, points, features, mean, deviation)

        return data, score

    def _gain(
        self, data: _Data, points: list[Params], features: Array, mean: Array, deviation: Array
    ) -> Array:
        """How promising points are whose outcomes are forecast."""
        if (part := self.memory.knowledge.part) is not None:
            at = self.names.index(part)
            rest = log_rest(data.values, data.features[:, [at]])
            left = data.values[data.first :].min(initial=np.inf) - features[:, at]
            return rest_improvement(left, rest, mean[:, 0], deviation[:, 0])
        if not self.focus or data.y.shape[1] != 2:
            return promise(data.y, mean, deviation, self.draw)
        if self.reached:
            return self._smaller(points, data.y, mean, deviation)
        (j,) = self.enough
        gain = log_improvement(mean[:, j], deviation[:, j], float(data.y[:, j].min()))
        return gain if self.misses is None else gain - _FAR * self.misses.contain(points)

    def _bounds(self, data: _Data, objectives: Iterable[int]) -> dict[int, Bounds]:
        """What nested trials say; nothing where nothing is known of what is nested."""
        knowledge, known = self.memory.knowledge, [r.params for r in data.rows]
        if not knowledge.exact:
            return {}
        nested = Nested(self.points, knowledge.extent)
        if self.reached:
            (j,) = self.reached
            self.thresholds = Thresholds(nested, known, data.y[:, j], enough_up_to(data.y[:, j]))
        return {j: Bounds(nested, known, data.y[:, j]) for j in objectives}

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

    def _smaller(self, points: list[Params], known: Array, mean: Array, deviation: Array) -> Array:
        """Chance of another outcome that is enough, times the cost it saves."""
        (cost,) = self.memory.knowledge.exact
        (j,) = self.reached
        level = enough_up_to(known[:, j])
        least = float(known[known[:, j] <= level, cost].min())
        chance = log_ndtr((level - mean[:, j]) / np.maximum(deviation[:, j], 1e-6))
        saved = log_improvement(mean[:, cost], np.maximum(deviation[:, cost], 1e-9), least)
        scores: Array = self.thresholds.chances(points, chance) + saved
        return scores
