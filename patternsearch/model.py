"""An assignment as a torch module, for the sizes of a task."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .assignment import Assignment, Block, Stem
from .layers import FeatureMap, Matrix, PositionMap
from .mixer import activation, build_mixer
from .pattern import Pattern
from .patterns.average import Average, by_region
from .patterns.dense import Dense
from .sizes import (
    Sizes,
    Spec,
    block_sizes,
    channel_widths,
    head_sizes,
    resolve,
    stem_sizes,
    strided,
)

_TOKENS = 64  # of a vocabulary whose every token is seen often
_QUIET = 0.1  # of the usual deviation: the readout of a forecast


class StemModule(nn.Module):
    """[B, *grid, channels] or tokens [B, *grid] -> [B, *out, width]."""

    def __init__(self, stem: Stem, at: Sizes, vocabulary: int | None) -> None:
        super().__init__()
        self.act = activation(stem.activation)
        self.table: nn.Embedding | FactorTable | None = None
        if vocabulary is not None:
            self.table = table(stem.table, vocabulary, at.d_out)
        self.mixer: nn.Module | None = None
        if stem.mixer is not None:
            self.mixer = build_mixer(stem.mixer, at, "input", "stem.mixer")
        elif vocabulary is None:
            self.mixer = FeatureMap(Dense(), at.d_in, at.d_out, role="input")
        learned = stem.encoding == "learned"
        self.encoding = nn.Parameter(0.02 * torch.randn(*at.out, at.d_out)) if learned else None

    def forward(self, x: Tensor) -> Tensor:
        h = x if self.table is None else self.table(x)
        h = h if self.mixer is None else self.act(self.mixer(h))
        return h if self.encoding is None else h + self.encoding


class BlockModule(nn.Module):
    """[B, *inp, d_in] -> [B, *out, d_out]."""

    def __init__(self, block: Block, at: Sizes, name: str) -> None:
        super().__init__()
        self.block, self.at = block, at
        self.act = activation(block.activation)
        self.mixer = build_mixer(block.mixer, at, name=f"{name}.mixer") if block.mixer else None
        widths = channel_widths(block, at.d_out)
        self.channel = nn.ModuleList(
            FeatureMap(p, widths[i], widths[i + 1]) for i, p in enumerate(block.channel)
        )
        self.mixer_norm = norm(block.norm, at.d_in) if block.mixer else nn.Identity()
        self.channel_norm = norm(block.norm, at.d_out) if block.channel else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        if self.mixer is not None:
            y = self.mixer(self.mixer_norm(x))
            y = self.skip(x) + y if self.block.residual else self.act(y)
            x = self.pool(y)
        if self.channel:
            y = self.channel_norm(x)
            for i, layer in enumerate(self.channel):
                y = layer(self.act(y) if i else y)
            x = x + y if self.block.residual else self.act(y)
        return x

    def skip(self, x: Tensor) -> Tensor:
        """x on the grid the mixer leaves, with zeros for the channels it adds."""
        if self.at.out != self.at.inp:
            x = Average().matmul({}, x.movedim(-1, 1), self.at.out).movedim(1, -1)
        new = self.at.d_out - self.at.d_in
        return nn.functional.pad(x, (0, new)) if new else x

    def pool(self, x: Tensor) -> Tensor:
        if self.block.pool == "none" or self.block.stride == 1:
            return x
        y, out = x.movedim(-1, 1), strided(self.at.out, self.block.stride)
        if self.block.pool == "average":
            return Average().matmul({}, y, out).movedim(1, -1)
        pools = (nn.functional.max_pool1d, nn.functional.max_pool2d, nn.functional.max_pool3d)
        return pools[len(out) - 1](y, self.block.stride, ceil_mode=True).movedim(1, -1)


class Model(nn.Module):
    """The model an assignment describes: [B, *grid(, channels)] -> logits.

    Logits are [B, classes], [B, *grid, classes] where the task labels positions, and numbers
    [B, horizon, classes] where it wants those that follow.
    """

    def __init__(self, assignment: Assignment, spec: Spec) -> None:
        super().__init__()
        self.assignment, self.spec = assignment, spec
        self.stem = StemModule(assignment.stem, stem_sizes(assignment, spec), spec.vocabulary)
        self.blocks = nn.ModuleList(
            BlockModule(block, at, f"block{i}")
            for i, (block, at) in enumerate(
                zip(assignment.blocks, block_sizes(assignment, spec), strict=True)
            )
        )
        at = head_sizes(assignment, spec)
        self.rows, width = at.out, at.d_out
        self.norm = norm(assignment.head.norm, width)
        self.readout = None
        if not spec.per_position:
            self.readout = PositionMap(assignment.head.positions, at.out, at.inp, width, width)
            if spec.rows:
                quieten(self.readout)
            width *= 1 if spec.rows else math.prod(at.out)
        self.head: FeatureMap | TiedHead
        if assignment.head.tied:
            self.head = TiedHead(spec.classes)
        else:
            self.head = FeatureMap(assignment.head.map, width, spec.classes, role="head")

    def forward(self, x: Tensor) -> Tensor:
        h = self.features(x)
        if isinstance(self.head, FeatureMap):
            logits: Tensor = self.head(h)
            return logits
        return nn.functional.linear(*self.head(h, self.stem.table))

    def features(self, x: Tensor) -> Tensor:
        """What the head is given."""
        h: Tensor = self.stem(x)
        for block in self.blocks:
            h = block(h)
        h = self.norm(h)
        if self.assignment.head.pool == "max":
            h = by_region(torch.amax, h.movedim(-1, 1), self.rows).movedim(1, -1)
        if self.readout is not None:
            h = self.readout(h)
            h = h if self.spec.rows else h.flatten(1)
        return h

    def last(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
        """(h, weight, bias) whose h weight' + bias are the logits; None of a structured head."""
        if isinstance(self.head, TiedHead):
            found: tuple[Tensor, Tensor, Tensor] = self.head(self.features(x), self.stem.table)
            return found
        if not isinstance(self.head.pattern, Dense) or self.head.bias is None:
            return None
        return self.features(x), self.head.numbers["weight"], self.head.bias

    def rates(self) -> dict[str, float]:
        """Parameter name -> learning rate over the base rate (1 for biases, norms, tables)."""
        rates = {name: 1.0 for name, _ in self.named_parameters()}
        for prefix, module in self.named_modules():
            if isinstance(module, Matrix):
                rates |= {f"{prefix}.{name}": r for name, r in module.rates().items()}
        return rates

    def decayed(self) -> set[str]:
        """Names of the parameters that weight decay is for."""
        return {
            f"{prefix}.{name}"
            for prefix, module in self.named_modules()
            if isinstance(module, Matrix)
            for name in module.decayed()
        }


