"""Average: each row is the mean of its region. Nothing to learn; the usual readout."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..domains import Domain
from ..pattern import Core, Cores, Cost, Dims, Pattern, Projected


@dataclass(frozen=True, kw_only=True)
class Average(Pattern, family="average"):
    """Row i averages columns floor(i in/out) to ceil((i+1) in/out) of every axis."""

    def unavailable(self, out: Dims, inp: Dims, causal: bool = False) -> str | None:
        if causal and out != inp:
            return "average: pools over the future; read single positions instead"
        if any(o > i for o, i in zip(out, inp, strict=True)):
            return f"average: out={out} is larger than inp={inp}; use at most {inp}"
        return None

    def resolve(self, out: Dims, inp: Dims, causal: bool = False) -> Average:
        return self

    def cores(self, out: Dims, inp: Dims) -> dict[str, Core]:
        return {}

    def matmul(self, cores: Cores, x: Tensor, out: Dims) -> Tensor:
        return by_region(torch.mean, x, out)

    def to_dense(self, cores: Cores, out: Dims, inp: Dims) -> Tensor:
        dense = torch.zeros(*out, *inp, dtype=torch.float64)  # 1 / 3 is no float32
        axes = [list(enumerate(_regions(o, i))) for o, i in zip(out, inp, strict=True)]
        for cell in itertools.product(*axes):
            rows = tuple(index for index, _ in cell)
            region = tuple(slice(a, b) for _, (a, b) in cell)
            dense[rows][region] = 1 / math.prod(b - a for _, (a, b) in cell)
        return dense.reshape(math.prod(out), math.prod(inp))

    def cost(self, out: Dims, inp: Dims) -> Cost:
        return self.product_cost(out, inp, 0)

    def matrix_rank(self, out: Dims, inp: Dims) -> int:
        return math.prod(out)

    def project(self, dense: Tensor, out: Dims, inp: Dims) -> Projected:
        return Projected({}, True)

    @classmethod
    def domains(cls) -> dict[str, Domain]:
        return {}


def by_region(reduce: Callable[[Tensor, int], Tensor], x: Tensor, out: Dims) -> Tensor:
    """[*, *inp] -> [*, *out]: `reduce`, such as torch.mean, over each axis of every region."""
    inp = x.shape[x.dim() - len(out) :]
    for axis, (o, i) in enumerate(zip(out, inp, strict=True)):
        dim = axis - len(out)
        if i % o == 0:
            x = reduce(x.unflatten(dim, (o, i // o)), dim)
        else:
            regions = [x.narrow(dim, a, b - a) for a, b in _regions(o, i)]
            x = torch.stack([reduce(region, dim) for region in regions], dim)
    return x


def _regions(out: int, inp: int) -> list[tuple[int, int]]:
    return [(i * inp // out, -(-(i + 1) * inp // out)) for i in range(out)]
