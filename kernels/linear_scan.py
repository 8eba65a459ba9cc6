"""Linear recurrence along positions: the product with a semiseparable lower triangular matrix."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import _linear_scan_cpu as plain_torch
from ._linear_scan_plain import formula
from ._runtime import (
    Impl,
    apply_of,
    check,
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
OP = "linear_scan"
MAX_ORDER = 16  # the CUDA kernel keeps the state in registers
UNROLLED = 256  # rows up to which torch.compile is left to unroll and fuse, within seconds,
FUSED = 2**19  # and entries, whose chunks stay in cache without tiles


def linear_scan(
    a: Tensor,
    b: Tensor,
    *,
    initial: Tensor | None = None,
    reverse: bool = False,
    impl: Impl = "auto",
) -> Tensor:
    """h_t = a_t h_{t-1} + b_t elementwise, or h_t = sum_i a_{t,i} h_{t-i} + b_t of order p.

    a        [B, T, D], [T, D], [D] or with axes of size 1 for B and T; [B, T, p, D] for order p,
             where a[:, t, i - 1] meets h_{t-i}; there B and T may be 1 as well
    b        [B, T, D]
    initial  [B, D], or [B, p, D] for order p with initial[:, i - 1] = h_{-i}; zero where None
    reverse  run from the last position to the first: h_{t+i} in place of h_{t-i}, and `initial`
             holds the states after the end
    returns  h [B, T, D] in the dtype of b; half precisions are added up in float32

    float32, bfloat16, float16 (float64 on CPU), one dtype and device for all; T may be 0. Once
    differentiable; impl="torch" is differentiable any number of times. Decays are never divided by
    and no logarithm is taken; a product of decays over some hundred steps must be finite.

    impl="auto" takes the kernel wherever it runs: on CPU always, on CUDA with Triton up to order
    16; otherwise, and with impl="torch", rows in turn in torch operations, of order 1 in about
    sqrt(T) chunks at once. torch.compile fuses these: on CPU, "auto" traces them in float32 and
    float64 for order 1, T at most 256 and not dynamic, B * T * D at most 2**19.

    Raises KernelError for shapes, dtypes or devices that do not fit, and for impl="kernel" where
    the kernel cannot run. Source: Blelloch, Prefix sums and their applications, 1990, section 1.4.
    """
    _check(a, b, initial)
    order = a.shape[2] if a.dim() == 4 else 1
    if not use_kernel(OP, impl, unsupported(b.device, order=order), _slower(b, order)):
        return formula(_lift(a), b, None if initial is None else _lift_state(initial), reverse)
    trained = torch.is_grad_enabled() and (
        a.requires_grad or b.requires_grad or (initial is not None and initial.requires_grad)
    )
    run = _run_differentiable if trained else _run_forward
    h: Tensor = run(a, b, initial, reverse)
    return h


def status(device: torch.device | str, dtype: torch.dtype = torch.float32) -> str | None:
    """The reason the kernel cannot run on `device` in `dtype`; None where it does."""
    return dtype_status(device, dtype) or device_status(device)


def unsupported(device: torch.device, *, order: int = 1) -> str | None:
    """The reason the kernel cannot run a recurrence of this order on `device`."""
    if device.type == "cpu":
        return None
    if order > MAX_ORDER:
        return f"order {order} is above {MAX_ORDER}, the highest on CUDA"
    return device_status(device)


def _slower(b: Tensor, order: int) -> str | None:
    if order > 1:
        return None
    return fusing(b, short=b.shape[1] <= UNROLLED, small=b.numel() <= FUSED)


def _check(a: Tensor, b: Tensor, initial: Tensor | None) -> None:
    check_tensor(OP, "b", b)
    check_tensor(OP, "a", a, like=b)
    if b.dim() != 3:
        refuse(OP, f"b has shape {tuple(b.shape)}", "Give b as [B, T, D]")
    batch, length, depth = b.shape
    size = a.shape
    rank = len(size)
    if (
        not 1 <= rank <= 4
        or size[-1] != depth
        or (rank >= 3 and size[0] != batch and size[0] != 1)
        or (rank >= 2 and size[1 if rank > 2 else 0] not in (length, 1))
        or (rank == 4 and size[2] == 0)
    ):
        refuse(
            OP,
            f"a of shape {tuple(size)} does not fit b of shape {tuple(b.shape)}",
            "Give a as [B, T, D], [T, D] or [D], or as [B, T, p, D] for order p; B and T may be 1",
        )
    if initial is not None:
        check_tensor(OP, "initial", initial, like=b)
        wanted = (batch, size[2], depth) if rank == 4 else (batch, depth)
        if initial.shape != wanted:
            check(False, OP, f"initial has shape {tuple(initial.shape)}", f"Give it as {wanted}")


def _lift(a: Tensor) -> Tensor:
    """The decays as [B|1, T|1, p, D]."""
    if a.dim() == 4:
        return a
    if a.dim() == 3:
        return a.unsqueeze(2)
    return a.view(1, -1, 1, a.shape[-1]) if a.dim() == 1 else a[None, :, None]


def _lift_state(initial: Tensor) -> Tensor:
    return initial if initial.dim() == 3 else initial.unsqueeze(1)


def _cpu(a: Tensor, b: Tensor, initial: Tensor | None, reverse: bool) -> Tensor:
    state = None if initial is None else _lift_state(initial)
    return plain_torch.forward(_lift(a), b, state, reverse)


def _cpu_backward(
    grad: Tensor, a: Tensor, h: Tensor, initial: Tensor | None, reverse: bool
) -> tuple[Tensor, Tensor, Tensor]:
    state = None if initial is None else _lift_state(initial)
    da, db, di = plain_torch.backward(grad, _lift(a), h, state, reverse)
    return da.view(a.shape), db, di if a.dim() == 4 else di[:, 0]


def _cuda(a: Tensor, b: Tensor, initial: Tensor | None, reverse: bool) -> Tensor:
    from ._linear_scan_triton import forward

    state = None if initial is None else _lift_state(initial)
    return forward(_lift(a), b, state, reverse)


def _cuda_backward(
    grad: Tensor, a: Tensor, h: Tensor, initial: Tensor | None, reverse: bool
) -> tuple[Tensor, Tensor, Tensor]:
    from ._linear_scan_triton import backward

    state = None if initial is None else _lift_state(initial)
    da, db, di = backward(grad, _lift(a), h, state, reverse)
    return da.view(a.shape), db, di if a.dim() == 4 else di[:, 0]


def _fake(a: Tensor, b: Tensor, initial: Tensor | None, reverse: bool) -> Tensor:
    return b.new_empty(b.shape)


def _fake_backward(
    grad: Tensor, a: Tensor, h: Tensor, initial: Tensor | None, reverse: bool
) -> tuple[Tensor, Tensor, Tensor]:
    batch, _, depth = h.shape
    state = (batch, a.shape[2], depth) if a.dim() == 4 else (batch, depth)
    return a.new_empty(a.shape), h.new_empty(h.shape), h.new_empty(state)


_forward = register(
    OP,
    "(Tensor a, Tensor b, Tensor? initial, bool reverse) -> Tensor",
    cpu=_cpu,
    cuda=_cuda,
    fake=_fake,
)
_backward = register(
    OP + "_backward",
    "(Tensor grad, Tensor a, Tensor h, Tensor? initial, bool reverse) -> (Tensor, Tensor, Tensor)",
    cpu=_cpu_backward,
    cuda=_cuda_backward,
    fake=_fake_backward,
)
_run_forward = eager(_forward, _cpu)
_run_backward = eager(_backward, _cpu_backward)


class _LinearScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, initial: Tensor | None, reverse: bool) -> Tensor:
        h: Tensor = _run_forward(a, b, initial, reverse)
        ctx.save_for_backward(a, h, initial)
        ctx.reverse = reverse
        return h

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor | None, None]:
        a, h, initial = ctx.saved_tensors
        da, db, di = _run_backward(grad, a, h, initial, ctx.reverse)
        return da, db, None if initial is None else di, None


_run_differentiable: Callable[..., Tensor] = apply_of(_LinearScan)
