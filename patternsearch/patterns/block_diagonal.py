"""Block-diagonal: groups of channels that do not see one another."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..domains import Domain, IntRange
from ..network import BlockedNetwork, Plan, Step
from ..pattern import Cores, Dims, Projected


@dataclass(frozen=True, kw_only=True)
class BlockDiagonal(BlockedNetwork, family="block_diagonal"):
    """`blocks` dense blocks of equal size. As an entry it makes a band a grouped convolution."""

    def plan(self, out: Dims, inp: Dims) -> Plan:
        b = self.blocks
        sizes = {"b": b, "o": math.prod(out) // b, "i": math.prod(inp) // b}
        return Plan(sizes, "bi", (Step("weight", "boi", "bo"),))

    def feature_operator(self, out: Dims, inp: Dims, device: torch.device) -> str:
        """On CUDA alone: on CPU a batched product on views moves as little."""
        wide = min(math.prod(out), math.prod(inp)) >= 16 * self.blocks
        return "block_sparse_matmul" if device.type == "cuda" and wide else ""

    def run_features(
        self, operator: Callable[..., Tensor], cores: Cores, x: Tensor, out: Dims
    ) -> Tensor:
        return operator(x, cores["weight"], tuple((b,) for b in range(self.blocks)))

    def to_dense(self, cores: Cores, out: Dims, inp: Dims) -> Tensor:
        weight = cores["weight"]
        dense = weight.new_zeros(*weight.shape[:-3], math.prod(out), math.prod(inp))
        o, i = weight.shape[-2:]
        for b in range(self.blocks):
            dense[..., b * o : (b + 1) * o, b * i : (b + 1) * i] = weight[..., b, :, :]
        return dense

    def project(self, dense: Tensor, out: Dims, inp: Dims) -> Projected:
        blocks = dense.unflatten(-1, (self.blocks, -1)).unflatten(-3, (self.blocks, -1))
        return Projected({"weight": blocks.diagonal(dim1=-4, dim2=-2).movedim(-1, -3)}, True)

    @classmethod
    def domains(cls) -> dict[str, Domain]:
        return {"blocks": IntRange(2, 16, log=True)}
