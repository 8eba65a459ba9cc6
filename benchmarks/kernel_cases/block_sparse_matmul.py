"""Block-sparse weight times dense beside F.linear, a product of gathers, and torch's BSR."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kernel_cases import Case, Overhead, Tensors, Way
from patternsearch.kernels import _block_sparse_matmul_cpu as plain_torch
from patternsearch.kernels._block_index import index_of
from patternsearch.kernels.block_sparse_matmul import block_sparse_matmul


class Shape(NamedTuple):
    rows: int
    width: int
    block: int
    kept: int  # blocks of every row and column

    @property
    def columns(self) -> tuple[tuple[int, ...], ...]:
        n = self.width // self.block
        return tuple(tuple((5 * r + k * 3) % n for k in range(self.kept)) for r in range(n))

    def make(self, device: torch.device, dtype: torch.dtype) -> Tensors:
        blocks = self.width // self.block * self.kept
        x = torch.randn(self.rows, self.width, device=device)
        values = torch.randn(blocks, self.block, self.block, device=device)
        return x.to(dtype), (values / (self.kept * self.block) ** 0.5).to(dtype)

    def ours(self, x: Tensor, values: Tensor) -> Tensor:
        return block_sparse_matmul(x, values, self.columns)

    def dense(self, values: Tensor) -> Tensor:
        full = values.new_zeros(self.width, self.width)
        held, b = iter(values), self.block
        for row, across in enumerate(self.columns):
            for c in across:
                full[row * b : (row + 1) * b, c * b : (c + 1) * b] = next(held)
        return full

    def bsr(self, x: Tensor, values: Tensor) -> Tensor:
        n = self.width // self.block
        starts = torch.arange(0, n * self.kept + 1, self.kept, device=x.device)
        across = torch.tensor([c for row in self.columns for c in row], device=x.device)
        size = (self.width, self.width)
        return F.linear(x, torch.sparse_bsr_tensor(starts, across, values, size))


def case(
    name: str, shape: Shape, goal: float | None = None, scale: tuple[str, int] | None = None
) -> Case:
    others = {
        "dense": Way(F.linear, lambda x, values: (x, shape.dense(values))),
        "gather and bmm": Way(lambda x, v: block_sparse_matmul(x, v, shape.columns, impl="torch")),
        "BSR": Way(shape.bsr, forward_only="torch has no backward of a BSR weight"),
    }
    entries = shape.width * shape.kept * shape.block
    numbers, work = shape.rows * shape.width, 2 * shape.rows * entries
    return Case(
        name,
        shape.make,
        Way(shape.ours),
        others,
        lambda x, values: x @ shape.dense(values).t(),
        moved=(2 * numbers + entries, 5 * numbers + 3 * entries),
        flops=(work, 3 * work),
        goals={} if goal is None else {"dense": goal},
        scale=scale,
    )


def cases(device: torch.device) -> list[Case]:
    cuda = device.type == "cuda"
    rows = 16384 if cuda else 2048
    widths = (2048, 4096, 8192, 16384) if cuda else (512, 1024, 2048)
    kinds = [(64, 0.1), (64, 0.25), (64, 0.5)] + ([] if cuda else [(16, 0.1), (32, 0.1)])
    found = []
    for block, share in kinds:
        for width in widths:
            kept = max(1, int(share * width / block))
            goal = 4.0 if share == 0.1 and not cuda else 1.0 if share == 0.5 and cuda else None
            goal = goal if cuda or width == 2048 else None
            name = f"width {width}, blocks of {block}, {kept * block / width:.0%}"
            scale = f"blocks of {block}, {share:.0%}", width
            found.append(case(name, Shape(rows, width, block, kept), goal, scale))
    return found


def growth(device: torch.device, length: int) -> Case:
    return case(f"{length} rows", Shape(length, 256, 32, 2))


def overhead() -> Overhead:
    columns = ((0,), (1,), (0, 1))
    index = index_of(columns, 2, torch.device("cpu"))
    return Overhead(
        lambda: (torch.randn(4, 8), torch.randn(4, 4, 4)),
        lambda x, values: block_sparse_matmul(x, values, columns, impl="kernel"),
        lambda x, values: plain_torch.forward(x[None], values, index, 3, False)[0],
        lambda dy, x, values: plain_torch.backward(
            dy[None], x[None], values, index, 3, False, True, True
        ),
    )
