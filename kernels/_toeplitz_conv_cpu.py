"""toeplitz_conv on CPU in plain torch: forward and backward of a depthwise band.

Three ways, chosen by a cost model of sizes alone (`_cost_*`, measured on one AVX-512 core): a
direct convolution through oneDNN, whose depthwise code for channel-last data with the positions on
the inner spatial axis runs near the arithmetic limit (on the outer axis, or channel-first, it does
not); FFT by overlap-save for long bands (`_toeplitz_conv_fft`); and, where oneDNN has no code
(float64, or torch built without it), shifted multiply-adds.

The gradient of the taps, sum_t g[t] x[t + o], is where torch's own depthwise backward loses its
time. Short bands accumulate it with cache-sized blocks, longer ones again as a depthwise
convolution: blocks of g are the taps, and the outputs are the offsets. oneDNN's own code serves
small images and the narrowest bands.

Everything here works on grids, x [B, H, W, D]; a sequence is a grid of height 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_weight

from . import _toeplitz_conv_fft as fft

BLOCK = 64  # rows of a cache-sized block: W accumulators of 64 rows stay in the second-level cache
FILTER = 512  # positions of g used as one long filter
TILE = 2**17  # entries that stay in cache: of sequences side by side, or of sums for every tap
TERMS = 2**11  # positions that oneDNN may add up one after the other: its error grows with them
CALL = 4e3  # ns of one call of a torch operator, and of one convolution with its reorders
CONVOLUTION = 30e3


class Band(NamedTuple):
    """Reach before and after, and the step between taps, for each of two axes."""

    lower: tuple[int, int]
    upper: tuple[int, int]
    dilation: tuple[int, int]

    @property
    def before(self) -> tuple[int, int]:
        return self.lower[0] * self.dilation[0], self.lower[1] * self.dilation[1]

    @property
    def after(self) -> tuple[int, int]:
        return self.upper[0] * self.dilation[0], self.upper[1] * self.dilation[1]

    @property
    def shape(self) -> tuple[int, int]:
        return self.lower[0] + self.upper[0] + 1, self.lower[1] + self.upper[1] + 1

    def flipped(self) -> Band:
        return Band(self.upper, self.lower, self.dilation)

    def offsets(self) -> list[tuple[int, int, int, int]]:
        """Tap (i, j) and the offset of the position it looks at."""
        (lh, lw), (dh, dw) = self.lower, self.dilation
        rows, columns = self.shape
        return [(i, j, (i - lh) * dh, (j - lw) * dw) for i in range(rows) for j in range(columns)]


def clipped(taps: Tensor, band: Band, grid: tuple[int, int]) -> tuple[Tensor, Band]:
    """Without the taps that reach outside the grid from every position."""
    reach = [(n - 1) // d for n, d in zip(grid, band.dilation, strict=True)]
    lower = min(band.lower[0], reach[0]), min(band.lower[1], reach[1])
    upper = min(band.upper[0], reach[0]), min(band.upper[1], reach[1])
    (i, j), small = (
        (band.lower[0] - lower[0], band.lower[1] - lower[1]),
        band._replace(lower=lower, upper=upper),
    )
    rows, columns = small.shape
    return taps[i : i + rows, j : j + columns], small


def forward(x: Tensor, taps: Tensor, band: Band) -> Tensor:
    """y [B, H, W, D] of x [B, H, W, D] and taps [Wh, Ww, D], one dtype, float32 or float64."""
    if x.numel() == 0:
        return torch.zeros_like(x, memory_format=torch.contiguous_format)
    taps, band = clipped(taps, band, (x.shape[1], x.shape[2]))
    if _cost_direct(x, band) <= fft.cost(x.shape, band, transforms=2):
        return _direct(x, taps, band)
    return fft.forward(x, taps, band)


def backward(
    g: Tensor, x: Tensor, taps: Tensor, band: Band, need_x: bool, need_taps: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of x and of taps; the one that is not needed is empty."""
    if x.numel() == 0:
        return torch.zeros_like(x, memory_format=torch.contiguous_format), torch.zeros_like(taps)
    small, near = clipped(taps, band, (x.shape[1], x.shape[2]))
    direct = need_x * _cost_direct(x, near) + need_taps * min(_cost_taps(x, near).values())
    if direct > fft.cost(x.shape, near, transforms=1 + need_x + need_taps):
        dx, dtaps = fft.backward(g, x, small, near, need_x, need_taps)
    else:
        empty = x.new_empty(0)
        dx = _direct(g, small.flip(0, 1), near.flipped()) if need_x else empty
        dtaps = _taps_gradient(g, x, near) if need_taps else empty
    return dx, _unclipped(dtaps, taps, band, near) if need_taps else dtaps


