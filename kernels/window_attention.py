"""Softmax attention on a band or on full support, causal or two-sided, with grouped heads."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _window_attention_cpu as plain_torch
from ._runtime import (
    Impl,
    apply_of,
    check_tensor,
    device_status,
    dtype_status,
    eager,
    once_differentiable,
    refuse,
    register,
    use_kernel,
    why_no_triton,
)
from ._windows import row_major

DEVICES = ("cpu", "cuda")
OP = "window_attention"
MAX_SIZE = {torch.float32: 128}  # channels of a head that fit in registers on CUDA, else 256


def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    lower: int | None = None,
    upper: int | None = None,
    dilation: int = 1,
    scale: float | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """softmax_s(scale q_t . k_s) v_s over s = t + j * dilation, -lower <= j <= upper, 0 <= s < T.

    q         [B, T, H, D]
    k, v      [B, T, Hk, D]; Hk divides H, and head h uses h // (H // Hk)
    lower     how many keys a query sees before its own, in steps of `dilation`; None: all of them
    upper     how many after its own; 0 is causal, None: all of them
    scale     factor of the scores; None: 1 / sqrt(D)
    returns   [B, T, H, D], contiguous where the kernel ran, in the dtype of q

    float32, bfloat16, float16 (float64 on CPU), one dtype and device for all; any size, 0 included.
    Products of scores and their sums are kept in float32. Memory beyond inputs and outputs grows
    with T, not T * T: the backward pass computes scores again. Deterministic. Once differentiable.

    impl="auto" takes the kernel, except on CPU, where torch's scaled_dot_product_attention is
    faster: full support and causal full support at dilation 1, T <= 64, windows of more than about
    two thirds of T, B * T * T <= 32768 * dilation. On CUDA without Triton the CPU's blocks run.
    impl="torch" is scaled_dot_product_attention with a mask [T, T].

    Raises KernelError for shapes, dtypes or devices that do not fit, and for impl="kernel" where
    the kernel cannot run. Source: Dao, FlashAttention-2, arXiv 2307.08691, algorithms 1 and 2;
    windows as in Beltagy et al., Longformer, arXiv 2004.05150, section 3.1.
    """
    _check(q, k, v, lower, upper, dilation)
    factor = 1 / math.sqrt(max(1, q.shape[3])) if scale is None else float(scale)
    low, up = plain_torch.reach(q.shape[1], lower, upper, dilation)
    if not use_kernel(OP, impl, _refused(q), _slower(q, low, up, dilation)) and not (
        impl == "auto" and _blocks_instead(q)
    ):
        return _formula(q, k, v, low, up, dilation, factor)
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        return _run_differentiable(q, k, v, (low, up, dilation, factor))
    return _run_forward(q, k, v, low, up, dilation, factor)[0]


def status(device: torch.device | str, dtype: torch.dtype = torch.float32) -> str | None:
    """The reason the kernel cannot run on `device` in `dtype`; None where it does."""
    return dtype_status(device, dtype) or device_status(device)


def _refused(q: Tensor) -> str | None:
    if q.device.type == "cpu":
        return None
    most = MAX_SIZE.get(q.dtype, 256)
    if q.shape[3] > most:
        return f"heads of {q.shape[3]} channels are above {most}, the most for {q.dtype} on CUDA"
    return device_status(q.device)


def _blocks_instead(q: Tensor) -> bool:
    """On CUDA without Triton the blocks still run, in plain torch."""
    return q.device.type == "cuda" and why_no_triton() is not None


def _slower(q: Tensor, lower: int, upper: int, dilation: int) -> str | None:
    """Why torch's own attention is faster here; None where blocks are."""
    batch, length = q.shape[:2]
    if q.device.type != "cpu" or q.numel() == 0:
        return None
    if length <= 64 or batch * length * length <= 32768 * dilation:
        return "short sequences cost less in one piece"
    seen = min(length // dilation, lower + upper + plain_torch.rows_of(lower + upper))
    if dilation == 1 and lower >= length - 1 and upper in (0, length - 1):
        return "full support is what scaled_dot_product_attention is made for"
    if 2 * length <= 3 * seen and lower + upper < length:
        return "the window holds most of the sequence"
    return None


def _formula(
    q: Tensor, k: Tensor, v: Tensor, lower: int, upper: int, dilation: int, scale: float
) -> Tensor:
    length, last = q.shape[1], q.shape[1] - 1
    mask, causal = None, False
    if dilation == 1 and lower >= last and upper in (0, last):
        causal = upper == 0
    else:
        at = torch.arange(length, device=q.device)
        step = at - at.unsqueeze(1)
        mask = (step >= -lower * dilation) & (step <= upper * dilation)
        if dilation > 1:
            mask &= step % dilation == 0
    grouped = q.shape[2] != k.shape[2]
    return F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=mask,
        is_causal=causal,
        scale=scale,
        enable_gqa=grouped,
    ).transpose(1, 2)


