"""Butterfly: log2(n) sparse factors, as in a fast Fourier transform.

(Dao et al. 2019, arXiv 1903.05895, section 3.)
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, einsum

from ..domains import Domain
from ..network import truncated
from ..pattern import Core, Cores, Cost, Dims, Pattern, Projected, sees_future


@dataclass(frozen=True, kw_only=True)
class Butterfly(Pattern, family="butterfly"):
    """W = B_L ... B_1 on n = 2^L numbers; B_l joins pairs 2^(l-1) apart by 2 x 2 matrices.

    n is the power of two from max(out, in) on; the input is padded with zeros, and the first `out`
    numbers are read.
    """

    def unavailable(self, out: Dims, inp: Dims, causal: bool = False) -> str | None:
        return sees_future(self) if causal else None

    def resolve(self, out: Dims, inp: Dims, causal: bool = False) -> Butterfly:
        return self

    def depth(self, out: Dims, inp: Dims) -> int:
        return max(1, (max(math.prod(out), math.prod(inp)) - 1).bit_length())

    def cores(self, out: Dims, inp: Dims) -> dict[str, Core]:
        """Padding leaves one of each pair zero where 2^k reaches past the input (or output)."""
        depth, o, i = self.depth(out, inp), math.prod(out), math.prod(inp)
        return {
            f"factor{k}": Core((2 ** (depth - 1 - k), 2**k, 2, 2), 1 + (2**k < i), 1 + (2**k < o))
            for k in range(depth)
        }

    def matmul(self, cores: Cores, x: Tensor, out: Dims) -> Tensor:
        x = x.flatten(-len(out))
        x = F.pad(x, (0, 2 ** len(cores) - x.shape[-1]))
        for k in range(len(cores)):
            pairs = x.unflatten(-1, (-1, 2, 2**k))
            x = einsum("...lsoi,...lis->...los", cores[f"factor{k}"], pairs).flatten(-3)
        y: Tensor = x[..., : math.prod(out)].unflatten(-1, out)
        return y

    def to_dense(self, cores: Cores, out: Dims, inp: Dims) -> Tensor:
        n = 2 ** len(cores)
        first = cores["factor0"]
        dense = first.new_ones(n).diag_embed()
        for k in range(len(cores)):
            core, stride = cores[f"factor{k}"], 2**k
            factor = core.new_zeros(*core.shape[:-4], n, n)
            for row in range(n):
                low = row & ~stride
                left, side = low // (2 * stride), low % stride
                for bit in (0, 1):
                    at = core[..., left, side, int(row & stride > 0), bit]
                    factor[..., row, low + bit * stride] = at
            dense = factor @ dense
        return dense[..., : math.prod(out), : math.prod(inp)]

    def cost(self, out: Dims, inp: Dims) -> Cost:
        depth = self.depth(out, inp)
        return self.product_cost(out, inp, 4 * depth * 2**depth, (depth - 1) * 2**depth)

    def matrix_rank(self, out: Dims, inp: Dims) -> int:
        return min(math.prod(out), math.prod(inp))

    def project(self, dense: Tensor, out: Dims, inp: Dims) -> Projected:
        """The last factor is peeled off by rank-one matrices of two rows, and so on.

        (Zheng, Riccietti and Gribonval 2023, arXiv 2110.01230.) Exact for a butterfly matrix that
        is not cropped, and near in general.
        """
        depth = self.depth(out, inp)
        n = 2**depth
        rest = F.pad(dense, (0, n - dense.shape[-1], 0, n - dense.shape[-2]))[..., None, :, :]
        found = {}
        for k in reversed(range(depth)):  # [*, left, 2 x 2^k, 2 x 2^k]
            pairs = rest.unflatten(-1, (2, 2**k)).unflatten(-3, (2, 2**k))  # [left, o, s, i, t]
            u, v = truncated(pairs.movedim(-2, -4).transpose(-3, -2), 1)  # [left, i, s, o, t]
            found[f"factor{k}"] = u.squeeze(-1).movedim(-3, -1)
            rest = v.squeeze(-2).flatten(-4, -3)
        found["factor0"] = found["factor0"] * rest.reshape(*dense.shape[:-2], -1, 1, 1, 2)
        return Projected(dict(reversed(found.items())), False)

    @classmethod
    def domains(cls) -> dict[str, Domain]:
        return {}
