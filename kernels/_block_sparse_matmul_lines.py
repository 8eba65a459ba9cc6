"""Products of small blocks in plain torch: what a line of blocks sees, side by side, in one.

Some vectors at a time, turned so that they are innermost: a block's inputs are then one run of
memory, gathering them costs little beside their product, and every product is as wide as there are
vectors, however small the blocks. Lines that hold equally many blocks are multiplied together.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ._block_index import unpacked
from ._windows import working_dtype

CHUNK = 1 << 18  # numbers of the vectors, or of what lines see of them, at a time: 1 MB of float32
LEAST, MOST = 64, 128  # vectors at a time


class Lines(NamedTuple):
    """Lines of a grid that hold k blocks each.

    lines   [l], their numbers
    across  [l, k], where along the line its blocks stand
    blocks  [l, k], the numbers of these
    """

    lines: Tensor
    across: Tensor
    blocks: Tensor

    def weights(self, values: Tensor) -> Tensor:
        """Blocks [blocks, m, s] side by side, [l, m, k s]."""
        return values[self.blocks].transpose(1, 2).flatten(2)


def lines_of(starts: Tensor, across: Tensor, blocks: Tensor) -> list[Lines]:
    """Lines by how many blocks they hold: line r holds entries starts[r] .. starts[r + 1]."""
    found, counts = [], starts.diff()
    for held in counts.unique().tolist():
        lines = (counts == held).nonzero().squeeze(1)
        at = starts[lines, None] + torch.arange(held, device=starts.device)
        found.append(Lines(lines, across[at], blocks[at]))
    return found


class Work:
    """Room for some vectors, taken once a call: fresh pages cost more than the products."""

    def __init__(self, x: Tensor, values: Tensor, features: int, first: bool) -> None:
        """features: of the wider side. values [blocks, o, i] only tell the size of a block."""
        vectors = x.shape[2 if first else 1]
        self.first, self.block = first, max(values.shape[1:])
        self.c = min(vectors, max(LEAST, min(MOST, CHUNK // features)))
        self.pieces = [slice(at, at + self.c) for at in range(0, vectors, self.c or 1)]
        self.dtype, self.like = working_dtype(x), x
        self.ends = [self.room(features * self.c) for _ in range(2)]
        self.parts = [self.room(max(CHUNK, features * self.c)) for _ in range(2)]

    def room(self, size: int) -> Tensor:
        return self.like.new_empty(size, dtype=self.dtype)

    def columns(self, which: int, x: Tensor, at: slice, size: int) -> Tensor:
        """Some vectors of an item [n, features], or [features, n]: [blocks, size, c]."""
        part = x[:, at] if self.first else x[at].t()
        turned = self.ends[which][: part.numel()].view(part.shape).copy_(part)
        return turned.view(-1, size, part.shape[1])

    def put(self, x: Tensor, at: slice, found: Tensor) -> None:
        """The other way: `found` [blocks, size, c] into vectors of x."""
        (x[:, at] if self.first else x[at].t()).copy_(found.flatten(0, 1))

    def gather(self, seen: Tensor, group: Lines) -> Iterator[tuple[slice, Tensor]]:
        """What some lines see of [blocks, size, c], side by side: [some, k size, c]."""
        c, held = seen.shape[2], group.across.shape[1]
        step = max(1, CHUNK // (max(1, held) * self.block * c))
        for start in range(0, len(group.lines), step):
            across = group.across[start : start + step]
            run = seen.shape[1] * c
            out = self.parts[0][: across.numel() * run].view(across.numel(), run)
            torch.index_select(seen.flatten(1), 0, across.flatten(), out=out)
            yield slice(start, start + step), out.view(len(across), held * seen.shape[1], c)

    def multiply(self, seen: Tensor, group: Lines, weights: Tensor, out: Tensor) -> None:
        """Lines of out [lines, m, c] of what they see."""
        for at, part in self.gather(seen, group):
            w = weights[at]
            room = self.parts[1][: w.shape[0] * out[0].numel()].view(-1, *out.shape[1:])
            out.index_copy_(0, group.lines[at], torch.bmm(w, part, out=room))


def forward(x: Tensor, values: Tensor, index: Tensor, rows: int, first: bool) -> Tensor:
    """x [b, n, in] -> [b, n, out]; [b, in, n] -> [b, out, n] where features are `first`."""
    blocks, made, summed = values.shape
    shape = (rows * made, x.shape[2]) if first else (x.shape[1], rows * made)
    y = x.new_empty(x.shape[0], *shape)
    groups = by_rows(index, rows, blocks)
    work = Work(x, values, max(rows * made, x.shape[1 if first else 2]), first)
    weights = [group.weights(values.to(work.dtype)) for group in groups]
    for item, target in zip(x, y, strict=True):
        for at in work.pieces:
            seen = work.columns(0, item, at, summed)
            out = work.ends[1][: rows * made * seen.shape[2]].view(rows, made, -1)
            for group, w in zip(groups, weights, strict=True):
                work.multiply(seen, group, w, out)
            work.put(target, at, out)
    return y


def by_rows(index: Tensor, rows: int, blocks: int) -> list[Lines]:
    at = unpacked(index, rows, blocks)
    return lines_of(at.row_starts, at.column_of, torch.arange(blocks, device=index.device))


def by_columns(index: Tensor, rows: int, blocks: int) -> list[Lines]:
    at = unpacked(index, rows, blocks)
    return lines_of(at.column_starts, at.turned_row, at.turned_block)


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
    features = x.shape[1 if first else 2]
    work = Work(x, values, max(rows * made, features), first)
    dx = x.new_empty(x.shape if need_x else 0)
    across = by_rows(index, rows, blocks)
    totals = [work.room(len(g.lines) * made * g.across.shape[1] * summed) for g in across]
    totals = [t.zero_().view(len(g.lines), made, -1) for t, g in zip(totals, across, strict=True)]
    down = by_columns(index, rows, blocks)
    turned = values.to(work.dtype).transpose(1, 2)
    weights = [group.weights(turned) for group in down]
    for item, (dy, source) in enumerate(zip(grad, x, strict=True)):
        for at in work.pieces:
            g = work.columns(1, dy, at, made)
            if need_values:
                sample(work, g, work.columns(0, source, at, summed), across, totals)
            if need_x:
                out = work.ends[0][: features * g.shape[2]].view(-1, summed, g.shape[2])
                for group, w in zip(down, weights, strict=True):
                    work.multiply(g, group, w, out)
                work.put(dx[item], at, out)
    if not need_values:
        return dx, x.new_empty(0)
    dvalues = torch.empty(values.shape, dtype=x.dtype, device=x.device)
    for group, total in zip(across, totals, strict=True):
        cube = total.view(*total.shape[:2], -1, summed).transpose(1, 2)
        dvalues[group.blocks] = cube.to(x.dtype)
    return dx, dvalues


def sample(
    work: Work, g: Tensor, seen: Tensor, groups: Sequence[Lines], totals: Sequence[Tensor]
) -> None:
    """Add to totals [l, m, k s] the products of g [lines, m, c] and what its lines see."""
    for group, total in zip(groups, totals, strict=True):
        for at, part in work.gather(seen, group):
            lines = group.lines[at]
            room = work.parts[1][: len(lines) * g[0].numel()].view(len(lines), -1)
            own = torch.index_select(g.flatten(1), 0, lines, out=room).view(-1, *g.shape[1:])
            total[at].baddbmm_(own, part.transpose(1, 2))
