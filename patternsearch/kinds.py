"""Kinds of tasks that data sets share: images, forecasts, language models."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import TaskError
from .task import IGNORE, Task

IMAGE_MOVES = ("shift", "flip")


class Images(Task):
    """Classification of images kept as uint8 [n, H, W, channels].

    mean, deviation: of every channel over the training images, in 0..1.
    """

    space = "images"
    moves: tuple[str, ...] = IMAGE_MOVES
    mean: tuple[float, ...]
    deviation: tuple[float, ...]

    def batch(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        mean, deviation = _channels(self.mean, self.deviation, x.device)
        return (x.float() / 255).sub_(mean).div_(deviation), y


@lru_cache(maxsize=16)
def _channels(
    mean: tuple[float, ...], deviation: tuple[float, ...], device: torch.device
) -> tuple[Tensor, Tensor]:
    """On the device once, not once a step."""
    return torch.tensor(mean, device=device), torch.tensor(deviation, device=device)


class Forecast(Task):
    """The rows that follow a window of several series: mean squared error, and absolute beside it.

    A model sees and predicts differences from the window's last row, which leaves both errors as
    they are (NLinear: Zeng et al. 2023, Are Transformers effective for time series forecasting?).
    So it predicts the series that it sees: channels and classes of the spec are as many.
    """

    space = "series"
    metric = "mse"
    higher_is_better = False

    def batch(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        last = x[:, -1:]
        return x - last, y - last

    def loss(self, output: Tensor, y: Tensor) -> Tensor:
        if output.shape != y.shape:
            raise TaskError(
                f"task {self.name!r}: a forecast {list(output.shape)} cannot be compared with y "
                f"{list(y.shape)}; give the spec as many classes as channels, all series of x, or "
                "define batch()"
            )
        return F.mse_loss(output, y)

    def score(self, output: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return (output - y).square().sum(), output.new_tensor(y.numel())

    def scores(self, output: Tensor, y: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        absolute = (output - y).abs().sum(), output.new_tensor(y.numel())
        return {**super().scores(output, y), "mae": absolute}


class LanguageModel(Task):
    """The next token at every position of contiguous windows; perplexity over all of a split.

    A model knows its own window only, so the first positions of each have little to go by.
    """

    space = "language"
    metric = "perplexity"
    higher_is_better = False

    def score(self, output: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        total = F.cross_entropy(
            output.flatten(0, -2), y.flatten(), ignore_index=IGNORE, reduction="sum"
        )
        return total, (y != IGNORE).sum()

    def judged(self, output: Tensor, y: Tensor) -> tuple[Tensor, dict[str, tuple[Tensor, Tensor]]]:
        total, count = self.score(output, y)
        return total / count.clamp_min(1), {self.metric: (total, count)}

    def value(self, mean: float) -> float:
        return math.exp(min(mean, 700.0))
