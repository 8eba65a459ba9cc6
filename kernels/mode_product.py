"""A chain of mode products along features: Kronecker (NdLinear), Tucker, tensor train."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _mode_product_cpu as plain_torch
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
)
from ._windows import rows_of

DEVICES = ("cpu", "cuda")
OP = "mode_product"
FEW = 1 << 17  # numbers below which, on CPU, calls cost more than passes


def mode_product(
    x: Tensor,
    factors: Sequence[Tensor],
    *,
    trailing: Sequence[int],
    biases: Sequence[Tensor] | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """Factor after factor on one axis of each row, read as an array: nothing is ever transposed.

    Step k reads what it is given as [a, i, b] with b < trailing[k], and leaves [a, o, b]:
    z[a, o, b] = sum_i factors[k][o, i] z[a, i, b] + biases[k][o].

    x         [*, n]
    factors   matrices [o_k, i_k]
    trailing  how many entries of a row follow the axis of step k; i_k * trailing[k] divides the
              size of the row at that step
    biases    one vector [o_k] a step, or None
    returns   [*, m], m = n prod(o_k / i_k), contiguous

    A Kronecker product of factors [o_k, i_k] from the first mode to the last has trailing[k] =
    i_{k+1} ... i_n. So has a tensor train, whose cores are read as [o_k r_k, r_{k-1} i_k]: the bond
    stands beside the next mode. A Tucker core is a factor with trailing 1.

    float32, bfloat16, float16 (float64 on CPU), one dtype and device for all; no or any number of
    rows. Sums are kept in float32. Once differentiable (impl="torch": any number of times). The
    backward keeps x alone and computes the intermediates again.

    On CPU the kernel multiplies the factors to one matrix first where n m <= NARROW (numbers of a
    row after each factor, added up) and there are at least 2 n rows: so narrow a matrix costs less
    than passes over its array; NARROW is 32, or 64 where products go through oneDNN. Gradients of
    the factors then come from that of the matrix.
    impl="auto" takes the kernel on CUDA with Triton, and on CPU from 2^17 numbers of the widest
    intermediate on. Elsewhere, and with impl="torch", a torch product for each step.

    Raises KernelError for shapes, dtypes or devices that do not fit, and for impl="kernel" where
    the kernel cannot run. Source: Kolda and Bader 2009, doi 10.1137/07070111X, section 2.5.
    """
    factors, trailing = list(factors), list(trailing)
    offsets = [] if biases is None else list(biases)
    _check(x, factors, offsets, trailing)
    slower = _slower(x, factors) if impl == "auto" else None
    if not use_kernel(OP, impl, device_status(x.device), slower):
        return _formula(x, factors, offsets, trailing)
    if torch.is_grad_enabled() and any(t.requires_grad for t in (x, *factors, *offsets)):
        return _run_differentiable(x, trailing, *factors, *offsets)
    return _multiply(x, factors, offsets, trailing)


def status(device: torch.device | str, dtype: torch.dtype = torch.float32) -> str | None:
    """The reason the kernel cannot run on `device` in `dtype`; None where it does."""
    return dtype_status(device, dtype) or device_status(device)


def _check(
    x: Tensor, factors: Sequence[Tensor], biases: Sequence[Tensor], trailing: Sequence[int]
) -> None:
    check_tensor(OP, "x", x)
    if x.dim() < 1 or x.shape[-1] == 0 or not factors or len(factors) != len(trailing):
        refuse(
            OP,
            f"x is {tuple(x.shape)}, with {len(factors)} factors and {len(trailing)} in trailing",
            "Give x as [*, n], at least one factor, and one number in trailing for each",
        )
    if biases and len(biases) != len(factors):
        refuse(OP, f"{len(biases)} biases, {len(factors)} factors", "Give one for each, or None")
    size = x.shape[-1]
    for k, (factor, after) in enumerate(zip(factors, trailing, strict=True)):
        check_tensor(OP, f"factors[{k}]", factor, like=x)
        if factor.dim() != 2 or factor.numel() == 0:
            refuse(OP, f"factors[{k}] has shape {tuple(factor.shape)}", "Give a matrix [out, in]")
        o, i = factor.shape
        if after < 1 or size % (i * after):
            refuse(
                OP,
                f"step {k} is given {size} entries a row, which {i} inputs with {after} entries "
                "after each do not divide",
                "Make i * trailing a divisor of what the steps before leave",
            )
        if biases:
            check_tensor(OP, f"biases[{k}]", biases[k], like=x)
            if biases[k].shape != (o,):
                refuse(OP, f"biases[{k}] has shape {tuple(biases[k].shape)}", f"Give [{o}]")
        size = size // i * o


def _slower(x: Tensor, factors: Sequence[Tensor]) -> str | None:
    """Why, on CPU, a product for each step is faster; None where it is not."""
    if x.device.type != "cpu":
        return None
    if x.numel() // x.shape[-1] * max(plain_torch.sizes_of(x.shape[-1], factors)) >= FEW:
        return None
    return f"every intermediate has fewer than {FEW} numbers"


def _formula(
    x: Tensor, factors: Sequence[Tensor], biases: Sequence[Tensor], trailing: Sequence[int]
) -> Tensor:
    z = x
    for k, (factor, after) in enumerate(zip(factors, trailing, strict=True)):
        bias = biases[k] if biases else None
        if after == 1:
            z = F.linear(z.unflatten(-1, (-1, factor.shape[1])), factor, bias).flatten(-2)
            continue
        z = factor @ z.unflatten(-1, (-1, factor.shape[1], after))
        z = (z if bias is None else z + bias[:, None]).flatten(-3)
    return z


def _cuda(
    x: Tensor, factors: Sequence[Tensor], biases: Sequence[Tensor], trailing: Sequence[int]
) -> Tensor:
    from ._mode_product_triton import forward

    return forward(x, factors, biases, trailing)


def _cuda_backward(grad: Tensor, x: Tensor, *how: Any) -> list[Tensor]:
    from ._mode_product_triton import backward

    return backward(grad, x, *how)


def _fake(x: Tensor, factors: Sequence[Tensor], *_: Any) -> Tensor:
    return x.new_empty(x.shape[0], plain_torch.sizes_of(x.shape[1], factors)[-1])


def _fake_backward(
    grad: Tensor,
    x: Tensor,
    factors: Sequence[Tensor],
    biases: Sequence[Tensor],
    trailing: Sequence[int],
    need_x: bool,
) -> list[Tensor]:
    dx = x.new_empty(x.shape if need_x else 0)
    return [dx, *(t.new_empty(t.shape) for t in (*factors, *biases))]


_HOW = "Tensor[] factors, Tensor[] biases, int[] trailing"
_forward = register(
    OP, f"(Tensor x, {_HOW}) -> Tensor", cpu=plain_torch.forward, cuda=_cuda, fake=_fake
)
_backward = register(
    f"{OP}_backward",
    f"(Tensor grad, Tensor x, {_HOW}, bool need_x) -> Tensor[]",
    cpu=plain_torch.backward,
    cuda=_cuda_backward,
    fake=_fake_backward,
)
_run_forward = eager(_forward, plain_torch.forward)
_run_backward = eager(_backward, plain_torch.backward)


def _multiply(
    x: Tensor, factors: Sequence[Tensor], biases: Sequence[Tensor], trailing: Sequence[int]
) -> Tensor:
    y: Tensor = _run_forward(rows_of(x), factors, biases, trailing)
    return y if x.dim() == 2 else y.view(*x.shape[:-1], y.shape[1])


class _ModeProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, trailing: list[int], *cores: Tensor) -> Tensor:
        ctx.save_for_backward(x, *cores)
        ctx.trailing = trailing
        n = len(trailing)
        return _multiply(x, list(cores[:n]), list(cores[n:]), trailing)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, *cores = ctx.saved_tensors
        n, need_x = len(ctx.trailing), ctx.needs_input_grad[0]
        rows = rows_of(grad), rows_of(x)
        dx, *found = _run_backward(*rows, cores[:n], cores[n:], ctx.trailing, need_x)
        if not need_x:
            return None, None, *found
        return dx if x.dim() == 2 else dx.view(x.shape), None, *found


_run_differentiable: Callable[..., Tensor] = apply_of(_ModeProduct)
