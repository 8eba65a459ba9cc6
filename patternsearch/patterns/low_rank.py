"""Low rank: a product of a tall and a wide matrix."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..domains import Domain, FloatRange
from ..errors import PatternError
from ..pattern import Core, Cores, Cost, Dims, Pattern


@dataclass(frozen=True, kw_only=True)
class LowRank(Pattern, family="low_rank"):
    """W = L R with R [rank, in] and L [out, rank].

    rank: an integer, or a float in (0, 1] as the fraction of full rank min(out, in).
    """

    rank: int | float = 0.25

    def check(self) -> None:
        whole = isinstance(self.rank, int)
        if not (self.rank >= 1 if whole else 0 < self.rank <= 1):
            raise PatternError(
                f"low_rank: rank={self.rank} must be an integer from 1, or a fraction in (0, 1]"
            )

    def unavailable(self, out: Dims, inp: Dims, causal: bool = False) -> str | None:
        if causal:
            return "low_rank: every row sees the future; use banded or semiseparable"
        if self.rank > (full := min(math.prod(out), math.prod(inp))):
            return f"low_rank: rank={self.rank} is above full rank {full}; use at most {full}"
        return None

    def resolve(self, out: Dims, inp: Dims, causal: bool = False) -> LowRank:
        return replace(self, rank=self.matrix_rank(out, inp))

    def cores(self, out: Dims, inp: Dims) -> dict[str, Core]:
        o, i, r = math.prod(out), math.prod(inp), self.matrix_rank(out, inp)
        return {"left": Core((o, r), r, o), "right": Core((r, i), i, r)}

    def matmul(self, cores: Cores, x: Tensor, out: Dims) -> Tensor:
        h = torch.einsum("...ri,...i->...r", cores["right"], x.flatten(-len(out)))
        return torch.einsum("...or,...r->...o", cores["left"], h).unflatten(-1, out)

    def to_dense(self, cores: Cores, out: Dims, inp: Dims) -> Tensor:
        return cores["left"] @ cores["right"]

    def cost(self, out: Dims, inp: Dims) -> Cost:
        r = self.matrix_rank(out, inp)
        return self.product_cost(out, inp, 2 * r * (math.prod(out) + math.prod(inp)), r)

    def matrix_rank(self, out: Dims, inp: Dims) -> int:
        full = min(math.prod(out), math.prod(inp))
        wanted = self.rank if isinstance(self.rank, int) else round(self.rank * full)
        return max(1, min(full, wanted))

    @classmethod
    def domains(cls) -> dict[str, Domain]:
        return {"rank": FloatRange(1 / 16, 0.5, log=True)}
