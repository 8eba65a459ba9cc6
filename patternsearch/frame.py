"""What must hold of an assignment besides its patterns: counts, strides, tables."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from .assignment import Assignment
from .errors import PatternError
from .patterns.dense import Dense
from .patterns.low_rank import LowRank

if TYPE_CHECKING:
    from .sizes import Spec


def check_frame(assignment: Assignment, spec: Spec) -> None:
    """Raise PatternError, with the place, the value and what to do."""
    stem = assignment.stem
    _at_least_1("", width=assignment.width)
    _at_least_1("head: ", regions=assignment.head.regions)
    _at_least_1("stem: ", stride=1 if stem.stride == "all" else stem.stride)
    for i, block in enumerate(assignment.blocks):
        _at_least_1(f"block{i}: ", stride=block.stride, widen=block.widen)
        for name in ("stride", "widen"):
            if block.mixer is None and (value := getattr(block, name)) != 1:
                raise PatternError(f"block{i}: {name}={value} needs a mixer; use {name}=1")
        if not 0 < block.expansion < math.inf:
            raise PatternError(f"block{i}: expansion={block.expansion} must be above 0")
        for part in block.mixer.parts() if block.mixer else ():
            _at_least_1(f"block{i}.mixer: ", heads=part.heads)
    for part in stem.mixer.parts() if stem.mixer else ():
        _at_least_1("stem.mixer: ", heads=part.heads)
        if part.order != 1:
            raise PatternError(f"stem.mixer: order={part.order}; only order 1 reads raw input")
    if spec.causal and (stem.stride != 1 or any(b.stride != 1 for b in assignment.blocks)):
        raise PatternError("a causal task keeps every position; use stride=1 in stem and blocks")
    if spec.per_position and (stem.stride != 1 or any(b.stride != 1 for b in assignment.blocks)):
        raise PatternError("a task that labels positions keeps every one; use stride=1")
    if spec.causal and "batch" in {assignment.head.norm, *(b.norm for b in assignment.blocks)}:
        raise PatternError("norm='batch': trains on later positions too; a causal task needs layer")
    if spec.rows and assignment.head.pool != "none":
        raise PatternError(f"head: pool={assignment.head.pool!r} is for one label an example")
    if not isinstance(stem.table, Dense | LowRank) or stem.table.entry is not None:
        raise PatternError(f"stem.table: {stem.table.family}; a table is dense or low_rank")
    if assignment.head.tied and not (spec.per_position and spec.vocabulary == spec.classes):
        raise PatternError(
            f"head: tied=True takes the table of {spec.vocabulary} tokens for {spec.classes} "
            "classes; use it where every position is labelled with a token"
        )
    if assignment.head.tied and any(block.widen != 1 for block in assignment.blocks):
        raise PatternError("head: tied=True keeps the width of the table; use widen=1 in blocks")
    if stem.mixer is None and stem.stride != 1:
        raise PatternError(f"stem: stride={stem.stride} needs a mixer to bring positions together")


def _at_least_1(where: str, **values: int) -> None:
    for name, value in values.items():
        if value < 1:
            raise PatternError(f"{where}{name}={value} must be at least 1")
