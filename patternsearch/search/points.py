"""The points of a conditional space as flat parameters: drawn, completed and moved by one place."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ..domains import Choice, Domain, FloatRange, IntRange
from ..space import ROOT, Params, Space, leaves, sample

_SHOWN = 9  # values of one number that a place is tried with


@dataclass(frozen=True)
class Parameter:
    """One parameter, present where any of `when` holds (always where it is empty).

    when: (another parameter, its values that lead here). Parameters whose names differ in their
    digits alone, with equal domains, are alike: of one `kind`.
    """

    name: str
    domain: Domain
    when: tuple[tuple[str, frozenset[Any]], ...] = ()

    @cached_property
    def kind(self) -> str:
        return re.sub(r"\d+", "#", self.name) + f" {self.domain}"


class Points:
    """A space whose parameters follow those that their presence depends on."""

    def __init__(self, parameters: Iterable[Parameter]) -> None:
        self.parameters = {p.name: p for p in parameters}
        self.parents = {name for p in self.parameters.values() for name, _ in p.when}
        kinds: dict[str, list[str]] = {}
        for p in self.parameters.values():
            kinds.setdefault(p.kind, []).append(p.name)
        self.alike = {kind: names for kind, names in kinds.items() if len(names) > 1}

        self.depths: dict[str, int] = {}  # how many choices lead to a parameter
        for p in self.parameters.values():
            self.depths[p.name] = max((1 + self.depths.get(n, 0) for n, _ in p.when), default=0)

    def complete(self, given: Params, rng: random.Random) -> Params:
        """The point with these values; those that are missing or out of place are drawn."""
        found: Params = {}
        for name, p in self.parameters.items():
            for parent, values in p.when:
                if parent in found and found[parent] in values:
                    break
            else:
                if p.when:
                    continue
            kept = name in given and p.domain.contains(given[name])
            found[name] = given[name] if kept else sample(p.domain, rng)
        return found

    def leading(self, name: str, value: Any) -> Params:
        """This value, and choices under which its parameter is present."""
        found = {name: value}
        for parent, values in self.parameters[name].when[:1]:
            found |= self.leading(parent, min(values, key=str))
        return found

    def moves(self, params: Params, rng: random.Random) -> Iterator[Params]:
        """Every point that differs in one place, or in all places alike set to one value."""
        for name, value in params.items():
            if (p := self.parameters.get(name)) is None:
                continue
            for other in _others(p.domain, value, rng):
                moved = {**params, name: other}
                if name not in self.parents:
                    yield moved
                    continue
                yield self.complete(moved, rng)
                old, new = f"{name}.{value}.", f"{name}.{other}."
                below = {n: v for n, v in params.items() if n.startswith(old)}
                if below:  # what is named alike below the other choice stays
                    kept = {new + n.removeprefix(old): v for n, v in below.items()}
                    yield self.complete({**kept, **moved}, rng)
        for names in self.alike.values():
            active = [n for n in names if n in params]
            for value in dict.fromkeys(params[n] for n in active):  # the same in every process
                if any(params[n] != value for n in active):
                    yield self.complete({**params, **dict.fromkeys(active, value)}, rng)


def _others(domain: Domain, value: Any, rng: random.Random) -> Iterable[Any]:
    """Other values of a place: all of a short list, else near and far ones of a range."""
    if isinstance(domain, Choice):
        return [v for v in domain.options if v != value]
    if isinstance(domain, IntRange):
        if domain.size() <= _SHOWN:
            return (v for v in range(domain.low, domain.high + 1, domain.step) if v != value)
        near = {value - domain.step, value + domain.step, *(sample(domain, rng) for _ in range(4))}
        near |= {value - value // 4, value + value // 4} if domain.log else set()
        return sorted(v for v in near - {value} if domain.contains(v))
    return (_nudged(domain, value, scale, rng) for scale in (0.03, 0.1, 0.1, 0.3))


def _nudged(domain: FloatRange, value: float, scale: float, rng: random.Random) -> float:
    by = rng.gauss(0, scale)
    moved = value + by * (domain.high - domain.low)
    if domain.log:
        moved = value * math.exp(by * math.log(domain.high / domain.low))
    return min(max(moved, domain.low), domain.high)


def space_points(space: Space) -> Points:
    """The points of a search space file, its conditions read off the tree."""
    found: dict[str, Parameter] = {}
    trees = (*leaves(space.assignment, ROOT, {}), *leaves(space.train, "train", {}))
    for name, domain, chosen in trees:
        # the nearest choice implies those before it
        nearest = next((n for n in reversed(chosen) if n in found), None)
        before = found[name].when if name in found else ()
        if nearest is None or (name in found and not before):
            found[name] = Parameter(name, domain)
        else:
            leading = _leading(found[nearest].domain, chosen[nearest])
            found[name] = Parameter(name, domain, (*before, (nearest, leading)))
    return Points(found.values())


def _leading(domain: Domain, value: Any) -> frozenset[Any]:
    """The values of a choice that lead where `value` does: of a count, the larger ones too."""
    if isinstance(domain, IntRange):
        return frozenset(v for v in range(domain.low, domain.high + 1, domain.step) if v >= value)
    if isinstance(domain, Choice) and all(type(v) is int for v in domain.options):
        return frozenset(v for v in domain.options if v >= value)
    return frozenset([value])


def learned_points(domains: Mapping[str, Domain], trials: Sequence[Params]) -> Points:
    """The points of a space known from trials alone.

    A parameter that some trials lack depends on the latest earlier one whose values tell the trials
    with it from those without.
    """
    places = {name: [list(t).index(name) for t in trials if name in t] for name in domains}
    order = sorted(domains, key=lambda name: max(places[name], default=0))
    found = []
    for i, name in enumerate(order):
        having = [t for t in trials if name in t]
        lacking = [t for t in trials if name not in t]
        when = _telling(order[:i], domains, having, lacking) if lacking else None
        found.append(Parameter(name, domains[name], () if when is None else (when,)))
    return Points(found)


def _telling(
    names: Sequence[str],
    domains: Mapping[str, Domain],
    having: Collection[Params],
    lacking: Collection[Params],
) -> tuple[str, frozenset[Any]] | None:
    for name in reversed(names):
        if domains[name].size() < math.inf and all(name in t for t in having):
            values = frozenset(t[name] for t in having)
            if not any(t[name] in values for t in lacking if name in t):
                return name, values
    return None
