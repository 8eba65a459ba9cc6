"""An assignment in a few words, for tables and for the end of a sweep."""

from __future__ import annotations

from .assignment import Assignment, Block, Mixer
from .pattern import Pattern
from .patterns.banded import Banded
from .patterns.low_rank import LowRank
from .patterns.semiseparable import Semiseparable
from .sizes import Spec, places

_ENTRIES = {"dense": "conv", "diagonal": "depthwise", "block_diagonal": "grouped conv"}


def short(assignment: Assignment) -> str:
    """One line, such as `w22 | conv 3x3 | conv 3x3 /2max | average 2`."""
    stem = assignment.stem
    parts = [f"w{assignment.width}"]
    if isinstance(stem.table, LowRank):
        parts[0] += f" table of rank {stem.table.rank}"
    if stem.mixer is not None:
        parts.append(mixer_words(stem.mixer) + _stride(stem.stride))
    width = assignment.width
    for block in assignment.blocks:
        width *= block.widen
        parts.append(_merge(block, width))
    head = assignment.head
    read = head.positions.family
    if head.pool != "none":  # of which one value a region is left, its own average
        read = head.pool if read == "average" else f"{head.pool} {read}"
    parts.append(f"{read} {head.regions}")
    return " | ".join(parts)


def outputs(spec: Spec) -> str:
    """What a model says of an example, such as `one of 10 classes at every position`."""
    if spec.horizon is not None:
        columns = "1 number" if spec.classes == 1 else f"{spec.classes} numbers"
        return f"the next {spec.horizon} rows of {columns}"
    return f"one of {spec.classes:,} classes" + (" at every position" * spec.per_position)


def _merge(block: Block, width: int) -> str:
    mixed = mixer_words(block.mixer) if block.mixer else ""
    channel = "-".join(p.family for p in block.channel)
    pool = "" if block.pool == "none" else block.pool
    mixed += f" w{width}" if block.widen > 1 else ""
    words = " + ".join(w for w in (mixed, f"mlp {channel}" if channel else "") if w)
    return (words or "nothing") + (_stride(block.stride) + pool if block.stride != 1 else "")


def _stride(stride: int | str) -> str:
    return "" if stride == 1 else f" /{stride}"


def mixer_words(mixer: Mixer) -> str:
    """The usual name of a mixer, such as `gated depthwise 1x7` or `attention h4 band 8`."""
    if mixer.plus is not None:
        return " & ".join(map(mixer_words, mixer.parts()))
    heads = f" h{mixer.heads}" if mixer.heads > 1 else ""
    words = pattern_words(mixer.positions)
    if mixer.order >= 3:
        words, kind = _attention(mixer)
        return f"{kind}{heads} {words}"
    if mixer.order == 2:
        gated = "gated " if {"gate", "decay"} & set(mixer.maps) else f"{mixer.gate} "
        return f"{gated}{words}{heads}"
    return f"{words}{heads}"


def mixer_kind(mixer: Mixer) -> str:
    """The usual name without sizes, such as `gated depthwise` or `attention, band`."""
    positions = mixer.positions
    if mixer.order >= 3:
        kind = _attention(mixer)[1]
        banded = isinstance(positions, Banded)
        return f"{kind}, band" if banded else kind
    if isinstance(positions, Banded):
        words = _ENTRIES.get(positions.entry.family, "band") if positions.entry else "band"
    else:
        words = pattern_words(positions)
    gated = {"gate", "decay"} & set(mixer.maps)
    return words if mixer.order == 1 else f"{'gated' if gated else mixer.gate} {words}"


def _attention(mixer: Mixer) -> tuple[str, str]:
    """(what it sees, its name)."""
    positions = mixer.positions
    if isinstance(positions, Semiseparable):
        seen = "both sides" if positions.two_sided else "causal"
        decaying = "decaying " if "decay" in mixer.maps else ""
        return f"{seen} state {positions.state}", f"{decaying}linear attention"
    if isinstance(positions, LowRank):
        return f"both sides rank {positions.rank}", "linear attention"
    if positions.family == "kronecker":
        return "full", "axial attention"
    words = "full" if positions.family == "dense" else pattern_words(positions)
    return words, "attention" if mixer.order == 3 else "two-key attention"


def pattern_words(pattern: Pattern) -> str:
    """A pattern along positions by the name its field gives it."""
    if pattern.family == "semiseparable":
        return "recurrence" + (f" of {pattern.entry.family}" if pattern.entry else "")
    if isinstance(pattern, Banded):
        entry = pattern.entry.family if pattern.entry else ""
        name = _ENTRIES.get(entry, f"band of {entry}" if entry else "band")
        local = " untied" if pattern.tie == "none" else ""
        return f"{name} {window(pattern)}{local}"
    entry = f" of {pattern.entry.family}" if pattern.entry else ""
    return f"{pattern.family}{entry}"


def window(band: Banded) -> str:
    """How many positions a band sees, behind + itself + ahead where those differ: `3`, `7+1+0`."""

    def axes(value: object) -> tuple[object, ...]:
        return value if isinstance(value, tuple) else (value,)

    lower, upper = axes(band.lower), axes(band.upper)
    pairs = list(zip(lower * len(upper), upper * len(lower), strict=False))[
        : max(len(lower), len(upper))
    ]
    sizes = []
    for a, b in pairs:
        if isinstance(a, int) and isinstance(b, int):
            sizes.append(str(a + b + 1) if a == b else f"{a}+1+{b}")
        else:
            sizes.append("full")
    dilated = "" if band.dilation == 1 else f" dilated {band.dilation}"
    return "x".join(sizes) + dilated


def sentences(assignment: Assignment, spec: Spec) -> list[str]:
    """The model place by place: `place: pattern, from -> to, parameters, FLOPs`."""
    lines = [f"width {assignment.width}"]
    for place in places(assignment, spec):
        cost = place.cost()
        times = f" x{place.matrices}" if place.matrices > 1 else ""
        lines.append(
            f"{place.name}: {place.pattern}{times}, {_dims(place.inp)} -> {_dims(place.out)}, "
            f"{cost.parameters:,} parameters, {cost.flops:,} FLOPs"
        )
    return lines


def _dims(dims: tuple[int, ...]) -> str:
    return "x".join(map(str, dims))
