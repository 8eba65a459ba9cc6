"""The sizes a place of an assignment has in one task: what patterns get as arguments."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from .assignment import Assignment, Block, Mixer, Stem
from .errors import PatternError
from .frame import check_frame
from .pattern import Cost, Dims, Pattern, divisors, nearest
from .patterns.dense import Dense
from .patterns.low_rank import LowRank


@dataclass(frozen=True, kw_only=True)
class Spec:
    """What a model must know of a task.

    grid: positions. channels: numbers a position, or None where a position is one token of
    `vocabulary`. classes: outputs, of the whole example or, with per_position, of every position.
    horizon: with it the outputs are so many rows of `classes` numbers, the positions that follow.
    causal: nothing may depend on later positions.
    """

    grid: Dims
    classes: int
    channels: int | None = None
    vocabulary: int | None = None
    per_position: bool = False
    causal: bool = False
    horizon: int | None = None

    def __post_init__(self) -> None:
        least = {"classes": self.classes, "channels": self.channels, "vocabulary": self.vocabulary}
        least["horizon"] = self.horizon
        for name, value in least.items():
            if value is not None and value < 1:
                raise PatternError(f"spec: {name}={value} must be at least 1")
        if not self.grid or min(self.grid) < 1:
            raise PatternError(f"spec: grid={self.grid} must be positions an axis, such as (8, 8)")
        if (self.channels is None) == (self.vocabulary is None):
            raise PatternError(
                f"spec: channels={self.channels}, vocabulary={self.vocabulary}; give one of them"
            )
        if self.horizon is not None and (self.per_position or len(self.grid) != 1):
            raise PatternError(
                f"spec: horizon={self.horizon} follows one axis of positions; grid={self.grid}, "
                f"per_position={self.per_position}"
            )

    @property
    def rows(self) -> Dims:
        """Axes of the outputs before `classes`."""
        if self.horizon is not None:
            return (self.horizon,)
        return self.grid if self.per_position else ()


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """From positions `inp` with `d_in` channels to positions `out` with `d_out`."""

    out: Dims
    inp: Dims
    d_in: int
    d_out: int
    causal: bool = False


@dataclass(frozen=True, kw_only=True)
class Place:
    """One pattern where it stands.

    matrices: how many of it (one a head). vectors: how many vectors of one example each is applied
    to. computed: its cores come from the input, so it has no parameters. attentions: how many
    matrices of products of the input it stands for, 1 at order 3 and 2 at order 4. bias: numbers
    added. shared: its numbers are those of another place.
    """

    name: str
    pattern: Pattern
    out: Dims
    inp: Dims
    matrices: int = 1
    vectors: int = 1
    causal: bool = False
    computed: bool = False
    attentions: int = 0
    bias: int = 0
    shared: bool = False

    def unavailable(self) -> str | None:
        """Why the pattern cannot stand here as it is written; None where it can."""
        return self.misplaced() or self.pattern.unavailable(self.out, self.inp, self.causal)

    def misplaced(self) -> str | None:
        """Why it cannot stand here whatever its fields."""
        mixes = self.name.endswith(".positions") and self.name != "head.positions"
        entry = self.pattern.entry if mixes else self.pattern
        if entry is None or entry.entry is None:
            return None
        return (
            f"{entry.family}: entry={entry.entry.family!r}, but only the positions of a mixer have "
            "patterns as entries; remove it"
        )

    def cost(self) -> Cost:
        if self.attentions:
            one = self.pattern.attention_cost(self.out, self.inp, self.vectors)
            return one.repeat(self.attentions * self.matrices, 1)
        cost = self.pattern.cost(self.out, self.inp).repeat(self.matrices, self.vectors)
        if self.computed:  # once to make the entries from the input, once to apply them
            return replace(cost, parameters=0, flops=2 * cost.flops)
        if self.shared:
            cost = replace(cost, parameters=0)
        return cost + Cost(parameters=self.bias, bytes=4 * self.bias)


MAPS_ON_INPUT = ("value", "key", "decay", "value2", "key2")


def map_sizes(mixer: Mixer, at: Sizes, key: str) -> tuple[int, int]:
    """(d_in, d_out) of a map: queries and keys may have numbers of their own."""
    features = None
    if mixer.order == 3 and mixer.positions.entry is None and key in ("query", "key", "decay"):
        features = mixer.positions.features(at.out, at.inp)
    d_out = at.d_out if features is None else features * mixer.heads
    return at.d_out if key == "output" else at.d_in, d_out


def on_input(mixer: Mixer, key: str) -> bool:
    """Whether a map is applied to every position of the input, and not to the rows alone."""
    along_modes = mixer.order == 3 and mixer.positions.family == "kronecker"
    return key in MAPS_ON_INPUT or (key == "query" and along_modes)  # other modes are whole yet


def mixer_places(mixer: Mixer, at: Sizes, name: str) -> Iterator[Place]:
    """Every pattern of a mixer, in the order of computation."""
    if mixer.plus is not None:
        for k, part in enumerate(mixer.parts()):
            yield from mixer_places(part, at, f"{name}.parts.{k}")
        return
    for key, pattern in mixer.maps.items():
        rows = math.prod(at.inp if on_input(mixer, key) else at.out)
        d_in, d_out = map_sizes(mixer, at, key)
        bias = d_out if mixer.bias else 0
        yield Place(
            name=f"{name}.{key}",
            pattern=pattern,
            out=(d_out,),
            inp=(d_in,),
            vectors=rows,
            bias=bias,
        )
    d_in = at.d_out if "value" in mixer.maps else at.d_in
    if mixer.positions.entry is not None:
        yield Place(
            name=f"{name}.positions",
            pattern=mixer.positions,
            out=(*at.out, at.d_out),
            inp=(*at.inp, d_in),
            causal=at.causal,
            bias=at.d_out if mixer.bias else 0,
        )
        return
    if d_in != at.d_out:
        raise PatternError(
            f"{name}: {mixer.positions.family} without an entry keeps {d_in} channels, but "
            f"{at.d_out} are wanted; give it an entry or a 'value' map"
        )
    yield Place(
        name=f"{name}.positions",
        pattern=mixer.positions,
        out=at.out,
        inp=at.inp,
        matrices=mixer.heads,
        vectors=at.d_out // mixer.heads,
        causal=at.causal,
        computed=mixer.order >= 3 or "decay" in mixer.maps,
        attentions=max(0, mixer.order - 2),
    )


def resolve_mixer(mixer: Mixer, at: Sizes, name: str) -> Mixer:
    """Every pattern of a mixer at its nearest valid value; PatternError where there is none."""
    if mixer.plus is not None:
        first, *rest = (
            resolve_mixer(part, at, f"{name}.parts.{k}") for k, part in enumerate(mixer.parts())
        )
        return first.with_others(*rest)
    heads = nearest(mixer.heads, divisors(at.d_out)) if mixer.positions.entry is None else 1
    mixer = replace(mixer, heads=heads)
    found: dict[str, Pattern] = {}
    for place in mixer_places(mixer, at, name):
        found[place.name.rpartition(".")[2]] = _resolve(place)
    positions = found.pop("positions")
    return replace(mixer, positions=positions, maps=found)


def _resolve(place: Place) -> Pattern:
    reason = place.misplaced()
    if reason is None:
        place = replace(place, pattern=place.pattern.resolve(place.out, place.inp, place.causal))
        reason = place.unavailable()
    if reason is not None:
        raise PatternError(f"{place.name}: {reason}")
    return place.pattern


def strided(grid: Dims, stride: int) -> Dims:
    return tuple(-(-n // stride) for n in grid)


def stem_sizes(assignment: Assignment, spec: Spec) -> Sizes:
    stem, width = assignment.stem, assignment.width
    if stem.stride == "all":
        out: Dims = (1,) * len(spec.grid)
    else:
        out = strided(spec.grid, stem.stride)
    d_in = spec.channels if spec.channels is not None else width
    return Sizes(out=out, inp=spec.grid, d_in=d_in, d_out=width, causal=spec.causal)


def block_sizes(assignment: Assignment, spec: Spec) -> list[Sizes]:
    """Sizes of every block's mixer, in order."""
    grid, width, sizes = stem_sizes(assignment, spec).out, assignment.width, []
    for block in assignment.blocks:
        out = grid if block.pool != "none" else strided(grid, block.stride)
        wider = width * block.widen
        sizes.append(Sizes(out=out, inp=grid, d_in=width, d_out=wider, causal=spec.causal))
        grid, width = strided(grid, block.stride), wider
    return sizes


