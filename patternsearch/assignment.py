"""What a trial is: place in the model -> pattern. All of it plain data, free of sizes.

Assignment = width, stem, blocks, head. Every place is resolved for the sizes of a task before it is
built, and a trial is identified by its resolved assignment.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from .codec import FrozenDict, decode, digest, encode
from .pattern import Pattern
from .patterns.average import Average
from .patterns.dense import Dense

Activation = Literal["none", "relu", "gelu", "silu", "tanh"]
Gate = Literal["sigmoid", "silu", "tanh", "relu", "none"]
Norm = Literal["none", "layer", "rms", "batch"]
_MAPS = ("query", "key", "key2", "value", "value2", "decay", "gate", "output")
_ORDER = {name: i for i, name in enumerate(_MAPS)}


@dataclass(frozen=True, kw_only=True)
class Mixer:
    """How positions are mixed: `positions` applied along them, at an order.

    order: where the entries of the positions' matrix come from. 1: they are parameters. 2: the
    result is gated by the input, or decays are computed from it. 3: they are products of the input
    (attention) on the support of `positions`: softmax on a banded or dense pattern, along each mode
    of a kronecker one, linear attention on a semiseparable or low_rank one, with `state` or `rank`
    features a head. 4: two attentions of the same queries, multiplied.
    heads: with entries that are numbers, so many matrices, each shared by the channels of a head.
    maps: patterns along features: 'value' and 'output' at any order, 'gate' or 'decay' at order 2,
    'query' and 'key' at order 3 (and 'decay' on a semiseparable pattern), 'key2' and 'value2' with
    them at order 4.
    gate: the nonlinearity of a gate. With a semiseparable pattern whose entries are a pattern, it
    is the nonlinearity of the state: 'tanh' makes an ordinary RNN.
    bias: a bias on every map, and on positions with a pattern as entry.
    encoding: 'rotary' turns queries and keys by their position (softmax of order 3 and 4).
    plus: another mixer of the same input, whose result is added: convolution + attention, say.
    """

    positions: Pattern
    order: int = 1
    heads: int = 1
    maps: Mapping[str, Pattern] = field(default_factory=FrozenDict)
    gate: Gate = "sigmoid"
    bias: bool = True
    encoding: Literal["none", "rotary"] = "none"
    plus: Mixer | None = None

    def __post_init__(self) -> None:
        # equal assignments are initialised alike, whatever the order in which maps were named
        named = sorted(self.maps.items(), key=lambda item: (_ORDER.get(item[0], 99), item[0]))
        object.__setattr__(self, "maps", FrozenDict(named))

    def with_others(self, *others: Mixer) -> Mixer:
        """The sum of this mixer and others, none of which is a sum."""
        if not others:
            return self
        return replace(self, plus=others[0].with_others(*others[1:]))

    def parts(self) -> tuple[Mixer, ...]:
        """The mixers whose results are added, none with a `plus`; itself alone without one."""
        if self.plus is None:
            return (self,)
        return (replace(self, plus=None), *self.plus.parts())


@dataclass(frozen=True, kw_only=True)
class Stem:
    """From the task's input to `width` channels.

    mixer: an order 1 mixer on the raw positions; none is one dense map a position (tokens always
    pass an embedding table first). stride: so many input positions an output position and axis,
    'all' leaves a single position. encoding: 'learned' adds a vector a position. table: of tokens,
    a dense or low_rank matrix (ALBERT: Lan et al. 2020, arXiv 1909.11942).
    """

    mixer: Mixer | None = None
    stride: int | Literal["all"] = 1
    activation: Activation = "none"
    encoding: Literal["none", "learned"] = "none"
    table: Pattern = field(default_factory=Dense)


@dataclass(frozen=True, kw_only=True)
class Block:
    """A mixer of positions and a chain of maps along channels, each with a residual and a norm.

    channel: one pattern keeps the width; two go through `expansion` times the width with the
    activation between. residual=False and norm='none' make a plain layer, activation(mixer(x)).
    stride and pool: the grid shrinks by `stride` an axis, by dropping rows of the mixer ('none') or
    by pooling after it. widen: the mixer leaves so many times the channels it is given, and the
    skip has zeros for the new ones (He et al. 2016, arXiv 1512.03385). norm: 'batch' in training
    counts on all positions, so it is not for causal tasks.
    """

    mixer: Mixer | None = None
    channel: tuple[Pattern, ...] = ()
    expansion: float = 2.0
    activation: Activation = "gelu"
    norm: Norm = "layer"
    residual: bool = True
    stride: int = 1
    pool: Literal["none", "max", "average"] = "none"
    widen: int = 1


@dataclass(frozen=True, kw_only=True)
class Head:
    """From the last grid to the task's outputs.

    regions: rows of `positions` an axis, concatenated before `map`; tasks that label positions skip
    both, and those with a horizon have so many rows, each mapped alone. norm: before everything
    else. pool: 'max' leaves the largest values of `regions` an axis for `positions` to read. tied:
    the map is the stem's table of tokens (Press and Wolf 2017, arXiv 1608.05859).
    """

    positions: Pattern = field(default_factory=Average)
    regions: int = 1
    map: Pattern = field(default_factory=Dense)
    norm: Norm = "none"
    pool: Literal["none", "max"] = "none"
    tied: bool = False


@dataclass(frozen=True, kw_only=True)
class Assignment:
    """A whole model as patterns: what a trial is and what the YAML holds."""

    width: int
    stem: Stem = field(default_factory=Stem)
    blocks: tuple[Block, ...] = ()
    head: Head = field(default_factory=Head)

    @staticmethod
    def from_dict(data: Any, where: str = "assignment") -> Assignment:
        assignment: Assignment = decode(Assignment, data, where)
        return assignment

    def to_dict(self) -> dict[str, Any]:
        data: dict[str, Any] = encode(self)
        return data

    def digest(self) -> str:
        """Twelve hexadecimal digits that name this assignment."""
        return digest(self.to_dict())
