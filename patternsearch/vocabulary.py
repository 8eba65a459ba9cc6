"""Cross-entropy over a large vocabulary, its logits made a few rows at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .task import IGNORE

LARGE = 2048  # classes from which on it pays
_MOST = 2**20  # logits at a time: they stay in the cache, and no page is mapped anew


def linear_cross_entropy(h: Tensor, weight: Tensor, bias: Tensor, y: Tensor) -> Tensor:
    """Mean cross-entropy of h weight' + bias over the places of y that count, 0 without one.

    h [*, d], weight [classes, d], bias [classes], y int64 [*]. The gradients are made with the loss
    (Wijmans et al. 2024, arXiv 2411.09009, keep no logits either); there are no second derivatives.
    """
    run: Callable[..., Tensor] = _LinearCrossEntropy.apply
    return run(h.flatten(0, -2), weight, bias, y.flatten())


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor, weight: Tensor, bias: Tensor, y: Tensor) -> Tensor:
        grads = torch.empty_like(h), torch.zeros_like(weight), torch.zeros_like(bias)
        kept = y != IGNORE
        share = kept.to(h.dtype)[:, None] / kept.sum().clamp_min(1)
        loss, rows = h.new_zeros(()), max(1, _MOST // len(weight))
        for part in torch.arange(len(h), device=h.device).split(rows):
            low, high = int(part[0]), int(part[-1]) + 1
            some, wanted = h[low:high], y[low:high, None].clamp_min(0)
            z = torch.addmm(bias, some, weight.mT)
            z -= z.amax(1, keepdim=True)
            right = z.gather(1, wanted)
            sums = z.exp_().sum(1, keepdim=True)
            loss += ((sums.log() - right) * share[low:high]).sum()
            z *= share[low:high] / sums
            z.scatter_add_(1, wanted, -share[low:high])
            torch.mm(z, weight, out=grads[0][low:high])
            grads[1].addmm_(z.mT, some)
            grads[2].add_(z.sum(0))
        ctx.save_for_backward(*grads)
        return loss

    @staticmethod
    def backward(ctx: Any, *given: Tensor) -> tuple[Tensor | None, ...]:
        return *(given[0] * grad for grad in ctx.saved_tensors), None
