"""A Gaussian process over the points of a conditional space, and what it makes of outcomes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cho_solve, solve_triangular
from scipy.optimize import minimize
from scipy.special import ndtr, ndtri

from ..domains import Choice, Domain, FloatRange, IntRange
from ..space import Params
from .points import Points

Array = NDArray[np.float64]
_STEPS = 15  # of the optimiser of the kernel's widths
_ABSENT = 0.5  # where a number would stand that a point does not have


class Encoding:
    """Points as rows of numbers.

    A number is its place in its range (in the logarithm where the range says so, by rank where it
    is one of a few), an unordered choice is one-hot at distance 1. For alike parameters follows how
    often they take each option, or their mean: what does not depend on where in a model it stands.
    """

    def __init__(self, points: Points) -> None:
        self.start: dict[str, int] = {}
        self.options: dict[str, dict[Any, tuple[int, float]]] = {}  # value -> column, number
        self.ranges: dict[str, tuple[int, IntRange | FloatRange]] = {}
        self.width = 0
        widths: dict[str, int] = {}
        for name, p in points.parameters.items():
            self.start[name], widths[name] = self.width, _width(p.domain)
            if isinstance(p.domain, Choice):
                self.options[name] = _entries(p.domain, self.width)
            else:
                self.ranges[name] = self.width, p.domain
            self.width += widths[name]
        self.numbers = [self.start[n] for n in widths if widths[n] == 1]
        self.alike: list[tuple[list[int], int, int]] = []  # first columns, width, where the mean is
        for names in points.alike.values():
            self.alike.append(([self.start[n] for n in names], widths[names[0]], self.width))
            self.width += widths[names[0]]

    def rows(self, points: Sequence[Params]) -> Array:
        """[points, width]."""
        x = np.zeros((len(points), self.width))
        x[:, self.numbers] = _ABSENT
        at: list[tuple[int, int, float]] = []
        for i, params in enumerate(points):
            for name, value in params.items():
                if name in self.options:
                    if (entry := self.options[name].get(value)) is not None:
                        at.append((i, *entry))
                elif name in self.ranges:
                    column, domain = self.ranges[name]
                    at.append((i, column, place_in(domain, value)))
        if at:
            i, column, number = np.array(at).T
            x[i.astype(int), column.astype(int)] = number
        for starts, width, mean in self.alike:
            parts = [x[:, s : s + width] for s in starts]
            x[:, mean : mean + width] = 2 * np.mean(parts, axis=0)
        return x


def _width(domain: Domain) -> int:
    return len(domain.options) if isinstance(domain, Choice) and not _ordered(domain) else 1


def _ordered(domain: Choice) -> bool:
    return all(isinstance(v, bool | int | float) for v in domain.options)


def _entries(domain: Choice, start: int) -> dict[Any, tuple[int, float]]:
    """What an option puts where: numbers their rank from 0 to 1, others a mark of their own."""
    if _ordered(domain):
        values = sorted(set(domain.options))
        return {v: (start, i / max(1, len(values) - 1)) for i, v in enumerate(values)}
    return {v: (start + i, math.sqrt(0.5)) for i, v in enumerate(domain.options)}


def place_in(domain: IntRange | FloatRange, value: float) -> float:
    """Where a number lies in its range, from 0 to 1."""
    if domain.high <= domain.low:
        return _ABSENT
    if domain.log:
        return math.log(value / domain.low) / math.log(domain.high / domain.low)
    return (value - domain.low) / (domain.high - domain.low)


class GaussianProcess:
    """Outcomes as a linear function plus a Matern 5/2 process with a width per column, plus noise.

    The kernel's numbers are at the maximum of their posterior under broad log-normal priors.
    """

    def __init__(self, x: Array, y: Array, theta: Array | None = None) -> None:
        """x: [n, columns]; y: [n], near mean 0 and deviation 1; theta: the kernel's numbers."""
        self.x, self.y, self.centre = x, y, x.mean(axis=0)
        self.share = 1 / max(1e-9, float(x.var(axis=0).sum()))  # of a typical squared distance
        self.theta = self._fitted() if theta is None else theta
        scale, linear, noise = np.exp(self.theta[-3:])
        self.widths, self.scale, self.linear = np.exp(self.theta[:-3] / 2), scale, linear
        gram = self._kernel(x, x) + (noise + 1e-5) * np.eye(len(x))
        self.root = np.linalg.cholesky(gram)
        self.weights = cho_solve((self.root, True), y)

    def predict(self, z: Array) -> tuple[Array, Array]:
        """Mean and deviation, noise apart, at the rows of z."""
        cross = self._kernel(z, self.x)
        left = solve_triangular(self.root, cross.T, lower=True, check_finite=False)
        own = self.scale + self.linear * self.share * ((z - self.centre) ** 2).sum(axis=1)
        variance = np.maximum(own - (left**2).sum(axis=0), 1e-10)
        return cross @ self.weights, np.sqrt(variance)

    def _kernel(self, a: Array, b: Array) -> Array:
        wa, wb = a * self.widths, b * self.widths
        r2 = (wa**2).sum(axis=1)[:, None] + (wb**2).sum(axis=1) - 2 * wa @ wb.T
        smooth, _ = _matern(np.maximum(r2, 0))
        straight = (a - self.centre) @ (b - self.centre).T * self.share
        kernel: Array = self.scale * smooth + self.linear * straight
        return kernel

    def _fitted(self) -> Array:
        """Columns in which all points agree keep the prior's width."""
        start = np.log([0.3 * self.share] * self.x.shape[1] + [1, 0.1, 0.01])
        spread = np.array([1.5] * self.x.shape[1] + [1, 1.5, 1.5])
        free = np.append(np.ptp(self.x, axis=0) > 0, [True] * 3)
        x = self.x[:, free[:-3]]
        squares = (x.T[:, :, None] - x.T[:, None, :]) ** 2
        straight = (self.x - self.centre) @ (self.x - self.centre).T * self.share

        def loss(theta: Array) -> tuple[float, Array]:
            value, slope = self._evidence(theta, squares, straight)
            away = (theta - start[free]) / spread[free]
            return value + 0.5 * float(away @ away), slope + away / spread[free]

        limits = np.stack([start - 3 * spread, start + 3 * spread], axis=1)[free]
        options = {"maxiter": _STEPS}
        found = minimize(
            loss, start[free], jac=True, method="L-BFGS-B", bounds=limits, options=options
        )
        start[free] = found.x
        return start

    def _evidence(self, theta: Array, squares: Array, straight: Array) -> tuple[float, Array]:
        """Negative log marginal likelihood and its slope (Rasmussen and Williams 2006, 5.9)."""
        widths, (scale, linear, noise) = np.exp(theta[:-3]), np.exp(theta[-3:])
        n, y = len(self.y), self.y
        r2 = np.tensordot(widths, squares, 1)
        smooth, fall = _matern(r2)
        gram = scale * smooth + linear * straight + (noise + 1e-5) * np.eye(n)
        root = np.linalg.cholesky(gram)
        inverse = cho_solve((root, True), np.eye(n))
        weights = inverse @ y
        value = 0.5 * float(y @ weights) + float(np.log(np.diag(root)).sum())
        half = 0.5 * (inverse - np.outer(weights, weights))
        by_width = scale * widths * (np.tensordot(squares, half * fall, 2))
        rest = [
            scale * float((half * smooth).sum()),
            linear * float((half * straight).sum()),
            noise * float(np.trace(half)),
        ]
        return value, np.concatenate([by_width, rest])


