"""Linear attention as a formula in torch operations, differentiable any number of times."""

from __future__ import annotations

import torch
from torch import Tensor

CHUNK = 64
CHUNK_PER_CHANNEL = 16  # its factors are a tensor of C x C x K numbers
FORGOTTEN = -1e3  # exp of it is 0 in every dtype, and sums of it stay finite


def formula(q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, scale: float) -> Tensor:
    """o [B, T, H, V], chunk after chunk; arguments as in linear_attention."""
    if not q.shape[1]:
        return v.clone()
    kind = torch.float64 if q.dtype == torch.float64 else torch.float32
    queries, keys, values = (x.to(kind).transpose(1, 2) for x in (q * scale, k, v))
    per_channel = decay is not None and decay.dim() == 4
    size = CHUNK_PER_CHANNEL if per_channel else CHUNK
    logs = None
    if decay is not None:
        spread = decay if per_channel else decay.unsqueeze(-1)
        logs = spread.to(kind).clamp(min=FORGOTTEN).transpose(1, 2)
    state = q.new_zeros(q.shape[0], q.shape[2], q.shape[3], v.shape[3], dtype=kind)
    rows = []
    for start in range(0, q.shape[1], size):
        qc, kc, vc = (x[:, :, start : start + size] for x in (queries, keys, values))
        if logs is None:
            rows.append((qc @ kc.mT).tril() @ vc + qc @ state)
            state = state + kc.mT @ vc
            continue
        sums = logs[:, :, start : start + size].cumsum(2)
        last = sums[:, :, -1:]
        rows.append(_scores(qc, kc, sums) @ vc + (qc * sums.exp()) @ state)
        state = last.exp().mT * state + (kc * (last - sums).exp()).mT @ vc
    return torch.cat(rows, 2).transpose(1, 2).to(v.dtype)


def _scores(q: Tensor, k: Tensor, sums: Tensor) -> Tensor:
    ahead = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).triu(1)
    between = sums.unsqueeze(3) - sums.unsqueeze(2)  # at most 0 on and below the diagonal
    factors = between.masked_fill(ahead.unsqueeze(-1), -torch.inf).exp()
    if sums.shape[-1] == 1:
        return (q @ k.mT) * factors.squeeze(-1)
    return (q.unsqueeze(3) * k.unsqueeze(2) * factors).sum(-1)
