"""The gradient of the taps of toeplitz_conv on CPU: sum_t g[t] x[t + o] for each offset o.

torch's own depthwise backward loses its time here. Short bands accumulate it in cache-sized blocks,
every tap at once; longer ones as a depthwise convolution again, in which blocks of g are the taps
and the outputs are the offsets. oneDNN's own code serves what is small, laid out as it wants it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_weight

from ._toeplitz_conv_band import Band, overlap

BLOCK = 64  # rows of a cache-sized block
SUMS = 2**18  # accumulators that stay in the second-level cache
FILTER = 256  # positions of g used as one long filter: its weights stay in cache
TILE = 2**17  # entries that stay in cache: of sequences side by side, or of sums for every tap
TERMS = 2**11  # positions that oneDNN may add up one after the other: its error grows with them
SMALL = 2**20  # entries of one call up to which it finds its strided lines in cache
COLUMNS = 3  # of taps that it has fast code for
CALL = 4e3  # ns of one call of a torch operator, and of one convolution with its reorders
CONVOLUTION = 30e3


def costs(shape: Sequence[int], band: Band, convolution: bool) -> dict[str, float]:
    """ns on one core of each way that there is; `convolution`: oneDNN has code for the dtype."""
    batch, height, length, width = shape
    taps, n = math.prod(band.shape), math.prod(shape)
    inner = length - band.before[1] - band.after[1]
    found = {"products": taps * (2 * CALL + 0.27 * n)}
    if height == 1 and inner >= BLOCK and length - inner <= 4 * BLOCK:
        calls = 8 + batch * math.ceil(inner / _block_rows(shape, band))
        share = inner / length
        found["blocks"] = calls * CALL + taps * n * (0.115 * share + 0.3 * (1 - share))
    if taps * height * length * width <= TILE:
        calls = 2 * math.ceil(batch / _window_group(shape, band))
        found["windows"] = (calls + 1) * CALL + (0.2 + 0.1 * taps) * n
    if convolution:
        tall, wide = _filter_shape(shape)
        calls = math.ceil(height / tall) * math.ceil(length / wide)
        calls *= math.ceil(batch / _group(shape, tall * wide))
        # Its transposes run on one thread, so they count twice.
        found["filters"] = calls * CONVOLUTION + n * (2.5 + 0.025 * taps)
        small = n <= SMALL or (band.shape[0] == 1 and length * width <= SMALL)
        if height * length <= TERMS and small and taps > 1 and band.dilation == (1, 1):
            calls = math.ceil(batch / (TERMS // (height * length)))
            calls *= math.ceil(band.shape[1] / COLUMNS) if band.shape[0] > 1 else 1
            each = 0.25 + 0.055 * taps if n <= SMALL else 0.5 + 0.06 * taps
            found["onednn"] = calls * CONVOLUTION + n * each
    return found


def by_products(g: Tensor, x: Tensor, band: Band) -> Tensor:
    """One tap after the other."""
    out = g.new_zeros((*band.shape, g.shape[3]))
    group = max(1, 2**16 // g[0].numel())  # products that stay in cache
    for i, j, oh, ow in band.offsets():
        (here_h, there_h), (here_w, there_w) = overlap(g.shape[1], oh), overlap(g.shape[2], ow)
        for b in range(0, g.shape[0], group):
            near = g[b : b + group, here_h, here_w]
            far = x[b : b + group, there_h, there_w]
            out[i, j] += (near * far).sum((0, 1, 2))
    return out


def _block_rows(shape: Sequence[int], band: Band) -> int:
    return max(16, min(BLOCK, SUMS // (band.shape[1] * shape[3])))


def by_blocks(g: Tensor, x: Tensor, band: Band) -> Tensor:
    """Sequences: every tap of a block of rows at once, into accumulators that stay in cache."""
    batch, _, length, width = g.shape
    before, after, count = band.before[1], band.after[1], band.shape[1]
    rows, row, step = _block_rows(g.shape, band), x.stride(2), band.dilation[1] * x.stride(2)
    blocks, rest = divmod(length - before - after, rows)
    sums = g.new_zeros((count, rows, width))
    for b in range(batch):
        near, far = g[b, 0, before : length - after], x[b, 0]
        sizes, strides = (blocks, count, rows, width), (rows * row, step, row, 1)
        seen = far.as_strided(sizes, strides, far.storage_offset())
        for p, q in zip(near.split(rows)[:blocks], seen.unbind(0), strict=True):
            sums.addcmul_(p, q)
        if rest:
            last = far[blocks * rows :]
            seen = last.as_strided((count, rest, width), (step, row, 1), last.storage_offset())
            sums[:, :rest].addcmul_(near[blocks * rows :], seen)
    out = sums.sum(1).unsqueeze(0)
    ends = before + after
    if before:
        out += by_windows(F.pad(g[:, :, :before], (0, 0, 0, after)), x[:, :, :ends], band)
    if after:
        near = F.pad(g[:, :, length - after :], (0, 0, before, 0))
        out += by_windows(near, x[:, :, length - ends :], band)
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
    out = g.new_zeros((*band.shape, width))
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
                # Channels last, as it lies; `sum` is slow over so few.
                for part in found[0].permute(1, 2, 0).split(width, 2):
                    out += part
    return out


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
    (bh, bw), (ah, aw), (rows, columns) = band.before, band.after, band.shape
    if rows == 1:
        g, x = (t.flatten(0, 1).unsqueeze(1) for t in (g, x))
    batch, height, length, width = g.shape
    even = (bh, bw) == (ah, aw) and (rows == 1 or columns <= COLUMNS)
    padding = (bh, bw) if even else (0, 0)
    out, group = g.new_zeros((rows, columns, width)), TERMS // (height * length)
    for b in range(0, batch, group):
        near, far = g[b : b + group], x[b : b + group]
        if not even:  # a part at a time: the copies stay in cache
            far = F.pad(far, (0, 0, bw, aw, bh, ah))
        out += _onednn(near, far, band, padding)
    return out


def _onednn(g: Tensor, x: Tensor, band: Band, padding: tuple[int, int]) -> Tensor:
    """A sequence lies along the outer axis of the two, where any number of taps is fast."""
    rows, columns = band.shape
    if rows == 1:
        g, x = g.squeeze(1).unsqueeze(2), x.squeeze(1).unsqueeze(2)
        rows, columns, padding = columns, 1, padding[::-1]
    width, near, far = g.shape[3], g.permute(0, 3, 1, 2), x.permute(0, 3, 1, 2)
    out = g.new_empty((width, 1, rows, columns))
    for j in range(0, columns, COLUMNS):
        size = (width, 1, rows, min(COLUMNS, columns - j))
        seen = far[..., j : far.shape[3] - columns + j + size[3]]
        found = conv2d_weight(seen, size, near, padding=padding, groups=width)
        out[..., j : j + size[3]] = found
    return out[:, 0].permute(1, 2, 0).reshape(*band.shape, width)


WAYS: dict[str, Callable[[Tensor, Tensor, Band], Tensor]] = {
    "products": by_products,
    "blocks": by_blocks,
    "windows": by_windows,
    "filters": by_filters,
    "onednn": by_onednn,
}