def _matern(r2: Array) -> tuple[Array, Array]:
    """The Matern 5/2 function of a squared distance and its derivative by it."""
    r = np.sqrt(5 * r2)
    falling = np.exp(-r)
    return (1 + r + r * r / 3) * falling, -5 / 6 * (1 + r) * falling


def warp(y: Array) -> Array:
    """Outcomes to minimise, made nearly normal: half by rank, half by value.

    Values far above the median, such as those of models that did not learn, are cut.
    """
    low, middle = float(y.min()), float(np.median(y))
    cut = np.minimum(y, middle + 1.5 * (middle - low)) if middle > low else y
    value = (cut - cut.mean()) / (cut.std() + 1e-12)
    order = np.argsort(np.argsort(y, kind="stable"), kind="stable")
    _, first, count = np.unique(y, return_inverse=True, return_counts=True)
    tied = np.bincount(first, weights=order) / count  # equal outcomes share their mean rank
    rank = ndtri((tied[first] + 0.5) / len(y))
    both: Array = (value + rank) / 2
    return both


def log_improvement(mean: Array, deviation: Array, best: float) -> Array:
    """Logarithm of the expected improvement below `best`."""
    u = (best - mean) / deviation
    near = np.exp(-u * u / 2) / math.sqrt(2 * math.pi) + u * ndtr(u)
    far = -u * u / 2 - math.log(2 * math.pi) / 2 - 2 * np.log(np.maximum(-u, 1))
    out: Array = np.where(u > -5, np.log(np.maximum(near, 1e-300)), far) + np.log(deviation)
    return out


def volume_gain(front: Array, points: Array) -> Array:
    """What points [*, 2] add to the area that `front` dominates, up to 1.1 in either objective.

    front: [n, 2], some of them dominated or not; less is better.
    """
    ordered = front[np.lexsort((front[:, 1], front[:, 0]))]
    ceiling = np.minimum(np.append(np.inf, np.minimum.accumulate(ordered[:, 1])), 1.1)
    starts, ends = np.append(-np.inf, ordered[:, 0]), np.append(ordered[:, 0], np.inf)
    width = np.minimum(ends, 1.1) - np.maximum(points[..., :1], starts)
    gain: Array = (np.maximum(width, 0) * np.maximum(ceiling - points[..., 1:], 0)).sum(-1)
    return gain


def impute(x: Array, features: Array, z: Array) -> tuple[Array, Array]:
    """Features at the rows of z, by ridge regression from the points x where they are known.

    Beside them how far off they are: the deviation of [features], each known point left out once.
    """
    if not features.shape[1]:
        return np.zeros((len(z), 0)), np.zeros(0)
    centre, middle = x.mean(axis=0), features.mean(axis=0)
    inverse = np.linalg.inv((x - centre) @ (x - centre).T + 0.1 * np.eye(len(x)))
    weights = inverse @ (features - middle)
    found: Array = middle + (z - centre) @ ((x - centre).T @ weights)
    off: Array = np.sqrt(np.mean((weights / np.diag(inverse)[:, None]) ** 2, axis=0))
    return found, off
