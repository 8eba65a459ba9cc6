"""toeplitz_conv on CUDA: Triton kernels, their launchers, and the launches compiled ahead of time.

A program owns BLOCK_D channels, a few per thread, and walks along one row of positions in steps of
ROWS. Each step keeps ROWS + TAPS - 1 rows in registers, so that a position is read and converted
(ROWS + TAPS - 1) / ROWS times instead of once a tap, and up to 16 taps cost the traffic of a copy.
Wider bands loop over groups of taps. Positions `dilation` apart form a row of their own.

The gradient of the taps is deterministic: each program writes its partial sums, torch adds them up.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
# mypy: disable-error-code="assignment,var-annotated"
# ruff: noqa: RUF005 (Triton knows (*a, b) no more than lists: tuples grow by addition)
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._runtime import Compiled
from ._toeplitz_conv_band import Band

GROUP = 16  # taps held in registers
PROGRAMS = 132 * 16  # wanted in flight before a program gets longer


@triton.jit
def _place(tiles, H, dilation, d_tiles):
    """Of a program: tile of channels, tile of positions, residue, row of the grid, sequence."""
    p = tl.program_id(0).to(tl.int64)
    tile_d, p = p % d_tiles, p // d_tiles
    tile, p = p % tiles, p // tiles
    residue, p = p % dilation, p // dilation
    return tile_d, tile, residue, p % H, p // H


@triton.jit
def _row(base, gate, i, n, stride, gate_stride, d, D, GATED: tl.constexpr):
    """Row i of n of a residue, in float32, zero outside."""
    mask = d < tl.where((i >= 0) & (i < n), D, 0)
    row = tl.load(base + i * stride + d, mask=mask, other=0.0).to(tl.float32)
    if GATED:
        row *= tl.load(gate + i * gate_stride + d, mask=mask, other=0.0).to(tl.float32)
    return row


@triton.jit
def _add_taps(
    acc, base, gate, taps, first, i0, n, stride, gate_stride, d, D,
    TAPS: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr, GATED: tl.constexpr,
):  # fmt: skip
    """acc[u] += sum_j taps[first + STEP j] row[i0 + u + j] for j < TAPS."""
    weights = ()
    for j in tl.static_range(TAPS):
        weight = tl.load(taps + (first + STEP * j) * D + d, mask=d < D, other=0.0)
        weights = weights + (weight.to(tl.float32),)
    rows = ()
    for r in tl.static_range(ROWS + TAPS - 1):
        rows = rows + (_row(base, gate, i0 + r, n, stride, gate_stride, d, D, GATED),)
    new = ()
    for u in tl.static_range(ROWS):
        total = acc[u]
        for j in tl.static_range(TAPS):
            total += rows[u + j] * weights[j]
        new = new + (total,)
    return new


@triton.jit
def conv_kernel(
    x, gate, taps, scale, y,
    H, L, D, tiles, steps, lower_h, lower_w, dil_h, dil_w,
    x_b, x_h, x_l, gate_b, gate_h, gate_l, scale_b, scale_h, scale_l,
    TH: tl.constexpr, TW: tl.constexpr, TAPS: tl.constexpr, ROWS: tl.constexpr,
    FLIP: tl.constexpr, GATED: tl.constexpr, SCALED: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """y = scale * conv(gate * x); FLIP turns the taps round, for the gradient of x."""
    d_tiles = tl.cdiv(D, BLOCK_D)
    tile_d, tile, residue, h, b = _place(tiles, H, dil_w, d_tiles)
    d = tile_d * BLOCK_D + tl.arange(0, BLOCK_D)
    n = (L - residue + dil_w - 1) // dil_w
    stride, gate_stride = tl.cast(x_l, tl.int64) * dil_w, tl.cast(gate_l, tl.int64) * dil_w
    STEP: tl.constexpr = -1 if FLIP else 1
    for step in range(steps):
        i0 = (tile * steps + step) * ROWS
        acc = ()
        for _ in tl.static_range(ROWS):
            acc = acc + (tl.zeros([BLOCK_D], tl.float32),)
        for kh in range(TH):
            row = h + (kh - lower_h) * dil_h
            # Outside the grid no position is left, so that every load is masked.
            left = tl.where((row >= 0) & (row < H), n, 0)
            base = x + b * x_b + row * x_h + residue * x_l
            gate_base = gate
            if GATED:
                gate_base = gate + b * gate_b + row * gate_h + residue * gate_l
            first = kh * TW
            if FLIP:
                first = TH * TW - 1 - kh * TW
            for group in range(TW // TAPS):
                acc = _add_taps(
                    acc, base, gate_base, taps, first + STEP * group * TAPS,
                    i0 + group * TAPS - lower_w, left, stride, gate_stride, d, D,
                    TAPS, ROWS, STEP, GATED,
                )  # fmt: skip
            if TW % TAPS > 0:
                DONE: tl.constexpr = TW // TAPS * TAPS
                acc = _add_taps(
                    acc, base, gate_base, taps, first + STEP * DONE, i0 + DONE - lower_w, left,
                    stride, gate_stride, d, D, TW - DONE, ROWS, STEP, GATED,
                )  # fmt: skip
        for u in tl.static_range(ROWS):
            l = residue + (i0 + u) * dil_w
            mask = d < tl.where(l < L, D, 0)
            out = acc[u]
            if SCALED:
                place = b * scale_b + h * scale_h + l * scale_l
                out *= tl.load(scale + place + d, mask=mask, other=0.0).to(tl.float32)
            place = ((b * H + h) * L + l) * D
            tl.store(y + place + d, out.to(y.dtype.element_ty), mask=mask)


@triton.jit
def backward_kernel(
    dy, gate, x, taps, dx, partial,
    H, L, D, tiles, steps, lower_h, lower_w, dil_h, dil_w,
    dy_b, dy_h, dy_l, gate_b, gate_h, gate_l, x_b, x_h, x_l,
    TH: tl.constexpr, TW: tl.constexpr, TAPS: tl.constexpr, ROWS: tl.constexpr,
    GATED: tl.constexpr, WITH_DX: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Partial sums of TAPS gradients of taps, and with WITH_DX (a single group) also dx.

    Both meet the same rows of g = gate * dy: dx[i] = sum_j taps[j] g[i - j + lower] and
    dtaps[j] = sum_i x[i] g[i - j + lower], so x and g are read once for both.
    """
    d_tiles = tl.cdiv(D, BLOCK_D)
    tile_d, tile, residue, h, b = _place(tiles, H, dil_w, d_tiles)
    GROUPS: tl.constexpr = (TW + TAPS - 1) // TAPS
    kh, j0 = tl.program_id(1) // GROUPS, tl.program_id(1) % GROUPS * TAPS
    d = tile_d * BLOCK_D + tl.arange(0, BLOCK_D)
    n = (L - residue + dil_w - 1) // dil_w
    row = h - (kh - lower_h) * dil_h
    left = tl.where((row >= 0) & (row < H), n, 0)
    base = dy + b * dy_b + row * dy_h + residue * dy_l
    gate_base = gate
    if GATED:
        gate_base = gate + b * gate_b + row * gate_h + residue * gate_l
    x_base = x + b * x_b + h * x_h + residue * x_l
    stride, gate_stride = tl.cast(dy_l, tl.int64) * dil_w, tl.cast(gate_l, tl.int64) * dil_w
    x_stride = tl.cast(x_l, tl.int64) * dil_w
    sums = ()
    weights = ()
    for j in tl.static_range(TAPS):
        sums = sums + (tl.zeros([BLOCK_D], tl.float32),)
        if WITH_DX:
            weight = tl.load(taps + (kh * TW + j0 + j) * D + d, mask=d < D, other=0.0)
            weights = weights + (weight.to(tl.float32),)
    for step in range(steps):
        i0 = (tile * steps + step) * ROWS
        near = ()
        for r in tl.static_range(ROWS + TAPS - 1):
            i = i0 + r - (j0 + TAPS - 1 - lower_w)
            g = _row(base, gate_base, i, left, stride, gate_stride, d, D, GATED)
            near = near + (g,)
        far = ()
        for u in tl.static_range(ROWS):
            far = far + (_row(x_base, x_base, i0 + u, n, x_stride, 0, d, D, False),)
        new = ()
        for j in tl.static_range(TAPS):
            total = sums[j]
            for u in tl.static_range(ROWS):
                total += far[u] * near[u + TAPS - 1 - j]
            new = new + (total,)
        sums = new
        if WITH_DX:
            for u in tl.static_range(ROWS):
                total = tl.zeros([BLOCK_D], tl.float32)
                for j in tl.static_range(TAPS):
                    total += near[u + TAPS - 1 - j] * weights[j]
                l = residue + (i0 + u) * dil_w
                place = ((b * H + h) * L + l) * D
                tl.store(
                    dx + place + d, total.to(dx.dtype.element_ty), mask=d < tl.where(l < L, D, 0)
                )
    part = tl.program_id(0).to(tl.int64) // d_tiles
    for j in tl.static_range(TAPS):
        place = ((part * TH + kh) * TW + j0 + j) * D
        tl.store(partial + place + d, sums[j], mask=d < tl.where(j0 + j < TW, D, 0))


