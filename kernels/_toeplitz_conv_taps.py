"""The gradient of the taps of toeplitz_conv on CPU: sum_t g[t] x[t + o] for each offset o.

torch's own depthwise backward loses its time here. Short bands accumulate it in cache-sized blocks,
every tap at once; longer ones as a depthwise convolution again, in which blocks of g are the taps
and the outputs are the offsets. oneDNN's own code serves the narrowest.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_weight

from ._toeplitz_conv_band import Band, overlap

BLOCK = 64  # rows of a cache-sized block: W accumulators of 64 rows stay in the second-level cache
FILTER = 256  # positions of g used as one long filter: its weights stay in cache
TILE = 2**17  # entries that stay in cache: of sequences side by side, or of sums for every tap
TERMS = 2**12  # positions that oneDNN may add up one after the other: its error grows with them
CALL = 4e3  # ns of one call of a torch operator, and of one convolution with its reorders
CONVOLUTION = 30e3


def costs(shape: Sequence[int], band: Band, convolution: bool) -> dict[str, float]:
    """ns on one core of each way that there is; `convolution`: oneDNN has code for the dtype."""
    batch, height, length, width = shape
    taps, n = math.prod(band.shape), math.prod(shape)
    inner = length - band.before[1] - band.after[1]
    found = {"products": taps * (2 * CALL + 0.27 * n)}
    if height == 1 and inner >= BLOCK:
        share = inner // BLOCK * BLOCK / length
        edges = taps * (4 * CALL + 0.27 * n * (1 - share))
        found["blocks"] = edges + batch * (inner // BLOCK) * CALL + 0.115 * taps * n * share
    if taps * height * length * width <= TILE:
        calls = 2 * math.ceil(batch / _window_group(shape, band))
        found["windows"] = (calls + 1) * CALL + (0.2 + 0.1 * taps) * n
    if convolution:
        tall, wide = _filter_shape(shape)
        calls = math.ceil(height / tall) * math.ceil(length / wide)
        calls *= math.ceil(batch / _group(shape, tall * wide))
        found["filters"] = calls * CONVOLUTION + n * (1.5 + 0.025 * taps)
        if height * length <= TERMS and max(band.shape) <= 3 and band.dilation == (1, 1):
            calls = math.ceil(batch / (TERMS // (height * length)))
            found["onednn"] = calls * CONVOLUTION + n * 0.35
    return found


def by_products(g: Tensor, x: Tensor, band: Band) -> Tensor:
    """One tap after the other."""
    out = g.new_zeros((*band.shape, g.shape[3]))
    _add_products(out, g, x, band, 0, g.shape[2])
    return out


def _add_products(out: Tensor, g: Tensor, x: Tensor, band: Band, start: int, stop: int) -> None:
    """The part of columns start..stop of g."""
    length = g.shape[2]
    group = max(1, 2**16 // max(1, g[0, :, start:stop].numel()))  # products that stay in cache
    for i, j, oh, ow in band.offsets():
        here_h, there_h = overlap(g.shape[1], oh)
        low, high = max(start, -ow), min(stop, length - ow)
        if low < high:
            for b in range(0, g.shape[0], group):
                near = g[b : b + group, here_h, low:high]
                far = x[b : b + group, there_h, low + ow : high + ow]
                out[i, j] += (near * far).sum((0, 1, 2))


def by_blocks(g: Tensor, x: Tensor, band: Band) -> Tensor:
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
    _add_products(out, g, x, band, 0, before)
    _add_products(out, g, x, band, stop, length)
    out[0] += sums.sum(1)
    return out


def _window_group(shape: Sequence[int], band: Band) -> int:
    return max(1, min(shape[0], TILE // (math.prod(band.shape) * math.prod(shape[1:]))))


def windows(x: Tensor, band: Band) -> Tensor:
    """[Wh, Ww, B, H, W, D] of [B, H, W, D]: what each tap meets; overlapping, to be read only."""
    (bh, bw), (ah, aw), (dh, dw) = band.before, band.after, band.dilation
    padded = F.pad(x, (0, 0, bw, aw, bh, ah))
    strides = padded.stride()
    return padded.as_strided((*band.shape, *x.shape), (dh * strides[1], dw * strides[2], *strides))


def by_windows(g: Tensor, x: Tensor, band: Band) -> Tensor:
    """Short sequences, small images: as by blocks, but the blocks are whole, and x is padded."""
    far, group = windows(x, band), _window_group(x.shape, band)
    if group == len(g):
        return (far * g).sum((2, 3, 4))
    sums = g.new_zeros((*band.shape, group, *g.shape[1:]))
    for b in range(0, g.shape[0], group):
        near = g[b : b + group]
        sums[:, :, : len(near)].addcmul_(near, far[:, :, b : b + group])
    return sums.sum((2, 3, 4))


def _filter_shape(shape: Sequence[int]) -> tuple[int, int]:
    length = min(FILTER, shape[2])
    return max(1, min(FILTER // length, shape[1])), length


def _group(shape: Sequence[int], positions: int) -> int:
    """Sequences whose channels lie side by side in one convolution."""
    batch, width = shape[0], shape[3]
    return max(1, min(batch, 1024 // width, TILE // (positions * width)))


def by_filters(g: Tensor, x: Tensor, band: Band) -> Tensor:
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


def by_onednn(g: Tensor, x: Tensor, band: Band) -> Tensor:
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


WAYS: dict[str, Callable[[Tensor, Tensor, Band], Tensor]] = {
    "products": by_products,
    "blocks": by_blocks,
    "windows": by_windows,
    "filters": by_filters,
    "onednn": by_onednn,
}
