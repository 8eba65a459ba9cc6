"""Circulant: a product is a cyclic convolution, done by Fourier transforms.

(Cheng et al. 2015, arXiv 1502.03436; in blocks: Ding et al. 2017, arXiv 1708.08917; along image
positions: Rao et al. 2021, arXiv 2107.00645.)
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import EllipsisType

import torch
from torch import Tensor, einsum

from ..domains import Domain, IntRange
from ..errors import PatternError
from ..pattern import Core, Cores, Cost, Dims, Pattern, Projected, divisors, nearest, sees_future


@dataclass(frozen=True, kw_only=True)
class Circulant(Pattern, family="circulant"):
    """Every axis is cut into `blocks`; a block has entries w[(i - j) mod n] of its own w.

    n is the larger side of a block, whose other side is cropped. On a grid the wrap is per axis.
    """

    blocks: int = 1

    def check(self) -> None:
        if self.blocks < 1:
            raise PatternError(f"circulant: blocks={self.blocks} must be at least 1")

    def unavailable(self, out: Dims, inp: Dims, causal: bool = False) -> str | None:
        if causal:
            return sees_future(self)
        if self.blocks not in (valid := divisors(math.gcd(*out, *inp))):
            return (
                f"circulant: blocks={self.blocks} does not cut every axis of {inp} and {out} "
                f"equally; choose one of {valid}"
            )
        return None

    def resolve(self, out: Dims, inp: Dims, causal: bool = False) -> Circulant:
        return replace(self, blocks=nearest(self.blocks, divisors(math.gcd(*out, *inp))))

    def period(self, out: Dims, inp: Dims) -> Dims:
        """n of every axis."""
        return tuple(max(o, i) // self.blocks for o, i in zip(out, inp, strict=True))

    def cores(self, out: Dims, inp: Dims) -> dict[str, Core]:
        cells = self.blocks ** len(inp)
        shape = (cells, cells, *self.period(out, inp))
        return {"weight": Core(shape, math.prod(inp), math.prod(out))}

    def matmul(self, cores: Cores, x: Tensor, out: Dims) -> Tensor:
        axes, kind = len(out), x.dtype
        if x.numel() == 0:
            return no_rows(x, cores["weight"].shape[: -axes - 2], out)
        n, dims = self.period(out, x.shape[-axes:]), tuple(range(-axes, 0))
        x_vn = torch.fft.rfftn(self.cut(full_precision(x), axes), s=n, dim=dims)
        w_uvn = torch.fft.rfftn(full_precision(cores["weight"]), s=n, dim=dims)
        shape = x_vn.shape[-axes:]
        y_un = einsum("...uvn,...vn->...un", w_uvn.flatten(-axes), x_vn.flatten(-axes))
        y = torch.fft.irfftn(y_un.unflatten(-1, shape), s=n, dim=dims)
        return self.join(y, out).to(kind)

    def cut(self, x: Tensor, axes: int) -> Tensor:
        """[*batch, i1, i2] -> [*batch, blocks^2, i1 / blocks, i2 / blocks], for any `axes`."""
        b, sizes = self.blocks, x.shape[-axes:]
        x = x.reshape(*x.shape[:-axes], *(m for n in sizes for m in (b, n // b)))
        x = x.movedim(tuple(range(-2 * axes, 0, 2)), tuple(range(-2 * axes, -axes)))
        return x.flatten(-2 * axes, -axes - 1)

    def join(self, y: Tensor, out: Dims) -> Tensor:
        """Back from `cut`, each block cropped to its share of `out`."""
        b, axes = self.blocks, len(out)
        for k, o in enumerate(out):
            y = y.narrow(k - axes, 0, o // b)
        y = y.unflatten(-axes - 1, (b,) * axes)
        y = y.movedim(tuple(range(-2 * axes, -axes)), tuple(range(-2 * axes, 0, 2)))
        return y.reshape(*y.shape[: -2 * axes], *out)

    def to_dense(self, cores: Cores, out: Dims, inp: Dims) -> Tensor:
        weight, axes = cores["weight"], len(inp)
        n = self.period(out, inp)
        dense = weight.new_zeros(*weight.shape[: -axes - 2], *out, *inp)
        for row in itertools.product(*map(range, out)):
            for col in itertools.product(*map(range, inp)):
                u, s = self.cell(row, out)
                v, t = self.cell(col, inp)
                lag = tuple((a - b) % m for a, b, m in zip(s, t, n, strict=True))
                dense[_at(*row, *col)] = weight[_at(u, v, *lag)]
        return dense.flatten(-2 * axes, -axes - 1).flatten(-axes)

    def cell(self, at: Sequence[int], dims: Dims) -> tuple[int, Dims]:
        """The block a position lies in, and where in it."""
        cell, inside = 0, []
        for k, n in zip(at, dims, strict=True):
            cell = cell * self.blocks + k // (n // self.blocks)
            inside.append(k % (n // self.blocks))
        return cell, tuple(inside)

    def cost(self, out: Dims, inp: Dims) -> Cost:
        cells, n = self.blocks ** len(inp), self.period(out, inp)
        flops = 2 * cells * transform_flops(n) + cells * cells * 8 * half(n)
        return self.product_cost(out, inp, flops, 2 * cells * math.prod(n))

    def matrix_rank(self, out: Dims, inp: Dims) -> int:
        return min(math.prod(out), math.prod(inp))

    def project(self, dense: Tensor, out: Dims, inp: Dims) -> Projected:
        """The mean of all entries that share a number; those that crop away are zero."""
        batch, axes = dense.shape[:-2], len(inp)
        entries = dense.reshape(*batch, *out, *inp)
        shape = self.cores(out, inp)["weight"].shape
        total, count = dense.new_zeros(*batch, *shape), dense.new_zeros(shape)
        for row in itertools.product(*map(range, out)):
            for col in itertools.product(*map(range, inp)):
                (u, s), (v, t) = self.cell(row, out), self.cell(col, inp)
                lag = tuple(
                    (a - b) % shape[2 + k] for k, a, b in zip(range(axes), s, t, strict=True)
                )
                total[_at(u, v, *lag)] += entries[_at(*row, *col)]
                count[(u, v, *lag)] += 1
        return Projected({"weight": total / count.clamp(min=1)}, True)

    @classmethod
    def domains(cls) -> dict[str, Domain]:
        return {"blocks": IntRange(1, 8, log=True)}


def full_precision(x: Tensor) -> Tensor:
    """float32 where x is of half precision, in which transforms and memories lose too much."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def no_rows(x: Tensor, batch: torch.Size, out: Dims) -> Tensor:
    """The product with an x of no elements, of which there are no Fourier transforms."""
    return x.new_zeros(*torch.broadcast_shapes(x.shape[: -len(out)], batch), *out)


def half(n: Dims) -> int:
    """Complex numbers that a real transform of these sizes leaves."""
    return math.prod(n[:-1]) * (n[-1] // 2 + 1)


def transform_flops(n: Dims) -> int:
    """The usual count of a real transform, 5/2 n log2 n; the weights' own is shared by a batch."""
    return math.ceil(2.5 * math.prod(n) * math.log2(math.prod(n)))


def _at(*index: int) -> tuple[int | EllipsisType, ...]:
    return (..., *index)
