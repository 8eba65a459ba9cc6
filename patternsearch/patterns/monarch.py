"""Monarch: block-diagonal, transpose, block-diagonal (Dao et al. 2022, arXiv 2204.00595)."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from ..domains import Domain, IntRange
from ..network import BlockedNetwork, Plan, Step, TwoFactorNetwork, truncated
from ..pattern import Cores, Dims, Projected


@dataclass(frozen=True, kw_only=True)
class Monarch(BlockedNetwork, TwoFactorNetwork, family="monarch"):
    """W = P' R P L with L and R block-diagonal in `blocks` blocks and P, P' transpositions.

    The input is split into `blocks` blocks of p, the output is read as [s, blocks]. R then joins
    what the blocks of L made: W[(j, r), (k, i)] = right[r, j, k] left[k, r, i], so that each of the
    blocks x blocks sub-matrices has rank one. Rectangular where `blocks` divides both sides.
    """

    def plan(self, out: Dims, inp: Dims) -> Plan:
        k, o, i = self.blocks, math.prod(out) // self.blocks, math.prod(inp) // self.blocks
        sizes = {"k": k, "r": k, "j": o, "i": i}
        return Plan(sizes, "ki", (Step("left", "kri", "kr"), Step("right", "rjk", "jr")))

    def two_factors(self, cores: Cores) -> tuple[Tensor, Tensor]:
        left, right = cores["left"].transpose(0, 1), cores["right"]
        return left[:, None, None], right[:, :, None, None]

    def to_dense(self, cores: Cores, out: Dims, inp: Dims) -> Tensor:
        left, right = cores["left"], cores["right"]
        w_jrki = right.movedim(-3, -2)[..., None] * left.movedim(-3, -2)[..., None, :, :, :]
        return w_jrki.flatten(-4, -3).flatten(-2, -1)

    def project(self, dense: Tensor, out: Dims, inp: Dims) -> Projected:
        """The nearest rank-one matrix to each sub-matrix (Dao et al. 2022, theorem 1)."""
        w_jrki = dense.unflatten(-1, (self.blocks, -1)).unflatten(-3, (-1, self.blocks))
        right, left = truncated(w_jrki.movedim(-4, -2), 1)  # [r, k, j, 1] and [r, k, 1, i]
        left, right = left.squeeze(-2).transpose(-3, -2), right.squeeze(-1).transpose(-2, -1)
        return Projected({"left": left, "right": right}, True)

    @classmethod
    def domains(cls) -> dict[str, Domain]:
        return {"blocks": IntRange(2, 32, log=True)}
