"""Product with a learned band beside a masked dense matrix, CSR and blocked batched products."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kernel_cases import PLAIN, SMALL, Case, Overhead, Tensors, Way
from patternsearch.kernels import _banded_matmul_cpu as plain_torch
from patternsearch.kernels.banded_matmul import banded_matmul

BLOCKS = (16, 32, 64, 128)


class Shape(NamedTuple):
    batch: int
    length: int
    heads: int
    size: int
    lower: int
    upper: int

    @property
    def width(self) -> int:
        return self.lower + self.upper + 1

    def make(self, device: torch.device, dtype: torch.dtype) -> Tensors:
        x = torch.randn(self.batch, self.length, self.heads, self.size, device=device)
        band = torch.randn(self.heads, self.length, self.width, device=device) / self.width**0.5
        return x.to(dtype), band.to(dtype)

    def ours(self, x: Tensor, band: Tensor) -> Tensor:
        return banded_matmul(x, band, lower=self.lower, upper=self.upper)

    def plain(self, x: Tensor, band: Tensor) -> Tensor:
        return banded_matmul(x, band, lower=self.lower, upper=self.upper, impl="torch")

    def exact(self, x: Tensor, band: Tensor) -> Tensor:
        padded = F.pad(x, (0, 0, 0, 0, self.lower, self.upper))
        y = torch.zeros_like(x)
        for j in range(self.width):
            y += band[:, :, j].t()[:, :, None] * padded[:, j : j + self.length]
        return y


def heads_first(x: Tensor) -> Tensor:
    return x.transpose(1, 2).contiguous()


def dense(shape: Shape) -> Way:
    """The matrix is the parameter; the mask keeps it a band while it is trained."""
    masks: list[Tensor] = []

    def prepare(x: Tensor, band: Tensor) -> Tensors:
        t = torch.arange(shape.length, device=x.device)
        step = t - t[:, None]
        masks[:] = [(step >= -shape.lower) & (step <= shape.upper)]
        return heads_first(x), plain_torch.shear(band, shape.lower, 1, band.dtype).contiguous()

    def run(x: Tensor, matrix: Tensor) -> Tensor:
        return torch.where(masks[0], matrix, 0) @ x

    return Way(run, prepare, lambda y: y.transpose(1, 2))


def blocked(shape: Shape, rows: int) -> Way:
    """Windows of neighbouring blocks, and tiles sheared by padding: views and one bmm."""
    width = shape.width
    span = rows + width - 1
    near = -(-span // rows)
    blocks = -(-shape.length // rows)

    def run(x: Tensor, band: Tensor) -> Tensor:
        missing = blocks * rows - shape.length
        tail = (blocks + near - 1) * rows - shape.length - shape.lower
        cut = F.pad(x, (0, 0, shape.lower, tail)).unflatten(2, (-1, rows))
        windows = torch.cat([cut[:, :, i : i + blocks] for i in range(near)], 3)
        tiles = F.pad(band, (0, span + 1 - width, 0, missing)).unflatten(1, (blocks, rows))
        tiles = tiles.flatten(2)[:, :, : rows * span].unflatten(2, (rows, span))
        y = F.pad(tiles, (0, near * rows - span)) @ windows
        return y.flatten(2, 3)[:, :, : shape.length]

    def prepare(x: Tensor, band: Tensor) -> Tensors:
        return heads_first(x), band

    return Way(run, prepare, lambda y: y.transpose(1, 2))


def sparse(shape: Shape) -> Way:
    """Compressed rows; torch gives no gradient with respect to their values."""
    matrices: list[Tensor] = []

    def prepare(x: Tensor, band: Tensor) -> Tensors:
        matrix = plain_torch.shear(band, shape.lower, 1, band.dtype)
        matrices[:] = [matrix[0].to_sparse_csr()]
        return (x[:, :, 0].transpose(0, 1).reshape(shape.length, -1),)

    def run(x: Tensor) -> Tensor:
        return torch.sparse.mm(matrices[0], x)

    def restore(y: Tensor) -> Tensor:
        return y.view(shape.length, shape.batch, 1, shape.size).transpose(0, 1)

    missing = None if shape.heads == 1 else "one matrix a call, no heads"
    return Way(run, prepare, restore, missing, "no gradient of a CSR matrix's values")


def case(name: str, shape: Shape, judged: bool = False) -> Case:
    blocks = {f"blocked bmm, {n} rows": blocked(shape, n) for n in BLOCKS if n <= shape.length}
    others = {"dense, masked": dense(shape), "CSR": sparse(shape), **blocks}
    goals = dict.fromkeys(blocks, 1.3) | {"dense, masked": 30.0} if judged else {}
    if shape.length <= 64:
        others[PLAIN], goals = Way(shape.plain), SMALL
    numbers = shape.batch * shape.length * shape.heads * shape.size
    entries = shape.heads * shape.length * shape.width
    return Case(
        name,
        shape.make,
        Way(shape.ours),
        others,
        shape.exact,
        moved=(2 * numbers + entries, 5 * numbers + 3 * entries),
        flops=(2 * numbers * shape.width, 6 * numbers * shape.width),
        goals=goals,
    )


SHAPES = {
    "B64 T64 D64 W16": Shape(64, 64, 1, 64, 15, 0),
    "B32 T256 D64 W16": Shape(32, 256, 1, 64, 15, 0),
    "B8 T1024 D64 W64": Shape(8, 1024, 1, 64, 63, 0),
    "B2 T2048 H4 D32 W65": Shape(2, 2048, 4, 32, 32, 32),
    "B2 T4096 D256 W64": Shape(2, 4096, 1, 256, 63, 0),
    "B2 T4096 D256 W16": Shape(2, 4096, 1, 256, 15, 0),
    "B2 T4096 D256 W256": Shape(2, 4096, 1, 256, 255, 0),
}
ON_CUDA = {
    "B16 T4096 D256 W64": Shape(16, 4096, 1, 256, 63, 0),
    "B8 T8192 H8 D128 W64": Shape(8, 8192, 8, 128, 63, 0),
    "B8 T8192 H8 D128 W129": Shape(8, 8192, 8, 128, 64, 64),
}


def cases(device: torch.device) -> list[Case]:
    shapes = SHAPES | (ON_CUDA if device.type == "cuda" else {})
    goal = "B2 T4096 D256 W64" if device.type == "cpu" else ""
    return [case(name, shape, name == goal) for name, shape in shapes.items()]


def growth(device: torch.device, length: int) -> Case:
    return case(f"T{length}", Shape(1, length, 1, 64, 31, 0))


def overhead() -> Overhead:
    shape = Shape(1, 4, 1, 4, 1, 0)
    how = 1, 0, 1, False
    return Overhead(
        lambda: shape.make(torch.device("cpu"), torch.float32),
        shape.ours,
        lambda x, band: plain_torch.apply(x, band, *how),
        lambda dy, x, band: plain_torch.backward(dy, x, band, *how),
    )
