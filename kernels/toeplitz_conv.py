"""A band along positions, one per channel: depthwise convolution of any width, causal or not.

The matrix of channel d is Toeplitz, A[t, s] = taps[lower + (s - t) / dilation, d] inside the band.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _toeplitz_conv_cpu as cpu
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
from ._toeplitz_conv_band import Band

DEVICES = ("cpu", "cuda")
SHORT = 64  # taps up to which the plain formulation shifts and adds; above it transforms
HALVES = (torch.bfloat16, torch.float16)  # in float32 on CPU, which has no such multiply-add
UNROLLED = 32  # taps up to which torch.compile is left to unroll and fuse, within seconds,
FUSED = 2**23  # and multiply-adds, of operands that stay in cache from tap to tap
LONG = 512  # taps above which, on CUDA, the transform moves less than the kernel multiplies

Axes = int | Sequence[int]


def status(device: torch.device | str, dtype: torch.dtype = torch.float32) -> str | None:
    """The reason the kernel cannot run on `device` in `dtype`; None where it can."""
    return dtype_status(device, dtype) or device_status(device)


def toeplitz_conv(
    x: Tensor,
    taps: Tensor,
    *,
    lower: Axes,
    upper: Axes,
    dilation: Axes = 1,
    gate: Tensor | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """y[b, t, d] = gate[b, t, d] * sum_j taps[j, d] x[b, t + (j - lower) * dilation, d].

    x         [B, T, D] or [B, H, W, D], zero outside; last stride 1, other strides free
    taps      [lower + upper + 1, D], or [Wh, Ww, D] for a grid: a band per axis
    lower     positions looked back at, upper: looked ahead at, in steps of dilation; each a number,
              or one per axis
    gate      shaped as x, or None
    impl      "auto": the kernel, but the plain formulation on CPU over at most 4096 positions for
              at most 3 taps an axis, even before and after, or at most 8 taps of a sequence and
              2**17 to 2**20 multiply-adds; under torch.compile, which fuses it, on CPU for at most
              32 taps and 2**23 multiply-adds in float32 and float64; on CUDA for more than 512
              taps or without Triton
              "torch": the plain formulation: torch.conv2d for those few taps and positions, else
              shifted multiply-adds up to 64 taps, FFT above
              "kernel": the kernel, or KernelError with the reason it cannot

    Returns y shaped as x, contiguous. One dtype: float32, bfloat16, float16 (float64 on CPU);
    accumulated in float32 at least. Differentiable once in x, taps and gate; deterministic.
    On CPU, long bands (some 200 taps on, the gradients some 90) go through FFT: a position then
    feels its neighbours, those ahead included, at the rounding of the largest of them.

    Raises KernelError where shapes, dtypes or widths do not fit together.
    """
    band, numbers = _check(x, taps, lower, upper, dilation, gate)
    slower = refused = None
    if not x.is_cpu:
        refused = device_status(x.device)
        if band.shape[0] * band.shape[1] > LONG:
            slower = f"{band.shape[0] * band.shape[1]} taps are more than {LONG}"
    elif (fused := _fused(x, band)) is not None:
        slower = fused
    elif gate is None and cpu.native(x, band):
        slower = "so few positions and taps are cheapest in torch's own convolution"
    if not use_kernel("toeplitz_conv", impl, refused, slower):
        return _plain(x, taps, band, gate)
    if torch.is_grad_enabled() and (
        x.requires_grad or taps.requires_grad or (gate is not None and gate.requires_grad)
    ):
        return _run_differentiable(x, taps, gate, numbers)
    return _run_forward(x, taps, gate, numbers)


def _fused(x: Tensor, band: Band) -> str | None:
    taps = band.shape[0] * band.shape[1]
    return fusing(x, short=taps <= UNROLLED, small=taps * x.numel() <= FUSED)


def _check(
    x: Tensor, taps: Tensor, lower: Axes, upper: Axes, dilation: Axes, gate: Tensor | None
) -> tuple[Band, tuple[int, ...]]:
    op, axes = "toeplitz_conv", x.dim() - 2
    if axes not in (1, 2):
        refuse(op, f"x has shape {tuple(x.shape)}", "Give [B, T, D] or [B, H, W, D]")
    check_tensor(op, "x", x)
    check_tensor(op, "taps", taps, x)
    if not type(lower) is type(upper) is type(dilation) is int:
        lower, upper, dilation = (
            w if isinstance(w, int) else tuple(w) for w in (lower, upper, dilation)
        )
    find = _resolved.__wrapped__ if torch.compiler.is_compiling() else _resolved
    band, numbers, shape = find(axes, lower, upper, dilation)
    if taps.shape != (*shape, x.shape[-1]):
        refuse(
            op,
            f"taps has shape {tuple(taps.shape)}, lower={lower}, upper={upper}, D={x.shape[-1]}",
            f"Give [lower + upper + 1, D] = {[*shape, x.shape[-1]]}",
        )
    if gate is not None:
        check_tensor(op, "gate", gate, x)
        if gate.shape != x.shape:
            refuse(op, f"gate has shape {tuple(gate.shape)}, x {tuple(x.shape)}", "Make them equal")
    return band, numbers


@functools.lru_cache(256)
def _resolved(
    axes: int, lower: Axes, upper: Axes, dilation: Axes
) -> tuple[Band, tuple[int, ...], tuple[int, ...]]:
    """The band, its numbers in one list (every further argument of a registered operator costs a
    microsecond), and the extents of its taps."""
    band = Band(_pair(lower, axes, 0), _pair(upper, axes, 0), _pair(dilation, axes, 1))
    if min(*band.lower, *band.upper) < 0 or min(band.dilation) < 1:
        refuse(
            "toeplitz_conv",
            f"lower={lower}, upper={upper}, dilation={dilation}",
            "Widths are 0 or more, the dilation 1 or more",
        )
    return band, (*band.lower, *band.upper, *band.dilation), band.shape[-axes:]


def _pair(value: Axes, axes: int, absent: int) -> tuple[int, int]:
    """Per axis of a grid; a sequence is a grid of height 1, whose first axis has width `absent`."""
    if isinstance(value, int):
        return (value, value) if axes == 2 else (absent, value)
    if len(value) != axes:
        refuse("toeplitz_conv", f"{tuple(value)} for {axes} axes", "Give a number, or one an axis")
    return (value[0], value[1]) if axes == 2 else (absent, value[0])


def _plain(x: Tensor, taps: Tensor, band: Band, gate: Tensor | None) -> Tensor:
    """Out of torch's own differentiable functions."""
    grid = x if x.dim() == 4 else x.unsqueeze(1)
    (bh, bw), (ah, aw), (height, length) = band.before, band.after, grid.shape[1:3]
    if grid.device.type == "cpu" and cpu.native(grid, band):
        even = band.lower == band.upper
        full = grid if even else F.pad(grid, (0, 0, bw, aw, bh, ah))
        y = _convolved(full, _kernel(taps), (bh, bw) if even else (0, 0))
        y = y if x.dim() == 4 else y.squeeze(1)
        return y if gate is None else y * gate
    padded = F.pad(grid, (0, 0, bw, aw, bh, ah))
    if math.prod(band.shape) <= SHORT or grid.numel() == 0:
        weights = _kernel(taps)
        y = torch.zeros_like(grid)
        for i, j, oh, ow in band.offsets():
            shifted = padded[:, bh + oh : bh + oh + height, bw + ow : bw + ow + length]
            y = y + shifted * weights[i, j]
    else:
        y = _transformed(padded, taps, band)[:, :height, :length]
    y = y.view(x.shape) if y.is_contiguous() else y.reshape(x.shape)
    return y if gate is None else y * gate