def _rows(taps: int, gated: bool) -> int:
    """Positions of a step: many for loads in flight, few enough that the rows stay in registers."""
    return 4 if gated and taps > 8 else 8


def _fuses(taps: tuple[int, int], gated: bool) -> bool:
    """Whether one kernel gives both gradients: one group of taps, and room for the gate's rows."""
    return taps[0] == 1 and taps[1] <= (8 if gated else GROUP)


def _channels(width: int) -> tuple[int, int]:
    """Channels of a program and its warps: two channels a thread."""
    block = min(256, max(64, triton.next_power_of_2(width)))
    return block, block // 64


def _split(x: Tensor, dilation: int, rows: int, block_d: int) -> tuple[int, int, int]:
    """Tiles of positions, steps in a tile, and rows of programs (all but the tiles of channels)."""
    batch, height, length, width = x.shape
    steps_all = triton.cdiv(triton.cdiv(length, dilation), rows)
    others = batch * height * dilation * triton.cdiv(width, block_d)
    steps = max(1, min(32, steps_all * others // PROGRAMS))
    tiles = triton.cdiv(steps_all, steps)
    return tiles, steps, tiles * dilation * height * batch


def _strides(x: Tensor | None) -> tuple[int, int, int]:
    return (0, 0, 0) if x is None else (x.stride(0), x.stride(1), x.stride(2))


def _conv(
    x: Tensor, gate: Tensor | None, taps: Tensor, scale: Tensor | None, band: Band, flip: bool
) -> Tensor:
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    high, wide = band.shape
    block, warps = _channels(x.shape[3])
    rows = _rows(wide, gate is not None)
    tiles, steps, programs = _split(x, band.dilation[1], rows, block)
    conv_kernel[(programs * triton.cdiv(x.shape[3], block),)](
        x, gate, taps, scale, y, *x.shape[1:], tiles, steps, *band.lower, *band.dilation,
        *_strides(x), *_strides(gate), *_strides(scale),
        TH=high, TW=wide, TAPS=min(wide, GROUP), ROWS=rows, FLIP=flip, GATED=gate is not None,
        SCALED=scale is not None, BLOCK_D=block, num_warps=warps,
    )  # fmt: skip
    return y


def forward(x: Tensor, taps: Tensor, gate: Tensor | None, band: Band) -> Tensor:
    """y [B, H, W, D]; taps [Wh, Ww, D] contiguous, all of one dtype, last strides 1."""
    if x.numel() == 0:
        return torch.zeros(x.shape, dtype=x.dtype, device=x.device)
    with torch.cuda.device_of(x):
        return _conv(x, None, taps, gate, band, False)


def backward(
    dy: Tensor,
    x: Tensor,
    taps: Tensor,
    gate: Tensor | None,
    band: Band,
    need_x: bool,
    need_taps: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, taps, gate; what is not needed, or absent, is empty."""
    empty = x.new_empty(0)
    if x.numel() == 0:
        zeros = torch.zeros(x.shape, dtype=x.dtype, device=x.device)
        return zeros, torch.zeros_like(taps), empty if gate is None else zeros.clone()
    with torch.cuda.device_of(x):
        dx, dtaps = empty, empty
        fused = need_x and need_taps and _fuses(band.shape, gate is not None)
        if need_taps:
            dx, dtaps = _backward(dy, gate, x, taps, band, fused)
        if need_x and not fused:
            dx = _conv(dy, gate, taps, None, band.flipped(), True)
        dgate = empty if gate is None else _conv(x, None, taps, dy, band, False)
    return dx, dtaps, dgate


def _backward(
    dy: Tensor, gate: Tensor | None, x: Tensor, taps: Tensor, band: Band, fused: bool
) -> tuple[Tensor, Tensor]:
    high, wide = band.shape
    block, warps = _channels(x.shape[3])
    rows = _rows(wide, gate is not None)
    tiles, steps, programs = _split(x, band.dilation[1], rows, block)
    group = min(wide, GROUP)
    partial = torch.empty((programs, *taps.shape), dtype=torch.float32, device=x.device)
    dx = torch.empty(x.shape if fused else 0, dtype=x.dtype, device=x.device)
    grid = (programs * triton.cdiv(x.shape[3], block), high * triton.cdiv(wide, group))
    backward_kernel[grid](
        dy, gate, x, taps, dx, partial, *x.shape[1:], tiles, steps, *band.lower, *band.dilation,
        *_strides(dy), *_strides(gate), *_strides(x),
        TH=high, TW=wide, TAPS=group, ROWS=rows, GATED=gate is not None, WITH_DX=fused,
        BLOCK_D=block, num_warps=warps,
    )  # fmt: skip
    return dx, partial.sum(0).to(x.dtype)


def _launch(kernel: Any, dtype: str, taps: tuple[int, int], width: int, **flags: bool) -> Compiled:
    high, wide = taps
    block, warps = _channels(width)
    constants: dict[str, Any] = {
        "TH": high, "TW": wide, "TAPS": min(wide, GROUP), "BLOCK_D": block,
        "ROWS": _rows(wide, flags["GATED"]),
    } | flags  # fmt: skip
    pointers = dict.fromkeys(("x", "taps", "y", "dy", "dx"), dtype) | {"partial": "fp32"}
    for name, present in (("gate", flags["GATED"]), ("scale", flags.get("SCALED", False))):
        if present:
            pointers[name] = dtype
        elif name in kernel.arg_names:
            constants[name] = None
    if width == 1:  # Triton makes a constant of every 1
        constants |= {n: 1 for n in kernel.arg_names if n == "D" or n[-2:] == "_l"}
    free = [n for n in kernel.arg_names if n not in constants]
    signature = {n: f"*{pointers[n]}" if n in pointers else "i32" for n in free}
    divisible = tuple(
        n for n, t in signature.items() if t[0] == "*" or n == "D" or n[-2:] in ("_b", "_h", "_l")
    )
    label = f"{kernel.arg_names[0]} {dtype} {high}x{wide} D{width} "
    label += str(sorted(k for k, v in flags.items() if v))
    return Compiled(kernel, signature, constants, warps, 2, divisible, False, label)


TAPS = ((1, 4), (1, 16), (1, 64), (3, 3))
CONFIGS = tuple(
    launch
    for dtype, taps, width in (
        *((dtype, taps, 512) for dtype in ("bf16", "fp32") for taps in TAPS),
        ("fp32", (1, 4), 1),
    )
    for launch in (
        _launch(conv_kernel, dtype, taps, width, FLIP=False, GATED=False, SCALED=False),
        _launch(conv_kernel, dtype, taps, width, FLIP=False, GATED=False, SCALED=True),
        _launch(conv_kernel, dtype, taps, width, FLIP=True, GATED=True, SCALED=False),
        _launch(backward_kernel, dtype, taps, width, GATED=False, WITH_DX=_fuses(taps, False)),
        _launch(backward_kernel, dtype, taps, width, GATED=True, WITH_DX=_fuses(taps, True)),
    )
)