class FactorTable(Matrix):
    """A table of tokens [vocabulary, width] of low rank: tokens -> rows of left @ right."""

    def __init__(self, pattern: Pattern, vocabulary: int, width: int) -> None:
        super().__init__(pattern, (vocabulary,), (width,))
        left, right = self.numbers["left"].data, self.numbers["right"].data
        left.normal_(std=_deviation(vocabulary))
        right.normal_(std=1 / math.sqrt(len(right)))  # rows begin as large as those of a dense one

    def forward(self, tokens: Tensor) -> Tensor:
        cores = self.cores()
        return nn.functional.embedding(tokens, cores["left"]) @ cores["right"]

    def rates(self) -> dict[str, float]:
        return {**super().rates(), "numbers.left": 1.0}

    def decayed(self) -> set[str]:
        return {"numbers.right"}


class TiedHead(nn.Module):
    """(h, weight, bias) of the linear map to tokens, by the table that they came in by."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(vocabulary))

    def forward(
        self, h: Tensor, table: nn.Embedding | FactorTable
    ) -> tuple[Tensor, Tensor, Tensor]:
        if isinstance(table, nn.Embedding):
            return h, table.weight, self.bias
        cores = table.cores()
        return h @ cores["right"].mT, cores["left"], self.bias


def table(pattern: Pattern, vocabulary: int, width: int) -> nn.Embedding | FactorTable:
    if not isinstance(pattern, Dense):
        return FactorTable(pattern, vocabulary, width)
    made = nn.Embedding(vocabulary, width)
    made.weight.data.mul_(_deviation(vocabulary))
    return made


def _deviation(vocabulary: int) -> float:
    """One up to 64 tokens, then less: what is seen rarely must outgrow its noise."""
    return min(1.0, math.sqrt(_TOKENS / vocabulary))


def quieten(matrix: Matrix) -> None:
    """Begin with a tenth of the usual matrix, all cores of a term reduced alike.

    Steps of a window are like their neighbours: noise across them has next to no gradient, and a
    forecast keeps what it began with (those of Zeng et al. 2023 begin with the mean of the window).
    """
    for one in matrix.pattern.chains(matrix.out, matrix.inp):
        for name in one:
            matrix.numbers[name].data.mul_(_QUIET ** (1 / len(one)))


def norm(name: str, width: int) -> nn.Module:
    """Over channels, but for 'batch': in training over all else, which causal tasks exclude."""
    kinds = {"layer": nn.LayerNorm, "rms": nn.RMSNorm, "batch": BatchNorm}
    return kinds[name](width) if name in kinds else nn.Identity()


class BatchNorm(nn.BatchNorm1d):
    """Of the channels [*, width] (Ioffe and Szegedy 2015, arXiv 1502.03167)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flatten(0, -2)).view_as(x)


def build_model(assignment: Assignment, spec: Spec, seed: int = 0) -> Model:
    """A freshly initialised model; the same seed gives the same parameters."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Model(resolve(assignment, spec), spec)
