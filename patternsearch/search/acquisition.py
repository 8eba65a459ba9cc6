"""How promising forecasts of several objectives are. All of them are to be minimised."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
from scipy.special import log_ndtr

from .surrogate import Array, log_improvement, volume_gain

_DRAWS = 64  # of a forecast
_LEAST = 0.01  # of the best outcome, that a part of others is told apart by


def joined(y: Array, known: Array, draw: int) -> Array:
    """Objectives (last axis) as one by random weights, scaled by the known ones."""
    low, high = known.min(axis=0), known.max(axis=0)
    z = (y - low) / (high - low + 1e-12) * _weights(y.shape[-1], draw)
    result: Array = z.max(axis=-1) + 0.05 * z.sum(axis=-1)
    return result


def _weights(objectives: int, draw: int) -> Array:
    rng = random.Random(draw)
    w = np.array([rng.expovariate(1) for _ in range(objectives)])
    weights: Array = w / w.sum()
    return weights


def promise(known: Array, mean: Array, deviation: Array, draw: int) -> Array:
    """[n] of forecasts [n, objectives] beside known outcomes, in the logarithm.

    Of one objective the expected improvement, of two that of the area that is dominated, of more
    that of the joined objectives; far below where surely dominated.
    """
    if known.shape[1] == 1:
        return log_improvement(mean[:, 0], deviation[:, 0], float(known.min()))
    noise = np.random.default_rng(draw).standard_normal((_DRAWS, 1, mean.shape[1]))
    drawn = mean + deviation * noise
    if known.shape[1] == 2:
        return _area(known, drawn)
    values = joined(drawn, known, draw)
    best = joined(known, known, draw).min()
    gain = np.log(np.maximum(best - values, 0).mean(axis=0) + 1e-12) - 1e-3 * values.mean(axis=0)
    hoped = (mean - deviation)[:, None]
    better = np.all(known <= hoped, axis=2) & np.any(known < hoped, axis=2)
    scores: Array = np.where(np.any(better, axis=1), gain - 100, gain)
    return scores


def _area(known: Array, drawn: Array) -> Array:
    low, high = known.min(axis=0), known.max(axis=0)
    front, points = ((v - low) / (high - low + 1e-12) for v in (known, drawn))
    gain = volume_gain(front, points).mean(axis=0)
    area: Array = np.log(gain + 1e-12) - 1e-3 * points.mean(axis=(0, 2))
    return area


def log_rest(values: Array, part: Array) -> Array:
    """Logarithm of what a known part leaves of outcomes; what is too little to matter is cut."""
    rest: Array = np.log(np.maximum(values - part, _LEAST * values.min()))
    return rest


def rest_improvement(left: Array, rest: Array, mean: Array, deviation: Array) -> Array:
    """Logarithm of the expected improvement where the logarithm of the rest is forecast.

    left: what the best outcome leaves above the known part; without that nothing improves on it.
    rest: known logarithms, of which mean and deviation are forecast in their standard units.
    """
    mean, deviation = rest.mean() + rest.std() * mean, rest.std() * deviation + 1e-12
    d = (np.log(np.maximum(left, 1e-300)) - mean) / deviation
    below = log_ndtr(d)
    over = np.minimum(deviation * (deviation / 2 - d) + log_ndtr(d - deviation) - below, -1e-12)
    gain: Array = np.log(np.maximum(left, 1e-300)) + below + np.log(-np.expm1(over))
    return gain


def latest_start(values: Sequence[float], patience: int) -> int:
    """Where a search began that starts anew after so many values in turn that are no better."""
    start = at = 0
    for i, value in enumerate(values):
        if i == start or value < values[at]:
            at = i
        elif i - at >= patience:
            start = i + 1
    return start


def enough_up_to(y: Array) -> float:
    """Between the best outcome and the next, where the best ones are alike."""
    best = float(y.min())
    return 0.5 * (best + min((float(v) for v in y if v > best + 1e-9), default=best + 1))
