"""Softmax attention on a band in plain torch: blocks of queries against slabs of keys.

A block of C queries needs C + lower + upper keys, so its scores are one small batched product, a
masked softmax over their last axis is exact, and nothing of size T x T exists. The backward pass
computes the scores again; gradients of keys and values add up over the slabs they were part of.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from . import _matmul_cpu as matmul
from ._windows import Unit, block, items, plan, window, working_dtype

SCORE_BYTES = 3 << 19  # of scores at a time: scores and weights stay in the second-level cache
LARGE = 1 << 22  # multiplications of a block's scores from which oneDNN takes its products singly
WIDE = 128  # keys from which stacked heads leave a block its rows: windows overlap less


def reach(length: int, lower: int | None, upper: int | None, dilation: int) -> tuple[int, int]:
    """Widths as numbers, without what looks past either end from every position."""
    most = max(length - 1, 0) // dilation
    low = most if lower is None else min(lower, most)
    return low, most if upper is None else min(upper, most)


def rows_of(width: int) -> int:
    """Queries of a block: more waste scores outside the band, fewer leave the products small."""
    return 32 if width <= 128 else 64


@functools.lru_cache(8)
def band_bias(
    rows: int, group: int, width: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """[rows * group, rows + width]: 0 where t <= s <= t + width for t = row // group, else -inf."""
    t = torch.arange(rows, device=device).repeat_interleave(group).unsqueeze(1)
    s = torch.arange(rows + width, device=device)
    outside = (s < t) | (s > t + width)
    bias = torch.zeros(outside.shape, dtype=dtype, device=device)
    return bias.masked_fill_(outside, float("-inf"))


