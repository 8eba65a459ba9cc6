"""ETTh1: the oil temperature and six loads of a transformer, hourly for two years.

Source: H. Zhou et al., Informer, 2021. The field's split: 12 months to train, 4 to validate and 4
to test, each month 30 days; standardised by the training part.
"""

from __future__ import annotations

from typing import ClassVar

from ..data.fetch import Published, Remote
from ..data.series import Borders, Table
from ..sizes import Spec

CSV = Remote(
    "https://raw.githubusercontent.com/zhouhaoyi/ETDataset/main/ETT-small/ETTh1.csv",
    "f18de3ad269cef59bb07b5438d79bb3042d3be49bdeecf01c1cd6d29695ee066",
)
MONTH = 30 * 24


class Etth1(Table):
    """96 hours from the 336 before, for 7 series."""

    name = "etth1"
    spec = Spec(grid=(336,), channels=7, classes=7, horizon=96)
    published = Published(name, "ETT-small", ("ETTh1.csv",), (CSV,))
    rows: ClassVar[int] = 17_420

    def borders(self, rows: int) -> Borders:
        return (0, 12 * MONTH), (12 * MONTH, 16 * MONTH), (16 * MONTH, 20 * MONTH)


class Etth1Week(Etth1):
    """192 hours from the 336 before, for 7 series."""

    name = "etth1-192"
    spec = Spec(grid=(336,), channels=7, classes=7, horizon=192)


class Etth1Fortnight(Etth1):
    """336 hours from the 336 before, for 7 series."""

    name = "etth1-336"
    spec = Spec(grid=(336,), channels=7, classes=7, horizon=336)


class Etth1Month(Etth1):
    """720 hours from the 336 before, for 7 series."""

    name = "etth1-720"
    spec = Spec(grid=(336,), channels=7, classes=7, horizon=720)
