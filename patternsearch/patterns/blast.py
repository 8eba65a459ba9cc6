"""BLAST: blocks that share their left and right factors (Lee et al. 2024, arXiv 2410.21262)."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor, einsum

from ..domains import Domain, FloatRange, IntRange
from ..network import BlockedNetwork, Plan, RankedNetwork, Step
from ..pattern import Cores, Dims


@dataclass(frozen=True, kw_only=True)
class Blast(RankedNetwork, BlockedNetwork, family="blast"):
    """Block (i, j) of blocks x blocks is left_i diag(middle_ij) right_j.

    rank: the length of those diagonals; an integer, or a fraction of min(out, in). With constant
    diagonals it is low rank, with diagonals that do not overlap block-diagonal.
    """

    def full_rank(self, out: Dims, inp: Dims) -> int:
        return min(math.prod(out), math.prod(inp))

    def plan(self, out: Dims, inp: Dims) -> Plan:
        b, o, i = self.blocks, math.prod(out) // self.blocks, math.prod(inp) // self.blocks
        sizes = {"i": b, "j": b, "p": o, "q": i, "r": self.whole_rank(out, inp)}
        steps = (Step("right", "jrq", "jr"), Step("middle", "ijr", "ir"), Step("left", "ipr", "ip"))
        return Plan(sizes, "jq", steps)

    def to_dense(self, cores: Cores, out: Dims, inp: Dims) -> Tensor:
        left, middle, right = cores["left"], cores["middle"], cores["right"]
        w_ipjq = einsum("...ipr,...ijr,...jrq->...ipjq", left, middle, right)
        return w_ipjq.flatten(-4, -3).flatten(-2)

    @classmethod
    def domains(cls) -> dict[str, Domain]:
        return {"rank": FloatRange(1 / 16, 0.5, log=True), "blocks": IntRange(2, 16, log=True)}