def _unclipped(dtaps: Tensor, taps: Tensor, band: Band, near: Band) -> Tensor:
    if near == band:
        return dtaps.contiguous()
    whole = torch.zeros(taps.shape, dtype=dtaps.dtype)
    i, j = band.lower[0] - near.lower[0], band.lower[1] - near.lower[1]
    rows, columns = near.shape
    whole[i : i + rows, j : j + columns] = dtaps
    return whole


def _has_convolution(x: Tensor) -> bool:
    return x.dtype == torch.float32 and torch.backends.mkldnn.is_available()


def _cost_direct(x: Tensor, band: Band) -> float:
    """ns on one core."""
    per_tap = 0.016 if _has_convolution(x) else 0.25
    return CONVOLUTION + x.numel() * (0.3 + per_tap * math.prod(band.shape))


def _direct(x: Tensor, taps: Tensor, band: Band) -> Tensor:
    if not _has_convolution(x):
        return _shifted(x, taps, band)
    (bh, bw), (ah, aw) = band.before, band.after
    if (bh, bw) == (ah, aw):
        return _convolve(x, taps, band.dilation, (bh, bw))
    length = x.shape[2]
    if x.shape[1] > 1 or not x.is_contiguous() or 4 * (bw + aw) > length:
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


def _overlap(n: int, offset: int) -> tuple[slice, slice]:
    """Positions of an axis of `n` whose neighbour at `offset` exists, and those neighbours."""
    return slice(max(0, -offset), min(n, n - offset)), slice(max(0, offset), min(n, n + offset))


def _shifted(x: Tensor, taps: Tensor, band: Band) -> Tensor:
    y = torch.zeros_like(x, memory_format=torch.contiguous_format)
    for i, j, oh, ow in band.offsets():
        (here_h, there_h), (here_w, there_w) = _overlap(x.shape[1], oh), _overlap(x.shape[2], ow)
        y[:, here_h, here_w].addcmul_(x[:, there_h, there_w], taps[i, j])
    return y


