"""Block tensor train with two cores (Qiu et al. 2024, arXiv 2406.06248, section 4)."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor, einsum

from ..domains import Domain, IntRange
from ..network import Plan, RankedNetwork, Step, TwoFactorNetwork, truncated
from ..pattern import Cores, Dims, Projected, balanced


@dataclass(frozen=True, kw_only=True)
class BlockTensorTrain(RankedNetwork, TwoFactorNetwork, family="btt"):
    """W[(e, f), (g, a)] = sum_r right[f, e, g, r] left[g, f, r, a].

    Input and output are split into two factors, as equal as their divisors allow. Each sub-matrix
    of fixed (f, g) has rank `rank`; with rank 1 this is a Monarch matrix, and no parameter is used
    twice for one vector.
    rank: an integer, or a fraction of the full rank min(a, e) of those sub-matrices.
    """

    rank: int | float = 2

    def full_rank(self, out: Dims, inp: Dims) -> int:
        return min(balanced(math.prod(out), 2)[1], balanced(math.prod(inp), 2)[1])

    def plan(self, out: Dims, inp: Dims) -> Plan:
        (f, e), (g, a) = balanced(math.prod(out), 2), balanced(math.prod(inp), 2)
        sizes = {"f": f, "e": e, "g": g, "a": a, "r": self.whole_rank(out, inp)}
        return Plan(sizes, "ga", (Step("left", "gfra", "fgr"), Step("right", "fegr", "ef")))

    def two_factors(self, cores: Cores) -> tuple[Tensor, Tensor]:
        left, right = cores["left"].permute(1, 2, 0, 3), cores["right"].transpose(2, 3)
        return left[:, None], right[:, :, :, None]

    def to_dense(self, cores: Cores, out: Dims, inp: Dims) -> Tensor:
        w_efga = einsum("...fegr,...gfra->...efga", cores["right"], cores["left"])
        return w_efga.flatten(-4, -3).flatten(-2)

    def project(self, dense: Tensor, out: Dims, inp: Dims) -> Projected:
        """The nearest matrix of that rank to each sub-matrix."""
        (f, e), (g, a) = balanced(math.prod(out), 2), balanced(math.prod(inp), 2)
        w_efga = dense.unflatten(-1, (g, a)).unflatten(-3, (e, f))
        right, left = truncated(w_efga.movedim(-4, -2), self.whole_rank(out, inp))  # [f, g, e, a]
        return Projected({"left": left.transpose(-4, -3), "right": right.transpose(-3, -2)}, True)

    @classmethod
    def domains(cls) -> dict[str, Domain]:
        return {"rank": IntRange(1, 8, log=True)}
