"""Block-sparse products in plain torch: what a line of blocks sees, side by side, in one product.

Some vectors at a time, so that what a line sees of them is gathered from the caches, and the
product is as long as there are vectors and as deep as all blocks of the line together. On several
threads, narrow blocks go another way: see `_block_columns_cpu`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from . import _block_columns_cpu as columns
from . import _matmul_cpu as matmul
from ._block_index import unpacked
from ._windows import working_dtype

CHUNK = 1 << 21  # numbers of the vectors at a time: 8 MB of float32
LEAST = 256  # vectors at a time, where that is more


class Lines:
    """Rows of the grid, or its columns: where each of them looks, and at which blocks."""

    def __init__(self, starts: Tensor, across: Tensor) -> None:
        """Line r holds entries starts[r] .. starts[r + 1]."""
        self.held: list[int] = starts.diff().tolist()
        self.across = across.split(self.held)

    def weights(self, values: Tensor) -> list[Tensor]:
        """Blocks [blocks, m, s] of each line side by side: [m, k s]."""
        return [w.transpose(0, 1).flatten(1) for w in values.split(self.held)]

    def zeros(self, values: Tensor, dtype: torch.dtype) -> list[Tensor]:
        """For gradients of `weights`."""
        _, made, size = values.shape
        return [values.new_zeros(made, k * size, dtype=dtype) for k in self.held]

    def blocks(self, weights: Sequence[Tensor], size: int) -> Tensor:
        """The inverse of `weights`, for blocks of `size` columns."""
        parts = zip(weights, self.held, strict=True)
        return torch.cat([w.unflatten(1, (k, size)).transpose(0, 1) for w, k in parts])


class Rows:
    """Items as pieces of [c, features] in their working dtype, and room for what lines see."""

    def __init__(self, x: Tensor, features: int, seen: int, first: bool) -> None:
        """features: of the wider side; seen: numbers that a line sees of a vector, at most."""
        vectors = x.shape[2 if first else 1]
        self.first, self.dtype = first, working_dtype(x)
        self.c = max(1, min(vectors, max(LEAST, CHUNK // features)))
        self.pieces = [slice(at, at + self.c) for at in range(0, vectors, self.c)]
        self.panel = x.new_empty(self.c * seen, dtype=self.dtype)

    def part(self, x: Tensor, at: slice) -> Tensor:
        """Some vectors of an item [n, features], or [features, n]: [c, features]."""
        return x[:, at].t() if self.first else x[at]

    def read(self, x: Tensor, at: slice, size: int) -> Tensor:
        """Some vectors of an item: [c, blocks, size]."""
        part = self.part(x, at).to(self.dtype).contiguous()
        return part.view(part.shape[0], -1, size)

    def gather(self, seen: Tensor, lines: Lines) -> Iterator[Tensor]:
        """What each line sees of [c, blocks, size], side by side: [c, k size]."""
        c, _, size = seen.shape
        for across in lines.across:
            part = self.panel[: c * len(across) * size].view(c, len(across), size)
            yield torch.index_select(seen, 1, across, out=part).flatten(1)

    def multiply(
        self, x: Tensor, y: Tensor, at: slice, lines: Lines, weights: Sequence[Tensor], size: int
    ) -> None:
        """Some vectors of an item x, in blocks of `size`, to those of an item y."""
        part = self.part(y, at)
        own = not self.first and y.dtype == self.dtype
        out = part if own else part.new_empty(part.shape, dtype=self.dtype)
        panels = self.gather(self.read(x, at, size), lines)
        for into, panel, w in zip(out.split(weights[0].shape[0], 1), panels, weights, strict=True):
            into.copy_(matmul.linear(panel, w))
        if not own:
            part.copy_(out)

    def outer(
        self, grad: Tensor, x: Tensor, at: slice, lines: Lines, sums: Sequence[Tensor], size: int
    ) -> None:
        """To each of `sums` [m, k size], a line's part of grad turned times what it sees of x."""
        own = self.read(grad, at, sums[0].shape[0]).unbind(1)
        panels = self.gather(self.read(x, at, size), lines)
        for into, part, panel in zip(sums, own, panels, strict=True):
            into += matmul.outer(part, panel)


def kinds(values: Tensor, features: int) -> tuple[Any, Any]:
    """What holds lines of blocks [blocks, o, i], and what multiplies by them."""
    return (columns.Runs, columns.Columns) if columns.pays(values, features) else (Lines, Rows)


def forward(x: Tensor, values: Tensor, index: Tensor, rows: int, first: bool) -> Tensor:
    """x [b, n, in] -> [b, n, out]; [b, in, n] -> [b, out, n] where features are `first`."""
    blocks, made, summed = values.shape
    shape = (rows * made, x.shape[2]) if first else (x.shape[1], rows * made)
    y = x.new_empty(x.shape[0], *shape)
    at = unpacked(index, rows, blocks)
    features = max(rows * made, x.shape[1 if first else 2])
    kind, kind_of_work = kinds(values, features)
    across = kind(at.row_starts, at.column_of)
    seen = max(across.held) * summed
    work = kind_of_work(x, features, seen, first)
    weights = across.weights(values.to(work.dtype))
    for item, target in zip(x, y, strict=True):
        for piece in work.pieces:
            work.multiply(item, target, piece, across, weights, summed)
    return y


def backward(
    grad: Tensor,
    x: Tensor,
    values: Tensor,
    index: Tensor,
    rows: int,
    first: bool,
    need_x: bool,
    need_values: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of x and of the blocks; empty where not needed."""
    blocks, made, summed = values.shape
    at = unpacked(index, rows, blocks)
    features = max(rows * made, x.shape[1 if first else 2])
    kind, kind_of_work = kinds(values, features)
    across, down = kind(at.row_starts, at.column_of), kind(at.column_starts, at.turned_row)
    seen = max(max(across.held) * summed, max(down.held) * made)
    work = kind_of_work(x, features, seen, first)
    weights = down.weights(values.to(work.dtype).transpose(1, 2)[at.turned_block])
    dx = x.new_empty(x.shape if need_x else 0)
    sums = across.zeros(values, work.dtype) if need_values else []
    for item, (dy, source) in enumerate(zip(grad, x, strict=True)):
        for piece in work.pieces:
            if need_x:
                work.multiply(dy, dx[item], piece, down, weights, made)
            if need_values:
                work.outer(dy, source, piece, across, sums, summed)
    found = across.blocks(sums, summed).to(x.dtype) if need_values else values.new_empty(0)
    return dx, found
