"""Kronecker product of one small matrix a mode: NdLinear (Reneau et al. 2025, arXiv 2503.17353)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from ..domains import Domain, IntRange
from ..errors import PatternError
from ..network import tensor_train
from ..pattern import Core, Cores, Cost, Dims, Pattern, Projected, balanced, mode_sizes, sees_future


@dataclass(frozen=True, kw_only=True)
class Kronecker(Pattern, family="kronecker"):
    """W = W_1 (x) ... (x) W_n: every mode of the input has a dense matrix of its own.

    modes: at most how many, where in_modes and out_modes are left empty; the features are then
    split into factors as equal as their divisors allow. in_modes, out_modes: explicit factors.
    bias: one a mode, as in NdLinear, applied right after that mode's matrix; the whole is then
    affine and `to_dense` is its linear part.
    outer_first: apply the modes from the first to the last (NdLinear's transform_outer), else from
    the last to the first. It changes the result only through the biases, and the cost.
    """

    operators: ClassVar[tuple[str, ...]] = ("two_factor", "mode_product")

    modes: int = 2
    in_modes: Dims = ()
    out_modes: Dims = ()
    bias: bool = False
    outer_first: bool = True

    def check(self) -> None:
        if self.modes < 1:
            raise PatternError(f"kronecker: modes={self.modes} must be at least 1")
        if len(self.in_modes) != len(self.out_modes):
            raise PatternError(
                f"kronecker: in_modes={self.in_modes} and out_modes={self.out_modes} differ in "
                "length; give one factor a mode in both, or leave both empty"
            )

    def unavailable(self, out: Dims, inp: Dims, causal: bool = False) -> str | None:
        if causal:
            return sees_future(self)
        for name, modes, dims in (
            ("out_modes", self.out_modes, out),
            ("in_modes", self.in_modes, inp),
        ):
            if modes and math.prod(modes) != math.prod(dims):
                near = balanced(math.prod(dims), len(modes))
                return f"kronecker: {name}={modes} do not multiply to {math.prod(dims)}; use {near}"
        return None

    def resolve(self, out: Dims, inp: Dims, causal: bool = False) -> Kronecker:
        outs, inps = self.factors(out, inp)
        return replace(self, modes=len(outs), out_modes=outs, in_modes=inps)

    def factors(self, out: Dims, inp: Dims) -> tuple[Dims, Dims]:
        """The factors of `out` and of `inp`, one a mode."""
        if self.in_modes and self.unavailable(out, inp) is None:
            return self.out_modes, self.in_modes
        return mode_sizes(out, inp, len(self.in_modes) or self.modes)

    def cores(self, out: Dims, inp: Dims) -> dict[str, Core]:
        cores = {}
        for m, (o, i) in enumerate(zip(*self.factors(out, inp), strict=True)):
            cores[f"factor{m}"] = Core((o, i), i, o)
            if self.bias:
                cores[f"bias{m}"] = Core((o,), 1, 1, "bias")
        return cores

    def order(self, n: int) -> list[int]:
        return list(range(n)) if self.outer_first else list(reversed(range(n)))

    def matmul(self, cores: Cores, x: Tensor, out: Dims) -> Tensor:
        outs, inps = self.factors(out, x.shape[x.dim() - len(out) :])
        n = len(outs)
        y = x.flatten(-len(out)).unflatten(-1, inps)
        for m in self.order(n):
            factor = cores[f"factor{m}"]
            for _ in range(n - 1):
                factor = factor.unsqueeze(-3)  # batch axes of the core align with those of x
            y = torch.einsum("...oi,...i->...o", factor, y.movedim(m - n, -1))
            if self.bias:
                bias = cores[f"bias{m}"]
                y = y + bias.reshape(*bias.shape[:-1], *(1,) * (n - 1), -1)
            y = y.movedim(-1, m - n)
        whole: Tensor = y.flatten(-n).unflatten(-1, out)
        return whole

    def feature_operator(self, out: Dims, inp: Dims, device: torch.device) -> str:
        """two_factor for two modes without a bias, where the last mode first is as cheap."""
        outs, inps = self.factors(out, inp)
        if len(outs) != 2 or self.bias:
            return "mode_product"
        last_first = inps[0] * outs[1] * (inps[1] + outs[0])
        cheap = last_first <= inps[1] * outs[0] * (inps[0] + outs[1])
        return "two_factor" if cheap else "mode_product"

    def run_features(
        self, operator: Callable[..., Tensor], cores: Cores, x: Tensor, out: Dims
    ) -> Tensor:
        if self.feature_operator(out, x.shape[-1:], x.device) == "two_factor":
            first, second = cores["factor1"], cores["factor0"]
            return operator(x, first[None, :, None, None], second[None, :, None, :, None])
        outs, inps = self.factors(out, x.shape[-1:])
        order, dims = self.order(len(outs)), list(inps)
        trailing = []
        for m in order:
            trailing.append(math.prod(dims[m + 1 :]))
            dims[m] = outs[m]
        biases = [cores[f"bias{m}"] for m in order] if self.bias else None
        return operator(x, [cores[f"factor{m}"] for m in order], trailing=trailing, biases=biases)

    def to_dense(self, cores: Cores, out: Dims, inp: Dims) -> Tensor:
        dense = cores["factor0"]
        for m in range(1, len(self.factors(out, inp)[0])):
            f = cores[f"factor{m}"]
            pairs = dense[..., :, None, :, None] * f[..., None, :, None, :]
            dense = pairs.flatten(-4, -3).flatten(-2, -1)
        return dense

    def steps(self, out: Dims, inp: Dims) -> Iterator[tuple[int, int]]:
        """(flops, elements of the result) of each mode product, in order."""
        outs, inps = self.factors(out, inp)
        dims = list(inps)
        for m in self.order(len(dims)):
            flops = 2 * math.prod(dims) * outs[m]
            dims[m] = outs[m]
            yield flops, math.prod(dims)

    def cost(self, out: Dims, inp: Dims) -> Cost:
        flops, sizes = zip(*self.steps(out, inp), strict=True)
        return self.product_cost(out, inp, sum(flops), sum(sizes[:-1]))

    def attention_cost(self, out: Dims, inp: Dims, channels: int) -> Cost:
        """Attention along the lines of every mode in turn."""
        outs, inps = self.factors(out, inp)
        total, dims = Cost(), list(inps)
        for m in self.order(len(dims)):
            lines = channels * math.prod(dims) // inps[m]
            o, i = outs[m], inps[m]
            total = total + Cost(
                flops=4 * lines * o * i,
                bytes=8 * lines * (o + i),
                activations=4 * lines * (o + 2 * i),
            )
            dims[m] = o
        return total

    def matrix_rank(self, out: Dims, inp: Dims) -> int:
        return math.prod(min(o, i) for o, i in zip(*self.factors(out, inp), strict=True))

    def project(self, dense: Tensor, out: Dims, inp: Dims) -> Projected:
        """A rank-one tensor of its rearrangement (Van Loan and Pitsianis 1993); no biases."""
        outs, inps = self.factors(out, inp)
        cores = tensor_train(dense, outs, inps, [1] * (len(outs) - 1))
        found = {f"factor{m}": core.squeeze(-1).squeeze(-3) for m, core in enumerate(cores)}
        if self.bias:
            found |= {f"bias{m}": core.new_zeros(core.shape[-3:-2]) for m, core in enumerate(cores)}
        return Projected(found, len(outs) <= 2)

    @classmethod
    def domains(cls) -> dict[str, Domain]:
        return {"modes": IntRange(2, 3)}
