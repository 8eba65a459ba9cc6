"""AdamW on torch's own kernels."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import compress
from typing import Any

import torch
from torch import Tensor


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

    @torch.no_grad()
    def step(self) -> None:
        """Update every parameter that has a gradient."""
        every = [
            (group, _with_gradient(group["params"], state))
            for group, state in zip(self.param_groups, self._state, strict=True)
        ]
        if counts := [count for _, lists in every for count in lists[-1]]:
            torch._foreach_add_(counts, 1)
        for group, (params, grads, first, second, steps) in every:
            if params:
                torch._fused_adamw_(
                    params,
                    grads,
                    first,
                    second,
                    [],
                    steps,
                    lr=group["lr"],
                    beta1=0.9,
                    beta2=0.999,
                    weight_decay=group["weight_decay"],
                    eps=1e-8,
                    amsgrad=False,
                    maximize=False,
                )

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


def _with_gradient(params: list[Tensor], state: Lists) -> Lists:
    """Parameters, gradients and state of those that have a gradient."""
    grads = [p.grad for p in params]
    lists: Lists = (params, grads, *state)
    has = [g is not None for g in grads]
    return lists if all(has) else tuple(list(compress(part, has)) for part in lists)
