"""What each order, band and rank did to the metric: marginal means over the trials of a sweep."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace

from .. import describe
from ..assignment import Assignment, Mixer
from ..patterns.banded import Banded
from ..sizes import Spec, places
from ..task import get_task
from .interval import Estimate, estimate
from .results import Results, TrialRecord

_ENOUGH = 0.95  # of the trials must have come to the epoch at which all are compared
_RANKS = ("below a quarter", "a quarter or more", "half or more", "full", "no map of its own")
FACTORS = {
    "order": "order of a mixer: 1 fixed weights, 2 gated or decays from the input, 3 attention",
    "mixer": "kind of mixer in a block",
    "band": "positions that a band of a block sees",
    "positions": "family of patterns along positions in a block",
    "channels": "family of patterns along channels",
    "rank": "lowest rank of a map along channels, of full rank",
    "blocks": "number of blocks",
    "width": "channels between the blocks",
}


@dataclass(frozen=True)
class Level:
    """Trials with one value of a factor.

    final: the metric of those that finished. early: that of all at one early epoch, where those
    that were stopped later count as well.
    """

    name: str
    final: Estimate
    early: Estimate


@dataclass(frozen=True)
class Factor:
    """A choice, in words, and the values that trials had; a trial may have several of them."""

    name: str
    levels: tuple[Level, ...]


def early_epoch(results: Results) -> float:
    """The latest epoch that almost every trial was evaluated at; 0 where there is none."""
    reached: dict[float, int] = defaultdict(int)
    for trial in results.trials:
        for row in trial.curve if trial.state != "FAIL" else ():
            reached[row["epoch"]] += results.metric in row
    most = max(reached.values(), default=0)
    return max((e for e, n in reached.items() if n and n >= _ENOUGH * most), default=0)


def factors(results: Results) -> list[Factor]:
    """Every factor that had at least two values."""
    spec, epoch = get_task(results.config.task).spec, early_epoch(results)
    groups: dict[str, dict[str, list[TrialRecord]]] = {name: defaultdict(list) for name in FACTORS}
    for trial in results.trials:
        if trial.state != "FAIL":
            for factor, level in set(_levels(trial.assignment, spec)):
                groups[factor][level].append(trial)
    found = []
    for factor, levels in groups.items():
        if len(levels) > 1:
            ordered = sorted(levels.items(), key=lambda item: _rank(item[0]))
            made = (_level(name, trials, results.metric, epoch) for name, trials in ordered)
            found.append(Factor(FACTORS[factor], tuple(made)))
    return found


def _level(name: str, trials: list[TrialRecord], metric: str, epoch: float) -> Level:
    done = [t.values[metric] for t in trials if t.state == "COMPLETE"]
    rows = (row for t in trials for row in t.curve)
    early = [row[metric] for row in rows if row["epoch"] == epoch and metric in row]
    return Level(name, _few(estimate(done)), _few(estimate(early)))


def _few(value: Estimate) -> Estimate:
    """Without the interval of two values, which says nothing: it is 13 times their distance."""
    return value if value.n > 2 else replace(value, half=math.inf)


def _rank(name: str) -> tuple[float, str]:
    """Ranks and numbers by size, before words by the alphabet."""
    if name in _RANKS:
        return _RANKS.index(name), ""
    head = name.split()[0].split("+")
    return (sum(map(float, head)), "") if all(p.isdigit() for p in head) else (math.inf, name)


def _levels(assignment: Assignment, spec: Spec) -> Iterator[tuple[str, str]]:
    """(factor, level) of an assignment."""
    mixers = [block.mixer for block in assignment.blocks if block.mixer is not None]
    for mixer in mixers:
        yield "order", str(mixer.order)
        yield "mixer", describe.mixer_kind(mixer)
        yield "positions", mixer.positions.family
        yield "band", _band(mixer)
    for block in assignment.blocks:
        for pattern in block.channel:
            yield "channels", pattern.family
    yield "rank", _lowest(assignment, spec)
    yield "blocks", str(len(assignment.blocks))
    yield "width", str(assignment.width)


def _band(mixer: Mixer) -> str:
    if not isinstance(mixer.positions, Banded):
        return "all (no band)"
    return describe.window(mixer.positions)


def _lowest(assignment: Assignment, spec: Spec) -> str:
    ranks = []
    for place in places(assignment, spec):
        if ".channel" in place.name:
            full = min(math.prod(place.out), math.prod(place.inp))
            ranks.append(place.pattern.matrix_rank(place.out, place.inp) / full)
    if not ranks:
        return "no map of its own"
    for least, name in ((1.0, "full"), (0.5, "half or more"), (0.25, "a quarter or more")):
        if min(ranks) >= least:
            return name
    return "below a quarter"
