"""Block-diagonal: groups of channels that do not see one another."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..domains import Domain, IntRange
from ..errors import PatternError
from ..pattern import Core, Cores, Cost, Dims, Pattern, divisors, nearest


@dataclass(frozen=True, kw_only=True)
class BlockDiagonal(Pattern, family="block_diagonal"):
    """`blocks` dense blocks of equal size. As an entry it makes a band a grouped convolution."""

    blocks: int = 4

    def check(self) -> None:
        if self.blocks < 1:
            raise PatternError(f"block_diagonal: blocks={self.blocks} must be at least 1")

    def unavailable(self, out: Dims, inp: Dims, causal: bool = False) -> str | None:
        if causal:
            return "block_diagonal: rows see the future inside a block; use banded with upper=0"
        valid = _valid(out, inp)
        if self.blocks not in valid:
            return (
                f"block_diagonal: blocks={self.blocks} must divide {out} and {inp}; choose {valid}"
            )
        return None

    def resolve(self, out: Dims, inp: Dims, causal: bool = False) -> BlockDiagonal:
        return replace(self, blocks=nearest(self.blocks, _valid(out, inp)))

    def cores(self, out: Dims, inp: Dims) -> dict[str, Core]:
        o, i = math.prod(out) // self.blocks, math.prod(inp) // self.blocks
        return {"weight": Core((self.blocks, o, i), i, o)}

    def matmul(self, cores: Cores, x: Tensor, out: Dims) -> Tensor:
        blocks = x.flatten(-len(out)).unflatten(-1, (self.blocks, -1))
        y = torch.einsum("...boi,...bi->...bo", cores["weight"], blocks)
        return y.flatten(-2).unflatten(-1, out)

    def to_dense(self, cores: Cores, out: Dims, inp: Dims) -> Tensor:
        weight = cores["weight"]
        dense = weight.new_zeros(*weight.shape[:-3], math.prod(out), math.prod(inp))
        o, i = weight.shape[-2:]
        for b in range(self.blocks):
            dense[..., b * o : (b + 1) * o, b * i : (b + 1) * i] = weight[..., b, :, :]
        return dense

    def cost(self, out: Dims, inp: Dims) -> Cost:
        return self.product_cost(out, inp, 2 * math.prod(out) * math.prod(inp) // self.blocks)

    def matrix_rank(self, out: Dims, inp: Dims) -> int:
        return min(math.prod(out), math.prod(inp))

    @classmethod
    def domains(cls) -> dict[str, Domain]:
        return {"blocks": IntRange(2, 16, log=True)}


def _valid(out: Dims, inp: Dims) -> list[int]:
    return divisors(math.gcd(math.prod(out), math.prod(inp)))
