"""The moving average of a model's weights."""

from __future__ import annotations

import torch
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn


class MovingAverage:
    """An exponential moving average of all that a model learns (Polyak and Juditsky 1992).

    The decay rises to its value as (1 + n) / (10 + n) over the steps n, so that what a model was
    before training is soon forgotten.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        both = [*model.parameters(), *model.buffers()]
        self.current = [tensor for tensor in both if tensor.is_floating_point()]
        self.average = [tensor.detach().clone() for tensor in self.current]
        self.decay, self.steps = decay, 0

    @torch.no_grad()
    def update(self) -> None:
        """After a step of the optimiser."""
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        get_ema_multi_avg_fn(decay)(self.average, self.current, 0)

    def swap(self) -> None:
        """Exchange the weights of the model and their average."""
        for i, tensor in enumerate(self.current):
            tensor.data, self.average[i] = self.average[i], tensor.data
