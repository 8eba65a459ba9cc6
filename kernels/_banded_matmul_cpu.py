"""Product with a learned band in plain torch: blocks of rows, sheared tiles, batched products.

A block of C rows needs a window of S = C + W - 1 columns. Written into zeros with a row stride of
S + 1, its rows of the band become the C x S piece of the matrix, and one batched product
does all blocks. The transposed matrix is a band too: its rows are gathered once, and the same
product applies. The gradient of the band is the product of block and window, read back along the
same stride. Short sequences take the whole matrix as a single block.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _matmul_cpu as matmul
from ._windows import Unit, block, items, plan, window, working_dtype

SHORT = 1 << 17  # entries up to which zeros around a sequence cost less than calls for its ends
TILE_BYTES = 1 << 20  # of sheared tiles at a time: they stay in the second-level cache


def reach(length: int, lower: int, upper: int, dilation: int) -> tuple[int, int]:
    """Widths without the entries that look past either end from every position."""
    most = max(length - 1, 0) // dilation
    return min(lower, most), min(upper, most)


def rows_of(width: int, size: int) -> int:
    """Rows of a block: wider blocks waste products, narrower ones leave them too small."""
    if width >= 512:
        return 64
    if 48 < width <= 96:
        return 24
    return 16 if 8 < width <= 48 and size >= 64 else 32


def is_dense(length: int, dilation: int) -> bool:
    """Whether the whole matrix costs less than blocks: always where a phase is that short."""
    return length * length <= 64 * 64 * dilation


def is_wide(x: Tensor, width: int) -> bool:
    """Whether the batch joins the channels: products of a few columns leave the processor idle.

    So do narrow bands over short sequences, whose blocks are batched over the batch otherwise.
    """
    batch, length, _, size = x.shape
    short = width <= 16 and size <= 64 and length <= 16 * batch
    return batch > 1 and (size < 32 or short)


def shear(band: Tensor, lower: int, dilation: int, dtype: torch.dtype) -> Tensor:
    """The matrices [H, T, T] of band [H, T, W]."""
    heads, length, width = band.shape
    span = length + (width - 1) * dilation
    full = torch.zeros(heads, length, span, dtype=dtype, device=band.device)
    full.as_strided((heads, length, width), (length * span, span + 1, dilation)).copy_(band)
    return full[:, :, lower * dilation : lower * dilation + length]


def unshear(product: Tensor, lower: int, width: int, dilation: int) -> Tensor:
    """The band [H, T, W] of matrices [H, T, T]; what lies outside the matrix is 0."""
    heads, length, _ = product.shape
    span = length + (width - 1) * dilation
    full = product.new_zeros(heads, length, span)
    full[:, :, lower * dilation : lower * dilation + length] = product
    return full.as_strided((heads, length, width), (length * span, span + 1, dilation))


def joined(x: Tensor, dtype: torch.dtype) -> Tensor:
    """[B, T, H, D] as [H, T, B D]: one product a head, the batch in the columns."""
    return x.to(dtype).permute(2, 1, 0, 3).reshape(x.shape[2], x.shape[1], -1)


def parted(columns: Tensor, like: Tensor) -> Tensor:
    """The inverse of `joined`, in the shape and dtype of `like`, contiguous."""
    batch, length, heads, size = like.shape
    split = columns.view(heads, length, batch, size).permute(2, 1, 0, 3)
    return torch.empty(like.shape, dtype=like.dtype, device=like.device).copy_(split)


def joins(x: Tensor, dtype: torch.dtype) -> bool:
    """Whether the batch joins the columns of a whole matrix: heads need it, and one large product
    runs twice as fast through oneDNN."""
    batch, length, heads, size = x.shape
    return heads > 1 or (matmul.fast(dtype) and batch * length**2 * size >= matmul.WORK)


def product(a: Tensor, b: Tensor) -> Tensor:
    """[H, n, k] times [H, k, m]."""
    if a.shape[0] == 1:
        return matmul.linear(a[0], b[0].t()).unsqueeze(0)
    return torch.bmm(a, b)


def dense_apply(matrix: Tensor, x: Tensor) -> Tensor:
    """Matrices [H, T, T] times [B, T, H, D]."""
    if joins(x, matrix.dtype):
        return parted(product(matrix, joined(x, matrix.dtype)), x)
    result = torch.bmm(matrix.expand(x.shape[0], -1, -1), x[:, :, 0].to(matrix.dtype))
    return result.unsqueeze(2).to(x.dtype)


def dense_outer(rows: Tensor, columns: Tensor, dtype: torch.dtype) -> Tensor:
    """Matrices [H, T, T]: products over batch and channels of two [B, T, H, D]."""
    if joins(rows, dtype):
        return product(joined(rows, dtype), joined(columns, dtype).transpose(1, 2))
    each = torch.bmm(rows[:, :, 0].to(dtype), columns[:, :, 0].to(dtype).transpose(1, 2))
    return each.sum(0, keepdim=True)


def flipped(band: Tensor, lower: int, upper: int, dtype: torch.dtype) -> Tensor:
    """The band [T, W] of the transposed matrix, whose widths are (upper, lower)."""
    length, width = band.shape
    out = torch.zeros(length + width - 1, width, dtype=dtype, device=band.device)
    out.as_strided((length, width), (width, width - 1), width - 1).copy_(band)
    return out[lower : lower + length]


def units(length: int, rows: int, lower: int, upper: int, batch: int, most: int) -> Iterator[Unit]:
    """As `plan`, but the few blocks at either end are one: their calls cost more than products."""
    found = plan(length, rows, lower, upper, batch, most)
    for single, some in itertools.groupby(found, lambda unit: unit.blocks == 1):
        group = list(some)
        first, last = group[0], group[-1]
        height, columns = last.end - first.first, last.start + last.columns - first.start
        if single and height <= 4 * rows and height < length:
            yield first._replace(rows=height, columns=columns)
        else:
            yield from group


def is_short(x: Tensor) -> bool:
    return x.shape[0] == 1 and x.numel() <= SHORT


def short_windows(x: Tensor, rows: int, lower: int, upper: int, dtype: torch.dtype) -> Tensor:
    """[blocks, rows + lower + upper, D] of x [1, T, D]; overlapping, to be read only."""
    _, length, size = x.shape
    blocks = -(-length // rows)
    padded = F.pad(x, (0, 0, lower, upper + blocks * rows - length)).to(dtype)
    return padded.as_strided((blocks, rows + lower + upper, size), (rows * size, size, 1))


def short_rows(x: Tensor, rows: int, dtype: torch.dtype) -> Tensor:
    """[blocks, rows, D] of x [T, D], zero beyond T."""
    missing = -x.shape[0] % rows
    padded = F.pad(x, (0, 0, 0, missing)) if missing else x
    return padded.to(dtype).reshape(-1, rows, x.shape[1])


def short_apply(band: Tensor, x: Tensor, lower: int, upper: int, out: Tensor) -> None:
    """As blocked_apply, in few calls."""
    width, dtype = band.shape[1], band.dtype
    rows = rows_of(width, x.shape[2])
    parts = short_rows(band, rows, dtype)
    span = rows + width - 1
    tiles = torch.zeros(len(parts), rows, span, dtype=dtype, device=band.device)
    tiles.as_strided(parts.shape, (rows * span, span + 1, 1)).copy_(parts)
    result = torch.bmm(tiles, short_windows(x, rows, lower, upper, dtype))
    out.copy_(result.view(1, -1, x.shape[2])[:, : x.shape[1]])


def short_outer(rows: Tensor, columns: Tensor, lower: int, upper: int, out: Tensor) -> None:
    """As blocked_outer, in few calls."""
    width, dtype = out.shape[1], working_dtype(rows)
    height = rows_of(width, rows.shape[2])
    seen = short_windows(columns, height, lower, upper, dtype)
    product = torch.bmm(short_rows(rows[0], height, dtype), seen.transpose(1, 2))
    blocks, _, span = product.shape
    diagonal = product.as_strided((blocks, height, width), (height * span, span + 1, 1))
    out.copy_(diagonal.reshape(-1, width)[: len(out)])


def blocked_apply(band: Tensor, x: Tensor, lower: int, upper: int, out: Tensor) -> None:
    """out [B, T, D] = band [T, W] times x [B, T, D]."""
    if is_short(x):
        short_apply(band, x, lower, upper, out)
        return
    width, dtype = band.shape[1], band.dtype
    rows = rows_of(width, x.shape[2])
    span = rows + width - 1
    most = max(1, min(TILE_BYTES // (rows * span * dtype.itemsize), x.shape[1] // rows))
    buffer = torch.zeros(most * rows * span, dtype=dtype, device=band.device)
    for unit in units(x.shape[1], rows, lower, upper, x.shape[0], most):
        span = unit.rows + width - 1
        # A block of other height lies differently.
        room = buffer if unit.rows == rows else buffer.new_zeros(unit.rows * span)
        tiles = room[: unit.blocks * unit.rows * span].view(unit.blocks, unit.rows, span)
        tiles.as_strided((unit.blocks, unit.rows, width), (unit.rows * span, span + 1, 1)).copy_(
            band[unit.first : unit.end].view(unit.blocks, unit.rows, width)
        )
        tiles = tiles[:, :, unit.cut : unit.cut + unit.columns]
        for item in items(x, unit):
            seen = window(x, unit, item, dtype)
            target = block(out, unit, item, out.dtype)
            if unit.blocks == 1:
                target.copy_(torch.bmm(tiles.expand(x.shape[0], -1, -1), seen))
            elif target.is_contiguous() and target.dtype == dtype:
                torch.bmm(tiles, seen, out=target)
            else:
                target.copy_(torch.bmm(tiles, seen))


def blocked_outer(rows: Tensor, columns: Tensor, lower: int, upper: int, out: Tensor) -> None:
    """out [T, W]: out[t, j] = sum over batch and channels of rows[t] * columns[t + j - lower]."""
    if is_short(rows):
        short_outer(rows, columns, lower, upper, out)
        return
    width, dtype = out.shape[1], working_dtype(rows)
    height = rows_of(width, rows.shape[2])
    most = max(1, TILE_BYTES // (height * (height + width - 1) * dtype.itemsize))
    for unit in units(rows.shape[1], height, lower, upper, rows.shape[0], most):
        shape = unit.blocks, unit.rows, unit.rows + width - 1
        whole = unit.columns == shape[2]
        product = torch.empty(*shape[:2], unit.columns, dtype=dtype, device=rows.device)
        for item in items(rows, unit):
            a = block(rows, unit, item, dtype)
            b = window(columns, unit, item, dtype).transpose(1, 2)
            if unit.blocks == 1:
                product = torch.bmm(a, b).sum(0, keepdim=True)
            elif item == 0:
                torch.bmm(a, b, out=product)
            else:
                product.baddbmm_(a, b)
        if not whole:
            full = product.new_zeros(shape)
            full[:, :, unit.cut : unit.cut + unit.columns] = product
            product = full
        diagonal = product.as_strided(
            (unit.blocks, unit.rows, width), (unit.rows * shape[2], shape[2] + 1, 1)
        )
        out[unit.first : unit.end] = diagonal.reshape(-1, width)


def widened(x: Tensor) -> Tensor:
    """[B, T, D] as [1, T, B D]: one wide product in place of many narrow ones."""
    return x.transpose(0, 1).reshape(1, x.shape[1], -1)


def apply(
    x: Tensor, band: Tensor, lower: int, upper: int, dilation: int, transpose: bool
) -> Tensor:
    """x [B, T, H, D], band [H, T, W] -> [B, T, H, D], contiguous."""
    batch, length, heads, size = x.shape
    if x.numel() == 0:
        return x.new_empty(x.shape)
    low, up = reach(length, lower, upper, dilation)
    band = band[:, :, lower - low : lower + up + 1]
    dtype = working_dtype(x)
    if is_dense(x.shape[1], dilation):
        matrix = shear(band, low, dilation, dtype)
        return dense_apply(matrix.transpose(1, 2) if transpose else matrix, x)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    wide = is_wide(x, low + up + 1)
    for head in range(heads):
        for phase in range(min(dilation, length)):
            every = slice(phase, None, dilation)
            part = band[head, every].to(dtype)
            widths = (low, up)
            if transpose:
                part, widths = flipped(part, low, up, dtype), (up, low)
            seen, target = x[:, every, head], out[:, every, head]
            if wide:
                result = torch.empty(1, seen.shape[1], batch * size, dtype=dtype, device=x.device)
                blocked_apply(part, widened(seen), *widths, result)
                target.copy_(result.view(-1, batch, size).transpose(0, 1))
            else:
                blocked_apply(part, seen, *widths, target)
    return out


def band_backward(
    grad: Tensor, x: Tensor, band: Tensor, lower: int, upper: int, dilation: int, transpose: bool
) -> Tensor:
    """Gradient of the band: sum over batch and channels of rows[t] columns[t + (j - lower) d]."""
    rows, columns = (x, grad) if transpose else (grad, x)
    length, heads = x.shape[1:3]
    low, up = reach(length, lower, upper, dilation)
    out, inner = _band_like(band, lower, low, up)
    if x.numel() == 0:
        return out.zero_()
    if is_dense(x.shape[1], dilation):
        product = dense_outer(rows, columns, working_dtype(x))
        inner.copy_(unshear(product, low, low + up + 1, dilation))
        return out
    wide = is_wide(x, low + up + 1)
    for head in range(heads):
        for phase in range(min(dilation, length)):
            every = slice(phase, None, dilation)
            a, b = rows[:, every, head], columns[:, every, head]
            if wide:
                a, b = widened(a), widened(b)
            blocked_outer(a, b, low, up, inner[head, every])
    return out


def _band_like(band: Tensor, lower: int, low: int, up: int) -> tuple[Tensor, Tensor]:
    """Memory for the gradient of a band, and the part whose entries look at positions."""
    out = torch.empty(band.shape, dtype=band.dtype, device=band.device)
    if low + up + 1 < band.shape[2]:
        out.zero_()
    return out, out[:, :, lower - low : lower + up + 1]


def backward(
    grad: Tensor, x: Tensor, band: Tensor, lower: int, upper: int, dilation: int, transpose: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of x and of the band."""
    dtype = working_dtype(x)
    if x.numel() == 0 or not (is_dense(x.shape[1], dilation) and joins(x, dtype)):
        how = lower, upper, dilation
        dx = apply(grad, band, *how, not transpose)
        return dx, band_backward(grad, x, band, *how, transpose)
    low, up = reach(x.shape[1], lower, upper, dilation)
    seen, given = joined(x, dtype), joined(grad, dtype)
    out, inner = _band_like(band, lower, low, up)
    matrix = shear(band[:, :, lower - low : lower + up + 1], low, dilation, dtype)
    rows, columns = (seen, given) if transpose else (given, seen)
    outer = product(rows, columns.transpose(1, 2))
    inner.copy_(unshear(outer, low, low + up + 1, dilation))
    return parted(product(matrix if transpose else matrix.transpose(1, 2), given), x), out
