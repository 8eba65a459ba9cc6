"""Linear recurrence as a formula in torch operations, differentiable any number of times."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ._linear_scan_cpu import compute_dtype

SHORT = 16  # rows up to which one walk is cheaper than chunks


def formula(a: Tensor, b: Tensor, initial: Tensor | None, reverse: bool) -> Tensor:
    """h [B, T, D] from a [B|1, T|1, p, D], b [B, T, D] and initial [B, p, D] or None."""
    length, order = b.shape[1], a.shape[2]
    if not length:
        return b.clone()
    kind = compute_dtype(b)
    decays, inputs = a.to(kind).expand(*b.shape[:2], -1, -1), b.to(kind)
    if initial is None:
        past = [torch.zeros_like(inputs[:, 0])] * order
    else:
        past = list(initial.to(kind).unbind(1))
    if order == 1 and length > SHORT:
        return _chunks(decays.squeeze(2), inputs, past[0], reverse).to(b.dtype)
    rows = []
    steps = (_ordered(x.unbind(1), reverse) for x in (decays, inputs))
    for factors, row in zip(*steps, strict=True):
        for factor, before in zip(factors.unbind(1), past, strict=True):
            row = torch.addcmul(row, factor, before)
        rows.append(row)
        past = [row, *past[:-1]]
    return torch.stack(_ordered(rows, reverse), 1).to(b.dtype)


def _chunks(a: Tensor, b: Tensor, start: Tensor, reverse: bool) -> Tensor:
    """About sqrt(T) rows in turn in all chunks at once, then the states between the chunks."""
    length = b.shape[1]
    rows = 2 ** round(math.log2(length) / 2)
    missing = -length % rows
    ends = (missing, 0) if reverse else (0, missing)  # beyond the last row: they reach no other
    padded = (F.pad(x, (0, 0, *ends)) if missing else x for x in (a, b))
    cut = (x.unflatten(1, (-1, rows)).unbind(2) for x in padded)
    decays, inputs = (_ordered(x, reverse) for x in cut)
    local, product = [inputs[0]], [decays[0]]
    for decay, given in zip(decays[1:], inputs[1:], strict=True):  # both in one loop when fused
        local.append(torch.addcmul(given, decay, local[-1]))
        product.append(product[-1] * decay)
    whole, last = (_ordered(x[-1].unbind(1), reverse)[:-1] for x in (product, local))
    states = [start]
    for decay, end in zip(whole, last, strict=True):
        states.append(torch.addcmul(end, decay, states[-1]))
    before = torch.stack(_ordered(states, reverse), 1).unsqueeze(2)
    within, after = (torch.stack(_ordered(x, reverse), 2) for x in (local, product))
    h = torch.addcmul(within, after, before).flatten(1, 2)
    if not missing:
        return h
    return h[:, missing:] if reverse else h[:, :length]


def _ordered(rows: Sequence[Tensor], reverse: bool) -> list[Tensor]:
    """In the order of the scan, or back from it."""
    return list(reversed(rows) if reverse else rows)
