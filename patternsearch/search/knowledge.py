"""What the structured sampler is told of a space of patterns on a task."""

from __future__ import annotations

import math
from statistics import fmean

from ..assignment import Assignment
from ..codec import digest
from ..config import SweepConfig
from ..errors import PatternSearchError
from ..pattern import Cost
from ..patterns.banded import Banded
from ..sizes import Place, Spec, model_cost, places, resolve
from ..space import FixedTrial, Params, Space
from ..space_check import within
from .points import space_points
from .proposal import Described, Knowledge


class PatternKnowledge(Knowledge):
    """Costs, orders, reach and free exponents of the assignments of a space, caps included."""

    def __init__(self, config: SweepConfig, space: Space, spec: Spec) -> None:
        self.config, self.space, self.spec = config, space, spec
        self.points = space_points(space)
        costs = ("parameters", "flops")
        self.exact = {i: n for i, n in enumerate(config.objectives) if n in costs}

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
