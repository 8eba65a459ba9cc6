"""Linear attention as a formula in torch operations, differentiable any number of times."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 64
CHUNK_PER_CHANNEL = 16  # its factors are a tensor of C x C x K numbers
NARROW = 32  # channels up to which longer sequences are cut into chunks of half that length
FORGOTTEN = {torch.float32: -110.0, torch.float64: -750.0}  # exp is 0; sums round by no more


def formula(q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, scale: float) -> Tensor:
    """o [B, T, H, V], all chunks side by side; arguments as in linear_attention."""
    length = q.shape[1]
    if not length:
        return v.clone()
    size = _chunk(q, v, decay)
    kind = torch.float64 if q.dtype == torch.float64 else torch.float32
    queries, keys, values = (_cut(x.to(kind), size) for x in (q, k, v))
    queries = queries * scale
    last = None
    if decay is None:
        scores = (queries @ keys.mT).tril()
    else:
        spread = decay if decay.dim() == 4 else decay.unsqueeze(-1)
        sums = _cut(spread.to(kind).clamp(min=FORGOTTEN[kind]), size).cumsum(3)
        last = sums[:, :, :, -1:]
        scores = _scores(queries, keys, sums)
        queries, keys = queries * sums.exp(), keys * (last - sums).exp()
    o = scores @ values
    if length > size:
        o = o + queries @ _states(keys.mT @ values, last)
    return o.flatten(2, 3)[:, :, :length].transpose(1, 2).to(v.dtype)


def _chunk(q: Tensor, v: Tensor, decay: Tensor | None) -> int:
    length, width = q.shape[1], max(q.shape[3], v.shape[3])
    if decay is not None and decay.dim() == 4:
        return min(length, CHUNK_PER_CHANNEL)
    return min(length, CHUNK // 2 if width <= NARROW and length > CHUNK else CHUNK)


def _cut(x: Tensor, size: int) -> Tensor:
    """[B, H, chunks, C, channels] of [B, T, H, channels], zero after the end."""
    missing = -x.shape[1] % size
    x = F.pad(x, (0, 0, 0, 0, 0, missing)) if missing else x
    chunks: Tensor = x.transpose(1, 2).unflatten(2, (-1, size))
    return chunks


def _states(updates: Tensor, last: Tensor | None) -> Tensor:
    """The state [B, H, chunks, K, V] before each chunk, from what each adds and its decay."""
    if last is None:
        return F.pad(updates[:, :, :-1].cumsum(2), (0, 0, 0, 0, 1, 0))
    states = [torch.zeros_like(updates[:, :, 0])]
    for update, kept in zip(updates.unbind(2), last.exp().mT.unbind(2), strict=True):
        states.append(torch.addcmul(update, kept, states[-1]))
    return torch.stack(states[:-1], 2)


def _scores(q: Tensor, k: Tensor, sums: Tensor) -> Tensor:
    ahead = torch.ones(q.shape[3], q.shape[3], dtype=torch.bool, device=q.device).triu(1)
    between = sums.unsqueeze(4) - sums.unsqueeze(3)  # at most 0 on and below the diagonal
    factors = between.masked_fill(ahead.unsqueeze(-1), -torch.inf).exp()
    if sums.shape[-1] == 1:
        return (q @ k.mT) * factors.squeeze(-1)
    return (q.unsqueeze(4) * k.unsqueeze(3) * factors).sum(-1)
