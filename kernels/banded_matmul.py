"""Product of a learned banded matrix with a sequence, along positions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _banded_matmul_cpu as plain_torch
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
OP = "banded_matmul"


def banded_matmul(
    x: Tensor,
    band: Tensor,
    *,
    lower: int,
    upper: int,
    dilation: int = 1,
    transpose: bool = False,
    impl: Impl = "auto",
) -> Tensor:
    """y[b, t, h] = sum_j band[h, t, j] x[b, t + (j - lower) * dilation, h], zero outside.

    x          [B, T, H, D]: D channels of a head share one matrix
    band       [H, T, W], W = lower + upper + 1: entry j of row t meets t + (j - lower) * dilation
    lower      how many entries a row looks back, in steps of `dilation`
    upper      how many it looks ahead
    transpose  apply the transposed matrix: y[s] = sum over t of A[t, s] x[t]
    returns    [B, T, H, D], contiguous, in the dtype of x

    float32, bfloat16, float16 (float64 on CPU), one dtype and device for both; any size, also 0.
    Sums are kept in float32. Entries that look past an end are ignored and get gradient 0. Once
    differentiable; impl="torch" is differentiable any number of times.

    impl="auto" takes the kernel wherever it runs; on CPU that is blocks of 16 to 64 rows, or the
    whole matrix where T * T <= 4096 * dilation. On CUDA without Triton the CPU's blocks are used.
    impl="torch" builds the matrices [H, T, T] and multiplies.

    Raises KernelError for shapes, dtypes or devices that do not fit, and for impl="kernel" where
    the kernel cannot run. Source: Golub and Van Loan, Matrix Computations, 1.2 (band storage).
    """
    _check(x, band, lower, upper, dilation)
    refused = None if x.is_cpu else device_status(x.device)
    if not use_kernel(OP, impl, refused) and not (impl == "auto" and _blocks_instead(x)):
        return _formula(x, band, lower, upper, dilation, transpose)
    if torch.is_grad_enabled() and (x.requires_grad or band.requires_grad):
        return _run_differentiable(x, band, (lower, upper, dilation, transpose))
    return _run_forward(x, band, lower, upper, dilation, transpose)


def status(device: torch.device | str, dtype: torch.dtype = torch.float32) -> str | None:
    """The reason the kernel cannot run on `device` in `dtype`; None where it does."""
    return dtype_status(device, dtype) or device_status(device)


def _check(x: Tensor, band: Tensor, lower: int, upper: int, dilation: int) -> None:
    check_tensor(OP, "x", x)
    check_tensor(OP, "band", band, like=x)
    if x.dim() != 4:
        refuse(OP, f"x has shape {tuple(x.shape)}", "Give x as [B, T, H, D]")
    if lower < 0 or upper < 0 or dilation < 1:
        refuse(
            OP,
            f"lower={lower}, upper={upper}, dilation={dilation}",
            "Give widths of at least 0 and a dilation of at least 1",
        )
    wanted = (x.shape[2], x.shape[1], lower + upper + 1)
    if band.shape != wanted:
        refuse(
            OP,
            f"band has shape {tuple(band.shape)}, x {tuple(x.shape)}, lower={lower}, upper={upper}",
            f"Give band as [H, T, lower + upper + 1] = {wanted}",
        )


def _blocks_instead(x: Tensor) -> bool:
    """On CUDA without Triton the blocks still run, in plain torch."""
    return x.device.type == "cuda" and why_no_triton() is not None


def _formula(
    x: Tensor, band: Tensor, lower: int, upper: int, dilation: int, transpose: bool
) -> Tensor:
    heads, length, width = band.shape
    span = length + (width - 1) * dilation
    spread = F.pad(band.unsqueeze(-1), (0, dilation - 1)).flatten(2)
    sheared = F.pad(spread, (0, span + 1 - width * dilation)).flatten(1)
    full = sheared[:, : length * span].view(heads, length, span)
    matrix = full[:, :, lower * dilation : lower * dilation + length]
    return torch.einsum("hst,bshd->bthd" if transpose else "hts,bshd->bthd", matrix, x)


def _cpu(x: Tensor, band: Tensor, *how: Any) -> Tensor:
    return plain_torch.apply(*row_major(x, band), *how)


def _cpu_backward(grad: Tensor, x: Tensor, band: Tensor, *how: Any) -> tuple[Tensor, Tensor]:
    return plain_torch.backward(*row_major(grad, x, band), *how)


def _cpu_band(grad: Tensor, x: Tensor, band: Tensor, *how: Any) -> Tensor:
    return plain_torch.band_backward(*row_major(grad, x, band), *how)


def _cuda(x: Tensor, band: Tensor, *how: Any) -> Tensor:
    if why_no_triton() is not None:
        return _cpu(x, band, *how)
    from ._banded_matmul_triton import apply

    return apply(*row_major(x, band), *how)


def _cuda_backward(grad: Tensor, x: Tensor, band: Tensor, *how: Any) -> tuple[Tensor, Tensor]:
    if why_no_triton() is not None:
        return _cpu_backward(grad, x, band, *how)
    from ._banded_matmul_triton import backward

    return backward(*row_major(grad, x, band), *how)


def _cuda_band(grad: Tensor, x: Tensor, band: Tensor, *how: Any) -> Tensor:
    if why_no_triton() is not None:
        return _cpu_band(grad, x, band, *how)
    from ._banded_matmul_triton import band_backward

    return band_backward(*row_major(grad, x, band), *how)


def _empty(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


_HOW = "int lower, int upper, int dilation, bool transpose"
_forward = register(
    OP,
    f"(Tensor x, Tensor band, {_HOW}) -> Tensor",
    cpu=_cpu,
    cuda=_cuda,
    fake=lambda x, band, *how: _empty(x),
)
_backward = register(
    f"{OP}_backward",
    f"(Tensor grad, Tensor x, Tensor band, {_HOW}) -> (Tensor, Tensor)",
    cpu=_cpu_backward,
    cuda=_cuda_backward,
    fake=lambda grad, x, band, *how: (_empty(x), _empty(band)),
)
_band_backward = register(
    f"{OP}_band_backward",
    f"(Tensor grad, Tensor x, Tensor band, {_HOW}) -> Tensor",
    cpu=_cpu_band,
    cuda=_cuda_band,
    fake=lambda grad, x, band, *how: _empty(band),
)
_run_forward: Callable[..., Tensor] = eager(_forward, _cpu)
_run_backward = eager(_backward, _cpu_backward)
_run_band_backward = eager(_band_backward, _cpu_band)


class _BandedMatmul(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, band: Tensor, how: tuple[int, int, int, bool]) -> Tensor:
        ctx.save_for_backward(x, band)
        ctx.how = how  # as one: every argument of a function costs half a microsecond
        return _run_forward(x, band, *how)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, band = ctx.saved_tensors
        need_x, need_band, _ = ctx.needs_input_grad
        if need_x and need_band:
            return *_run_backward(grad, x, band, *ctx.how), None
        if need_x:
            *widths, transpose = ctx.how
            return _run_forward(grad, band, *widths, not transpose), None, None
        return None, _run_band_backward(grad, x, band, *ctx.how), None


_run_differentiable: Callable[..., Tensor] = apply_of(_BandedMatmul)
