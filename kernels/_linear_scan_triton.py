"""Linear recurrence in Triton: a program walks T for one tile of channels, its state in registers.

Order 1 scans 64 rows at a time with an associative scan (more rows spill) and carries the last.
Order p walks row by row over a ring of p states. Where batch x channels make too few programs, T is
cut into segments: one pass finds what each segment does to the state before it, a second walks over
these summaries, a third writes the rows. Every sum has one fixed order, so results repeat bitwise.
"""

# mypy: allow-untyped-calls

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from ._linear_scan_rows_triton import carry_kernel, first_order_kernel, order_kernel
from ._rows_triton import on
from ._runtime import Compiled

ROWS = 64  # of the associative scan's tile
ENOUGH = 264  # programs: two for each multiprocessor of an H200
STAGES = 3  # tiles in flight: loads of the next while one is scanned
SEGMENT = 512  # rows at least in a segment: below, the passes over summaries cost more


def forward(a: Tensor, b: Tensor, initial: Tensor | None, reverse: bool) -> Tensor:
    """h [B, T, D] from a [B|1, T|1, p, D], b [B, T, D] and initial [B, p, D] or None."""
    out = b.new_empty(b.shape)
    _scan(Scan(a, b, out, initial=initial), flip=reverse)
    return out


def backward(
    grad: Tensor, a: Tensor, h: Tensor, initial: Tensor | None, reverse: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of a (in its own shape), of b and of the initial state [B, p, D]."""
    batch, length, depth = h.shape
    order = a.shape[2]
    grad_b = h.new_empty(h.shape)
    grad_initial = h.new_zeros(batch, order, depth)
    one_for_all, shared = a.shape[1] != length, a.shape[0] != batch
    kind = torch.float32 if one_for_all or shared else a.dtype
    rows = _segments(h, order)[1] if one_for_all else length
    axes = (rows, batch) if one_for_all else (batch, rows)
    grad_a = a.new_empty(*axes, order, depth, dtype=kind)
    _scan(Scan(a, grad, grad_b, _unit(h), grad_a, initial, grad_initial), flip=not reverse)
    if one_for_all:
        grad_a = grad_a.sum(0).unsqueeze(1)
    if shared:
        grad_a = grad_a.sum(0, keepdim=True)
    return grad_a.to(a.dtype), grad_b, grad_initial


@dataclass(frozen=True)
class Scan:
    """What a scan reads and writes; the adjoint, with h, scans the gradient b into that of b."""

    a: Tensor
    b: Tensor
    out: Tensor
    h: Tensor | None = None
    grad_a: Tensor | None = None
    initial: Tensor | None = None
    grad_initial: Tensor | None = None


def _unit(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _tile(batch: int, depth: int) -> tuple[int, int]:
    """Channels and warps of a program: narrow where wide ones would be too few."""
    wide = min(64, max(8, triton.next_power_of_2(depth)))
    if wide == 64 and batch * triton.cdiv(depth, 64) < ENOUGH:
        return 32, 2
    return wide, 4 if wide == 64 else 2


def _segments(x: Tensor, order: int) -> tuple[int, int]:
    """Length and number of segments of T; from the shape alone, so that results repeat."""
    batch, length, depth = x.shape
    programs = max(1, batch * triton.cdiv(depth, _tile(batch, depth)[0]))
    parts = max(1, min(ENOUGH // programs, length // SEGMENT))
    length = max(1, length)
    segment = triton.cdiv(length, parts)
    if order == 1:
        segment = triton.cdiv(segment, ROWS) * ROWS
    return segment, triton.cdiv(length, segment)


def _scan(x: Scan, *, flip: bool) -> None:
    batch, length, depth = x.out.shape
    if not x.out.numel():
        if x.grad_a is not None:
            x.grad_a.zero_()
        return
    a, b = _unit(x.a.expand(batch, length, -1, -1)), _unit(x.b)
    initial = None if x.initial is None else _unit(x.initial)
    order, adjoint = a.shape[2], x.h is not None
    segment, parts = _segments(x.out, order)
    width, warps = _tile(batch, depth)
    sum_t = adjoint and x.a.shape[1] != length
    strides = {
        "a": a.stride()[:3],
        "b": b.stride()[:2],
        "h": x.h.stride()[:2] if x.h is not None else (0, 0),
        "da": x.grad_a.stride()[:3] if x.grad_a is not None else (0, 0, 0),
        "i": initial.stride()[:2] if initial is not None else (0, 0),
    }
    flags: dict[str, Any] = {"FLIP": flip, "ADJOINT": adjoint, "BD": width, "STAGES": STAGES}
    if order == 1:
        kernel = first_order_kernel
        sizes = [length, depth, segment]
        taken = {"a": 2, "b": 2, "h": 2, "da": 2, "i": 1}
        flags["BT"] = ROWS
    else:
        kernel = order_kernel
        sizes = [length, depth, segment, parts]
        taken = {"a": 3, "b": 2, "h": 2, "da": 3, "i": 2}
        flags |= {"ORDER": order, "P": triton.next_power_of_2(order)}
    numbers = (*sizes, *(n for name, axes in taken.items() for n in strides[name][:axes]))
    tiles = triton.cdiv(depth, width)
    launch = {"num_warps": warps, "num_stages": STAGES}
    with on(b):
        starts = None
        if parts > 1:
            summary = a.new_empty(parts, order + 1, order, batch, depth, dtype=torch.float32)
            starts = a.new_empty(parts, order, batch, depth, dtype=torch.float32)
            runs = 1 if order == 1 else order + 1
            kernel[tiles * batch, parts * runs](
                a, b, x.out, x.h, None, None, None, summary, None, *numbers,
                SUMMARY=True, SUM_T=False, **flags, **launch,
            )  # fmt: skip
            first = None if adjoint else initial
            places = triton.next_power_of_2(order)
            carry_kernel[batch, triton.cdiv(depth, 32)](
                summary, first, starts, parts, depth, *strides["i"],
                ORDER=order, P=places, BD=32, num_warps=4,
            )  # fmt: skip
        kernel[tiles * batch, parts](
            a, b, x.out, x.h, x.grad_a, starts, initial, None, x.grad_initial, *numbers,
            SUMMARY=False, SUM_T=sum_t, **flags, **launch,
        )  # fmt: skip


_SIZES = ("T", "D", "segment")
_POINTERS = ("a", "b", "out", "h", "da", "starts", "initial", "summary", "dinitial")


def _shipped(order: int, kind: str, width: int, run: str, dtype: str, sum_t: bool) -> Compiled:
    """One launch of `_scan`; run is "rows", "rows from starts" or "summary"."""
    adjoint, summary = kind == "adjoint", run == "summary"
    there = {"a", "b", "out"} | ({"h"} if adjoint else set())
    if summary:
        there |= {"summary"}
    else:
        there |= {"da", "dinitial", "initial"} if adjoint else {"initial"}
        if run == "rows from starts":
            there |= {"starts"}
    wide = {"starts", "summary"} | ({"da"} if sum_t else set())
    names = ["a_b", "a_t", "b_b", "b_t", "h_b", "h_t", "da_b", "da_t", "i_b"]
    sizes = list(_SIZES)
    if order > 1:
        names += ["a_p", "da_p", "i_p"]
        sizes += ["parts"]
    values: dict[str, Any] = {n: None for n in _POINTERS if n not in there}
    values |= {"FLIP": adjoint, "ADJOINT": adjoint, "SUMMARY": summary, "SUM_T": sum_t}
    values |= {"BD": width, "STAGES": STAGES}
    ring = {"ORDER": order, "P": triton.next_power_of_2(order)}
    values |= {"BT": ROWS} if order == 1 else ring
    return Compiled(
        first_order_kernel if order == 1 else order_kernel,
        {n: "*fp32" if n in wide else f"*{dtype}" for n in _POINTERS if n in there}
        | dict.fromkeys((*sizes, *names), "i32"),
        values,
        num_warps=4 if width == 64 else 2,
        num_stages=STAGES,
        divisible=(*(n for n in _POINTERS if n in there), "D", *names),
        label=f"linear_scan order {order} {kind} {run} {width} {dtype}{' sum' if sum_t else ''}",
    )


CONFIGS = [
    _shipped(order, kind, width, run, dtype, sum_t)
    for order, width, dtype in (
        (1, 64, "bf16"),
        (1, 32, "bf16"),
        (1, 64, "fp32"),
        (2, 64, "bf16"),
        (16, 64, "fp32"),
    )
    for kind, run, sum_t in (
        ("forward", "rows", False),
        ("forward", "rows from starts", False),
        ("forward", "summary", False),
        ("adjoint", "rows", False),
        ("adjoint", "rows", True),
        ("adjoint", "summary", False),
    )
] + [
    Compiled(
        carry_kernel,
        {"summary": "*fp32", "initial": "*bf16", "starts": "*fp32"}
        | dict.fromkeys(("parts", "D", "i_b", "i_p"), "i32"),
        {"ORDER": order, "P": order, "BD": 32},
        num_warps=4,
        divisible=("summary", "initial", "starts", "D"),
        label=f"linear_scan order {order} carry",
    )
    for order in (1, 16)
]
