"""Block-sparse products in plain torch: one dense product a block, on views of both sides.

A block's columns of x and rows of y are read and written where they lie: nothing is gathered,
turned or kept, and the products of a line add up in place. Many small blocks go side by side.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from . import _block_sparse_matmul_lines as lines
from ._block_index import unpacked
from ._windows import working_dtype


def side_by_side(values: Tensor, rows: int) -> bool:
    """Whether blocks are so small, and so many a row, that gathering them pays."""
    return 4 * values.shape[0] > rows * min(values.shape[1:])


def add_up(total: Tensor, pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
    """total = sum of a @ b; zero where there are no pairs."""
    empty = True
    for a, b in pairs:
        if empty:
            torch.mm(a, b, out=total)
        else:
            total.addmm_(a, b)
        empty = False
    if empty:
        total.zero_()


def parts(x: Tensor, size: int) -> Sequence[Tensor]:
    """Views of the blocks of features of x [n, features]."""
    found: Sequence[Tensor] = x.split(size, 1)
    return found


def vectors(x: Tensor, first: bool) -> Tensor:
    """[n, features] of one item, in its working dtype."""
    return (x.t() if first else x).to(working_dtype(x))


def room(x: Tensor, first: bool) -> Tensor:
    """Where a result that looks like x is computed: x itself where its dtype allows."""
    wide = x if x.dtype == working_dtype(x) else torch.empty_like(x, dtype=working_dtype(x))
    return wide.t() if first else wide


def settle(x: Tensor, computed: Tensor, first: bool) -> None:
    """Round what `room` gave into x."""
    if computed.dtype != x.dtype:
        x.copy_(computed.t() if first else computed)


def forward(x: Tensor, values: Tensor, index: Tensor, rows: int, first: bool) -> Tensor:
    """x [b, n, in] -> [b, n, out]; [b, in, n] -> [b, out, n] where features are `first`."""
    if side_by_side(values, rows):
        return lines.forward(x, values, index, rows, first)
    blocks, made, summed = values.shape
    shape = (rows * made, x.shape[2]) if first else (x.shape[1], rows * made)
    y = x.new_empty(x.shape[0], *shape)
    at = unpacked(index.tolist(), rows, blocks)
    turned = values.to(working_dtype(x)).transpose(1, 2).unbind()
    for item, target in zip(x, y, strict=True):
        seen, out = parts(vectors(item, first), summed), room(target, first)
        for row, part in enumerate(parts(out, made)):
            held = range(at.row_starts[row], at.row_starts[row + 1])
            add_up(part, ((seen[at.column_of[k]], turned[k]) for k in held))
        settle(target, out, first)
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
    if side_by_side(values, rows):
        return lines.backward(grad, x, values, index, rows, first, need_x, need_values)
    blocks, made, summed = values.shape
    at = unpacked(index.tolist(), rows, blocks)
    wide = values.to(working_dtype(x))
    dx = x.new_empty(x.shape if need_x else 0)
    dvalues = torch.zeros_like(wide, memory_format=torch.contiguous_format)
    for item, (dy, source) in enumerate(zip(grad, x, strict=True)):
        g, seen = parts(vectors(dy, first), made), parts(vectors(source, first), summed)
        if need_x:
            out = room(dx[item], first)
            for column, part in enumerate(parts(out, summed)):
                held = range(at.column_starts[column], at.column_starts[column + 1])
                add_up(part, ((g[at.turned_row[k]], wide[at.turned_block[k]]) for k in held))
            settle(dx[item], out, first)
        if need_values:
            for k, total in enumerate(dvalues.unbind()):
                total.addmm_(g[at.row_of[k]].t(), seen[at.column_of[k]])
    return dx, dvalues.to(x.dtype) if need_values else x.new_empty(0)
