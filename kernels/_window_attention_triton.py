"""Softmax attention on a band on CUDA: one pass forward, two backward, no atomics.

Forward: a block of queries walks over the keys of its window and keeps a running maximum and sum.
Backward: blocks of queries write their gradient, then blocks of keys theirs, each walking over the
other side again, so that every element has one writer. Only blocks at the edges of the window are
masked. All positions of one program belong to one phase of the dilation.
"""

# The parameters of a Triton function have no Python type.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._rows_triton import load_rows, numerics, on, short_name, store_rows
from ._runtime import Compiled

LOG2E = 1.4426950408889634
NARROW = 64  # entries of a row up to which small blocks waste less
NOWHERE = tl.constexpr(1 << 30)  # a position outside every window
FREE = ("B", "T", "lower", "upper")  # sizes that must not lead to another compilation


@triton.jit
def locate(B, T, heads, dilation, BLOCK: tl.constexpr):
    """Batch element, head, phase, first position of the program's block, positions of the phase."""
    pid = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(tl.cdiv(T, dilation), BLOCK)
    first = (pid % blocks).to(tl.int32) * BLOCK
    pid //= blocks
    phase = (pid % dilation).to(tl.int32)
    pid //= dilation
    return pid // heads, pid % heads, phase, first, tl.cdiv(T - phase, dilation)


@triton.jit
def stretch(part, begin, end, inner, outer, BLOCK: tl.constexpr):
    """Part 0, 1 or 2 of [begin, end): before, inside and after the blocks within [inner, outer)."""
    at = begin + tl.cdiv(tl.maximum(inner - begin, 0), BLOCK) * BLOCK
    at = tl.minimum(at, begin + tl.cdiv(tl.maximum(end - begin, 0), BLOCK) * BLOCK)
    to = at + tl.maximum(outer - at, 0) // BLOCK * BLOCK
    if part == 0:
        return begin, at
    if part == 1:
        return at, to
    return to, end


@triton.jit
def visible(rows, columns, lower, upper):
    """Which keys the queries see: 0 <= columns - rows + lower <= lower + upper, compared once."""
    ahead = columns - rows + lower
    return ahead.to(tl.uint32, bitcast=True) <= (lower + upper).to(tl.uint32, bitcast=True)