def head_sizes(assignment: Assignment, spec: Spec) -> Sizes:
    """Of the head's positions: rows read, and the positions they are read from."""
    grid, width = stem_sizes(assignment, spec).out, assignment.width
    for block in assignment.blocks:
        grid, width = strided(grid, block.stride), width * block.widen
    rows = spec.rows or tuple(min(assignment.head.regions, n) for n in grid)
    inp = grid if assignment.head.pool == "none" else rows
    return Sizes(out=rows, inp=inp, d_in=width, d_out=width, causal=spec.causal)


def channel_widths(block: Block, width: int) -> list[int]:
    """Widths between the maps of a block's channel chain, both ends included."""
    hidden = max(1, round(block.expansion * width))
    return [width, *[hidden] * (len(block.channel) - 1), width] if block.channel else [width]


def places(assignment: Assignment, spec: Spec) -> Iterator[Place]:
    """Every pattern of a model, in the order of computation."""
    at = stem_sizes(assignment, spec)
    if spec.vocabulary is not None and not isinstance(assignment.stem.table, Dense):
        yield _table(assignment, spec)
    if assignment.stem.mixer is not None:
        yield from mixer_places(assignment.stem.mixer, at, "stem.mixer")
    for i, (block, at) in enumerate(
        zip(assignment.blocks, block_sizes(assignment, spec), strict=True)
    ):
        if block.mixer is not None:
            yield from mixer_places(block.mixer, at, f"block{i}.mixer")
        widths = channel_widths(block, at.d_out)
        rows = math.prod(strided(at.inp, block.stride))
        for j, pattern in enumerate(block.channel):
            o, d = widths[j + 1], widths[j]
            yield Place(
                name=f"block{i}.channel{j}",
                pattern=pattern,
                out=(o,),
                inp=(d,),
                vectors=rows,
                bias=o,
            )
    at = head_sizes(assignment, spec)
    n, width = math.prod(at.out), at.d_out
    if not spec.per_position:
        yield Place(
            name="head.positions",
            pattern=assignment.head.positions,
            out=at.out,
            inp=at.inp,
            vectors=width,
        )
    tied = assignment.head.tied
    yield Place(
        name="head.map",
        pattern=assignment.stem.table if tied else assignment.head.map,
        out=(spec.classes,),
        inp=(width if spec.rows else n * width,),
        vectors=n if spec.rows else 1,
        bias=spec.classes,
        shared=tied,
    )


