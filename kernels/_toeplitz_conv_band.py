"""The numbers of a band on a grid [B, H, W, D]; a sequence is a grid of height 1."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Band(NamedTuple):
    """Reach before and after, and the step between taps, for each of two axes."""

    lower: tuple[int, int]
    upper: tuple[int, int]
    dilation: tuple[int, int]

    @property
    def before(self) -> tuple[int, int]:
        return self.lower[0] * self.dilation[0], self.lower[1] * self.dilation[1]

    @property
    def after(self) -> tuple[int, int]:
        return self.upper[0] * self.dilation[0], self.upper[1] * self.dilation[1]

    @property
    def shape(self) -> tuple[int, int]:
        return self.lower[0] + self.upper[0] + 1, self.lower[1] + self.upper[1] + 1

    def flipped(self) -> Band:
        return Band(self.upper, self.lower, self.dilation)

    def offsets(self) -> list[tuple[int, int, int, int]]:
        """Tap (i, j) and the offset of the position it looks at."""
        (lh, lw), (dh, dw) = self.lower, self.dilation
        rows, columns = self.shape
        return [(i, j, (i - lh) * dh, (j - lw) * dw) for i in range(rows) for j in range(columns)]

    def within(self, height: int, width: int) -> Band:
        """Without the taps that reach outside a grid of this size from every position."""
        lower, upper = (
            (
                min(side[0], (height - 1) // self.dilation[0]),
                min(side[1], (width - 1) // self.dilation[1]),
            )
            for side in (self.lower, self.upper)
        )
        return Band(lower, upper, self.dilation)

    def inner(self, taps: Tensor, near: Band) -> Tensor:
        """The part of `taps` (of this band) that belongs to the narrower band `near`."""
        i, j = self.lower[0] - near.lower[0], self.lower[1] - near.lower[1]
        rows, columns = near.shape
        return taps[i : i + rows, j : j + columns]


def overlap(n: int, offset: int) -> tuple[slice, slice]:
    """Positions of an axis of `n` whose neighbour at `offset` exists, and those neighbours."""
    return slice(max(0, -offset), min(n, n - offset)), slice(max(0, offset), min(n, n + offset))
