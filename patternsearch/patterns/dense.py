"""Dense: every entry is free."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from ..domains import Domain
from ..pattern import Core, Cores, Cost, Dims, Pattern, Projected


@dataclass(frozen=True, kw_only=True)
class Dense(Pattern, family="dense"):
    """Every entry free: `nn.Linear` along features, full mixing along positions.

    With an entry along features every pair of positions has a matrix of its own, so one row of
    dense entries is the linear layer of a flattened input.
    """

    takes_entry: ClassVar[bool] = True

    def unavailable(self, out: Dims, inp: Dims, causal: bool = False) -> str | None:
        if causal:
            return "dense: every row sees the future; use banded with lower='full' and upper=0"
        return self.entry.unavailable(out[-1:], inp[-1:]) if self.entry else None

    def resolve(self, out: Dims, inp: Dims, causal: bool = False) -> Dense:
        return replace(self, entry=self.entry.resolve(out[-1:], inp[-1:])) if self.entry else self

    def cores(self, out: Dims, inp: Dims) -> dict[str, Core]:
        o, i = (math.prod(self.split(dims)[0]) for dims in (out, inp))
        return self.with_entry("weight", Core((o, i), i, o), out, inp)

    def matmul(self, cores: Cores, x: Tensor, out: Dims) -> Tensor:
        y: Tensor
        if self.entry is None:
            flat = x.flatten(-len(out))
            weight = cores["weight"]
            if weight.dim() == 2:
                y = torch.nn.functional.linear(flat, weight)
            else:
                y = torch.einsum("...oi,...i->...o", weight, flat)
            y = y.unflatten(-1, out)
            return y
        flat = x.flatten(-len(out), -2)[..., None, :, :]  # [*batch, 1, i, c]
        terms = self.entry.matmul(self.entry_cores("weight", cores), flat, out[-1:])
        y = terms.sum(-2).unflatten(-2, out[:-1])
        return y

    def to_dense(self, cores: Cores, out: Dims, inp: Dims) -> Tensor:
        if self.entry is None:
            return cores["weight"]
        entries = self.entry.to_dense(self.entry_cores("weight", cores), out[-1:], inp[-1:])
        blocks = entries.movedim(-2, -3)  # [o, i, c, d] -> [o, c, i, d]
        return blocks.reshape(*blocks.shape[:-4], math.prod(out), math.prod(inp))

    def cost(self, out: Dims, inp: Dims) -> Cost:
        if self.entry is None:
            return self.product_cost(out, inp, 2 * math.prod(out) * math.prod(inp))
        pairs = math.prod(out[:-1]) * math.prod(inp[:-1])
        flops = pairs * self.entry.cost(out[-1:], inp[-1:]).flops
        return self.product_cost(out, inp, flops)

    def matrix_rank(self, out: Dims, inp: Dims) -> int:
        return min(math.prod(out), math.prod(inp))

    def project(self, dense: Tensor, out: Dims, inp: Dims) -> Projected | None:
        if self.entry is None:
            return Projected({"weight": dense}, True)
        (o, (c,)), (i, (d,)) = self.split(out), self.split(inp)
        blocks = dense.unflatten(-1, (math.prod(i), d)).unflatten(-3, (math.prod(o), c))
        found = self.entry.project(blocks.movedim(-2, -3), (c,), (d,))
        return found.named("weight") if found else None

    @classmethod
    def domains(cls) -> dict[str, Domain]:
        return {}