class Slabs:
    """The blocks of one (head of keys, phase), with the buffers that they share.

    The `group` heads of queries that share the keys lie side by side: rows (t, head) of one matrix.
    """

    def __init__(self, q: Tensor, group: int, lower: int, upper: int) -> None:
        self.dtype, self.group = working_dtype(q), group
        width = lower + upper
        rows = rows_of(width) if width >= WIDE else max(16, rows_of(width) // group)
        columns = min(q.shape[1], rows + width)
        scores = group * rows * columns
        self.singly = matmul.fast(self.dtype) and scores * q.shape[3] >= LARGE
        self.most = 1 if self.singly else max(1, SCORE_BYTES // (scores * self.dtype.itemsize))
        self.shape = q.shape[1], rows, lower, upper, q.shape[0], self.most
        self.bias = band_bias(rows, group, width, self.dtype, q.device)

    def units(self) -> Iterator[Unit]:
        return plan(*self.shape)

    def tall(self, unit: Unit) -> Unit:
        """The rows of `unit` where heads are stacked."""
        return unit._replace(first=unit.first * self.group, rows=unit.rows * self.group)

    def scores(self, unit: Unit, q: Tensor, k: Tensor, scale: float) -> Tensor:
        """[n, group * rows, columns]: scale q k^T inside the band, -inf outside."""
        bias = self.bias[: unit.rows * self.group, unit.cut : unit.cut + unit.columns]
        if self.singly:
            return torch.add(bias, self.product(q, k.transpose(1, 2)), alpha=scale)
        return torch.baddbmm(bias, q, k.transpose(1, 2), alpha=scale)

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        """a [n, i, k] times b [n, k, j]; n is 1 where blocks are taken singly."""
        return matmul.linear(a[0], b[0].t())[None] if self.singly else torch.bmm(a, b)

    def keys(self, x: Tensor) -> Tensor:
        """x [B, T, D] so that its windows are dense: oneDNN is slow on others."""
        return x.contiguous() if self.singly else x

    def batches(self, *tensors: Tensor) -> Iterator[Any]:
        """The tensors [B, ...] as they are, or an element of the batch at a time."""
        return zip(*(t.split(1) for t in tensors), strict=True) if self.singly else iter([tensors])


def add_windows(total: Tensor, unit: Unit, item: int, part: Tensor) -> None:
    """total [B, T, D] += part [n, columns, D] at the windows of a unit, which overlap."""
    if unit.blocks == 1:
        total[:, unit.start : unit.start + unit.columns] += part
        return
    for at in range(0, unit.columns, unit.rows):  # windows lie `rows` apart: slices do not overlap
        height = min(unit.rows, unit.columns - at)
        down = total.stride(1)
        shape = (unit.blocks, height, total.shape[2])
        where = total[item, unit.start + at :].as_strided(shape, (unit.rows * down, down, 1))
        where += part[:, at : at + height]


def stacked(x: Tensor, rows: slice, heads: slice) -> Tensor:
    """[B, T * heads, D]: the heads of each position one after the other; one head is a view."""
    return x[:, rows, heads].flatten(1, 2)


def unstack(out: Tensor, rows: slice, heads: slice, result: Tensor) -> None:
    """Write `result`, as `stacked` gives it, back."""
    target = out[:, rows, heads]
    if result.data_ptr() != target.data_ptr():
        target.copy_(result.view(target.shape))


def forward(
    q: Tensor, k: Tensor, v: Tensor, lower: int, upper: int, dilation: int, scale: float
) -> Tensor:
    """Output [B, T, H, D], contiguous; widths as `reach` gives them."""
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if out.numel() == 0:
        return out
    group = q.shape[2] // k.shape[2]
    for phase in range(min(dilation, q.shape[1])):
        every = slice(phase, None, dilation)
        slabs = Slabs(q[:, every], group, lower, upper)
        for head in range(k.shape[2]):
            heads = slice(head * group, (head + 1) * group)
            result = stacked(out, every, heads)
            k1, v1 = slabs.keys(k[:, every, head]), slabs.keys(v[:, every, head])
            for part in slabs.batches(stacked(q, every, heads), k1, v1, result):
                _forward_head(slabs, scale, *part)
            unstack(out, every, heads, result)
    return out


def _forward_head(slabs: Slabs, scale: float, q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> None:
    dtype = slabs.dtype
    for unit in slabs.units():
        tall = slabs.tall(unit)
        for item in items(k, unit):
            scores = slabs.scores(
                unit, block(q, tall, item, dtype), window(k, unit, item, dtype), scale
            )
            result = slabs.product(torch.softmax(scores, -1), window(v, unit, item, dtype))
            block(out, tall, item, out.dtype).copy_(result)


def backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lower: int,
    upper: int,
    dilation: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, contiguous."""
    dtype = working_dtype(q)
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    dk, dv = (torch.zeros(t.shape, dtype=dtype, device=q.device) for t in (k, v))
    group = q.shape[2] // k.shape[2] if k.numel() else 1
    for phase in range(min(dilation, q.shape[1]) if dq.numel() else 0):
        every = slice(phase, None, dilation)
        slabs = Slabs(q[:, every], group, lower, upper)
        for head in range(k.shape[2]):
            heads, column = slice(head * group, (head + 1) * group), (slice(None), every, head)
            result = stacked(dq, every, heads)
            q1, g1 = stacked(q, every, heads), stacked(grad, every, heads)
            k1, v1 = slabs.keys(k[column]), slabs.keys(v[column])
            for part in slabs.batches(q1, k1, v1, g1, result, dk[column], dv[column]):
                _backward_head(slabs, scale, *part)
            unstack(dq, every, heads, result)
    return dq, dk.to(k.dtype), dv.to(v.dtype)


def _backward_head(
    slabs: Slabs,
    scale: float,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grad: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
) -> None:
    dtype = slabs.dtype
    for unit in slabs.units():
        tall = slabs.tall(unit)
        for item in items(k, unit):
            q1, g1 = block(q, tall, item, dtype), block(grad, tall, item, dtype)
            k1, v1 = window(k, unit, item, dtype), window(v, unit, item, dtype)
            weights = torch.softmax(slabs.scores(unit, q1, k1, scale), -1)
            add_windows(dv, unit, item, torch.bmm(weights.transpose(1, 2), g1))
            seen = slabs.product(g1, v1.transpose(1, 2))
            dscores = torch._softmax_backward_data(seen, weights, -1, dtype)
            block(dq, tall, item, dq.dtype).copy_(slabs.product(dscores, k1).mul_(scale))
            add_windows(dk, unit, item, torch.bmm(dscores.transpose(1, 2), q1 * scale))
