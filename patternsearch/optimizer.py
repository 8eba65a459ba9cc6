"""AdamW on torch's own kernels."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import compress
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw


class AdamW:
    """AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101) over groups of parameters.

    groups: mappings with `params` (a list), `lr` and `weight_decay`; the last two may be changed
    between steps.
    Same numbers as torch.optim.AdamW(fused=True), without what its base class does around them: a
    first instance imports torch's compiler, a second's work in every new worker, and bookkeeping
    takes longer than the step of a small model.
    """

    def __init__(self, groups: Iterable[dict[str, Any]]) -> None:
        self.param_groups = list(groups)
        self._state = [_state(group["params"]) for group in self.param_groups]

    def step(self) -> None:
        """Update every parameter that has a gradient."""
        for group, state in zip(self.param_groups, self._state, strict=True):
            grads = [p.grad for p in group["params"]]
            lists = (group["params"], grads, *state)
            has = [g is not None for g in grads]
            if not all(has):
                lists = tuple(list(compress(part, has)) for part in lists)
            if lists[0]:
                _update(lists, group["lr"], group["weight_decay"])

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for group in self.param_groups:
            for p in group["params"]:
                p.grad = None


Lists = tuple[list[Any], ...]


def _state(params: list[Tensor]) -> Lists:
    """Both moments, and the number of steps."""
    counts = [torch.zeros((), device=p.device) for p in params]
    return [torch.zeros_like(p) for p in params], [torch.zeros_like(p) for p in params], counts


@torch.no_grad()
def _update(lists: Lists, lr: float, weight_decay: float) -> None:
    params, grads, first, second, steps = lists
    adamw(
        params,
        grads,
        first,
        second,
        [],
        steps,
        fused=True,
        amsgrad=False,
        beta1=0.9,
        beta2=0.999,
        lr=lr,
        weight_decay=weight_decay,
        eps=1e-8,
        maximize=False,
    )
