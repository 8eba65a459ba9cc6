"""Linear attention in Triton: what is launched for the forward pass and for each gradient.

Where heads x sequences make too few programs, T is cut into segments: one pass finds what each
segment adds to the state, a second walks over these, a third starts every segment from its state.
States of single chunks are kept only in the backward pass of a decay. Every sum has one fixed
order, so results repeat bitwise.
"""

# mypy: allow-untyped-calls

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from ._linear_attention_chunks_triton import carry_kernel, chunk_kernel
from ._rows_triton import numerics, on, short_name
from ._runtime import Compiled

ENOUGH = 264  # programs: two for each multiprocessor of an H200
SEGMENT = 512  # positions at least in a segment
STAGES = 2  # chunks in flight
NONE, HEAD, OF_K, OF_V = range(4)  # MODE of the kernel: what has a decay of its own
PLAIN, KEEP, FINISH = range(3)  # ROLE of the kernel


# Channels of a head up to -> positions of a chunk, channels of v, warps: what fits the registers.
# Half precision, by mode; the two roles that also make the gradient of a decay need more.
HALF = {
    (NONE, False): {64: (64, 64, 4), 128: (64, 64, 4), 256: (64, 32, 8)},
    (HEAD, False): {64: (64, 64, 4), 128: (64, 32, 8), 256: (16, 32, 8)},
    (HEAD, True): {64: (64, 64, 8), 128: (64, 32, 8), 256: (16, 32, 8)},
    (OF_K, False): {64: (32, 64, 8), 128: (32, 64, 8), 256: (16, 32, 8)},
    (OF_V, True): {64: (32, 64, 8), 128: (32, 32, 8), 256: (16, 32, 8)},
}
WIDE_FP16 = (32, 32, 8)  # float16 above 64 channels: the state is multiplied as tf32, or overflows
FULL = (16, 16, 8)  # float32


@dataclass(frozen=True)
class Plan:
    """Tile of a launch: positions of a chunk, channels of q and k, channels of v."""

    chunk: int
    keys: int
    values: int
    warps: int

    def constants(self) -> dict[str, int]:
        levels = self.chunk.bit_length() - 1
        return {"C": self.chunk, "LEVELS": levels, "BK": self.keys, "BV": self.values}


def plan(mode: int, role: int, keys: int, values: int, dtype: torch.dtype) -> Plan:
    """The one shipped tile for a mode and role, channels of k and v, and a dtype."""
    wide = max(64, triton.next_power_of_2(max(keys, values)))
    if dtype == torch.float32:
        chunk, tile, warps = FULL
    elif dtype == torch.float16 and wide > 64:
        chunk, tile, warps = WIDE_FP16
    else:
        chunk, tile, warps = HALF[mode, role != PLAIN][wide]
    block = max(16, triton.next_power_of_2(keys))
    return Plan(chunk, block, max(16, min(tile, triton.next_power_of_2(values))), warps)


