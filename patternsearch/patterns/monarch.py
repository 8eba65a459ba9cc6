"""Monarch: block-diagonal, transpose, block-diagonal (Dao et al. 2022, arXiv 2204.00595)."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..domains import Domain, IntRange
from ..errors import PatternError
from ..pattern import Core, Cores, Cost, Dims, Pattern, divisors, nearest


@dataclass(frozen=True, kw_only=True)
class Monarch(Pattern, family="monarch"):
    """W = P' R P L with L and R block-diagonal in `blocks` blocks and P, P' transpositions.

    The input is split into `blocks` blocks of p, the output is read as [s, blocks]. R then joins
    what the blocks of L made: W[(j, r), (k, i)] = right[r, j, k] left[k, r, i], so that each of the
    blocks x blocks sub-matrices has rank one. Rectangular where `blocks` divides both sides.
    """

    blocks: int = 4

    def check(self) -> None:
        if self.blocks < 1:
            raise PatternError(f"monarch: blocks={self.blocks} must be at least 1")

    def unavailable(self, out: Dims, inp: Dims, causal: bool = False) -> str | None:
        if causal:
            return "monarch: every row sees the future; use banded or semiseparable"
        if self.blocks not in (valid := _valid(out, inp)):
            return (
                f"monarch: blocks={self.blocks} must divide {out} and {inp}; choose one of {valid}"
            )
        return None

    def resolve(self, out: Dims, inp: Dims, causal: bool = False) -> Monarch:
        return replace(self, blocks=nearest(self.blocks, _valid(out, inp)))

    def cores(self, out: Dims, inp: Dims) -> dict[str, Core]:
        k, o, i = self.blocks, math.prod(out) // self.blocks, math.prod(inp) // self.blocks
        return {"left": Core((k, k, i), i, k), "right": Core((k, o, k), k, o)}

    def matmul(self, cores: Cores, x: Tensor, out: Dims) -> Tensor:
        x_ki = x.flatten(-len(out)).unflatten(-1, (self.blocks, -1))
        h_kr = torch.einsum("...kri,...ki->...kr", cores["left"], x_ki)
        y_jr = torch.einsum("...rjk,...kr->...jr", cores["right"], h_kr)
        return y_jr.flatten(-2).unflatten(-1, out)

    def to_dense(self, cores: Cores, out: Dims, inp: Dims) -> Tensor:
        left, right = cores["left"], cores["right"]
        w_jrki = right.movedim(-3, -2)[..., None] * left.movedim(-3, -2)[..., None, :, :, :]
        return w_jrki.flatten(-4, -3).flatten(-2, -1)

    def cost(self, out: Dims, inp: Dims) -> Cost:
        k = self.blocks
        return self.product_cost(out, inp, 2 * k * (math.prod(out) + math.prod(inp)), k * k)

    def matrix_rank(self, out: Dims, inp: Dims) -> int:
        k, o, i = self.blocks, math.prod(out) // self.blocks, math.prod(inp) // self.blocks
        return k * min(k, o, i) if k > 1 else 1

    @classmethod
    def domains(cls) -> dict[str, Domain]:
        return {"blocks": IntRange(2, 32, log=True)}


def _valid(out: Dims, inp: Dims) -> list[int]:
    return divisors(math.gcd(math.prod(out), math.prod(inp)))
