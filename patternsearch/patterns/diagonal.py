"""Diagonal: every channel, or position, is scaled by itself."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from ..domains import Domain
from ..pattern import Core, Cores, Cost, Dims, Pattern, Projected


@dataclass(frozen=True, kw_only=True)
class Diagonal(Pattern, family="diagonal"):
    """y_i = w_i x_i. As an entry it makes a band depthwise."""

    def unavailable(self, out: Dims, inp: Dims, causal: bool = False) -> str | None:
        if out != inp:
            return f"diagonal: out={out} differs from inp={inp}; it needs both the same"
        return None

    def resolve(self, out: Dims, inp: Dims, causal: bool = False) -> Diagonal:
        return self

    def cores(self, out: Dims, inp: Dims) -> dict[str, Core]:
        return {"weight": Core((math.prod(out),), 1, 1)}

    def matmul(self, cores: Cores, x: Tensor, out: Dims) -> Tensor:
        y: Tensor = cores["weight"].unflatten(-1, out) * x
        return y

    def to_dense(self, cores: Cores, out: Dims, inp: Dims) -> Tensor:
        return cores["weight"].diag_embed()

    def cost(self, out: Dims, inp: Dims) -> Cost:
        return self.product_cost(out, inp, 2 * math.prod(out))

    def matrix_rank(self, out: Dims, inp: Dims) -> int:
        return math.prod(out)

    def project(self, dense: Tensor, out: Dims, inp: Dims) -> Projected:
        return Projected({"weight": dense.diagonal(dim1=-2, dim2=-1)}, True)

    @classmethod
    def domains(cls) -> dict[str, Domain]:
        return {}
