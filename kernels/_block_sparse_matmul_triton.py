"""Block-sparse products on CUDA: a program walks the blocks of a line, or makes one block.

Strides say on which side the dense factor stands and whether the matrix is transposed, so that one
kernel does W x, x W^T and both of their backwards. No atomics: every output element has one writer,
and sums over parts of the vectors are stored apart and added in order.
"""

# The parameters of a Triton function have no Python type.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._block_index import unpacked
from ._rows_triton import numerics, on, short_name
from ._runtime import Compiled

ENOUGH = 264  # programs that fill a large device twice; fixed, so that results do not depend on it
FREE = ("N", "batch", "lines", "share")  # sizes that must not lead to another compilation


@triton.jit(do_not_specialize=FREE)
def line_kernel(
    x, values, y, starts, across, blocks, N, lines, made, summed,
    xb, xn, xf, vb, vk, vm, yb, yn, yf,
    UPCAST: tl.constexpr, PRECISION: tl.constexpr,
    BN: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """y[n, line, m] = sum over the line's blocks and k of x[n, across, k] values[block, k, m]."""
    pid = tl.program_id(0).to(tl.int64)
    tiles = tl.cdiv(made, BM)
    m = (pid % tiles) * BM + tl.arange(0, BM)
    pid //= tiles
    line = pid % lines
    pid //= lines
    slabs = tl.cdiv(N, BN)
    n = (pid % slabs) * BN + tl.arange(0, BN)
    batch = pid // slabs
    first = tl.load(starts + line)
    steps = tl.cdiv(summed, BK)
    total = tl.zeros([BN, BM], tl.float32)
    for step in range((tl.load(starts + line + 1) - first) * steps):
        entry = first + step // steps
        k = (step % steps) * BK + tl.arange(0, BK)
        f = tl.load(across + entry).to(tl.int64) * summed + k
        block = entry.to(tl.int64) if blocks is None else tl.load(blocks + entry).to(tl.int64)
        near = (k < summed)[None, :] & (n < N)[:, None]
        a = tl.load(x + batch * xb + n[:, None] * xn + f[None, :] * xf, mask=near, other=0.0)
        inside = (k < summed)[:, None] & (m < made)[None, :]
        at = block * vb + k[:, None] * vk + m[None, :] * vm
        v = tl.load(values + at, mask=inside, other=0.0)
        if UPCAST:
            a, v = a.to(tl.float32), v.to(tl.float32)
        total = tl.dot(a, v, total, input_precision=PRECISION)
    f = line * made + m
    at = batch * yb + n[:, None] * yn + f[None, :] * yf
    tl.store(y + at, total.to(y.dtype.element_ty), mask=(n < N)[:, None] & (m < made)[None, :])


@triton.jit(do_not_specialize=FREE)
def sampled_kernel(
    left, right, out, row_of, column_of, N, batch, blocks, share, made, summed,
    lb, ln, lf, rb, rn, rf, op,
    UPCAST: tl.constexpr, PRECISION: tl.constexpr,
    BN: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """out[block, m, k] = sum_n left[n, row, m] right[n, column, k], over `share` slabs."""
    pid = tl.program_id(0).to(tl.int64)
    across = tl.cdiv(summed, BK)
    k = (pid % across) * BK + tl.arange(0, BK)
    pid //= across
    tiles = tl.cdiv(made, BM)
    m = (pid % tiles) * BM + tl.arange(0, BM)
    pid //= tiles
    block = pid % blocks
    part = pid // blocks
    fm = tl.load(row_of + block).to(tl.int64) * made + m
    fk = tl.load(column_of + block).to(tl.int64) * summed + k
    slabs = tl.cdiv(N, BN)
    first = part * share
    last = tl.minimum(slabs.to(tl.int64) * batch, first + share)
    total = tl.zeros([BM, BK], tl.float32)
    for step in range((last - first).to(tl.int32)):
        item = (first + step) // slabs
        n = ((first + step) % slabs) * BN + tl.arange(0, BN)
        at = item * lb + n[None, :] * ln + fm[:, None] * lf
        a = tl.load(left + at, mask=(n < N)[None, :] & (m < made)[:, None], other=0.0)
        at = item * rb + n[:, None] * rn + fk[None, :] * rf
        b = tl.load(right + at, mask=(n < N)[:, None] & (k < summed)[None, :], other=0.0)
        if UPCAST:
            a, b = a.to(tl.float32), b.to(tl.float32)
        total = tl.dot(a, b, total, input_precision=PRECISION)
    at = part * op + block * made * summed + m[:, None] * summed + k[None, :]
    inside = (m < made)[:, None] & (k < summed)[None, :]
    tl.store(out + at, total.to(out.dtype.element_ty), mask=inside)


def tile(size: int, most: int) -> int:
    power: int = triton.next_power_of_2(size)
    return max(16, min(most, power))


def line_launch(dtype: torch.dtype, made: int, summed: int) -> dict[str, int]:
    """Tiles of `line_kernel`; float32 has no tensor cores at full precision."""
    if dtype == torch.float32:
        sizes = {"BN": 64, "BM": tile(made, 64), "BK": tile(summed, 32)}
        return {**sizes, "num_warps": 4, "num_stages": 2}
    sizes = {"BN": 128, "BM": tile(made, 128), "BK": tile(summed, 64)}
    return {**sizes, "num_warps": 8 if sizes["BM"] == 128 else 4, "num_stages": 3}


def sampled_launch(dtype: torch.dtype, made: int, summed: int) -> dict[str, int]:
    """Tiles of `sampled_kernel`."""
    if dtype == torch.float32:
        sizes = {"BN": 32, "BM": tile(made, 64), "BK": tile(summed, 64)}
        return {**sizes, "num_warps": 4, "num_stages": 2}
    sizes = {"BN": 64, "BM": tile(made, 128), "BK": tile(summed, 128)}
    wide = sizes["BM"] * sizes["BK"] > 64 * 128
    return {**sizes, "num_warps": 8 if wide else 4, "num_stages": 3}


def _strides(x: Tensor, first: bool) -> tuple[int, int, int]:
    """Of batch, vector and feature."""
    batch, outer, inner = x.stride()
    return (batch, inner, outer) if first else (batch, outer, inner)


def _vectors(x: Tensor, first: bool) -> int:
    return x.shape[2 if first else 1]


def forward(x: Tensor, values: Tensor, index: Tensor, rows: int, first: bool) -> Tensor:
    """x [b, n, in] -> [b, n, out]; [b, in, n] -> [b, out, n] where features are `first`."""
    at = unpacked(index, rows, values.shape[0])
    shape = (rows * values.shape[1], x.shape[2]) if first else (x.shape[1], rows * values.shape[1])
    y = torch.empty((x.shape[0], *shape), dtype=x.dtype, device=x.device)
    vb, vm, vk = values.stride()
    _lines(x, values, (vb, vk, vm), y, at.row_starts, at.column_of, None, first)
    return y


def _lines(
    x: Tensor,
    values: Tensor,
    strides: tuple[int, ...],
    y: Tensor,
    starts: Tensor,
    across: Tensor,
    blocks: Tensor | None,
    first: bool,
) -> None:
    if y.numel() == 0:
        return
    lines, n = starts.numel() - 1, _vectors(y, first)
    made = (y.shape[1] if first else y.shape[2]) // lines
    summed = values.shape[1] * values.shape[2] // made
    tiles = line_launch(x.dtype, made, summed)
    grid = (triton.cdiv(made, tiles["BM"]) * lines * triton.cdiv(n, tiles["BN"]) * y.shape[0],)
    with on(x):
        line_kernel[grid](
            x, values, y, starts, across, blocks, n, lines, made, summed,
            *_strides(x, first), *strides, *_strides(y, first), **numerics(x), **tiles,
        )  # fmt: skip


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
    at = unpacked(index, rows, values.shape[0])
    dx = torch.empty(x.shape if need_x else 0, dtype=x.dtype, device=x.device)
    if need_x:
        starts, across, order = at.column_starts, at.turned_row, at.turned_block
        _lines(grad, values, values.stride(), dx, starts, across, order, first)
    if not need_values:
        return dx, torch.empty(0, dtype=x.dtype, device=x.device)
    return dx, sampled(grad, x, values.shape, at.row_of, at.column_of, first)


def sampled(
    grad: Tensor,
    x: Tensor,
    shape: torch.Size,
    row_of: Tensor,
    column_of: Tensor,
    first: bool,
) -> Tensor:
    """The product of grad and x over all vectors, at the blocks alone: [blocks, out, in]."""
    out = torch.empty(shape, dtype=x.dtype, device=x.device)
    n = _vectors(x, first)
    if n * x.shape[0] == 0:
        return out.zero_()
    if out.numel() == 0:
        return out
    blocks, made, summed = shape
    tiles = sampled_launch(x.dtype, made, summed)
    programs = blocks * triton.cdiv(made, tiles["BM"]) * triton.cdiv(summed, tiles["BK"])
    slabs = triton.cdiv(n, tiles["BN"]) * x.shape[0]
    share = triton.cdiv(slabs, min(slabs, triton.cdiv(ENOUGH, programs)))
    parts = triton.cdiv(slabs, share)
    written = out
    if parts > 1:
        written = torch.empty((parts, *shape), dtype=torch.float32, device=x.device)
    with on(x):
        sampled_kernel[(programs * parts,)](
            grad, x, written, row_of, column_of, n, x.shape[0], blocks, share, made, summed,
            *_strides(grad, first), *_strides(x, first), out.numel(), **numerics(x), **tiles,
        )  # fmt: skip
    return out if parts == 1 else written.sum(0).to(x.dtype)


def _compiled(
    kernel: Any, dtype: torch.dtype, tiles: dict[str, int], constants: dict[str, Any], how: str
) -> Compiled:
    short = short_name(dtype)
    pointers = dict.fromkeys(("x", "values", "y", "left", "right"), f"*{short}") | {"out": "*fp32"}
    pointers |= dict.fromkeys(("starts", "across", "blocks", "row_of", "column_of"), "*i32")
    if kernel is sampled_kernel:
        pointers["blocks"] = "i32"
    fixed = {k: n for k, n in tiles.items() if k[0] == "B"} | {"UPCAST": False} | constants
    signature = {n: pointers.get(n, "i32") for n in kernel.arg_names if n not in fixed}
    free = (*FREE, "starts", "across", "blocks", "row_of", "column_of")
    return Compiled(
        kernel,
        signature,
        fixed,
        tiles["num_warps"],
        tiles["num_stages"],
        divisible=tuple(n for n in signature if n not in free),
        tensor_cores=constants["PRECISION"] != "ieee",
        label=f"{kernel.__name__} {short} {how} {tiles}",
    )


def _configs() -> list[Compiled]:
    found = []
    kinds = [(torch.bfloat16, "tf32", size) for size in (16, 64, 128)]
    kinds += [(torch.float16, "tf32", 64), (torch.float32, "ieee", 64), (torch.float32, "tf32", 64)]
    for dtype, precision, size in kinds:
        tiles, outer = line_launch(dtype, size, size), sampled_launch(dtype, size, size)
        for first in (False, True):
            how = f"{precision} first={first}"
            ones = dict.fromkeys(("xn", "yn") if first else ("xf", "yf"), 1)  # strides that are 1
            for way in ({"vk": 1, "blocks": None}, {"vm": 1}):
                fixed = {**ones, **way, "PRECISION": precision}
                name = f"{how} {'forward' if 'vk' in way else 'backward'}"
                found.append(_compiled(line_kernel, dtype, tiles, fixed, name))
            ones = dict.fromkeys(("ln", "rn") if first else ("lf", "rf"), 1)
            fixed = {**ones, "PRECISION": precision}
            found.append(_compiled(sampled_kernel, dtype, outer, fixed, how))
    return found


CONFIGS = _configs()
