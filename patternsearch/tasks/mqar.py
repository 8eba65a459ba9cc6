"""Multi-query associative recall (Arora et al. 2023, arXiv 2312.04927, section 4 and appendix).

A prefix of key-value pairs `k1 v1 .. k4 v4`, all keys and all values of a sequence distinct. After
it every key comes once more, at an even distance from the prefix, and there the answer is its
value; small distances are likelier, by a power law. All other places are filled with random tokens
of the whole vocabulary. Keys are tokens 1 to 31, values 32 to 63.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ..sizes import Spec
from ..task import IGNORE, Array, Generated

LENGTH, VOCABULARY, PAIRS = 32, 64, 4
POWER = 0.01  # places g = 1, 2, .. after the prefix are weighted by g ** (POWER - 1)


def distinct(
    rng: np.random.RandomState, n: int, weights: NDArray[np.float64], count: int
) -> NDArray[np.intp]:
    """[n, count]: in each row so many different indices, drawn one after another by weight.

    The smallest of independent exponentials with these rates are such a draw.
    """
    return np.argsort(rng.exponential(size=(n, len(weights))) / weights, axis=1)[:, :count]


class MQAR(Generated):
    """32 tokens, 4 pairs, 4 queries; 1 in 4 right by guessing among the values of a sequence."""

    name = "mqar"
    space = "sequences"
    salt = 2312_04927

    @property
    def spec(self) -> Spec:
        return Spec(
            grid=(LENGTH,),
            vocabulary=VOCABULARY,
            classes=VOCABULARY,
            per_position=True,
            causal=True,
        )

    def generate(self, n: int, rng: np.random.RandomState) -> tuple[Array, Array]:
        """x [n, 32] and y [n, 32] int64; y is a value at the queries, IGNORE elsewhere."""
        half, prefix = VOCABULARY // 2, 2 * PAIRS
        keys = 1 + distinct(rng, n, np.ones(half - 1), PAIRS)
        values = half + distinct(rng, n, np.ones(half), PAIRS)
        places = np.arange(1.0, (LENGTH - prefix) // 2 + 1)
        queries = prefix + 2 * distinct(rng, n, places ** (POWER - 1), PAIRS)
        x = rng.randint(VOCABULARY, size=(n, LENGTH), dtype=np.int64)
        x[:, 0:prefix:2], x[:, 1:prefix:2] = keys, values
        np.put_along_axis(x, queries, keys, axis=1)
        y = np.full((n, LENGTH), IGNORE, dtype=np.int64)
        np.put_along_axis(y, queries, values, axis=1)
        return x, y