def _convolved(grid: Tensor, taps: Tensor, padding: tuple[int, int]) -> Tensor:
    weights = taps.permute(2, 0, 1).unsqueeze(1)
    y = torch.conv2d(grid.permute(0, 3, 1, 2), weights, padding=padding, groups=grid.shape[3])
    return y.permute(0, 2, 3, 1).contiguous()


def _transformed(padded: Tensor, taps: Tensor, band: Band) -> Tensor:
    """Correlation through the spectra of both, in float32 at least."""
    wide = torch.promote_types(padded.dtype, torch.float32)
    (dh, dw), (rows, columns) = band.dilation, band.shape
    spread = taps.new_zeros(((rows - 1) * dh + 1, (columns - 1) * dw + 1, taps.shape[-1]))
    spread[::dh, ::dw] = taps.reshape(rows, columns, -1)
    size = padded.shape[1:3]
    spectrum = torch.fft.rfft2(spread.to(wide), s=size, dim=(0, 1)).conj()
    product = torch.fft.rfft2(padded.to(wide), dim=(1, 2)) * spectrum
    y: Tensor = torch.fft.irfft2(product, s=size, dim=(1, 2)).to(padded.dtype)
    return y


def _grid(x: Tensor) -> Tensor:
    """[B, H, W, D] of either shape, last stride 1."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    return x if x.dim() == 4 else x.unsqueeze(1)


def _kernel(taps: Tensor) -> Tensor:
    return taps if taps.dim() == 3 else taps.unsqueeze(0)


@functools.lru_cache(256)
def _band(n: tuple[int, ...]) -> Band:
    return Band((n[0], n[1]), (n[2], n[3]), (n[4], n[5]))


def _cast(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if x is None else x.to(dtype)


def _cpu_forward(x: Tensor, taps: Tensor, gate: Tensor | None, numbers: Sequence[int]) -> Tensor:
    band = _band(tuple(numbers))
    if x.dtype in HALVES:
        wide = _cast(gate, torch.float32)
        return _cpu_forward(x.float(), taps.float(), wide, numbers).to(x.dtype)
    y = cpu.forward(_grid(x), _kernel(taps), band)
    y = y if x.dim() == 4 else y.squeeze(1)
    return y if gate is None else y.mul_(gate)


def _cpu_gradients(
    dy: Tensor,
    x: Tensor,
    taps: Tensor,
    gate: Tensor | None,
    numbers: Sequence[int],
    need_x: bool,
    need_taps: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Of x, taps and gate; None for one that is not needed or not there."""
    if x.dtype in HALVES:
        wide = dy.float(), x.float(), taps.float(), _cast(gate, torch.float32)
        dx, dtaps, dgate = _cpu_gradients(*wide, numbers, need_x, need_taps)
        return _cast(dx, x.dtype), _cast(dtaps, x.dtype), _cast(dgate, x.dtype)
    g, far, near, band, dgate = _grid(dy), _grid(x), _kernel(taps), _band(tuple(numbers)), None
    if gate is not None:  # the ungated output again, rather than kept since the forward
        dgate = cpu.forward(far, near, band).mul_(g).view(x.shape)
        g = g * _grid(gate)
    dx, dtaps = cpu.backward(g, far, near, band, need_x, need_taps)
    if x.dim() == 3:  # which costs half of a view
        dx = None if dx is None else dx.squeeze(1)
        dtaps = None if dtaps is None else dtaps.squeeze(0)
    return dx, dtaps, dgate


