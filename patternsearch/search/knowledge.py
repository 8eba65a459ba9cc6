"""What the structured sampler is told of a space of patterns on a task."""

from __future__ import annotations

import math
import random
import re
from statistics import fmean
from typing import Any

from ..assignment import Assignment, Mixer
from ..codec import digest
from ..config import METRICS, SweepConfig
from ..domains import Choice
from ..errors import PatternSearchError
from ..pattern import Cost
from ..patterns.banded import Banded
from ..sizes import Place, Spec, model_cost, places, resolve
from ..space import FixedTrial, Params, Space, ends
from ..space_check import within
from .known import Described, Knowledge
from .points import Points, space_points

_TRIES = 8  # points at which a parameter's effect on the size of a model is looked for


class PatternKnowledge(Knowledge):
    """Costs, orders, reach and free exponents of the assignments of a space, caps included."""

    points: Points

    def __init__(self, config: SweepConfig, space: Space, spec: Spec) -> None:
        self.config, self.space, self.spec = config, space, spec
        self.points = space_points(space)
        costs = ("parameters", "flops")
        self.exact = {i: n for i, n in enumerate(config.objectives) if n in costs}
        stop = config.train.stop_at
        if stop is not None:  # of the task's metric alone
            others = ("valid_loss", *METRICS)
            self.enough = {i: stop for i, n in enumerate(config.objectives) if n not in others}
        self._rising: dict[str, float] = {}

    def extent(self, name: str, value: Any) -> float | None:
        """A number that makes a model larger, or smaller; of the families dense, of ties none."""
        domain = self.points.parameters[name].domain
        if isinstance(domain, Choice) and any(isinstance(v, str) for v in domain.options):
            whole = "none" if name.endswith("tie") else "dense"
            return float(value == whole) if whole in domain.options else self._gated(name, value)
        if (kind := self.points.parameters[name].kind) not in self._rising:
            self._rising[kind] = self._rise(name, *ends(domain))
        return value * self._rising[kind] if self._rising[kind] else None

    def _gated(self, name: str, value: Any) -> float | None:
        """Fixed weights are inside of gated ones, whose gates may be constant."""
        mixer = self._mixer(name, value)
        if mixer is None or not mixer.bias or mixer.positions.family == "semiseparable":
            return None
        return {(1, False): 0.0, (2, True): 1.0}.get((mixer.order, "gate" in mixer.maps))

    def _mixer(self, name: str, value: Any) -> Mixer | None:
        """Of the block that a choice is of; None of other choices."""
        if not (found := re.fullmatch(r"block(\d*)", name)):
            return None
        try:
            params = self.points.complete(self.points.leading(name, value), random.Random(name))
            blocks = self.space.suggest(FixedTrial(params))[0].blocks
        except PatternSearchError:
            return None
        return blocks[int(found[1] or 0)].mixer

    def _rise(self, name: str, low: float, high: float) -> float:
        """Whether there always are more parameters at the upper end: 1, fewer: -1, else: 0."""
        rng = random.Random(name)
        changes = set()
        for _ in range(_TRIES):
            point = self.points.complete(self.points.leading(name, low), rng)
            few, many = (
                self.describe(self.points.complete({**point, name: v}, rng)) for v in (low, high)
            )
            if few is not None and many is not None:
                change = many.features["parameters"] - few.features["parameters"]
                changes.add(math.copysign(1.0, change) if change else 0.0)
        return changes.pop() if len(changes) == 1 else 0.0

    def describe(self, params: Params) -> Described | None:
        try:
            assignment, train = self.space.suggest(FixedTrial(params))
            assignment = resolve(assignment, self.spec)
            cost = model_cost(assignment, self.spec)
            within(cost, self.config.caps)
        except PatternSearchError:
            return None
        key = identity(self.config, assignment, train)
        return Described(key, features(assignment, self.spec, cost))


def identity(config: SweepConfig, assignment: Assignment, train: Params) -> str:
    """Equal for trials that would be the same: a resolved assignment and how it is trained."""
    settings = {**config.train.model_dump(), **train}
    return f"{assignment.digest()}-{digest(settings, 6)}"


def features(assignment: Assignment, spec: Spec, cost: Cost) -> dict[str, float]:
    """Numbers that mean the same whatever the family: logarithms of costs, mixers of each order.

    Beside them, of the patterns along positions (`mix`) and along features (`map`): the means of
    the free exponents (Pattern.omega, psi, nu), and how far the widest mixer reaches, from 0 (a
    position sees itself) to 1 (the whole grid).
    """
    found = {"parameters": math.log(max(1, cost.parameters)), "flops": math.log(max(1, cost.flops))}
    for block in assignment.blocks:
        if block.mixer is not None:
            name = f"order{block.mixer.order}"
            found[name] = found.get(name, 0.0) + 1
    kinds: dict[str, list[Place]] = {"mix": [], "map": []}
    for place in places(assignment, spec):
        kinds["mix" if place.name.endswith("mixer.positions") else "map"].append(place)
    for kind, found_places in kinds.items():
        for exponent in ("omega", "psi", "nu"):
            values = [getattr(p.pattern, exponent)(p.out, p.inp) for p in found_places]
            known = [v for v in values if v is not None]
            found[f"{kind}.{exponent}"] = fmean(known) if known else 1.0
    found["reach"] = max(map(_reach, kinds["mix"]), default=0.0)
    return found


def _reach(place: Place) -> float:
    pattern = place.pattern
    if not isinstance(pattern, Banded):
        return 1.0
    grid, _ = pattern.split(place.inp)
    lower, upper, dilation = pattern.window(grid)
    widths = zip(grid, lower, upper, dilation, strict=True)
    return fmean(min(1.0, (a + b) * d / max(1, n - 1)) for n, a, b, d in widths)
