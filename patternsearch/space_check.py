"""Whether a space makes sense for a task, found out before anything starts."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

from .assignment import Assignment
from .codec import decode
from .config import STATIC, Caps
from .domains import Choice
from .errors import PatternSearchError, SpaceError, unknown
from .pattern import Cost
from .patterns.banded import Banded
from .sizes import Spec, model_cost, places, resolve
from .space import ROOT, FixedTrial, Params, Space, ends, leaves
from .train import TrainSettings

_TRIES = 200  # points looked at to find one within the caps


def check_space(space: Space, spec: Spec, settings: TrainSettings) -> None:
    """Try every alternative and every end of every range on a task before anything starts.

    Raises SpaceError naming the file and the parameter where one makes no valid assignment.
    """
    try:
        _check_space(space, spec, settings)
    except PatternSearchError as e:
        named = str(e).startswith(space.source)
        raise SpaceError(str(e) if named else f"{space.source}: {e}") from None


def _check_space(space: Space, spec: Spec, settings: TrainSettings) -> None:
    rng = random.Random(0)
    found = [*leaves(space.assignment, ROOT, {}), *leaves(space.train, "train", {})]
    first = {name: ends(domain)[0] for name, domain, _ in found}
    possible = 0
    reasons: list[str] = []
    for name, domain, chosen in [("", Choice((None,)), {}), *found]:
        for value in ends(domain) if not isinstance(domain, Choice) else domain.options:
            trial = FixedTrial({**first, **chosen, name: value}, rng)
            assignment, train = space.suggest(trial)
            decode(TrainSettings, {**_plain(settings), **train}, "train")
            if isinstance(domain, Choice) or value == ends(domain)[0]:
                _check_bands(assignment, spec, name)
            try:
                resolve(assignment, spec)
                possible += 1
            except PatternSearchError as e:
                reasons.append(str(e))
    if not possible:
        raise SpaceError(f"nothing in it fits the task: {reasons[0]}")
    for name, params in space.experts.items():
        _check_expert(space, name, params, spec)


def within(cost: Cost, caps: Caps) -> None:
    """Raise SpaceError where a cost is over a cap."""
    for name in STATIC:
        cap, value = getattr(caps, name), getattr(cost, name)
        if cap is not None and value > cap:
            raise SpaceError(f"{name}={value} is over the cap of {cap:g}")


def check_caps(space: Space, spec: Spec, caps: Caps) -> None:
    """Look for one point within the caps: among random ones, then downhill from the cheapest.

    Raises SpaceError naming the cheapest one found where there is none.
    """
    found = {name: getattr(caps, name) for name in STATIC}
    limits = {name: cap for name, cap in found.items() if cap is not None}
    rng = random.Random(0)
    best: tuple[float, Params, Cost] | None = None
    for attempt in range(2 * _TRIES if limits else 0):
        if best is None or attempt < _TRIES:
            params, assignment = space.point({}, rng)
        else:
            params = space.neighbour(best[1], rng)
            assignment = space.point(params)[1]
        try:
            cost = model_cost(resolve(assignment, spec), spec)
        except PatternSearchError:
            continue
        excess = max(getattr(cost, name) / cap for name, cap in limits.items())
        if excess <= 1:
            return
        if best is None or excess < best[0]:
            best = excess, params, cost
    if best is not None:
        least = ", ".join(f"{name}={getattr(best[2], name)}" for name in limits)
        raise SpaceError(
            f"{space.source}: nothing found within the caps {limits}; the smallest model of "
            f"{2 * _TRIES} has {least}; raise caps or widen the space towards smaller models"
        )


def _plain(settings: TrainSettings) -> dict[str, Any]:
    return dict(vars(settings))


def _check_bands(assignment: Assignment, spec: Spec, name: str) -> None:
    """A band wider than the task's grid is a mistake.

    At the upper end of a range, or on a later grid, it is cut: a space serves grids of any size.
    """
    try:
        found = list(places(assignment, spec))
    except PatternSearchError:
        return  # the reason comes with `resolve`
    for place in found:
        pattern = place.pattern
        if not isinstance(pattern, Banded) or pattern.split(place.inp)[0] != spec.grid:
            continue
        plain = replace(pattern, entry=None)
        if (why := plain.unavailable(spec.grid, spec.grid)) is not None:
            raise SpaceError(f"{name or place.name}: {why}")


def _check_expert(space: Space, name: str, params: Params, spec: Spec) -> None:
    try:
        used, assignment = space.point(params)
        resolve(assignment, spec)
    except PatternSearchError as e:
        raise SpaceError(f"experts.{name}: {e}") from None
    for key in params:
        if key not in used:
            raise SpaceError(f"experts.{name}: {unknown('parameter', key, used)}")
