"""Which points lie inside of others: a narrower band in a wider one, a rank in a higher one.

What fails with more freedom fails with less of it, and what succeeds with less succeeds with more,
as far as training finds it: how often that held so far says how much it is believed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ..domains import Choice
from ..space import Params, ends
from .points import Points
from .surrogate import Array

_ABSENT = -1
_UNKNOWN = 0.02  # chance of points of which nothing nested is known


class Nested:
    """Points compared place by place; `extent(name, value)` is that of a Knowledge.

    What is named alike below two values of a choice is one place.
    """

    def __init__(self, points: Points, extent: Callable[[str, Any], float | None]) -> None:
        self.points, self.extent = points, extent
        places: dict[str, int] = {}
        self.at = {n: places.setdefault(_place(n, points), len(places)) for n in points.parameters}
        self.count = len(places)
        self.values: dict[tuple[int, Any], int] = {}
        self.extents: dict[tuple[str, Any], float] = {}

    def lowest(self) -> Array:
        """For every place a number below its least extent; nan where it has none."""
        found = np.full(self.count, np.nan)
        for name, p in self.points.parameters.items():
            options = p.domain.options if isinstance(p.domain, Choice) else ends(p.domain)
            extents = [e for v in options if (e := self.extent(name, v)) is not None]
            if extents:
                found[self.at[name]] = min(extents) - 1
        return found

    def codes(self, points: Sequence[Params]) -> tuple[Array, Array]:
        """[points, places]: a number that names the value, and its extent (nan: none)."""
        shape = len(points), self.count
        value, extent = np.full(shape, float(_ABSENT)), np.full(shape, np.nan)
        for i, params in enumerate(points):
            for name, chosen in params.items():
                if (j := self.at.get(name)) is not None:
                    value[i, j] = self.values.setdefault((j, chosen), len(self.values))
                    if (name, chosen) not in self.extents:
                        found = self.extent(name, chosen)
                        self.extents[name, chosen] = np.nan if found is None else found
                    extent[i, j] = self.extents[name, chosen]
        return value, extent

    def inside(self, few: Sequence[Params], many: Sequence[Params]) -> Array:
        """[few, many], 1 where a point of `few` lies inside of one of `many`.

        A place that one of them lacks hangs on another in which they differ.
        """
        (value, extent), (values, extents) = self.codes(few), self.codes(many)
        a, b = value[:, None], values[None]
        less = extent[:, None] < extents[None]
        same = (a == b) | (a == _ABSENT) | (b == _ABSENT)
        found: Array = ((same | less).all(2) & less.any(2)).astype(float)
        return found


def _place(name: str, points: Points) -> str:
    """The name without the values of the choices that it is below."""
    for parent in sorted(points.parents, key=len, reverse=True):
        domain = points.parameters[parent].domain
        for value in domain.options if isinstance(domain, Choice) else ():
            if name.startswith(f"{parent}.{value}."):
                name = f"{parent}.{name.removeprefix(f'{parent}.{value}.')}"
                break
    return name


class Bounds:
    """What the outcomes y (to be minimised) of `known` points say of those around them."""

    def __init__(self, nested: Nested, known: Sequence[Params], y: Array) -> None:
        self.nested, self.known, self.y = nested, known, y
        within = nested.inside(known, known)  # [less, more]
        held = float((within * (y[:, None] >= y[None] - 0.1)).sum())
        self.belief = max(0.0, 2 * (held + 1) / (float(within.sum()) + 2) - 1)

    def apply(self, points: Sequence[Params], mean: Array) -> Array:
        """The forecast moved towards what nested points allow, as far as that is believed."""
        less = self.nested.inside(points, self.known)
        more = self.nested.inside(self.known, points).T
        low = np.where(less > 0, self.y, -np.inf).max(axis=1)
        high = np.where(more > 0, self.y, np.inf).min(axis=1)
        bound = np.minimum(np.maximum(mean, low), np.maximum(low, high))
        moved: Array = mean + self.belief * (bound - mean)
        return moved


class Misses:
    """Points that were far from what is enough: what lies inside of them is so too, mostly.

    What counts as nearer is a quarter of the way: models that all miss alike differ by chance.
    """

    def __init__(self, nested: Nested, known: Sequence[Params], y: Array, enough: float) -> None:
        """known: points whose outcomes are y, of which none was `enough`."""
        self.nested = nested
        away = y - enough
        self.missed = [p for p, a in zip(known, away, strict=True) if a > np.median(away) / 4]
        far = away[away > np.median(away) / 4]
        within = nested.inside(known, self.missed)  # [less, more]
        nearer = float((within * (away[:, None] < 0.75 * far)).sum())
        self.chance = (nearer + 1) / (float(within.sum()) + 2)  # that one inside is not

    def contain(self, points: Sequence[Params]) -> Array:
        """[points], 1 where one lies inside of them."""
        found: Array = self.nested.inside(points, self.missed).max(axis=1, initial=0.0)
        return found


class Thresholds:
    """How likely points succeed that lie inside of ones that did.

    In every place the least that is enough is anywhere between what succeeded and the most that
    failed with no less in all other places: halving it costs the fewest trials. A trial that is no
    worse than those that contain one that succeeded may just have been trained badly.
    """

    def __init__(self, nested: Nested, known: Sequence[Params], y: Array, level: float) -> None:
        """known: points whose outcomes are y, enough up to `level`."""
        self.nested = nested
        self.enough = [p for p, v in zip(known, y, strict=True) if v <= level]
        unlucky = y[nested.inside(self.enough, known).any(axis=0)].max(initial=level)
        near = max(level, min(float(unlucky), float(np.median(y))))
        failed = [p for p, v in zip(known, y, strict=True) if v > near]
        values, extents = nested.codes(failed)
        succeeded, self.most = nested.codes(self.enough)
        self.fails = np.tile(nested.lowest(), (len(self.enough), 1))
        for i, (value, most) in enumerate(zip(succeeded, self.most, strict=True)):
            same = (values == value) | (values == _ABSENT) | (value == _ABSENT)
            short = ~same & ~(extents > most)
            alone = (short.sum(axis=1) == 1)[:, None] & short & (extents < most)
            most_failed = np.where(alone, extents, -np.inf).max(axis=0, initial=-np.inf)
            self.fails[i] = np.maximum(self.fails[i], most_failed)

    def chances(self, points: Sequence[Params], forecast: Array) -> Array:
        """Logarithms, from those of a forecast that knows nothing of what is nested."""
        found: Array = np.log(_UNKNOWN) + forecast
        _, extents = self.nested.codes(points)
        inside = self.nested.inside(points, self.enough)
        for i, (most, fail) in enumerate(zip(self.most, self.fails, strict=True)):
            part = (extents - fail) / (most - fail)
            part = np.where(extents < most, np.clip(part, 0.02, 1), 1.0)
            chance = np.log(part).sum(axis=1) + forecast / 2
            found = np.where(inside[:, i] > 0, np.maximum(found, chance), found)
        return found
