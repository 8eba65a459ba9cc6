"""Linear attention with no, scalar or per-channel decay: third-order mixing in linear time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import _linear_attention_cpu as chunked
from ._linear_attention_plain import formula
from ._runtime import (
    Impl,
    apply_of,
    check_tensor,
    device_status,
    dtype_status,
    eager,
    fusing,
    once_differentiable,
    refuse,
    register,
    use_kernel,
)

DEVICES = ("cpu", "cuda")
OP = "linear_attention"
UNROLLED = 256  # positions up to which torch.compile is left to fuse the chunks, within seconds
# Channels of a head on CUDA, whose state has to fit the registers; and with a decay a channel.
MAX_WIDTH = {torch.bfloat16: (256, 256), torch.float16: (128, 128), torch.float32: (128, 64)}


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    decay: Tensor | None = None,
    scale: float | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """o_t = scale S_t^T q_t with the state S_t = exp(decay_t) S_{t-1} + k_t v_t^T, causal.

    So o_t = scale sum_{s <= t} (q_t . w_ts k_s) v_s with w_ts = exp(decay_{s+1} + ... + decay_t).

    q, k     [B, T, H, K]
    v        [B, T, H, V]
    decay    None, [B, T, H] (one a head) or [B, T, H, K] (one a channel of k): natural logarithms,
             at most 0, -inf to forget everything; in the dtype of q or float32
    scale    K ** -0.5 where None
    returns  o [B, T, H, V] in the dtype of v; products of half precisions add up in float32

    float32, bfloat16, float16 (float64 on CPU), one dtype and device; T may be 0. Once
    differentiable; impl="torch" is differentiable any number of times. Factors of decays are at
    most 1 wherever they are formed, so strong decays underflow to 0 and nothing overflows.

    impl="auto" takes the kernel wherever it runs: on CPU always, on CUDA with Triton for heads up
    to 256 channels in bfloat16 and 128 in float16 and float32 (64 with a decay a channel in
    float32); otherwise, and with impl="torch", chunks of torch operations. torch.compile fuses
    these: on CPU, "auto" traces them in float32 and float64 for T at most 256 and not dynamic,
    without a decay or with one a head.

    Raises KernelError for shapes, dtypes or devices that do not fit, and for impl="kernel" where
    the kernel cannot run. Sources: Katharopoulos et al., Transformers are RNNs, 2020, equation 18;
    Yang et al., Gated Linear Attention Transformers, 2023, equation 3.
    """
    _check(q, k, v, decay)
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    width = max(q.shape[-1], v.shape[-1])
    per_channel = decay is not None and decay.dim() == 4
    refused = unsupported(q.device, width=width, dtype=q.dtype, per_channel=per_channel)
    if not use_kernel(OP, impl, refused, _slower(q, decay)):
        return formula(q, k, v, decay, factor)
    trained = torch.is_grad_enabled() and (
        q.requires_grad
        or k.requires_grad
        or v.requires_grad
        or (decay is not None and decay.requires_grad)
    )
    run = _run_differentiable if trained else _run_forward
    o: Tensor = run(q, k, v, decay, factor)
    return o


def _slower(q: Tensor, decay: Tensor | None) -> str | None:
    if decay is not None and decay.dim() == 4:
        return None
    return fusing(q, short=q.shape[1] <= UNROLLED)


def status(device: torch.device | str, dtype: torch.dtype = torch.float32) -> str | None:
    """The reason the kernel cannot run on `device` in `dtype`; None where it does."""
    return dtype_status(device, dtype) or device_status(device)


def unsupported(
    device: torch.device,
    *,
    width: int = 1,
    dtype: torch.dtype = torch.float32,
    per_channel: bool = False,
) -> str | None:
    """The reason the kernel cannot run heads of this many channels on `device`."""
    if device.type == "cpu":
        return None
    most = MAX_WIDTH[dtype][per_channel] if dtype in MAX_WIDTH else 0
    if width > most:
        decay = " with a decay a channel" if per_channel else ""
        return f"{width} channels a head are above {most}, the most for {dtype}{decay} on CUDA"
    return device_status(device)


def _check(q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None) -> None:
    check_tensor(OP, "q", q)
    check_tensor(OP, "k", k, like=q)
    check_tensor(OP, "v", v, like=q)
    if q.dim() != 4 or v.dim() != 4 or k.shape != q.shape or v.shape[:3] != q.shape[:3]:
        refuse(
            OP,
            f"q, k and v have shapes {tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}",
            "Give q and k as [B, T, H, K] and v as [B, T, H, V]",
        )
    if q.shape[3] == 0:
        refuse(OP, "q has no channels", "Give at least one channel a head")
    if decay is None:
        return
    if decay.shape != q.shape and decay.shape != q.shape[:3]:
        refuse(
            OP,
            f"decay has shape {tuple(decay.shape)} for q of shape {tuple(q.shape)}",
            "Give it as [B, T, H], one a head, or [B, T, H, K], one a channel",
        )
    if decay.device != q.device or decay.dtype not in (q.dtype, torch.float32):
        refuse(
            OP,
            f"decay is {decay.dtype} on {decay.device}, q {q.dtype} on {q.device}",
            "Bring it to the device of q, and to its dtype or float32",
        )


def _cpu(q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, scale: float) -> Tensor:
    return chunked.forward(q, k, v, decay, scale)


def _cpu_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, scale: float
) -> tuple[Tensor, ...]:
    grads = chunked.backward(grad, q, k, v, decay, scale)
    return grads if decay is not None else (*grads, q.new_empty(0))


def _cuda(q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, scale: float) -> Tensor:
    from ._linear_attention_triton import forward

    return forward(q, k, v, decay, scale)


def _cuda_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, scale: float
) -> tuple[Tensor, ...]:
    from ._linear_attention_triton import backward

    grads = backward(grad, q, k, v, decay, scale)
    return grads if decay is not None else (*grads, q.new_empty(0))


def _fake(q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, scale: float) -> Tensor:
    return v.new_empty(v.shape)


def _fake_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, scale: float
) -> tuple[Tensor, ...]:
    last = q.new_empty(0) if decay is None else decay.new_empty(decay.shape)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), last


_forward = register(
    OP,
    "(Tensor q, Tensor k, Tensor v, Tensor? decay, float scale) -> Tensor",
    cpu=_cpu,
    cuda=_cuda,
    fake=_fake,
)
_backward = register(
    OP + "_backward",
    "(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor? decay, float scale)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    cpu=_cpu_backward,
    cuda=_cuda_backward,
    fake=_fake_backward,
)
_run_forward = eager(_forward, _cpu)
_run_backward = eager(_backward, _cpu_backward)


class _LinearAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, scale: float
    ) -> Tensor:
        o: Tensor = _run_forward(q, k, v, decay, scale)
        ctx.save_for_backward(q, k, v, decay)
        ctx.scale = scale
        return o

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, decay = ctx.saved_tensors
        dq, dk, dv, dg = _run_backward(grad, q, k, v, decay, ctx.scale)
        return dq, dk, dv, None if decay is None else dg, None


_run_differentiable: Callable[..., Tensor] = apply_of(_LinearAttention)
