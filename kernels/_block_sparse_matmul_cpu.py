"""Block-sparse products in plain torch: what a line of blocks sees, side by side, in one product.

Some vectors at a time, each in one run of memory, so that what a line sees of them is gathered from
the caches in runs as long as a block is wide, and the product is as long as there are vectors and
as deep as all blocks of the line together.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

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


class Work:
    """Items as pieces of [c, features] in their working dtype, and room for what lines see."""

    def __init__(self, x: Tensor, features: int, seen: int, first: bool) -> None:
        """features: of the wider side; seen: numbers that a line sees of a vector, at most."""
        vectors = x.shape[2 if first else 1]
        self.first, self.dtype = first, working_dtype(x)
        self.c = max(1, min(vectors, max(LEAST, CHUNK // features)))
        self.pieces = [slice(at, at + self.c) for at in range(0, vectors, self.c)]
        self.room = x.new_empty(self.c * seen, dtype=self.dtype)

    def read(self, x: Tensor, at: slice, size: int) -> Tensor:
        """Some vectors of an item [n, features], or [features, n]: [c, blocks, size]."""
        part = (x[:, at].t() if self.first else x[at]).to(self.dtype)
        return part.contiguous().view(part.shape[0], -1, size)

    def target(self, x: Tensor, at: slice) -> Tensor:
        """[c, features] to compute some vectors of an item in: the item itself if it can be."""
        part = x[:, at].t() if self.first else x[at]
        if self.first or x.dtype != self.dtype:
            return torch.empty_like(part, dtype=self.dtype, memory_format=torch.contiguous_format)
        return part

    def settle(self, x: Tensor, at: slice, computed: Tensor) -> None:
        if self.first or x.dtype != self.dtype:
            (x[:, at].t() if self.first else x[at]).copy_(computed)

    def gather(self, seen: Tensor, lines: Lines) -> Iterator[Tensor]:
        """What each line sees of [c, blocks, size], side by side: [c, k size]."""
        c, _, size = seen.shape
        for across in lines.across:
            part = self.room[: c * len(across) * size].view(c, len(across), size)
            yield torch.index_select(seen, 1, across, out=part).flatten(1)

    def multiply(self, seen: Tensor, lines: Lines, weights: Sequence[Tensor], out: Tensor) -> None:
        parts = out.split(weights[0].shape[0], 1)
        for part, panel, w in zip(parts, self.gather(seen, lines), weights, strict=True):
            part.copy_(matmul.linear(panel, w))


def forward(x: Tensor, values: Tensor, index: Tensor, rows: int, first: bool) -> Tensor:
    """x [b, n, in] -> [b, n, out]; [b, in, n] -> [b, out, n] where features are `first`."""
    blocks, made, summed = values.shape
    shape = (rows * made, x.shape[2]) if first else (x.shape[1], rows * made)
    y = x.new_empty(x.shape[0], *shape)
    at = unpacked(index, rows, blocks)
    across = Lines(at.row_starts, at.column_of)
    features = max(rows * made, x.shape[1 if first else 2])
    work = Work(x, features, max(across.held) * summed, first)
    weights = across.weights(values.to(work.dtype))
    for item, target in zip(x, y, strict=True):
        for piece in work.pieces:
            out = work.target(target, piece)
            work.multiply(work.read(item, piece, summed), across, weights, out)
            work.settle(target, piece, out)
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
    across = Lines(at.row_starts, at.column_of)
    down = Lines(at.column_starts, at.turned_row)
    features = max(rows * made, x.shape[1 if first else 2])
    work = Work(x, features, max(max(across.held) * summed, max(down.held) * made), first)
    weights = down.weights(values.to(work.dtype).transpose(1, 2)[at.turned_block])
    dx = x.new_empty(x.shape if need_x else 0)
    total = torch.zeros(values.shape if need_values else 0, dtype=work.dtype, device=x.device)
    for item, (dy, source) in enumerate(zip(grad, x, strict=True)):
        for piece in work.pieces:
            g = work.read(dy, piece, made)
            if need_x:
                out = work.target(dx[item], piece)
                work.multiply(g, down, weights, out)
                work.settle(dx[item], piece, out)
            if need_values:
                sums = total.split(across.held)
                panels = work.gather(work.read(source, piece, summed), across)
                for own, panel, into in zip(g.unbind(1), panels, sums, strict=True):
                    found = matmul.outer(own, panel).unflatten(1, (-1, summed))
                    into += found.transpose(0, 1)
    return dx, total.to(x.dtype)
