"""Linear attention without decay over so few positions that all pairs of them are cheapest.

A head at a time: its rows are read where they lie, where one batch of all heads would take copies.
"""

from __future__ import annotations

import torch
from torch import Tensor

LENGTH = 64  # positions up to which chunks and states between them do not pay
SCORES = 2**20  # pairs in the whole batch up to which they stay in cache


def suits(q: Tensor, decay: Tensor | None) -> bool:
    """For q [B, T, H, K], in the precision that is computed in."""
    batch, length, heads, _ = q.shape
    few = length <= LENGTH and batch * heads * length * length <= SCORES
    return decay is None and few and q.dtype in (torch.float32, torch.float64)


def forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """o [B, T, H, V]."""
    out = _by_heads(v)
    for o, queries, keys, values in zip(out, *(x.unbind(2) for x in (q, k, v)), strict=True):
        torch.bmm(torch.bmm(queries, keys.mT).tril_(), values, out=o)
    return _by_positions(out.mul_(scale))


def backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, ...]:
    """Gradients of q, k and v; the scores are computed once more."""
    grads = _by_heads(q), _by_heads(k), _by_heads(v)
    for dq, dk, dv, given, queries, keys, values in zip(
        *grads, *(x.unbind(2) for x in (grad, q, k, v)), strict=True
    ):
        scores = torch.bmm(queries, keys.mT).tril_()
        torch.bmm(scores.mT, given, out=dv)
        torch.bmm(given, values.mT, out=scores).tril_()
        torch.bmm(scores, keys, out=dq)
        torch.bmm(scores.mT, queries, out=dk)
    return tuple(_by_positions(x.mul_(scale)) for x in grads)


def _by_heads(x: Tensor) -> Tensor:
    batch, length, heads, width = x.shape
    return x.new_empty(heads, batch, length, width)


def _by_positions(x: Tensor) -> Tensor:
    return x.permute(1, 2, 0, 3).contiguous()