def _cpu_backward(dy: Tensor, x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    found = _cpu_gradients(dy, x, *rest)
    return tuple(x.new_empty(0) if t is None else t for t in found)


def _cuda_forward(x: Tensor, taps: Tensor, gate: Tensor | None, numbers: Sequence[int]) -> Tensor:
    from . import _toeplitz_conv_triton as kernels

    scale = None if gate is None else _grid(gate)
    band = _band(tuple(numbers))
    return kernels.forward(_grid(x), _kernel(taps).contiguous(), scale, band).view(x.shape)


def _cuda_backward(
    dy: Tensor,
    x: Tensor,
    taps: Tensor,
    gate: Tensor | None,
    numbers: Sequence[int],
    need_x: bool,
    need_taps: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    from . import _toeplitz_conv_triton as kernels

    band, scale = _band(tuple(numbers)), None if gate is None else _grid(gate)
    near = _kernel(taps).contiguous()
    dx, dtaps, dgate = kernels.backward(_grid(dy), _grid(x), near, scale, band, need_x, need_taps)
    dx = dx.view(x.shape) if need_x else dx
    dtaps = dtaps.view(taps.shape) if need_taps else dtaps
    return dx, dtaps, dgate if gate is None else dgate.view(x.shape)


def _fake_forward(x: Tensor, *_: object) -> Tensor:
    return x.new_empty(x.shape)


def _fake_backward(
    dy: Tensor, x: Tensor, taps: Tensor, gate: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    need_x, need_taps = rest[1:]
    return (
        x.new_empty(x.shape if need_x else 0),
        taps.new_empty(taps.shape if need_taps else 0),
        x.new_empty(0 if gate is None else x.shape),
    )


_forward = register(
    "toeplitz_conv",
    "(Tensor x, Tensor taps, Tensor? gate, int[] band) -> Tensor",
    cpu=_cpu_forward,
    cuda=_cuda_forward,
    fake=_fake_forward,
)
_backward = register(
    "toeplitz_conv_backward",
    "(Tensor dy, Tensor x, Tensor taps, Tensor? gate, int[] band, bool need_x, bool need_taps)"
    " -> (Tensor, Tensor, Tensor)",
    cpu=_cpu_backward,
    cuda=_cuda_backward,
    fake=_fake_backward,
)
_run_forward: Callable[..., Tensor] = eager(_forward, _cpu_forward)
_run_backward = eager(_backward, _cpu_gradients)


class _Toeplitz(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, taps: Tensor, gate: Tensor | None, numbers: Sequence[int]
    ) -> Tensor:
        ctx.save_for_backward(x, taps, gate)
        ctx.numbers = numbers
        return _run_forward(x, taps, gate, numbers)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, taps, gate = ctx.saved_tensors
        need_x, need_taps, need_gate, _ = ctx.needs_input_grad
        dx, dtaps, dgate = _run_backward(dy, x, taps, gate, ctx.numbers, need_x, need_taps)
        return (
            dx if need_x else None,
            dtaps if need_taps else None,
            dgate if need_gate else None,
            None,
        )


_run_differentiable: Callable[..., Tensor] = apply_of(_Toeplitz)
