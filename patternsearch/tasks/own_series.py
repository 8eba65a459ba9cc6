"""A user's own series: a table with a row a step."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..data.series import shares, standardised, windows
from ..data.tables import Rows, missing, numeric, shown
from ..errors import TaskError, unknown
from ..kinds import Forecast
from ..sizes import Spec
from ..task import Array, Data
from .arrays import LEAST
from .own import count, sizes

MOST_MISSING = 0.2  # of a column's cells
FEWEST = 200  # rows


class SeriesTable(Forecast):
    """Forecast of the numeric columns of a table, in the order of its rows.

    Options: columns (names, with commas between), horizon (rows). Split 70/10/20 % in the order of
    time, standardised by the training part. Gaps are interpolated, columns that never change are
    left out; both are said in `note`.
    """

    def __init__(
        self, path: Path, header: list[str], rows: Rows, options: dict[str, str] | None = None
    ) -> None:
        options = options or {}
        if len(rows) < FEWEST:
            raise TaskError(f"{path}: {count(len(rows), 'row')}; a series needs at least {FEWEST}")
        names = _columns(path, header, rows, options.get("columns"))
        table, names, repairs = _table(path, header, rows, names)
        borders = shares(len(rows), 0.7, 0.2)
        most = min(borders[1][1] - borders[1][0], len(rows) // 7) - LEAST
        horizon = _horizon(path, options.get("horizon"), most)
        lookback = min(max(4 * horizon, 96), borders[0][1] - horizon - LEAST, 336)
        table = standardised(table, borders[0][1])
        parts = (table[max(0, start - lookback) : end] for start, end in borders)
        self._data = Data(*(windows(part, lookback, horizon) for part in parts))
        channels = len(names)
        self._spec = Spec(grid=(lookback,), channels=channels, classes=channels, horizon=horizon)
        listed = ", ".join(names[:6]) + (", ..." if channels > 6 else "")
        self.note = (
            f"{path}: a table of {count(len(rows), 'row')}; {channels} series ({listed}), "
            f"{count(horizon, 'row')} ahead from {lookback}; windows: {sizes(self._data)}"
            + "".join(f"; {repair}" for repair in repairs)
        )

    @property
    def spec(self) -> Spec:
        return self._spec

    def load(self) -> Data:
        return self._data


def _columns(path: Path, header: list[str], rows: Rows, wanted: str | None) -> list[str]:
    if wanted is not None:
        names = [name.strip() for name in wanted.split(",")]
        for name in names:
            if name not in header:
                raise TaskError(f"{path}: {unknown('column', name, header)}")
        return names
    columns = zip(*rows, strict=True)
    names = [name for name, column in zip(header, columns, strict=True) if numeric(column)]
    if not names:
        raise TaskError(f"{path}: expected columns of numbers, found none in {shown(header)}")
    return names


def _horizon(path: Path, wanted: str | None, most: int) -> int:
    if wanted is None:
        return max(1, min(24, most))
    if not wanted.isdigit() or not 1 <= int(wanted) <= most:
        raise TaskError(f"{path}: horizon={wanted} must be from 1 to {most} for its rows")
    return int(wanted)


def _table(
    path: Path, header: list[str], rows: Rows, names: list[str]
) -> tuple[Array, list[str], list[str]]:
    """The columns as float64 [T, C], the names of those that are kept, and what was repaired."""
    kept, found, constant, filled = [], [], [], 0
    for name in names:
        place = header.index(name)
        column = _numbers(path, name, [row[place] for row in rows])
        gaps = ~np.isfinite(column)
        if gaps.mean() > MOST_MISSING:
            raise TaskError(
                f"{path}: column {name!r} lacks {gaps.sum():,} of {len(column):,} numbers; fill or "
                "leave it out with columns=..."
            )
        at = np.arange(len(column))
        column[gaps] = np.interp(at[gaps], at[~gaps], column[~gaps])
        filled += int(gaps.sum())
        if np.ptp(column) == 0:
            constant.append(name)
        else:
            kept.append(name)
            found.append(column)
    if not kept:
        raise TaskError(f"{path}: no column ever changes ({', '.join(constant)})")
    repairs = [f"missing numbers, interpolated: {filled:,}"] * bool(filled)
    repairs += [f"never changing and left out: {', '.join(constant)}"] * bool(constant)
    return np.stack(found, axis=1), kept, repairs


def _numbers(path: Path, name: str, column: list[str]) -> NDArray[np.float64]:
    out = np.full(len(column), np.nan)
    for i, cell in enumerate(column):
        if not missing(cell):
            try:
                out[i] = float(cell)
            except ValueError:
                raise TaskError(
                    f"{path}, row {i + 1} after the header: expected a number in column {name!r}, "
                    f"found {cell!r}; correct it, or leave the column out with columns=..."
                ) from None
    return out
