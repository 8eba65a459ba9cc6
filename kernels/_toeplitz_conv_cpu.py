"""toeplitz_conv on CPU in plain torch: forward and backward of a depthwise band.

Four ways, chosen by a cost model of sizes alone (measured on one AVX-512 core): a direct
convolution through oneDNN, whose depthwise code for channel-last data with the positions on the
inner spatial axis runs near the arithmetic limit (on the outer axis, or channel-first, it does
not); a sum over overlapping windows for a few thousand entries, where a call of oneDNN costs more
than the work; FFT by overlap-save for long bands (`_toeplitz_conv_fft`); and, where oneDNN has no
code (float64, or torch built without it), shifted multiply-adds. The gradient of the taps has ways
of its own (`_toeplitz_conv_taps`).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _toeplitz_conv_fft as fft
from . import _toeplitz_conv_taps as gradient
from ._toeplitz_conv_band import Band, overlap

ONEDNN = torch.backends.mkldnn.is_available()  # asked here: torch.compile cannot trace it
FEW = 2**12  # positions up to which torch's own convolution is taken
NARROW = 8  # taps of a sequence up to which it is, uneven ones as well,
PADDED, MUCH = 2**17, 2**20  # from and up to these multiply-adds
LARGE = 2**20  # entries from which a padded copy costs more than the seams of one long sequence


class Choice(NamedTuple):
    """The taps that reach anything, whether to transform, and the ways to y and to dtaps if not."""

    near: Band
    transform: bool
    output: str
    taps: str


@functools.lru_cache(4096)
def choose(
    shape: Sequence[int], band: Band, convolution: bool, need_x: bool, need_taps: bool
) -> Choice:
    """For the results needed: y or dx cost the same. `convolution`: see `gradient.costs`."""
    near = band.within(shape[1], shape[2])
    found, others = costs(shape, near, convolution), gradient.costs(shape, near, convolution)
    output, taps = min(found, key=lambda k: found[k]), min(others, key=lambda k: others[k])
    sums = need_x * found[output] + need_taps * others[taps]
    transform = sums > fft.cost(shape, near, 1 + need_x + need_taps)
    return Choice(near, transform, output, taps)


def costs(shape: Sequence[int], band: Band, convolution: bool) -> dict[str, float]:
    """ns on one core of each direct way that there is."""
    taps, n = math.prod(band.shape), math.prod(shape)
    found = {"shifts": 2 * taps * gradient.CALL + n * (0.3 + 0.25 * taps)}
    if taps * n <= gradient.TILE:
        found["windows"] = 3 * gradient.CALL + n * (0.5 + 0.12 * taps)
    if convolution:
        found["convolution"] = gradient.CONVOLUTION + n * (0.3 + 0.019 * taps)
    return found


def forward(x: Tensor, taps: Tensor, band: Band) -> Tensor:
    """y [B, H, W, D] of x [B, H, W, D] and taps [Wh, Ww, D], one dtype, float32 or float64."""
    if x.numel() == 0:
        return torch.zeros_like(x, memory_format=torch.contiguous_format)
    near, transform, output, _ = choose(x.shape, band, _has_convolution(x), True, False)
    taps = taps if near == band else band.inner(taps, near)
    return fft.forward(x, taps, near) if transform else DIRECT[output](x, taps, near)


def backward(
    g: Tensor, x: Tensor, taps: Tensor, band: Band, need_x: bool, need_taps: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of x and of taps; None for the one that is not needed."""
    if x.numel() == 0:
        dx = torch.zeros_like(x, memory_format=torch.contiguous_format) if need_x else None
        return dx, torch.zeros_like(taps) if need_taps else None
    near, transform, output, way = choose(x.shape, band, _has_convolution(x), need_x, need_taps)
    small = taps if near == band else band.inner(taps, near)
    dx = dtaps = None
    if transform:
        dx, dtaps = fft.backward(g, x, small, near, need_x, need_taps)
    else:
        if need_x:
            dx = DIRECT[output](g, small.flip(0, 1), near.flipped())
        if need_taps:
            dtaps = gradient.WAYS[way](g, x, near).contiguous()
    if dtaps is not None and near != band:
        whole = torch.zeros(taps.shape, dtype=dtaps.dtype)
        band.inner(whole, near).copy_(dtaps)
        dtaps = whole
    return dx, dtaps


