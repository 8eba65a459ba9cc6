"""Block-sparse with a fixed mask: random regular, or pixelfly's flat block butterfly.

(Chen et al. 2022, "Pixelated Butterfly", arXiv 2112.00029, section 3.)
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import ClassVar, Literal

import torch
from torch import Tensor, einsum

from ..domains import Choice, Domain, FloatRange, IntRange
from ..errors import PatternError
from ..network import BlockedNetwork, Plan, Step
from ..pattern import Core, Cores, Dims, Projected

Columns = tuple[tuple[int, ...], ...]


@dataclass(frozen=True, kw_only=True)
class BlockSparse(BlockedNetwork, family="block_sparse"):
    """A grid of blocks x blocks, of which every row and column holds the same number, dense.

    density: the share of blocks kept, at least one a row.
    mask: 'random' is drawn from `seed`, the same on every machine; 'butterfly' keeps block (i, j)
    where i = j or i and j differ in one of the lowest bits, and takes powers of two as `blocks`.
    """

    operators: ClassVar[tuple[str, ...]] = ("block_sparse_matmul",)

    blocks: int = 8
    density: float = 0.375
    mask: Literal["random", "butterfly"] = "butterfly"
    seed: int = 0

    def check(self) -> None:
        super().check()
        if not 0 < self.density <= 1:
            raise PatternError(f"block_sparse: density={self.density} must be in (0, 1]")

    def valid_blocks(self, out: Dims, inp: Dims) -> list[int]:
        valid = super().valid_blocks(out, inp)
        return [b for b in valid if b.bit_count() == 1] if self.mask == "butterfly" else valid

    def resolve(self, out: Dims, inp: Dims, causal: bool = False) -> BlockSparse:
        fitting = super().resolve(out, inp, causal)
        kept, blocks = fitting.kept(), fitting.blocks
        seed = self.seed if self.mask == "random" and kept < blocks else 0
        return replace(fitting, density=kept / blocks, seed=seed)

    def kept(self) -> int:
        """Blocks a row."""
        most = self.blocks if self.mask == "random" else self.blocks.bit_length()
        return max(1, min(most, round(self.density * self.blocks)))

    def columns(self) -> Columns:
        """Of every row of blocks, the columns that hold one."""
        if self.mask == "butterfly":
            steps = [0, *(1 << bit for bit in range(self.kept() - 1))]
            return tuple(tuple(i ^ step for step in steps) for i in range(self.blocks))
        return regular(self.blocks, self.kept(), self.seed)

    def plan(self, out: Dims, inp: Dims) -> Plan:
        b = self.blocks
        o, i = math.prod(out) // b, math.prod(inp) // b
        sizes = {"b": b, "k": self.kept(), "o": o, "i": i}
        return Plan(sizes, "bki", (Step("weight", "bkoi", "bo"),))  # after the blocks are gathered

    def cores(self, out: Dims, inp: Dims) -> dict[str, Core]:
        b, k, o, i = self.plan(out, inp).shape("bkoi")
        return {"weight": Core((b, k, o, i), k * i, k * o)}

    def matmul(self, cores: Cores, x: Tensor, out: Dims) -> Tensor:
        blocks = x.flatten(-len(out)).unflatten(-1, (self.blocks, -1))
        seen = blocks.index_select(-2, index(self.columns(), x.device))
        seen = seen.unflatten(-2, (self.blocks, -1))
        y = einsum("...bkoi,...bki->...bo", cores["weight"], seen)
        whole: Tensor = y.flatten(-2).unflatten(-1, out)
        return whole

    def feature_operator(self, out: Dims, inp: Dims, device: torch.device) -> str:
        return "block_sparse_matmul"

    def run_features(
        self, operator: Callable[..., Tensor], cores: Cores, x: Tensor, out: Dims
    ) -> Tensor:
        return operator(x, cores["weight"].flatten(0, 1), self.columns())

    def to_dense(self, cores: Cores, out: Dims, inp: Dims) -> Tensor:
        weight = cores["weight"]
        o, i = weight.shape[-2:]
        dense = weight.new_zeros(*weight.shape[:-4], math.prod(out), math.prod(inp))
        for row, columns in enumerate(self.columns()):
            for k, column in enumerate(columns):
                rows, cols = slice(row * o, (row + 1) * o), slice(column * i, (column + 1) * i)
                dense[..., rows, cols] = weight[..., row, k, :, :]
        return dense

    def matrix_rank(self, out: Dims, inp: Dims) -> int:
        return min(math.prod(out), math.prod(inp))  # a regular mask holds a permutation of blocks

    def project(self, dense: Tensor, out: Dims, inp: Dims) -> Projected:
        blocks = dense.unflatten(-1, (self.blocks, -1)).unflatten(-3, (self.blocks, -1))
        rows = [
            torch.stack([blocks[..., row, :, column, :] for column in columns], -3)
            for row, columns in enumerate(self.columns())
        ]
        return Projected({"weight": torch.stack(rows, -4)}, True)

    @classmethod
    def domains(cls) -> dict[str, Domain]:
        return {
            "blocks": IntRange(4, 32, log=True),
            "density": FloatRange(1 / 16, 0.5, log=True),
            "mask": Choice(("random", "butterfly")),
        }


@lru_cache(maxsize=1024)
def regular(blocks: int, kept: int, seed: int) -> Columns:
    """`kept` shifted copies of one permutation: as many blocks in every row as in every column."""
    rows, columns, shifts = (shuffled(blocks, f"{seed}/{what}") for what in ("row", "column", "by"))
    return tuple(
        tuple(sorted(columns[(rows[i] + s) % blocks] for s in shifts[:kept])) for i in range(blocks)
    )


def shuffled(n: int, key: str) -> list[int]:
    """range(n) in an order of `key` alone: no version of a random generator can change a mask."""
    return sorted(range(n), key=lambda i: hashlib.sha256(f"{key}/{i}".encode()).digest())


@lru_cache(maxsize=256)
def index(columns: Columns, device: torch.device) -> Tensor:
    """The columns as one index, kept so that no step copies it to the device again."""
    with torch.inference_mode(False):
        return torch.tensor([c for row in columns for c in row], device=device)
