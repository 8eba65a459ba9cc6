"""Product with a matrix of two small factors along features: Monarch, BTT, low rank, Kronecker."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from patternsearch.errors import unknown

from . import _two_factor_cpu as plain_torch
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
from ._two_factor_cpu import ACTIVATIONS, Sizes
from ._windows import row_major, rows_of

DEVICES = ("cpu", "cuda")
OP = "two_factor"
Activation = Literal["none", "relu", "gelu", "silu", "tanh"]
_aten = torch.ops.aten
_DERIVED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "relu": lambda dy, u: _aten.threshold_backward(dy, u, 0),
    "gelu": _aten.gelu_backward,
    "silu": _aten.silu_backward,
    "tanh": lambda dy, u: _aten.tanh_backward(dy, u.tanh()),
}


def two_factor(
    x: Tensor,
    left: Tensor,
    right: Tensor,
    *,
    bias: Tensor | None = None,
    activation: Activation = "none",
    residual: Tensor | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """y = activation(W x + bias) + residual, W[(e, f, d), (g, b, a)] = sum_r left right.

    z[f, d, r, b, g] = sum_a left[f, d, r, g, a] x[g, b, a], and then
    y[e, f, d] = sum_{r, b, g} right[f, e, r, b, g] z[f, d, r, b, g].

    x           [*, g b a]
    left        [f, d, r, g, a]
    right       [f, e, r, b, g]
    bias        [e f d], or None
    activation  "none", "relu", "gelu" (exact), "silu" or "tanh"
    residual    [*, e f d], or None
    returns     [*, e f d], contiguous, in the dtype of x

    Sizes of 1 leave out a letter. Monarch has d = r = b = 1, block tensor train and low rank a
    block d = b = 1, low rank only a, e and r, a Kronecker product only a, b, d and e.

    float32, bfloat16, float16 (float64 on CPU), one dtype and device for all; no or any number of
    rows. Sums are kept in float32. Once differentiable (impl="torch": any number of times). The
    backward keeps x, and with an activation what it was given; z is computed again.

    impl="torch" is two einsums, or two plain products of a Kronecker product. impl="auto" takes the
    kernel wherever it runs (on CUDA without Triton the CPU's), but on CPU these for low rank alone,
    whose products are plain, below 2^19 multiplications, and with several threads for a Kronecker
    product of at most 2^20 numbers of x: autograd keeps what lies between. The kernel is two
    batched products, some rows at a time (on CPU two mode products of a Kronecker product); or,
    where they need more work than the dense matrix, that matrix is multiplied out. Work counts
    multiplications: on CPU 1.4 + 12 / n times each, with n the shorter side of a product, and 24
    for every number of x and y, those with the dense matrix half where oneDNN does them (float32,
    AVX-512); on CUDA 80 / n times where n < 80.

    Raises KernelError for shapes, dtypes or devices that do not fit, and for impl="kernel" where
    the kernel cannot run. Source: Potapczynski et al. 2024 (arXiv 2410.02117), section 3.
    """
    sizes = _check(x, left, right, bias, activation, residual)
    slower = sizes.slower(x.numel() // x.shape[-1]) if x.is_cpu and impl == "auto" else None
    if not use_kernel(OP, impl, device_status(x.device), slower) and (x.is_cpu or impl != "auto"):
        return _formula(x, left, right, bias, activation, residual)
    tensors = (x, left, right, bias, residual)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        return _run_differentiable(*tensors, activation)
    return _multiply(*tensors, activation, False)[0]


def status(device: torch.device | str, dtype: torch.dtype = torch.float32) -> str | None:
    """The reason the kernel cannot run on `device` in `dtype`; None where it does."""
    return dtype_status(device, dtype) or device_status(device)


def _check(
    x: Tensor,
    left: Tensor,
    right: Tensor,
    bias: Tensor | None,
    activation: str,
    residual: Tensor | None,
) -> Sizes:
    check_tensor(OP, "x", x)
    check_tensor(OP, "left", left, like=x)
    check_tensor(OP, "right", right, like=x)
    if left.dim() != 5 or right.dim() != 5 or x.dim() < 1 or not left.numel() * right.numel():
        refuse(
            OP,
            f"x has shape {tuple(x.shape)}, left {tuple(left.shape)}, right {tuple(right.shape)}",
            "Give x as [*, g b a], left as [f, d, r, g, a], right as [f, e, r, b, g], none empty",
        )
    n = Sizes.of(left, right)
    if right.shape != (n.f, n.e, n.r, n.b, n.g):
        refuse(
            OP,
            f"left has shape [f, d, r, g, a] = {tuple(left.shape)}, right {tuple(right.shape)}",
            f"Give right as [f, e, r, b, g] with f={n.f}, r={n.r}, g={n.g}",
        )
    if x.shape[-1] != n.inputs:
        refuse(
            OP,
            f"x has {x.shape[-1]} features, the factors g b a = {n.g} * {n.b} * {n.a}",
            f"Give {n.inputs} features",
        )
    if activation not in ACTIVATIONS:
        refuse(OP, unknown("activation", activation, ACTIVATIONS), "Choose one of these")
    for name, tensor in (("bias", bias), ("residual", residual)):
        if tensor is not None:
            shape = (n.outputs,) if name == "bias" else (*x.shape[:-1], n.outputs)
            check_tensor(OP, name, tensor, like=x)
            if tensor.shape != shape:
                refuse(OP, f"{name} has shape {tuple(tensor.shape)}", f"Give {shape}")
    return n


def _formula(
    x: Tensor,
    left: Tensor,
    right: Tensor,
    bias: Tensor | None,
    activation: str,
    residual: Tensor | None,
) -> Tensor:
    n = Sizes.of(left, right)
    if n.two_modes:
        one, two = plain_torch.matrices(left, right)
        z = (x.unflatten(-1, (n.b, n.a)) @ one.t()).transpose(-1, -2)
        u = (z @ two.t()).transpose(-1, -2).flatten(-2)
    else:
        z = torch.einsum("fdrga,...gba->...fdrbg", left, x.unflatten(-1, (n.g, n.b, n.a)))
        u = torch.einsum("ferbg,...fdrbg->...efd", right, z).flatten(-3)
    y = ACTIVATIONS[activation](u if bias is None else u + bias)
    return y if residual is None else y + residual


def _cuda(x: Tensor, left: Tensor, right: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    if why_no_triton() is not None or Sizes.of(left, right).multiplied_out(x.shape[0], True):
        return plain_torch.apply(x, left, right, *rest)
    from ._two_factor_triton import apply

    bias, residual, activation, keep = rest
    bias = None if bias is None else bias.contiguous()
    residual = None if residual is None else residual.contiguous()
    (x,) = row_major(x)
    return apply(x, left.contiguous(), right.contiguous(), bias, residual, activation, keep)


def _cuda_backward(
    grad: Tensor, x: Tensor, left: Tensor, right: Tensor, data: bool, weights: bool
) -> tuple[Tensor, Tensor, Tensor]:
    if why_no_triton() is not None or Sizes.of(left, right).multiplied_out(x.shape[0], True):
        return plain_torch.backward(grad, x, left, right, data, weights)
    from ._two_factor_triton import backward

    grad, x = row_major(grad, x)
    return backward(grad, x, left.contiguous(), right.contiguous(), data, weights)


def _fake(
    x: Tensor,
    left: Tensor,
    right: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    y = x.new_empty(x.shape[0], Sizes.of(left, right).outputs)
    return y, y.new_empty(y.shape if keep else (0,))


def _fake_backward(
    grad: Tensor, x: Tensor, left: Tensor, right: Tensor, data: bool, weights: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        x.new_empty(x.shape if data else (0,)),
        x.new_empty(left.shape if weights else (0,)),
        x.new_empty(right.shape if weights else (0,)),
    )


_forward = register(
    OP,
    "(Tensor x, Tensor left, Tensor right, Tensor? bias, Tensor? residual, str activation, "
    "bool keep) -> (Tensor, Tensor)",
    cpu=plain_torch.apply,
    cuda=_cuda,
    fake=_fake,
)
_backward = register(
    f"{OP}_backward",
    "(Tensor grad, Tensor x, Tensor left, Tensor right, bool data, bool weights) "
    "-> (Tensor, Tensor, Tensor)",
    cpu=plain_torch.backward,
    cuda=_cuda_backward,
    fake=_fake_backward,
)
_run_forward = eager(_forward, plain_torch.apply)
_run_backward = eager(_backward, plain_torch.backward)


def _multiply(
    x: Tensor,
    left: Tensor,
    right: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    """The result, and as rows what the activation was given where that is to be kept."""
    added = None if residual is None else rows_of(residual)
    y, given = _run_forward(rows_of(x), left, right, bias, added, activation, keep)
    return y if x.dim() == 2 else y.view(*x.shape[:-1], y.shape[1]), given


class _TwoFactor(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        left: Tensor,
        right: Tensor,
        bias: Tensor | None,
        residual: Tensor | None,
        activation: str,
    ) -> Tensor:
        keep = activation != "none"
        y, given = _multiply(x, left, right, bias, residual, activation, keep)
        ctx.save_for_backward(x, left, right, given)
        ctx.activation = activation
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, left, right, given = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        du = rows_of(grad)
        if ctx.activation != "none":
            du = _DERIVED[ctx.activation](du, given)
        data, weights = wanted[0], wanted[1] or wanted[2]
        dx = one = two = None
        if data or weights:
            dx, one, two = _run_backward(du, rows_of(x), left, right, data, weights)
            dx = None if not data else dx if x.dim() == 2 else dx.view(x.shape)
        return (
            dx,
            one if wanted[1] else None,
            two if wanted[2] else None,
            du.sum(0) if wanted[3] else None,
            grad if wanted[4] else None,
            None,
        )


_run_differentiable: Callable[..., Tensor] = apply_of(_TwoFactor)
