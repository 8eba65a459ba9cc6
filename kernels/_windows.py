"""Cut positions into blocks of rows that each see one window of columns, in plain torch.

Row t of a band sees columns t - lower .. t + upper. A block of rows therefore sees a window that
is `lower + upper` wider than the block. Blocks whose windows lie inside share their shape, so one
batched product does many of them, on overlapping views without a copy; windows that stick out at
the ends are cut there and batch over the batch instead.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Unit(NamedTuple):
    """`blocks` blocks of `rows` rows from row `first` on; the first window starts at `start`.

    blocks = 1: one block, batched over the batch; else a batch of blocks for each batch element.
    `cut` columns of the full window (from first - lower on) are missing at the left.
    """

    first: int
    rows: int
    start: int
    columns: int
    blocks: int
    cut: int

    @property
    def end(self) -> int:
        return self.first + self.rows * self.blocks


def plan(length: int, rows: int, lower: int, upper: int, batch: int, most: int) -> Iterator[Unit]:
    """Units that cover rows 0 .. length - 1, in order; at most `most` blocks in a unit."""
    inner = -(-lower // rows)
    outer = max(inner, (length - upper) // rows)
    inside = outer - inner > batch
    block, last = 0, -(-length // rows)
    while block < last:
        first = block * rows
        if inside and inner <= block < outer:
            count = min(most, outer - block)
            if count > 1:
                yield Unit(first, rows, first - lower, rows + lower + upper, count, 0)
                block += count
                continue
        height = min(rows, length - first)
        start = max(0, first - lower)
        end = min(length, first + height + upper)
        yield Unit(first, height, start, end - start, 1, start - (first - lower))
        block += 1


def items(x: Tensor, unit: Unit) -> range:
    """The products of a unit: one for all the batch, or one for each element."""
    return range(1 if unit.blocks == 1 else x.shape[0])


def piece(x: Tensor, unit: Unit, item: int, start: int, length: int, dtype: torch.dtype) -> Tensor:
    """[n, length, D] from x [B, T, D] in `dtype`: rows from `start` on, `unit.rows` apart."""
    if unit.blocks == 1:
        return x[:, start : start + length].to(dtype)
    step = unit.rows
    slab = x[item, start : start + (unit.blocks - 1) * step + length].to(dtype)
    across, down = slab.stride()[0] * step, slab.stride()[0]
    return slab.as_strided((unit.blocks, length, x.shape[2]), (across, down, 1))


def block(x: Tensor, unit: Unit, item: int, dtype: torch.dtype) -> Tensor:
    """The rows of a unit, [n, rows, D]."""
    return piece(x, unit, item, unit.first, unit.rows, dtype)


def window(x: Tensor, unit: Unit, item: int, dtype: torch.dtype) -> Tensor:
    """The columns of a unit, [n, columns, D]; overlapping, to be read only."""
    return piece(x, unit, item, unit.start, unit.columns, dtype)


def working_dtype(x: Tensor) -> torch.dtype:
    """float64 stays, everything else is computed in float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def row_major(*tensors: Tensor) -> Any:
    """The tensors with a last stride of 1."""
    return tuple(t if t.stride(-1) == 1 else t.contiguous() for t in tensors)


def rows_of(x: Tensor) -> Tensor:
    """x [*, n] as [rows, n]."""
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def threads() -> int:
    """How many share a call of torch on CPU."""
    return torch.get_num_threads()
