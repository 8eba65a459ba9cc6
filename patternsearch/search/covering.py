"""What has been tried of a space, and what shows the most of a branch that has not."""

from __future__ import annotations

import random
from collections.abc import Callable, Hashable
from itertools import combinations
from typing import Any

from ..domains import Choice, Domain
from ..space import Params, ends
from .points import Points
from .surrogate import place_in


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


def untried(points: Points, tried: set[tuple[str, Any]]) -> list[Params]:
    """Every value not tried of a choice that others depend on, with what leads to it."""
    known = points.parameters
    return [
        points.leading(name, value)
        for name in (n for n in known if n in points.parents)
        for value in _options(known[name].domain)
        if isinstance(known[name].domain, Choice) and (name, value) not in tried
    ]


def grown(
    points: Points, given: Params, extent: Callable[[str, Any], float | None], rng: random.Random
) -> Params:
    """The point with these values and the most of all others that can be compared."""
    found = points.complete(given, rng)
    for name, p in points.parameters.items():
        if name in found and name not in given:
            extents = {v: extent(name, v) for v in _options(p.domain)}
            comparable = {v: e for v, e in extents.items() if e is not None}
            if comparable:
                most = max(comparable, key=lambda v: comparable[v])
                found = points.complete({**found, name: most}, rng)
    return found


def _options(domain: Domain) -> tuple[Any, ...]:
    """All values of a choice, the ends of a range."""
    return domain.options if isinstance(domain, Choice) else ends(domain)