@triton.jit(do_not_specialize=FREE)
def forward_kernel(
    q, k, v, out, lse, scale, B, T, D, heads, group, lower, upper, dilation,
    qb, qt, qh, kb, kt, kh, vb, vt, vh, ob, ot, oh,
    UPCAST: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    b, h, phase, u0, count = locate(B, T, heads, dilation, BM)
    u = u0 + tl.arange(0, BM)
    d = tl.arange(0, BD)
    a = load_rows(q, b, h, u, phase, d, T, D, dilation, qb, qt, qh, UPCAST)
    top = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    result = tl.zeros([BM, BD], tl.float32)
    begin, end = tl.maximum(u0 - lower, 0), tl.minimum(u0 + BM + upper, count)
    inner, outer = u0 + BM - 1 - lower, tl.minimum(u0 + upper + 1, count)
    for part in tl.static_range(3):
        start, stop = stretch(part, begin, end, inner, outer, BN)
        for n in range(start, stop, BN):
            s = n + tl.arange(0, BN)
            keys = load_rows(k, b, h // group, s, phase, d, T, D, dilation, kb, kt, kh, UPCAST)
            values = load_rows(v, b, h // group, s, phase, d, T, D, dilation, vb, vt, vh, UPCAST)
            x = tl.dot(a, tl.trans(keys), input_precision=PRECISION) * scale
            if part != 1:
                there = tl.where(s < count, s, NOWHERE)
                seen = visible(u[:, None], there[None, :], lower, upper)
                x = tl.where(seen, x, float("-inf"))
            higher = tl.maximum(top, tl.max(x, 1))
            base = tl.where(higher == float("-inf"), 0.0, higher)
            p = tl.exp2(x - base[:, None])
            shrink = tl.exp2(top - base)
            total = total * shrink + tl.sum(p, 1)
            result = result * shrink[:, None]
            result = tl.dot(p.to(values.dtype), values, result, input_precision=PRECISION)
            top = higher
    inside = u < count
    total = tl.where(inside, total, 1.0)
    top = tl.where(inside, top, 0.0)
    store_rows(out, result / total[:, None], b, h, u, phase, d, T, D, dilation, ob, ot, oh)
    t = u * dilation + phase
    tl.store(lse + (b * heads + h) * T + t, top + tl.log2(total), mask=inside)


@triton.jit(do_not_specialize=FREE)
def query_kernel(
    q, k, v, out, grad, lse, delta, dq, scale, B, T, D, heads, group, lower, upper, dilation,
    qb, qt, qh, kb, kt, kh, vb, vt, vh, ob, ot, oh, gb, gt, gh,
    UPCAST: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Gradient of a block of queries; leaves sum_d grad * out, which the keys need, in `delta`."""
    b, h, phase, u0, count = locate(B, T, heads, dilation, BM)
    u = u0 + tl.arange(0, BM)
    d = tl.arange(0, BD)
    a = load_rows(q, b, h, u, phase, d, T, D, dilation, qb, qt, qh, UPCAST)
    g = load_rows(grad, b, h, u, phase, d, T, D, dilation, gb, gt, gh, UPCAST)
    o = load_rows(out, b, h, u, phase, d, T, D, dilation, ob, ot, oh, UPCAST)
    at = (b * heads + h) * T + u * dilation + phase
    along = tl.sum(o.to(tl.float32) * g.to(tl.float32), 1)
    tl.store(delta + at, along, mask=u < count)
    level = tl.load(lse + at, mask=u < count, other=float("inf"))
    result = tl.zeros([BM, BD], tl.float32)
    begin, end = tl.maximum(u0 - lower, 0), tl.minimum(u0 + BM + upper, count)
    inner, outer = u0 + BM - 1 - lower, tl.minimum(u0 + upper + 1, count)
    for part in tl.static_range(3):
        start, stop = stretch(part, begin, end, inner, outer, BN)
        for n in range(start, stop, BN):
            s = n + tl.arange(0, BN)
            keys = load_rows(k, b, h // group, s, phase, d, T, D, dilation, kb, kt, kh, UPCAST)
            values = load_rows(v, b, h // group, s, phase, d, T, D, dilation, vb, vt, vh, UPCAST)
            x = tl.dot(a, tl.trans(keys), input_precision=PRECISION) * scale - level[:, None]
            if part != 1:
                there = tl.where(s < count, s, NOWHERE)
                seen = visible(u[:, None], there[None, :], lower, upper)
                x = tl.where(seen, x, float("-inf"))
            dp = tl.dot(g, tl.trans(values), input_precision=PRECISION)
            ds = tl.exp2(x) * (dp - along[:, None])
            result = tl.dot(ds.to(keys.dtype), keys, result, input_precision=PRECISION)
    store_rows(
        dq, result * (scale * 0.6931471805599453),
        b, h, u, phase, d, T, D, dilation, ob, ot, oh,
    )  # fmt: skip


@triton.jit(do_not_specialize=FREE)
def key_kernel(
    q, k, v, grad, lse, delta, dk, dv, scale, B, T, D, heads, group, lower, upper, dilation,
    qb, qt, qh, kb, kt, kh, vb, vt, vh, gb, gt, gh, db, dt, dh,
    UPCAST: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Gradients of a block of keys and values, summed over the heads that share them."""
    b, h, phase, s0, count = locate(B, T, heads // group, dilation, BN)
    s = s0 + tl.arange(0, BN)
    d = tl.arange(0, BD)
    keys = load_rows(k, b, h, s, phase, d, T, D, dilation, kb, kt, kh, UPCAST)
    values = load_rows(v, b, h, s, phase, d, T, D, dilation, vb, vt, vh, UPCAST)
    of_keys = tl.zeros([BN, BD], tl.float32)
    of_values = tl.zeros([BN, BD], tl.float32)
    begin, end = tl.maximum(s0 - upper, 0), tl.minimum(s0 + BN + lower, count)
    for member in range(group):
        row = h * group + member
        for m in range(begin, end, BM):
            u = m + tl.arange(0, BM)
            at = (b * heads + row) * T + u * dilation + phase
            a = load_rows(q, b, row, u, phase, d, T, D, dilation, qb, qt, qh, UPCAST)
            g = load_rows(grad, b, row, u, phase, d, T, D, dilation, gb, gt, gh, UPCAST)
            level = tl.load(lse + at, mask=u < count, other=float("inf"))
            along = tl.load(delta + at, mask=u < count, other=0.0)
            x = tl.dot(keys, tl.trans(a), input_precision=PRECISION) * scale - level[None, :]
            seen = visible(u[None, :], s[:, None], lower, upper)
            x = tl.where(seen, x, float("-inf"))
            p = tl.exp2(x)
            of_values = tl.dot(p.to(g.dtype), g, of_values, input_precision=PRECISION)
            dp = tl.dot(values, tl.trans(g), input_precision=PRECISION)
            ds = p * (dp - along[None, :])
            of_keys = tl.dot(ds.to(a.dtype), a, of_keys, input_precision=PRECISION)
    store_rows(
        dk, of_keys * (scale * 0.6931471805599453),
        b, h, s, phase, d, T, D, dilation, db, dt, dh,
    )  # fmt: skip
    store_rows(dv, of_values, b, h, s, phase, d, T, D, dilation, db, dt, dh)


# kernel, channels of a head up to: rows of queries, of keys, warps, stages
HALF = {
    ("forward", 64): (128, 64, 4, 3),
    ("forward", 128): (128, 64, 8, 3),
    ("forward", 256): (64, 32, 8, 2),
    ("query", 64): (128, 64, 8, 2),
    ("query", 128): (64, 64, 8, 2),
    ("query", 256): (32, 64, 8, 1),
    ("key", 64): (64, 128, 8, 2),
    ("key", 128): (32, 128, 8, 2),
    ("key", 256): (32, 32, 8, 1),
}
HALF_NARROW = {"forward": (64, 32), "query": (64, 32), "key": (32, 64)}
FULL = {64: (32, 32, 8, 1), 128: (16, 16, 8, 1)}  # float32 at full precision has no tensor cores


def launch_of(kernel: str, dtype: torch.dtype, size: int, width: int) -> dict[str, int]:
    """Tiles by kernel, channels of a head and entries of a row."""
    wide = max(16, triton.next_power_of_2(size))
    if dtype == torch.float32:
        rows, columns, warps, stages = FULL[max(64, wide)]
    else:
        rows, columns, warps, stages = HALF[kernel, max(64, wide)]
        if width <= NARROW and wide <= 128:
            most = HALF_NARROW[kernel]
            rows, columns = min(rows, most[0]), min(columns, most[1])
    return {"BM": rows, "BN": columns, "BD": wide, "num_warps": warps, "num_stages": stages}


def _grid(q: Tensor, heads: int, block: int, dilation: int) -> tuple[int]:
    blocks = triton.cdiv(triton.cdiv(q.shape[1], dilation), block)
    return (blocks * dilation * heads * q.shape[0],)


def _sizes(
    q: Tensor, k: Tensor, lower: int, upper: int, dilation: int, scale: float
) -> tuple[float | int, ...]:
    batch, length, heads, size = q.shape
    group = heads // k.shape[2]
    return scale * LOG2E, batch, length, size, heads, group, lower, upper, dilation


def forward(
    q: Tensor, k: Tensor, v: Tensor, lower: int, upper: int, dilation: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Output [B, T, H, D] and the base-2 logarithm of the sums, [B, H, T] in float32."""
    batch, length, heads, size = q.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty((batch, heads, length), dtype=torch.float32, device=q.device)
    if q.numel() == 0:
        return out, lse.zero_()
    tiles = launch_of("forward", q.dtype, size, lower + upper + 1)
    strides = (s for t in (q, k, v, out) for s in t.stride()[:3])
    with on(q):
        forward_kernel[_grid(q, heads, tiles["BM"], dilation)](
            q, k, v, out, lse, *_sizes(q, k, lower, upper, dilation, scale), *strides,
            **numerics(q), **tiles,
        )  # fmt: skip
    return out, lse


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    lower: int, upper: int, dilation: int, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k and v, contiguous."""
    dq, dk, dv = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v))
    if q.numel() == 0:
        return dq, dk.zero_(), dv.zero_()
    heads, size = q.shape[2:]
    delta = torch.empty(lse.shape, dtype=lse.dtype, device=lse.device)
    sizes = _sizes(q, k, lower, upper, dilation, scale)
    tiles = launch_of("query", q.dtype, size, lower + upper + 1)
    strides = [s for t in (q, k, v, out, grad) for s in t.stride()[:3]]
    with on(q):
        query_kernel[_grid(q, heads, tiles["BM"], dilation)](
            q, k, v, out, grad, lse, delta, dq, *sizes, *strides, **numerics(q), **tiles
        )
        tiles = launch_of("key", q.dtype, size, lower + upper + 1)
        strides = [s for t in (q, k, v, grad, dk) for s in t.stride()[:3]]
        key_kernel[_grid(q, k.shape[2], tiles["BN"], dilation)](
            q, k, v, grad, lse, delta, dk, dv, *sizes, *strides, **numerics(q), **tiles
        )
    return dq, dk, dv


KERNELS = {"forward": forward_kernel, "query": query_kernel, "key": key_kernel}


def _compiled(name: str, dtype: torch.dtype, size: int, width: int, precision: str) -> Compiled:
    kernel, tiles = KERNELS[name], launch_of(name, dtype, size, width)
    types = dict.fromkeys(("q", "k", "v", "out", "grad", "dq", "dk", "dv"), "*" + short_name(dtype))
    types |= {"lse": "*fp32", "delta": "*fp32", "scale": "fp32"}
    constants: dict[str, Any] = {n: tiles[n] for n in ("BM", "BN", "BD")}
    constants |= {"UPCAST": False, "PRECISION": precision, "dilation": 1}
    signature = {n: types.get(n, "i32") for n in kernel.arg_names if n not in constants}
    free = {*FREE, "heads", "group", "scale"}
    return Compiled(
        kernel,
        signature,
        constants,
        tiles["num_warps"],
        tiles["num_stages"],
        divisible=tuple(n for n in signature if n not in free),
        tensor_cores=precision != "ieee",
        label=f"{name} {short_name(dtype)} {precision} {tiles}",
    )


def _configs() -> list[Compiled]:
    half = [(torch.bfloat16, d, w, "tf32") for d in (64, 128, 256) for w in (NARROW, NARROW + 1)]
    half += [(torch.float16, d, NARROW + 1, "tf32") for d in (64, 128)]
    full = [(torch.float32, d, NARROW, how) for d in FULL for how in ("ieee", "tf32")]
    found = [_compiled(name, *rest) for name in KERNELS for rest in half + full]
    return list({launch.label: launch for launch in found}.values())


CONFIGS = _configs()