def native(x: Tensor, band: Band) -> bool:
    """Whether torch's own convolution, backward included, is best: few taps, few positions.

    Never under torch.compile, whose code generator fails on channel-last strides of dynamic shapes.
    """
    if torch.compiler.is_compiling() or band.dilation != (1, 1) or not _has_convolution(x):
        return False
    if not 0 < x.numel() <= FEW * x.shape[-1]:
        return False
    rows, columns = band.shape
    if band.lower == band.upper and rows <= 3 and columns <= 3:
        return True
    work = columns * x.numel()  # too little does not pay for a padded copy
    return rows == 1 and columns <= NARROW and PADDED <= work <= MUCH


def _has_convolution(x: Tensor) -> bool:
    return x.dtype == torch.float32 and ONEDNN


def convolved(x: Tensor, taps: Tensor, band: Band) -> Tensor:
    """By oneDNN."""
    (bh, bw), (ah, aw) = band.before, band.after
    if (bh, bw) == (ah, aw):
        return _convolve(x, taps, band.dilation, (bh, bw))
    length = x.shape[2]
    short = x.numel() < LARGE or 4 * (bw + aw) > length
    if short or x.shape[1] > 1 or not x.is_contiguous():
        return _convolve(F.pad(x, (0, 0, bw, aw, bh, ah)), taps, band.dilation, (0, 0))
    return _sequence(x, taps, band)


def _sequence(x: Tensor, taps: Tensor, band: Band) -> Tensor:
    """One long sequence of all the batch, which saves a padded copy; then its seams again."""
    batch, _, length, width = x.shape
    before, after, most = band.before[1], band.after[1], max(band.before[1], band.after[1])
    whole = x.view(1, 1, batch * length, width)
    long = _convolve(whole, taps, band.dilation, (0, most))
    start = most - before
    y = long[:, :, start : start + batch * length].view(x.shape)
    if batch > 1:
        span = before + after
        if before:
            head = F.pad(x[:, :, :span], (0, 0, before, 0))
            y[:, :, :before] = _convolve(head, taps, band.dilation, (0, 0))
        if after:
            tail = F.pad(x[:, :, length - span :], (0, 0, 0, after))
            y[:, :, length - after :] = _convolve(tail, taps, band.dilation, (0, 0))
    return y


def _convolve(
    x: Tensor, taps: Tensor, dilation: tuple[int, int], padding: tuple[int, int]
) -> Tensor:
    weight = taps.permute(2, 0, 1).unsqueeze(1)
    y = torch.conv2d(x.permute(0, 3, 1, 2), weight, None, 1, padding, dilation, x.shape[3])
    return y.permute(0, 2, 3, 1).contiguous()


def windowed(x: Tensor, taps: Tensor, band: Band) -> Tensor:
    """Every tap at once, in three calls."""
    weights = taps.view(*band.shape, 1, 1, 1, taps.shape[2])
    y: Tensor = (gradient.windows(x, band) * weights).sum((0, 1))
    return y


def shifted(x: Tensor, taps: Tensor, band: Band) -> Tensor:
    """One tap after the other."""
    y = torch.zeros_like(x, memory_format=torch.contiguous_format)
    for i, j, oh, ow in band.offsets():
        (here_h, there_h), (here_w, there_w) = overlap(x.shape[1], oh), overlap(x.shape[2], ow)
        y[:, here_h, here_w].addcmul_(x[:, there_h, there_w], taps[i, j])
    return y


DIRECT: dict[str, Callable[[Tensor, Tensor, Band], Tensor]] = {
    "windows": windowed,
    "convolution": convolved,
    "shifts": shifted,
}