def _table(assignment: Assignment, spec: Spec) -> Place:
    """The table of tokens as a matrix from features to tokens; to look up takes a part of it."""
    return Place(
        name="stem.table",
        pattern=assignment.stem.table,
        out=(spec.vocabulary or 1,),
        inp=(assignment.width,),
        vectors=0,
    )


def extras(assignment: Assignment, spec: Spec) -> Cost:
    """What is no pattern: embedding table, positions learned, norms, the stem's plain map."""
    width, stem = assignment.width, assignment.stem
    grid = stem_sizes(assignment, spec).out
    n = flops = 0
    if spec.vocabulary is not None and isinstance(stem.table, LowRank):
        rank = stem.table.whole_rank((spec.vocabulary,), (width,))
        flops = 2 * rank * width * math.prod(spec.grid)
    elif spec.vocabulary is not None:
        n += spec.vocabulary * width
    if stem.encoding == "learned":
        n += math.prod(grid) * width
    per_channel = {"none": 0, "layer": 2, "rms": 1, "batch": 2}
    for block, at in zip(assignment.blocks, block_sizes(assignment, spec), strict=True):
        normed = at.d_in * (block.mixer is not None) + at.d_out * bool(block.channel)
        n += per_channel[block.norm] * normed
    n += per_channel[assignment.head.norm] * head_sizes(assignment, spec).d_out
    if spec.channels is not None and stem.mixer is None:
        n += (spec.channels + 1) * width
        flops = 2 * spec.channels * width * math.prod(spec.grid)
    return Cost(parameters=n, flops=flops, bytes=4 * n)


def model_cost(assignment: Assignment, spec: Spec) -> Cost:
    """Cost of one example through the whole model."""
    total = extras(assignment, spec)
    for place in places(assignment, spec):
        total = total + place.cost()
    return total


def resolve(assignment: Assignment, spec: Spec) -> Assignment:
    """The assignment with every field at its nearest valid value for a task's sizes.

    Raises PatternError with the place and the reason where a pattern cannot stand there.
    """
    check_frame(assignment, spec)
    stem: Stem = assignment.stem
    if stem.mixer is not None:
        at = stem_sizes(assignment, spec)
        stem = replace(stem, mixer=resolve_mixer(stem.mixer, at, "stem.mixer"))
    blocks = []
    for i, (block, at) in enumerate(
        zip(assignment.blocks, block_sizes(assignment, spec), strict=True)
    ):
        if block.mixer is not None:
            block = replace(block, mixer=resolve_mixer(block.mixer, at, f"block{i}.mixer"))
        blocks.append(block)
    if spec.vocabulary is not None:
        stem = replace(stem, table=_resolve(_table(assignment, spec)))
    assignment = replace(assignment, stem=stem, blocks=tuple(blocks))
    found = {
        p.name: _resolve(p) for p in places(assignment, spec) if not p.name.endswith("positions")
    }
    blocks = [
        replace(b, channel=tuple(found[f"block{i}.channel{j}"] for j in range(len(b.channel))))
        for i, b in enumerate(blocks)
    ]
    at = head_sizes(assignment, spec)
    regions = 1 if spec.rows else max(at.out)
    mapped = Dense() if assignment.head.tied else found["head.map"]
    head = replace(assignment.head, map=mapped, regions=regions)
    if not spec.per_position:
        place = Place(name="head.positions", pattern=head.positions, out=at.out, inp=at.inp)
        head = replace(head, positions=_resolve(place))
    return replace(assignment, blocks=tuple(blocks), head=head)


def verify(assignment: Assignment, spec: Spec) -> None:
    """Raise PatternError where a pattern cannot stand as it is written, without resolving it."""
    check_frame(assignment, spec)
    widths = {f"block{i}": at.d_out for i, at in enumerate(block_sizes(assignment, spec))}
    for place in places(assignment, spec):
        if reason := place.unavailable():
            raise PatternError(f"{place.name}: {reason}")
        width = widths.get(place.name.partition(".")[0], assignment.width)
        if place.matrices > 1 and place.matrices * place.vectors != width:
            raise PatternError(
                f"{place.name}: heads={place.matrices} do not divide width={width}; "
                f"use {nearest(place.matrices, divisors(width))}"
            )
