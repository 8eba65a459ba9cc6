"""Depthwise band along positions, beside what torch (and what else is installed) offers for it."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from kernel_cases import PLAIN, SMALL, Case, Overhead, Tensors, Way, no_compiler
from patternsearch.kernels import _toeplitz_conv_cpu as cpu
from patternsearch.kernels._toeplitz_conv_band import Band
from patternsearch.kernels.toeplitz_conv import toeplitz_conv

GOALS = {4: 5.0, 16: 3.0, 64: 5.0, 256: 12.0}  # times F.conv1d, forward+backward, float32


def shifts(x: Tensor, taps: Tensor, lower: int, upper: int) -> Tensor:
    padded = F.pad(x, (0, 0, lower, upper))
    return sum(padded[:, j : j + x.shape[1]] * taps[j] for j in range(len(taps)))


def channel_first(x: Tensor, taps: Tensor) -> Tensors:
    return x.transpose(1, 2).contiguous(), taps.t().unsqueeze(1).contiguous()


def conv1d(x: Tensor, taps: Tensor, lower: int, upper: int) -> Tensor:
    return F.conv1d(F.pad(x, (lower, upper)), taps, groups=x.shape[1])


def channels_last(x: Tensor, taps: Tensor, lower: int, upper: int) -> Tensor:
    grid = F.pad(x, (0, 0, lower, upper)).unsqueeze(1).permute(0, 3, 1, 2)
    y = F.conv2d(grid, taps.t()[:, None, None], groups=x.shape[2])
    return y.permute(0, 2, 3, 1).squeeze(1)


def transform(x: Tensor, taps: Tensor, lower: int, upper: int) -> Tensor:
    """Channel-first, in float32; the length is rounded up to what transforms like."""
    size = 2 ** math.ceil(math.log2(x.shape[2] + lower + upper))
    spectrum = torch.fft.rfft(taps[:, 0].float(), size).conj()
    padded = F.pad(x, (lower, 0)).float()
    y = torch.fft.irfft(torch.fft.rfft(padded, size) * spectrum, size)
    return y[..., : x.shape[2]].to(x.dtype)


def unfolded(x: Tensor, taps: Tensor, lower: int, upper: int) -> Tensor:
    windows = F.pad(x, (0, 0, lower, upper)).unfold(1, lower + upper + 1, 1)
    return torch.einsum("btdw,wd->btd", windows, taps)


def causal_conv1d(x: Tensor, taps: Tensor) -> Tensor:
    from causal_conv1d import causal_conv1d_fn

    return causal_conv1d_fn(x, taps[:, 0])


def not_installed(name: str) -> str | None:
    return None if importlib.util.find_spec(name) else f"{name} is not installed"


def others(device: torch.device, lower: int, upper: int, entries: int) -> dict[str, Way]:
    sides = {"lower": lower, "upper": upper}
    width = lower + upper + 1
    back: Callable[[Tensor], Tensor] = partial(Tensor.transpose, dim0=1, dim1=2)
    heavy = entries * width > 2**28
    ways = {
        "F.conv1d": Way(partial(conv1d, **sides), channel_first, back),
        "F.conv2d channels-last": Way(partial(channels_last, **sides)),
        "torch.fft": Way(partial(transform, **sides), channel_first, back),
        "shifted multiply-add": Way(
            partial(shifts, **sides), missing="minutes at this width" if width > 64 else None
        ),
        "compiled multiply-add": Way(
            torch.compile(partial(shifts, **sides), dynamic=False),
            missing=no_compiler(device)
            or ("unrolls every tap, minutes to compile" if width > 32 else None),
            compiled=True,
        ),
        "unfold": Way(
            partial(unfolded, **sides), missing="more than 1 GB of windows" if heavy else None
        ),
    }
    if device.type == "cuda":
        gone = not_installed("causal_conv1d")
        narrow = "2 to 4 causal taps only" if width > 4 or upper else None
        ways["causal_conv1d"] = Way(causal_conv1d, channel_first, back, missing=gone or narrow)
    return ways


def sequence(
    device: torch.device, batch: int, length: int, width: int, lower: int, upper: int = 0
) -> Case:
    def make(device: torch.device, dtype: torch.dtype) -> Tensors:
        x = torch.randn(batch, length, width, device=device, dtype=dtype)
        taps = torch.randn(band, width, device=device, dtype=dtype) / band**0.5
        return x, taps

    band, n = lower + upper + 1, batch * length * width
    run = partial(toeplitz_conv, lower=lower, upper=upper)
    small = {PLAIN: Way(partial(run, impl="torch"))} if length <= 64 else {}
    listed = device.type == "cpu" and (batch, length, width, upper) == (4, 2048, 512, 0)
    return Case(
        name=f"B{batch} T{length} D{width} W{band}" + (" two-sided" if upper else ""),
        make=make,
        ours=Way(run),
        others=small | others(device, lower, upper, n),
        exact=partial(shifts, lower=lower, upper=upper),
        moved=(2 * n, 5 * n),
        flops=(2 * n * band, 6 * n * band),
        goals={"F.conv1d": GOALS[band]} if listed else SMALL if small else {},
    )


def image(batch: int, side: int, width: int, reach: int) -> Case:
    def make(device: torch.device, dtype: torch.dtype) -> Tensors:
        x = torch.randn(batch, side, side, width, device=device, dtype=dtype)
        return x, torch.randn(band, band, width, device=device, dtype=dtype) / band

    def conv2d(x: Tensor, taps: Tensor) -> Tensor:
        return F.conv2d(x, taps, padding=reach, groups=width)

    def memory_last(x: Tensor, taps: Tensor) -> Tensor:
        y = conv2d(x.permute(0, 3, 1, 2), taps.permute(2, 0, 1).unsqueeze(1))
        return y.permute(0, 2, 3, 1)

    def first(x: Tensor, taps: Tensor) -> Tensors:
        return x.permute(0, 3, 1, 2).contiguous(), taps.permute(2, 0, 1).unsqueeze(1).contiguous()

    def exact(x: Tensor, taps: Tensor) -> Tensor:
        padded = F.pad(x, (0, 0, reach, reach, reach, reach))
        windows = padded.unfold(1, band, 1).unfold(2, band, 1)
        return torch.einsum("bhwdij,ijd->bhwd", windows, taps)

    band, n = 2 * reach + 1, batch * side * side * width
    return Case(
        name=f"B{batch} {side}x{side} D{width} {band}x{band}",
        make=make,
        ours=Way(partial(toeplitz_conv, lower=reach, upper=reach)),
        others={
            "F.conv2d": Way(conv2d, first, lambda y: y.permute(0, 2, 3, 1)),
            "F.conv2d channels-last": Way(memory_last),
        },
        exact=exact,
        moved=(2 * n, 5 * n),
        flops=(2 * n * band**2, 6 * n * band**2),
    )


def cases(device: torch.device) -> list[Case]:
    made = partial(sequence, device)
    small = [made(64, 64, 64, 3), made(64, 64, 64, 15, 16), image(64, 8, 64, 1)]
    if device.type == "cpu":
        middle = [made(4, 2048, 512, w - 1) for w in GOALS]
        return [*small, *middle, made(2, 16384, 128, 15), image(16, 32, 64, 2)]
    large = [made(16, 8192, 2048, w - 1) for w in (4, 16, 64)]
    return [
        *small,
        made(4, 2048, 512, 15),
        *large,
        made(8, 8192, 1024, 1023),
        image(64, 64, 256, 1),
    ]


def growth(device: torch.device, length: int) -> Case:
    return sequence(device, 1, length, 256, 15)


def overhead() -> Overhead:
    band = Band((0, 3), (0, 0), (1, 1))

    def forward(x: Tensor, taps: Tensor) -> Tensor:
        return cpu.forward(x.unsqueeze(1), taps.unsqueeze(0), band).view(x.shape)

    def backward(dy: Tensor, x: Tensor, taps: Tensor) -> tuple[Tensor, Tensor]:
        grids = (t.unsqueeze(1) for t in (dy, x))
        return cpu.backward(*grids, taps.unsqueeze(0), band, True, True)

    return Overhead(
        lambda: (torch.randn(1, 16, 16), torch.randn(4, 16)),
        partial(toeplitz_conv, lower=3, upper=0),
        forward,
        backward,
    )
