"""Selective copying (Gu and Dao 2023, arXiv 2312.00752, section 4.1.1), at a length for laptops.

Data tokens stand at random places among noise; at the markers that follow, they must be repeated in
order. The distances vary from sequence to sequence, so a fixed convolution cannot do it. Noise is
token 0, data are tokens 1 to 8, the marker is token 9.
"""

from __future__ import annotations

import numpy as np

from ..sizes import Spec
from ..task import IGNORE, Array, Generated

LENGTH, DATA, VOCABULARY = 32, 4, 10
NOISE, MARKER = 0, VOCABULARY - 1


class SelectiveCopy(Generated):
    """32 positions with 4 data tokens, then 4 markers; 1 in 8 right by guessing."""

    name = "selective-copy"
    space = "sequences"
    salt = 2312_00752

    @property
    def spec(self) -> Spec:
        return Spec(
            grid=(LENGTH + DATA,),
            vocabulary=VOCABULARY,
            classes=VOCABULARY,
            per_position=True,
            causal=True,
        )

    def generate(self, n: int, rng: np.random.RandomState) -> tuple[Array, Array]:
        """x [n, 36] and y [n, 36] int64; y is the data at the markers, IGNORE elsewhere."""
        data = rng.randint(1, MARKER, size=(n, DATA), dtype=np.int64)
        places = np.sort(np.argsort(rng.random_sample((n, LENGTH)), axis=1)[:, :DATA], axis=1)
        x = np.full((n, LENGTH + DATA), NOISE, dtype=np.int64)
        x[:, LENGTH:] = MARKER
        np.put_along_axis(x, places, data, axis=1)
        y = np.full_like(x, IGNORE)
        y[:, LENGTH:] = data
        return x, y