def _cost_taps(x: Tensor, band: Band) -> dict[str, float]:
    """ns on one core of each way to the gradient of the taps."""
    batch, height, length = x.shape[:3]
    taps, n = math.prod(band.shape), x.numel()
    inner = length - band.before[1] - band.after[1]
    costs = {"products": taps * (2 * CALL + 0.27 * n)}
    if height == 1 and inner >= BLOCK:
        share = inner // BLOCK * BLOCK / length
        edges = taps * (4 * CALL + 0.27 * n * (1 - share))
        costs["blocks"] = edges + batch * (inner // BLOCK) * CALL + 0.115 * taps * n * share
    if taps * x[0].numel() <= TILE:
        calls = 2 * math.ceil(batch / _window_group(x, band))
        costs["windows"] = (calls + 3) * CALL + (0.2 + 0.1 * taps) * n
    if _has_convolution(x):
        tall, wide = _filter_shape(x.shape)
        calls = math.ceil(height / tall) * math.ceil(length / wide)
        calls *= math.ceil(batch / _group(x.shape, tall * wide))
        costs["filters"] = calls * CONVOLUTION + n * (1.5 + 0.014 * taps)
        if height * length <= TERMS and max(band.shape) <= 3 and band.dilation == (1, 1):
            calls = math.ceil(batch / (TERMS // (height * length)))
            costs["onednn"] = calls * CONVOLUTION + n * 0.35
    return costs


def _taps_gradient(g: Tensor, x: Tensor, band: Band) -> Tensor:
    costs = _cost_taps(x, band)
    way = min(costs, key=lambda name: costs[name])
    if way == "filters":
        return _by_filters(g, x, band)
    if way == "windows":
        return _by_windows(g, x, band)
    if way == "onednn":
        return _by_onednn(g, x, band)
    if way == "blocks":
        return _by_blocks(g, x, band)
    out = g.new_zeros((*band.shape, g.shape[3]))
    _by_products(out, g, x, band, 0, g.shape[2])
    return out


def _by_products(out: Tensor, g: Tensor, x: Tensor, band: Band, start: int, stop: int) -> None:
    """Add the part of columns start..stop of g, one tap after the other."""
    length = g.shape[2]
    group = max(1, 2**16 // max(1, g[0, :, start:stop].numel()))  # products that stay in cache
    for i, j, oh, ow in band.offsets():
        here_h, there_h = _overlap(g.shape[1], oh)
        low, high = max(start, -ow), min(stop, length - ow)
        if low < high:
            for b in range(0, g.shape[0], group):
                near = g[b : b + group, here_h, low:high]
                far = x[b : b + group, there_h, low + ow : high + ow]
                out[i, j] += (near * far).sum((0, 1, 2))


def _by_blocks(g: Tensor, x: Tensor, band: Band) -> Tensor:
    """Sequences: every tap of a block of rows at once, into accumulators that stay in cache."""
    batch, _, length, width = g.shape
    before, count = band.before[1], band.shape[1]
    blocks = (length - before - band.after[1]) // BLOCK
    out = g.new_zeros((1, count, width))
    sums = g.new_zeros((count, BLOCK, width))
    stop = before + blocks * BLOCK
    row, step = x.stride(2), band.dilation[1]
    for b in range(batch):
        near = g[b, 0, before:stop].unflatten(0, (blocks, BLOCK)).unbind(0)
        sizes, strides = (blocks, count, BLOCK, width), (BLOCK * row, step * row, row, 1)
        far = x[b].as_strided(sizes, strides, x[b].storage_offset()).unbind(0)
        for p, q in zip(near, far, strict=True):
            sums.addcmul_(p, q)
    _by_products(out, g, x, band, 0, before)
    _by_products(out, g, x, band, stop, length)
    out[0] += sums.sum(1)
    return out


def _window_group(x: Tensor, band: Band) -> int:
    return max(1, min(x.shape[0], TILE // (math.prod(band.shape) * max(1, x[0].numel()))))


def _by_windows(g: Tensor, x: Tensor, band: Band) -> Tensor:
    """Short sequences, small images: as by blocks, but the blocks are whole, and x is padded."""
    (bh, bw), (ah, aw), (dh, dw) = band.before, band.after, band.dilation
    padded = F.pad(x, (0, 0, bw, aw, bh, ah))
    strides, group = padded.stride(), _window_group(x, band)
    sums = g.new_zeros((*band.shape, group, *g.shape[1:]))
    for b in range(0, g.shape[0], group):
        near = g[b : b + group]
        steps = (dh * strides[1], dw * strides[2], *strides)
        start = padded.storage_offset() + b * strides[0]
        far = padded.as_strided((*band.shape, *near.shape), steps, start)
        sums[:, :, : len(near)].addcmul_(near, far)
    return sums.sum((2, 3, 4))


def _filter_shape(shape: Sequence[int]) -> tuple[int, int]:
    length = min(FILTER, shape[2])
    return max(1, min(FILTER // length, shape[1])), length


def _group(shape: Sequence[int], positions: int) -> int:
    """Sequences whose channels lie side by side in one convolution."""
    batch, width = shape[0], shape[3]
    return max(1, min(batch, 1024 // width, TILE // (positions * width)))


def _by_filters(g: Tensor, x: Tensor, band: Band) -> Tensor:
    """Blocks of g as depthwise filters over x; output (i, j) is the gradient of tap (i, j)."""
    batch, height, length, width = g.shape
    (bh, bw), (ah, aw) = band.before, band.after
    tall, wide = _filter_shape(g.shape)
    group = _group(g.shape, tall * wide)
    out = g.new_zeros((width, *band.shape))
    for b in range(0, batch, group):
        for h in range(0, height, tall):
            for w in range(0, length, wide):
                block = _side_by_side(g[b : b + group, h : h + tall, w : w + wide])
                rows, columns, channels = block.shape
                # Through a two-dimensional transpose, which torch does in blocks.
                weight = block.reshape(rows * columns, channels).t().contiguous()
                bounds = (h - bh, h + rows + ah, w - bw, w + columns + aw)
                near = _side_by_side(_window(x[b : b + group], *bounds))
                found = torch.conv2d(
                    near.unsqueeze(0).permute(0, 3, 1, 2),
                    weight.view(channels, 1, rows, columns),
                    stride=band.dilation,
                    groups=channels,
                )
                out += found.view(-1, width, *band.shape).sum(0)
    return out.permute(1, 2, 0)


def _side_by_side(x: Tensor) -> Tensor:
    """[H, W, b D] of [b, H, W, D]."""
    return x[0] if x.shape[0] == 1 else x.permute(1, 2, 0, 3).flatten(2)


def _window(x: Tensor, top: int, bottom: int, left: int, right: int) -> Tensor:
    """x [b, H, W, D] from top to bottom and left to right, zero where that is outside."""
    height, length = x.shape[1:3]
    inside = x[:, max(top, 0) : bottom, max(left, 0) : right]
    pad = (max(-left, 0), max(right - length, 0), max(-top, 0), max(bottom - height, 0))
    return F.pad(inside, (0, 0, *pad)) if any(pad) else inside


def _by_onednn(g: Tensor, x: Tensor, band: Band) -> Tensor:
    """torch's own backward, over few enough positions at once that its rounding stays small."""
    batch, height, length, width = g.shape
    (bh, bw), (ah, aw), group = band.before, band.after, TERMS // (height * length)
    even = (bh, bw) == (ah, aw)
    near = x if even else F.pad(x, (0, 0, bw, aw, bh, ah))
    padding, size = (bh, bw) if even else (0, 0), (width, 1, *band.shape)
    out = g.new_zeros(size)
    for b in range(0, batch, group):
        far, here = near[b : b + group].permute(0, 3, 1, 2), g[b : b + group].permute(0, 3, 1, 2)
        out += conv2d_weight(far, size, here, padding=padding, groups=width)
    return out[:, 0].permute(1, 2, 0)
