"""Where the blocks of a block-sparse matrix stand, by rows and by columns, as one array of ints."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._runtime import refuse

Columns = tuple[tuple[int, ...], ...]


class BlockIndex(NamedTuple):
    """`blocks` blocks of a grid of `rows` x `columns`; numbered row by row.

    row_starts     [rows + 1]: row r holds blocks row_starts[r] .. row_starts[r + 1]
    column_of      [blocks]
    row_of         [blocks]
    column_starts  [columns + 1]: column c holds entries column_starts[c] .. column_starts[c + 1] of
    turned_row     [blocks]: the rows of its blocks, and
    turned_block   [blocks]: their numbers

    Each a list of ints, or an int32 array on a device.
    """

    row_starts: Any
    column_of: Any
    row_of: Any
    column_starts: Any
    turned_row: Any
    turned_block: Any


def packed(columns: Columns, width: int) -> list[int]:
    """The fields of BlockIndex one after the other, for a grid of `width` columns."""
    held = [(row, column) for row, across in enumerate(columns) for column in across]
    order = sorted(range(len(held)), key=lambda k: (held[k][1], k))
    row_starts, column_starts = [0] * (len(columns) + 1), [0] * (width + 1)
    for row, column in held:
        row_starts[row + 1] += 1
        column_starts[column + 1] += 1
    for starts in (row_starts, column_starts):
        for line in range(1, len(starts)):
            starts[line] += starts[line - 1]
    by_rows = [*row_starts, *(column for _, column in held), *(row for row, _ in held)]
    return [*by_rows, *column_starts, *(held[k][0] for k in order), *order]


def unpacked(index: list[int] | Tensor, rows: int, blocks: int) -> BlockIndex:
    """The fields of `packed`, as a list of ints or as one array on a device."""
    columns = len(index) - rows - 4 * blocks - 2
    fields, start = [], 0
    for size in (rows + 1, blocks, blocks, columns + 1, blocks, blocks):
        fields.append(index[start : start + size])
        start += size
    return BlockIndex(*fields)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def index_of(columns: Columns, width: int, device: torch.device) -> Tensor:
    """`packed` on `device`, kept so that no step copies it there again.

    Raises KernelError for columns out of the grid, or twice in a row.
    """
    return _index_of(columns, width, device)


@lru_cache(maxsize=256)
def _index_of(columns: Columns, width: int, device: torch.device) -> Tensor:
    for row, held in enumerate(columns):  # here, where it happens once
        if held and (min(held) < 0 or max(held) >= width or len(set(held)) < len(held)):
            refuse(
                "block_sparse_matmul",
                f"row {row} holds columns {held} of {width}",
                f"Name each column once, from 0 to {width - 1}",
            )
    with torch.inference_mode(False):
        return torch.tensor(packed(columns, width), dtype=torch.int32, device=device)
