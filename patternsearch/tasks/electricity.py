"""Electricity: the hourly consumption of 321 clients for three years.

Source: UCI ElectricityLoadDiagrams20112014, as cut by G. Lai et al., Modeling long- and short-term
temporal patterns with deep neural networks, 2018. The field's split in the order of time: 70 % to
train, 10 % to validate, 20 % to test; standardised by the training part.
"""

from __future__ import annotations

from typing import ClassVar

from ..data.fetch import Published, Remote
from ..data.series import Borders, Table, shares
from ..sizes import Spec

TEXT = Remote(
    "https://raw.githubusercontent.com/laiguokun/multivariate-time-series-data/master/"
    "electricity/electricity.txt.gz",
    "3c4c069588198c1fcc95cace7bb69c99922129edfd673b7286661dad20badefa",
)


class Electricity(Table):
    """96 hours from the 336 before, for 321 series."""

    name = "electricity"
    spec = Spec(grid=(336,), channels=321, classes=321, horizon=96)
    published = Published(name, "electricity", ("electricity.txt.gz",), (TEXT,))
    rows: ClassVar[int] = 26_304

    def borders(self, rows: int) -> Borders:
        return shares(rows, 0.7, 0.2)


class ElectricityWeek(Electricity):
    """192 hours from the 336 before, for 321 series."""

    name = "electricity-192"
    spec = Spec(grid=(336,), channels=321, classes=321, horizon=192)


class ElectricityFortnight(Electricity):
    """336 hours from the 336 before, for 321 series."""

    name = "electricity-336"
    spec = Spec(grid=(336,), channels=321, classes=321, horizon=336)


class ElectricityMonth(Electricity):
    """720 hours from the 336 before, for 321 series."""

    name = "electricity-720"
    spec = Spec(grid=(336,), channels=321, classes=321, horizon=720)
