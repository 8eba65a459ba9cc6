"""Low rank: a product of a tall and a wide matrix."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from ..domains import Domain, FloatRange
from ..network import Plan, RankedNetwork, Step, truncated
from ..pattern import Cores, Cost, Dims, Projected, linear_attention_cost


@dataclass(frozen=True, kw_only=True)
class LowRank(RankedNetwork, family="low_rank"):
    """W = L R with R [rank, in] and L [out, rank].

    rank: an integer, or a float in (0, 1] as the fraction of full rank min(out, in).
    """

    def full_rank(self, out: Dims, inp: Dims) -> int:
        return min(math.prod(out), math.prod(inp))

    def plan(self, out: Dims, inp: Dims) -> Plan:
        sizes = {"o": math.prod(out), "i": math.prod(inp), "r": self.whole_rank(out, inp)}
        return Plan(sizes, "i", (Step("right", "ri", "r"), Step("left", "or", "o")))

    def features(self, out: Dims, inp: Dims) -> int:
        return self.whole_rank(out, inp)

    def attention_cost(self, out: Dims, inp: Dims, channels: int) -> Cost:
        o, i = math.prod(out), math.prod(inp)
        return linear_attention_cost(o, i, self.whole_rank(out, inp), channels + 1)

    def to_dense(self, cores: Cores, out: Dims, inp: Dims) -> Tensor:
        return cores["left"] @ cores["right"]

    def project(self, dense: Tensor, out: Dims, inp: Dims) -> Projected:
        left, right = truncated(dense, self.whole_rank(out, inp))
        return Projected({"left": left, "right": right}, True)

    @classmethod
    def domains(cls) -> dict[str, Domain]:
        return {"rank": FloatRange(1 / 16, 0.5, log=True)}