def _check(
    q: Tensor, k: Tensor, v: Tensor, lower: int | None, upper: int | None, dilation: int
) -> None:
    check_tensor(OP, "q", q)
    check_tensor(OP, "k", k, like=q)
    check_tensor(OP, "v", v, like=q)
    if q.dim() != 4:
        refuse(OP, f"q has shape {tuple(q.shape)}", "Give q as [B, T, H, D]")
    if (
        k.dim() != 4
        or k.shape != v.shape
        or k.shape[:2] != q.shape[:2]
        or k.shape[3] != q.shape[3]
        or (q.shape[2] % k.shape[2] if k.shape[2] else q.shape[2])
    ):
        refuse(
            OP,
            f"k has shape {tuple(k.shape)}, v {tuple(v.shape)}, q {tuple(q.shape)}",
            "Give k and v as [B, T, Hk, D] with B, T, D of q and Hk a divisor of its H",
        )
    if (lower or 0) < 0 or (upper or 0) < 0 or dilation < 1:
        refuse(
            OP,
            f"lower={lower}, upper={upper}, dilation={dilation}",
            "Give widths of at least 0 or None, and a dilation of at least 1",
        )


def _cpu_alone(q: Tensor, k: Tensor, v: Tensor, *how: Any) -> tuple[Tensor, None]:
    return plain_torch.forward(*row_major(q, k, v), *how), None


def _cpu(q: Tensor, k: Tensor, v: Tensor, *how: Any) -> tuple[Tensor, Tensor]:
    return _cpu_alone(q, k, v, *how)[0], _no_lse(q)


def _cpu_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *how: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return plain_torch.backward(*row_major(grad, q, k, v), *how)


def _cuda(q: Tensor, k: Tensor, v: Tensor, *how: Any) -> tuple[Tensor, Tensor]:
    if why_no_triton() is not None:
        return _cpu(q, k, v, *how)
    from ._window_attention_triton import forward

    return forward(*row_major(q, k, v), *how)


def _cuda_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *how: Any
) -> tuple[Tensor, Tensor, Tensor]:
    if why_no_triton() is not None:
        return _cpu_backward(grad, q, k, v, out, lse, *how)
    from ._window_attention_triton import backward

    grad, q, k, v = row_major(grad, q, k, v)
    return backward(grad, q, k, v, out, lse, *how)


def _no_lse(q: Tensor) -> Tensor:
    """The blocks find the weights again without it."""
    return q.new_empty(0, dtype=torch.float32)


def _fake(q: Tensor, k: Tensor, v: Tensor, *how: Any) -> tuple[Tensor, Tensor]:
    if q.device.type != "cuda" or why_no_triton() is not None:
        return q.new_empty(q.shape), _no_lse(q)
    lse = q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=torch.float32)
    return q.new_empty(q.shape), lse


def _fake_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return tuple(t.new_empty(t.shape) for t in (q, k, v))


_HOW = "int lower, int upper, int dilation, float scale"
_forward = register(
    OP,
    f"(Tensor q, Tensor k, Tensor v, {_HOW}) -> (Tensor, Tensor)",
    cpu=_cpu,
    cuda=_cuda,
    fake=_fake,
)
_backward = register(
    f"{OP}_backward",
    f"(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, {_HOW})"
    " -> (Tensor, Tensor, Tensor)",
    cpu=_cpu_backward,
    cuda=_cuda_backward,
    fake=_fake_backward,
)
_run_forward: Callable[..., tuple[Tensor, Tensor | None]] = eager(_forward, _cpu_alone)
_run_backward = eager(_backward, _cpu_backward)


class _WindowAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, how: tuple[Any, ...]) -> Tensor:
        out, lse = _run_forward(q, k, v, *how)
        if lse is None or not lse.numel():  # the blocks need neither
            ctx.save_for_backward(q, k, v)
        else:
            ctx.save_for_backward(q, k, v, out, lse)
        ctx.how = how
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, *kept = ctx.saved_tensors
        out, lse = kept or (q, q)  # given to blocks, which look at neither
        dq, dk, dv = _run_backward(grad, q, k, v, out, lse, *ctx.how)
        return dq, dk, dv, None


_run_differentiable: Callable[..., Tensor] = apply_of(_WindowAttention)
