"""What the structured sampler knows: of a space before any trial, and what trials have shown."""

from __future__ import annotations

import random
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from ..space import Params
from .covering import tokens
from .points import Points
from .surrogate import Array

Tokens = tuple[Hashable, ...]


@dataclass(frozen=True)
class Described:
    """A point that can be trained: `key` is equal for points that are the same."""

    key: Hashable
    features: Mapping[str, float] = field(default_factory=dict)


class Knowledge:
    """What may be known of a space beyond what trials show. Every part is optional.

    points: its parameters and their conditions. exact: objective's index -> name of the feature
    that equals it, up to a rising function, before anything is trained. enough: objective's index
    -> a value that makes a trial stop, so that what is better is luck. local: whether only points
    one place away from the best are scored, all by exact features; `describe` should be fast.
    part: the feature that is a known part of the only objective, in its units; the rest is > 0.
    """

    points: Points | None = None
    local: bool = False
    part: str | None = None
    exact: Mapping[int, str] = {}
    enough: Mapping[int, float] = {}

    def describe(self, params: Params) -> Described | None:
        """Identity and features of a point; None where it cannot be trained."""
        return Described(frozenset(params.items()))

    def moves(self, params: Params, rng: random.Random) -> Iterable[Params]:
        """Points near another, beside those that differ in one place."""
        return ()

    def extent(self, name: str, value: Any) -> float | None:
        """How much a parameter's value can express: with less it is inside of those with more.

        None where it can be compared with no other value.
        """
        return None


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