def forward(q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, scale: float) -> Tensor:
    """o [B, T, H, V]; decay None, [B, T, H] or [B, T, H, K], logarithms."""
    mode = NONE if decay is None else decay.dim() - 2
    return _attention(q, k, v, decay, mode, scale)


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, scale: float
) -> tuple[Tensor, ...]:
    """Gradients of q, k, v and, where there is one, the decay."""
    if not v.numel():
        inputs = (q, k, v) if decay is None else (q, k, v, decay)
        return tuple(x.new_zeros(x.shape) for x in inputs)
    mode = NONE if decay is None else decay.dim() - 2
    turned = OF_V if mode == OF_K else mode
    dv = _attention(k, q, grad, decay, mode, scale, flip=True)
    if decay is None:
        dq = _attention(grad, v, k, None, turned, scale)
        return dq, _attention(v, grad, q, None, turned, scale, flip=True), dv
    batch, length, heads, keys = q.shape
    tile = plan(turned, KEEP, v.shape[3], keys, q.dtype)
    wide = triton.cdiv(keys, tile.values) if mode == HEAD else keys
    z = q.new_empty(batch, length, heads, wide, dtype=torch.float32)
    chunks = triton.cdiv(length, tile.chunk)
    kind = _states_dtype(q.dtype)
    states = q.new_empty(batch * heads, chunks, v.shape[3], keys, dtype=kind)
    dq = _attention(grad, v, k, decay, turned, scale, role=KEEP, kept=(q, z, states))
    dk = _attention(v, grad, q, decay, turned, scale, flip=True, role=FINISH, kept=(k, z, states))
    return dq, dk, dv, (z.sum(3) if mode == HEAD else z).to(decay.dtype)


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    mode: int,
    scale: float,
    *,
    flip: bool = False,
    role: int = PLAIN,
    kept: tuple[Tensor, Tensor, Tensor] | None = None,
) -> Tensor:
    batch, length, heads, values = v.shape
    keys = q.shape[3]
    out = v.new_empty(v.shape)
    if not out.numel():
        return out
    q, k, v = _unit(q), _unit(k), _unit(v)
    x, z, states = (None, None, None) if kept is None else (_unit(kept[0]), *kept[1:])
    if decay is not None:
        decay = decay if mode == HEAD else _unit(decay)
    tile = plan(mode, role, keys, values, q.dtype)
    tiles, lanes = triton.cdiv(values, tile.values), batch * heads
    chunks = triton.cdiv(length, tile.chunk)
    wanted = max(1, min(ENOUGH // (tiles * lanes), length // SEGMENT))
    segment = triton.cdiv(chunks, wanted)
    parts = triton.cdiv(chunks, segment)
    sizes = (length, heads, keys, values, segment, float(scale))
    strides = [n for y in (q, k, v) for n in y.stride()[:3]]
    for y in (decay, x):
        strides += [0, 0, 0] if y is None else y.stride()[:3]
    flags: dict[str, Any] = {"MODE": mode, "FLIP": flip, "WIDE_STATE": q.dtype == torch.float16}
    flags |= tile.constants() | numerics(q) | {"TILES": tiles}
    flags |= {"num_warps": tile.warps, "num_stages": STAGES}
    with on(q):
        starts = None
        if parts > 1:
            summary, starts = q.new_empty(2, lanes, parts, keys, values, dtype=torch.float32)
            wide = {NONE: 0, HEAD: 1, OF_K: keys, OF_V: values}[mode]
            total = q.new_empty(lanes, parts, wide, dtype=torch.float32) if wide else None
            chunk_kernel[tiles * lanes, parts](
                q, k, v, None, decay, None, summary, total, None, None, None,
                *sizes, *strides, ROLE=PLAIN, SUMMARY=True, **flags,
            )  # fmt: skip
            carry_kernel[lanes, triton.cdiv(keys * values, 1024)](
                summary, total, starts, parts, keys, values, MODE=mode, BLOCK=1024, num_warps=4
            )
        chunk_kernel[tiles * lanes, parts](
            q, k, v, out, decay, starts, None, None, x, z, states,
            *sizes, *strides, ROLE=role, SUMMARY=False, **flags,
        )  # fmt: skip
    return out


def _states_dtype(dtype: torch.dtype) -> torch.dtype:
    """Sums over T leave the range of float16."""
    return torch.float32 if dtype == torch.float16 else dtype


def _unit(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


_STRIDES = [f"{name}_{axis}" for name in "qkvgx" for axis in "bth"]
_OPTIONAL = {"o", "decay", "starts", "summary", "total", "x", "z", "states"}


def _shipped(
    mode: int, flip: bool, role: int, summary: bool, width: int, dtype: torch.dtype, precision: str
) -> Compiled:
    """One launch of `_attention`, heads of `width` channels and the decay in float32."""
    short = f"*{short_name(dtype)}"
    there = dict.fromkeys(("q", "k", "v"), short)
    if mode != NONE:
        there["decay"] = "*fp32"
    if summary:
        there |= {"summary": "*fp32"} | ({"total": "*fp32"} if mode != NONE else {})
    else:
        there |= {"o": short, "starts": "*fp32"}
    if role != PLAIN and not summary:
        there |= {"x": short, "z": "*fp32", "states": f"*{short_name(_states_dtype(dtype))}"}
    tile = plan(mode, role, width, width, dtype)
    values: dict[str, Any] = dict.fromkeys(_OPTIONAL - there.keys())
    values |= {"MODE": mode, "FLIP": flip, "SUMMARY": summary} | tile.constants()
    values |= {"ROLE": PLAIN if summary else role, "WIDE_STATE": dtype == torch.float16}
    values |= {"UPCAST": False, "PRECISION": precision, "TILES": triton.cdiv(width, tile.values)}
    numbers = dict.fromkeys(("T", "H", "K", "V", "segment", *_STRIDES), "i32")
    return Compiled(
        chunk_kernel,
        there | numbers | {"scale": "fp32"},
        values,
        num_warps=tile.warps,
        num_stages=STAGES,
        divisible=(*there, "K", "V", *_STRIDES),
        tensor_cores=precision != "ieee",
        label=f"linear_attention mode {mode} {'flip ' if flip else ''}role {role} "
        f"{'summary ' if summary else ''}{width} {short} {precision}",
    )


# Mode, flip, role, summary. A summary loads and adds up the same tile in either direction.
_RUNS = [
    (mode, flip, PLAIN, summary)
    for mode in (NONE, HEAD, OF_K)
    for flip, summary in ((False, False), (True, False), (False, True))
] + [
    (mode, role == FINISH, role, summary)
    for mode in (HEAD, OF_V)
    for role, summary in ((KEEP, False), (FINISH, False), (KEEP, True))
]
CONFIGS = [
    _shipped(*run, width, dtype, precision)
    for width, dtype, precision in (
        (64, torch.bfloat16, "tf32"),
        (128, torch.bfloat16, "tf32"),
        (256, torch.bfloat16, "tf32"),
        (128, torch.float16, "tf32"),
        (64, torch.float32, "ieee"),
        (128, torch.float32, "ieee"),
        (128, torch.float32, "tf32"),
    )
    for run in _RUNS
    if dtype != torch.float32 or width <= 64 or run[0] in (NONE, HEAD)
] + [
    Compiled(
        carry_kernel,
        {"summary": "*fp32", "starts": "*fp32"}
        | ({"total": "*fp32"} if mode != NONE else {})
        | dict.fromkeys(("parts", "K", "V"), "i32"),
        {"MODE": mode, "BLOCK": 1024} | ({} if mode != NONE else {"total": None}),
        num_warps=4,
        divisible=("summary", "starts", "K", "V"),
        label=f"linear_attention mode {mode} carry",
    )
    for mode in (NONE, HEAD, OF_K, OF_V)
]
