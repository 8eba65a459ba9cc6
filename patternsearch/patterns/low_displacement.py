"""Low displacement rank: Toeplitz-like matrices, as sums of products of circulants.

(Kailath, Kung and Morf 1979, doi 10.1016/0022-247X(79)90124-0; as layers: Sindhwani et al. 2015,
arXiv 1510.01722, and Thomas et al. 2018, arXiv 1810.02309.)
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ..domains import Domain, IntRange
from ..errors import PatternError
from ..network import truncated
from ..pattern import Core, Cores, Cost, Dims, Pattern, Projected, sees_future
from .circulant import full_precision, half, no_rows, transform_flops


@dataclass(frozen=True, kw_only=True)
class LowDisplacement(Pattern, family="low_displacement"):
    """W = sum_k Z_1(left_k) Z_-1(right_k), n x n with n = max(out, in), cropped.

    Z_f(v) has entries v[i - j] below and on the diagonal, f v[n + i - j] above it. With the shifts
    Z_f of the unit vector, Z_1 W - W Z_-1 has rank `rank` at most. A Toeplitz matrix has two, and
    products and inverses of such matrices have few.
    """

    rank: int = 2

    def check(self) -> None:
        if self.rank < 1:
            raise PatternError(f"low_displacement: rank={self.rank} must be at least 1")

    def unavailable(self, out: Dims, inp: Dims, causal: bool = False) -> str | None:
        if causal:
            return sees_future(self)
        if self.rank > (full := min(math.prod(out), math.prod(inp))):
            return f"low_displacement: rank={self.rank} is above full rank {full}; use at most that"
        return None

    def resolve(self, out: Dims, inp: Dims, causal: bool = False) -> LowDisplacement:
        return replace(self, rank=min(self.rank, math.prod(out), math.prod(inp)))

    def cores(self, out: Dims, inp: Dims) -> dict[str, Core]:
        o, i, r = math.prod(out), math.prod(inp), self.rank
        n = max(o, i)
        return {"left": Core((r, n), r * n, o), "right": Core((r, n), i, r * n)}

    def matmul(self, cores: Cores, x: Tensor, out: Dims) -> Tensor:
        left, right = full_precision(cores["left"]), full_precision(cores["right"])
        if x.numel() == 0:
            return no_rows(x, left.shape[:-2], out)
        kind, n = x.dtype, left.shape[-1]
        x = full_precision(x).flatten(-len(out))[..., None, :]
        # Skew-circulant products are cyclic ones between twists by the roots of -1.
        turn = torch.arange(n, device=x.device, dtype=x.dtype) * (math.pi / n)
        twist = torch.polar(torch.ones_like(turn), turn)
        x_n = torch.fft.fft(x * twist[: x.shape[-1]], n)
        z_rn = (torch.fft.ifft(torch.fft.fft(right * twist) * x_n) / twist).real
        y_n = (torch.fft.rfft(left) * torch.fft.rfft(z_rn)).sum(-2)
        y: Tensor = torch.fft.irfft(y_n, n)[..., : math.prod(out)].to(kind).unflatten(-1, out)
        return y

    def to_dense(self, cores: Cores, out: Dims, inp: Dims) -> Tensor:
        products = wrapped(cores["left"], 1) @ wrapped(cores["right"], -1)
        return products.sum(-3)[..., : math.prod(out), : math.prod(inp)]

    def cost(self, out: Dims, inp: Dims) -> Cost:
        n, r = max(math.prod(out), math.prod(inp)), self.rank
        complex_ones, real_ones = 1 + r, 1 + r  # transforms of n numbers
        flops = (2 * complex_ones + real_ones) * transform_flops((n,))
        products = 6 * (n + 2 * r * n) + 8 * r * half((n,))
        return self.product_cost(out, inp, flops + products, 2 * n * (1 + 2 * r))

    def matrix_rank(self, out: Dims, inp: Dims) -> int:
        return min(math.prod(out), math.prod(inp))

    def project(self, dense: Tensor, out: Dims, inp: Dims) -> Projected:
        """From the nearest displacement of that rank: exact for members, near in general.

        Z_1 W - W Z_-1 = sum_k 2 left_k (right_k reversed)', for each term of W.
        """
        o, i = dense.shape[-2:]
        n = max(o, i)
        whole = F.pad(dense, (0, n - i, 0, n - o))
        unit = F.pad(dense.new_ones(1), (1, n - 2)) if n > 1 else dense.new_ones(1)
        displaced = wrapped(unit, 1) @ whole - whole @ wrapped(unit, -1)
        left, right = truncated(displaced / 2, self.rank)
        return Projected({"left": left.transpose(-1, -2), "right": right.flip(-1)}, False)

    @classmethod
    def domains(cls) -> dict[str, Domain]:
        return {"rank": IntRange(1, 4)}


def wrapped(v: Tensor, sign: int) -> Tensor:
    """Z_sign(v) for every last axis of v, [*, n] -> [*, n, n]."""
    n = v.shape[-1]
    lag = torch.arange(n, device=v.device)[:, None] - torch.arange(n, device=v.device)
    return v[..., lag % n] * torch.where(lag < 0, sign, 1).to(v.dtype)
