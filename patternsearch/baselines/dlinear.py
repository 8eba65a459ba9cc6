"""DLinear: a linear forecast of trend and rest."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from ..native import Native, NativeModel
from ..sizes import Spec

WINDOW = 25


class DLinear(NativeModel):
    """Linear forecast: one map for the moving average of 25 steps, one for what is left.

    Zeng et al. 2023 (arXiv 2205.13504): MSE 0.375 at 96 hours of ETTh1 from 336; the maps are
    shared by the series and start from the mean of the window, as theirs do.
    """

    name = "dlinear"
    depths = (1,)
    dropouts = (0.0,)
    learning_rates = (1e-4, 1e-2)
    widths = 0

    @classmethod
    def suits(cls, spec: Spec) -> bool:
        return spec.horizon is not None and spec.channels == spec.classes

    def __init__(self, design: Native, spec: Spec) -> None:
        super().__init__(design, spec)
        steps, horizon = spec.grid[0], spec.horizon or 1
        self.trend, self.rest = nn.Linear(steps, horizon), nn.Linear(steps, horizon)
        for layer in (self.trend, self.rest):
            nn.init.constant_(layer.weight, 1 / steps)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, series] -> [B, horizon, series]."""
        x = x.mT
        half = WINDOW // 2
        trend = F.avg_pool1d(F.pad(x, (half, half), mode="replicate"), WINDOW, 1)
        y: Tensor = self.trend(trend) + self.rest(x - trend)
        return y.mT
