"""A mean and how far it can be trusted."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from scipy.special import stdtrit


@dataclass(frozen=True)
class Estimate:
    """A mean of n values; the 95 % interval of what it estimates is mean - half to mean + half."""

    mean: float
    half: float
    n: int

    def __str__(self) -> str:
        half = f" ± {self.half:.4f}" if math.isfinite(self.half) else ""
        return f"{self.mean:.4f}{half}"


def estimate(values: Sequence[float]) -> Estimate:
    """Student's interval of the mean of independent values; nan of none, infinite of one."""
    n = len(values)
    if n < 2:
        return Estimate(values[0] if values else math.nan, math.inf, n)
    half = float(stdtrit(n - 1, 0.975)) * statistics.stdev(values) / math.sqrt(n)
    return Estimate(statistics.fmean(values), half, n)


def difference(a: Sequence[float], b: Sequence[float]) -> Estimate:
    """Welch's interval of the difference of two means, of at least two values each."""
    va, vb = statistics.variance(a) / len(a), statistics.variance(b) / len(b)
    gap = statistics.fmean(a) - statistics.fmean(b)
    if va + vb == 0:
        return Estimate(gap, 0.0, len(a) + len(b))
    freedom = (va + vb) ** 2 / (va**2 / (len(a) - 1) + vb**2 / (len(b) - 1))
    half = float(stdtrit(freedom, 0.975)) * math.sqrt(va + vb)
    return Estimate(gap, half, len(a) + len(b))
