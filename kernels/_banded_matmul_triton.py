"""Product with a learned band on CUDA: sheared tiles on the tensor cores.

The pointer arithmetic does the shear: element (i, c) of a tile is entry c - i of the band's row i,
so each row is read contiguously. All positions of one program belong to one phase of the dilation.
No atomics: every output element has one writer, and sums over parts of the batch are stored apart
and added in order.
"""

# The parameters of a Triton function have no Python type.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._banded_matmul_cpu import reach
from ._rows_triton import load_rows, numerics, on, short_name, store_rows
from ._runtime import Compiled

ENOUGH = (
    264  # programs that fill a large device twice; a constant, so that results do not depend on it
)
FUSED_SPAN = 256  # widest window of which one program keeps the whole product
FREE = ("T", "W", "lower", "upper", "B")  # sizes that must not lead to another compilation


@triton.jit
def load_tile(
    p, head, u, c, phase, T, W, lower, upper, dilation, bh, bt,
    TRANSPOSE: tl.constexpr, BT: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """[BT, len(c)]: rows u of the matrix (or of its transpose) at columns c of their window."""
    i = tl.arange(0, BT)
    j = c[None, :] - i[:, None]
    inside = (j >= 0) & (j < W)
    if TRANSPOSE:
        row = tl.sum(tl.where(i == 0, u, 0), 0) - upper + c
        t = row * dilation + phase
        inside &= ((row >= 0) & (t < T))[None, :]
        at = t.to(tl.int64)[None, :] * bt + (W - 1 - j)
    else:
        t = u * dilation + phase
        inside &= (t < T)[:, None]
        at = t.to(tl.int64)[:, None] * bt + j
    a = tl.load(p + head * bh + at, mask=inside, other=0.0)
    return a.to(tl.float32) if UPCAST else a


@triton.jit
def store_band(p, x, head, u, c, phase, T, W, dilation, bh, bt, BT: tl.constexpr):
    """Element (i, c) of a product of block and window is entry c - i of row i."""
    j = c[None, :] - tl.arange(0, BT)[:, None]
    t = u * dilation + phase
    at = head * bh + t.to(tl.int64)[:, None] * bt + j
    tl.store(p + at, x.to(p.dtype.element_ty), mask=(j >= 0) & (j < W) & (t < T)[:, None])


@triton.jit(do_not_specialize=FREE)
def apply_kernel(
    x, band, y, B, T, D, W, lower, upper, dilation,
    xb, xt, xh, bh, bt, yb, yt, yh,
    TRANSPOSE: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
    BT: tl.constexpr, BS: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0).to(tl.int64)
    tiles = tl.cdiv(D, BD)
    d = (pid % tiles) * BD + tl.arange(0, BD)
    pid //= tiles
    batch = pid % B
    pid //= B
    phase = pid % dilation
    pid //= dilation
    blocks = tl.cdiv(tl.cdiv(T, dilation), BT)
    u0 = (pid % blocks) * BT
    head = pid // blocks
    u = u0 + tl.arange(0, BT)
    before = upper if TRANSPOSE else lower
    total = tl.zeros([BT, BD], tl.float32)
    for c0 in range(0, BT + W - 1, BS):
        c = c0 + tl.arange(0, BS)
        a = load_tile(
            band, head, u, c, phase, T, W, lower, upper, dilation, bh, bt, TRANSPOSE, BT, UPCAST
        )
        s = load_rows(x, batch, head, u0 - before + c, phase, d, T, D, dilation, xb, xt, xh, UPCAST)
        total = tl.dot(a, s, total, input_precision=PRECISION)
    store_rows(y, total, batch, head, u, phase, d, T, D, dilation, yb, yt, yh)


@triton.jit(do_not_specialize=FREE)
def outer_kernel(
    rows, columns, out, B, T, D, W, lower, upper, dilation, share,
    rb, rt, rh, cb, ct, ch, op, oh, ot,
    UPCAST: tl.constexpr, PRECISION: tl.constexpr,
    BT: tl.constexpr, BS: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Entries of the band's gradient over `share` batch elements."""
    pid = tl.program_id(0).to(tl.int64)
    pieces = tl.cdiv(BT + W - 1, BS)
    c = (pid % pieces) * BS + tl.arange(0, BS)
    pid //= pieces
    phase = pid % dilation
    pid //= dilation
    blocks = tl.cdiv(tl.cdiv(T, dilation), BT)
    u0 = (pid % blocks) * BT
    pid //= blocks
    parts = tl.cdiv(B, share)
    part = pid % parts
    head = pid // parts
    u = u0 + tl.arange(0, BT)
    tiles = tl.cdiv(D, BD)
    first = part * share
    total = tl.zeros([BT, BS], tl.float32)
    for step in range((tl.minimum(B, first + share) - first).to(tl.int32) * tiles):
        batch = first + step // tiles
        d = (step % tiles) * BD + tl.arange(0, BD)
        a = load_rows(rows, batch, head, u, phase, d, T, D, dilation, rb, rt, rh, UPCAST)
        s = u0 - lower + c
        b = load_rows(columns, batch, head, s, phase, d, T, D, dilation, cb, ct, ch, UPCAST)
        total = tl.dot(a, tl.trans(b), total, input_precision=PRECISION)
    store_band(out + part * op, total, head, u, c, phase, T, W, dilation, oh, ot, BT)


@triton.jit(do_not_specialize=FREE)
def fused_backward_kernel(
    grad, x, band, dx, dband, B, T, D, W, lower, upper, dilation, share,
    gb, gt, gh, xb, xt, xh, bh, bt, db, dt, dh, op, oh, ot,
    TRANSPOSE: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
    BT: tl.constexpr, BS: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Both gradients for one block of positions, BS >= BT + W - 1: each slab is loaded once."""
    pid = tl.program_id(0).to(tl.int64)
    phase = pid % dilation
    pid //= dilation
    blocks = tl.cdiv(tl.cdiv(T, dilation), BT)
    u0 = (pid % blocks) * BT
    pid //= blocks
    parts = tl.cdiv(B, share)
    part = pid % parts
    head = pid // parts
    u = u0 + tl.arange(0, BT)
    c = tl.arange(0, BS)
    tiles = tl.cdiv(D, BD)
    first = part * share
    # dx takes the other orientation: the transposed matrix where the forward took the plain one
    a = load_tile(
        band, head, u, c, phase, T, W, lower, upper, dilation, bh, bt, not TRANSPOSE, BT, UPCAST
    )
    total = tl.zeros([BT, BS], tl.float32)
    for step in range((tl.minimum(B, first + share) - first).to(tl.int32) * tiles):
        batch = first + step // tiles
        d = (step % tiles) * BD + tl.arange(0, BD)
        before = lower if TRANSPOSE else upper
        g = load_rows(
            grad, batch, head, u0 - before + c, phase, d, T, D, dilation, gb, gt, gh, UPCAST
        )
        store_rows(
            dx, tl.dot(a, g, input_precision=PRECISION),
            batch, head, u, phase, d, T, D, dilation, db, dt, dh,
        )  # fmt: skip
        if TRANSPOSE:
            r = load_rows(x, batch, head, u, phase, d, T, D, dilation, xb, xt, xh, UPCAST)
            s = g
        else:
            r = load_rows(grad, batch, head, u, phase, d, T, D, dilation, gb, gt, gh, UPCAST)
            at = u0 - lower + c
            s = load_rows(x, batch, head, at, phase, d, T, D, dilation, xb, xt, xh, UPCAST)
        total = tl.dot(r, tl.trans(s), total, input_precision=PRECISION)
    store_band(dband + part * op, total, head, u, c, phase, T, W, dilation, oh, ot, BT)


def launch_of(dtype: torch.dtype, size: int) -> dict[str, int]:
    """Tiles of `apply_kernel` and `outer_kernel`; float32 has no tensor cores at full precision."""
    if dtype == torch.float32:
        return {"BT": 32, "BS": 32, "BD": 32, "num_warps": 4, "num_stages": 2}
    wide = 128 if size > 64 else 64
    return {"BT": 64, "BS": 64, "BD": wide, "num_warps": 4, "num_stages": 3}


def fused_launch_of(dtype: torch.dtype, width: int) -> dict[str, int] | None:
    """Tiles of `fused_backward_kernel`; None where the window is too wide for it."""
    if dtype == torch.float32 or 64 + width - 1 > FUSED_SPAN:
        return None
    span = 128 if 64 + width - 1 <= 128 else 256
    warps = 4 if span == 128 else 8
    return {"BT": 64, "BS": span, "BD": 64, "num_warps": warps, "num_stages": 2}


def _inside(
    x: Tensor, band: Tensor, lower: int, upper: int, dilation: int
) -> tuple[Tensor, tuple[int, ...]]:
    """The band without entries past the ends, and the sizes the kernels take."""
    batch, length, _, size = x.shape
    low, up = reach(length, lower, upper, dilation)
    band = band[:, :, lower - low : lower + up + 1]
    return band, (batch, length, size, low + up + 1, low, up, dilation)


def apply(
    x: Tensor, band: Tensor, lower: int, upper: int, dilation: int, transpose: bool
) -> Tensor:
    """x [B, T, H, D], band [H, T, W] -> [B, T, H, D], contiguous."""
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    band, sizes = _inside(x, band, lower, upper, dilation)
    batch, length, heads, size = x.shape
    tiles = launch_of(x.dtype, size)
    blocks = triton.cdiv(triton.cdiv(length, dilation), tiles["BT"]) * dilation
    grid = (triton.cdiv(size, tiles["BD"]) * batch * blocks * heads,)
    strides = (*x.stride()[:3], *band.stride()[:2], *y.stride()[:3])
    with on(x):
        apply_kernel[grid](
            x, band, y, *sizes, *strides, TRANSPOSE=transpose, **numerics(x), **tiles
        )
    return y


def _partial(band: Tensor, like: Tensor, parts: int) -> tuple[Tensor, Tensor, tuple[int, ...]]:
    """The gradient's memory, where the kernel writes, and strides (part, head, row) of that."""
    out = torch.empty(like.shape, dtype=like.dtype, device=like.device)
    if parts == 1 and band.shape == like.shape:
        return out, out, (0, *out.stride()[:2])
    written = torch.empty((parts, *band.shape), dtype=torch.float32, device=like.device)
    return out, written, written.stride()[:3]


def _collect(out: Tensor, written: Tensor, first: int) -> Tensor:
    if out is not written:
        width = written.shape[3]
        out[:, :, :first] = 0
        out[:, :, first + width :] = 0
        out[:, :, first : first + width] = written.sum(0)
    return out


def _share(batch: int, programs: int) -> int:
    """Batch elements of one program, so that there are enough programs."""
    share: int = triton.cdiv(batch, min(batch, triton.cdiv(ENOUGH, programs)))
    return share


def band_backward(
    grad: Tensor, x: Tensor, band: Tensor, lower: int, upper: int, dilation: int, transpose: bool
) -> Tensor:
    """Gradient of the band, [H, T, W]."""
    if x.numel() == 0:
        return torch.zeros(band.shape, dtype=band.dtype, device=band.device)
    rows, columns = (x, grad) if transpose else (grad, x)
    inner, sizes = _inside(x, band, lower, upper, dilation)
    batch, length, heads, size = x.shape
    tiles = launch_of(x.dtype, size)
    blocks = triton.cdiv(triton.cdiv(length, dilation), tiles["BT"]) * dilation
    programs = blocks * heads * triton.cdiv(tiles["BT"] + inner.shape[2] - 1, tiles["BS"])
    share = _share(batch, programs)
    parts = triton.cdiv(batch, share)
    out, written, strides = _partial(inner, band, parts)
    strides = (*rows.stride()[:3], *columns.stride()[:3], *strides)
    with on(x):
        outer_kernel[(programs * parts,)](
            rows, columns, written, *sizes, share, *strides, **numerics(x), **tiles
        )
    return _collect(out, written, lower - sizes[4])


def backward(
    grad: Tensor, x: Tensor, band: Tensor, lower: int, upper: int, dilation: int, transpose: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of x and of the band, in one kernel where the window fits in a program."""
    inner, sizes = _inside(x, band, lower, upper, dilation)
    tiles = fused_launch_of(x.dtype, inner.shape[2])
    if tiles is None or x.numel() == 0:
        how = lower, upper, dilation
        dx = apply(grad, band, *how, not transpose)
        return dx, band_backward(grad, x, band, *how, transpose)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    batch, length, heads, _ = x.shape
    programs = triton.cdiv(triton.cdiv(length, dilation), tiles["BT"]) * dilation * heads
    share = _share(batch, programs)
    parts = triton.cdiv(batch, share)
    out, written, strides = _partial(inner, band, parts)
    strides = (
        *grad.stride()[:3], *x.stride()[:3], *inner.stride()[:2], *dx.stride()[:3], *strides,
    )  # fmt: skip
    with on(x):
        fused_backward_kernel[(programs * parts,)](
            grad, x, inner, dx, written, *sizes, share, *strides,
            TRANSPOSE=transpose, **numerics(x), **tiles,
        )  # fmt: skip
    return dx, _collect(out, written, lower - sizes[4])


def _compiled(
    kernel: Any,
    dtype: torch.dtype,
    tiles: dict[str, int],
    transpose: bool | None,
    precision: str = "tf32",
) -> Compiled:
    short = short_name(dtype)
    names = ("x", "band", "y", "rows", "columns", "grad", "dx")
    pointers = dict.fromkeys(names, f"*{short}") | {"out": "*fp32", "dband": "*fp32"}
    constants: dict[str, Any] = {k: n for k, n in tiles.items() if k[0] == "B"}
    constants |= {"UPCAST": False, "PRECISION": precision}
    if transpose is not None:
        constants["TRANSPOSE"] = transpose
    constants["dilation"] = 1  # the most common value becomes a constant at the launch too
    signature = {n: pointers.get(n, "i32") for n in kernel.arg_names if n not in constants}
    return Compiled(
        kernel,
        signature,
        constants,
        tiles["num_warps"],
        tiles["num_stages"],
        divisible=tuple(n for n in signature if n not in (*FREE, "share")),
        tensor_cores=precision != "ieee",
        label=f"{kernel.__name__} {short} {precision} transpose={transpose} {tiles}",
    )


def _configs() -> list[Compiled]:
    found = []
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for precision in ("ieee", "tf32") if dtype == torch.float32 else ("tf32",):
            for size in (64, 128):
                tiles = launch_of(dtype, size)
                found.append(_compiled(outer_kernel, dtype, tiles, None, precision))
                for way in (False, True):
                    found.append(_compiled(apply_kernel, dtype, tiles, way, precision))
        for width in (65, 193):
            for way in (False, True):
                fused = fused_launch_of(dtype, width)
                if fused is not None:
                    found.append(_compiled(fused_backward_kernel, dtype, fused, way))
    return found


CONFIGS = _configs()
