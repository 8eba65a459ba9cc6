"""Tables of series: standardising, windows that are views, the base of the published sets."""

from __future__ import annotations

from abc import abstractmethod
from pathlib import Path
from typing import ClassVar

import numpy as np

from ..errors import TaskError
from ..kinds import Forecast
from ..task import Array, Data
from .cache import parsed
from .fetch import Published, check_count
from .idx import content

ROUNDING = 1e-9  # of a column's largest number; float32 keeps 6e-8
Borders = tuple[tuple[int, int], tuple[int, int], tuple[int, int]]  # rows of train, valid, test


def standardised(table: Array, rows: int) -> Array:
    """float32 [T, C]: every column less its mean over its deviation, both of the first `rows`."""
    part = table[:rows]
    mean = part.mean(axis=0)
    deviation = np.where(varies(part), part.std(axis=0), 1.0)
    scaled: Array = ((table - mean) / deviation).astype(np.float32)
    return scaled


def varies(table: Array) -> Array:
    """bool [C]: whether a column changes by more than the rounding of its numbers."""
    return np.asarray(table.std(axis=0) > ROUNDING * np.abs(table).max(axis=0))


def windows(table: Array, lookback: int, horizon: int) -> tuple[Array, Array]:
    """x [n, lookback, C] and the rows after, y [n, horizon, C], at every step: views of `table`."""
    n = len(table) - lookback - horizon + 1
    x = np.lib.stride_tricks.sliding_window_view(table, lookback, axis=0, writeable=True)[:n]
    y = np.lib.stride_tricks.sliding_window_view(table[lookback:], horizon, axis=0, writeable=True)[
        :n
    ]
    return x.swapaxes(1, 2), y.swapaxes(1, 2)


def shares(rows: int, train: float, test: float) -> Borders:
    """Borders of a table split in the order of time."""
    first, last = int(rows * train), int(rows * test)
    return (0, first), (first, rows - last), (rows - last, rows)


class Table(Forecast):
    """A published table with a row an hour: text, a header or none, dates first or none.

    rows: how many. `borders` says which are trained on; windows to validate and to test reach back
    into the part before by the lookback, as the field's do.
    """

    published: ClassVar[Published]
    rows: ClassVar[int]

    @abstractmethod
    def borders(self, rows: int) -> Borders:
        """Rows of each split."""

    def load(self) -> Data:
        table = parsed(self.name.partition("-")[0], self.published.locate(), self._parse)["table"]
        lookback, horizon = self.spec.grid[0], self.spec.horizon or 1
        starts = (max(0, start - lookback) for start, _ in self.borders(len(table)))
        ends = (end for _, end in self.borders(len(table)))
        parts = (table[a:b] for a, b in zip(starts, ends, strict=True))
        return Data(*(windows(part, lookback, horizon) for part in parts))

    def _parse(self) -> dict[str, Array]:
        (path,) = self.published.locate()
        table = read_numbers(path, self.spec.classes)
        check_count(path, "rows", self.rows, len(table))
        return {"table": standardised(table, self.borders(len(table))[0][1])}


def read_numbers(path: Path, columns: int) -> Array:
    """float64 [T, columns] of comma-separated text; a header and a first column of dates go.

    Raises TaskError naming the line that is not so many finite numbers.
    """
    lines = content(path).decode("utf-8", "replace").splitlines()
    dated = lines[:1] != [] and len(lines[-1].split(",")) == columns + 1
    rows = []
    for i, line in enumerate(lines):
        cells = line.split(",")[dated:]
        try:
            row = [float(cell) for cell in cells]
        except ValueError:
            row = []
        if not row and i == 0 and len(cells) == columns:
            continue  # the header
        if len(row) != columns or not np.isfinite(row).all():
            shown = line if len(line) < 60 else f"{line[:60]}..."
            raise TaskError(f"{path}, line {i + 1}: expected {columns} numbers, found {shown!r}")
        rows.append(row)
    return np.array(rows)
