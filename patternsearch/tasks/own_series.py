"""A user's own series: a table with a row a step."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..data.series import shares, standardised, varies, windows
from ..data.tables import Rows, grouped, missing, numeric, shown
from ..errors import TaskError, unknown
from ..kinds import Forecast
from ..sizes import Spec
from ..task import Array, Data
from .arrays import LEAST
from .own import count, sizes

MOST_MISSING = 0.2  # of a column's cells
FEWEST = 200  # rows
FARTHEST, LARGEST = 1e6, 1e30  # deviations from the mean, and numbers, that can be trained on
COUNTERS = ("", "Unnamed: 0")  # names that pandas gives to the numbers of rows
LABELS = ("label", "labels", "class")


class SeriesTable(Forecast):
    """Forecast of the numeric columns of a table, in the order of its rows.

    Options: columns (names, with commas between), horizon (rows). Split 70/10/20 % in the order of
    time, standardised by the training part. Gaps are interpolated. Columns of words, a first one
    that numbers the rows and those that never change in training are left out; `note` says so.
    """

    def __init__(
        self, path: Path, header: list[str], rows: Rows, options: dict[str, str] | None = None
    ) -> None:
        options = options or {}
        if len(rows) < FEWEST:
            raise TaskError(f"{path}: {count(len(rows), 'row')}; a series needs at least {FEWEST}")
        names, left = _columns(path, header, rows, options.get("columns"))
        borders = shares(len(rows), 0.7, 0.2)
        table, names, repairs = _table(path, header, rows, names, borders[0][1])
        most = min(borders[1][1] - borders[1][0], len(rows) // 7) - LEAST
        horizon = _horizon(path, options.get("horizon"), most)
        lookback = min(max(4 * horizon, 96), borders[0][1] - horizon - LEAST, 336)
        table = _scaled(path, names, table, borders[0][1])
        parts = (table[max(0, start - lookback) : end] for start, end in borders)
        self._data = Data(*(windows(part, lookback, horizon) for part in parts))
        channels = len(names)
        self._spec = Spec(grid=(lookback,), channels=channels, classes=channels, horizon=horizon)
        listed = ", ".join(names[:6]) + (", ..." if channels > 6 else "")
        self.note = (
            f"{path}: a table of {count(len(rows), 'row')}; {channels} series ({listed}), "
            f"{count(horizon, 'row')} ahead from {lookback}; windows: {sizes(self._data)}"
            + "".join(f"; {repair}" for repair in [*left, *repairs])
        )

    @property
    def spec(self) -> Spec:
        return self._spec

    def load(self) -> Data:
        return self._data


def _columns(
    path: Path, header: list[str], rows: Rows, wanted: str | None
) -> tuple[list[str], list[str]]:
    """Names of the columns that are series, and what is said of the others."""
    left: list[str] = []
    if wanted is not None:
        names = [name.strip() for name in wanted.split(",")]
        for name in names:
            if name not in header:
                raise TaskError(f"{path}: {unknown('column', name, header)}")
    else:
        names, left = _numeric(path, header, list(zip(*rows, strict=True)))
    if twice := next((name for name in names if [*names, *header].count(name) > 2), None):
        raise TaskError(f"{path}: column {twice!r} comes twice; name every column once")
    return names, left


def _numeric(
    path: Path, header: list[str], columns: list[tuple[str, ...]]
) -> tuple[list[str], list[str]]:
    places = [i for i, column in enumerate(columns) if numeric(column)]
    others = [i for i in range(len(columns)) if i not in places]
    for i in others:
        if cell := grouped(columns[i]):
            raise TaskError(
                f"{path}: column {header[i]!r} has numbers such as {cell!r}; write them with a "
                "point and without separators, for example by pandas.read_csv(..., decimal=',')"
            )
    if not places:
        raise TaskError(
            f"{path}: expected columns of numbers, found none in {shown(header)}; texts to "
            "classify have more than two words"
        )
    if label := next((name for name in header if name.lower() in LABELS), None):
        raise TaskError(
            f"{path}: numbers beside a column {label!r} are examples to classify, not series; save "
            "them as .npz arrays x and y, or name the series with columns=..."
        )
    words = [header[i] for i in others if header[i]]
    left = [f"no numbers and left out: {shown(words)}"] * bool(words)
    if len(places) > 1 and places[0] == 0 and _counts(header[0], columns[0]):
        left += [f"the number of the row and left out: {header[0] or 'the first column'}"]
        places = places[1:]
    return [header[i] for i in places], left


def _counts(name: str, column: tuple[str, ...]) -> bool:
    """Whether numbers rise by one step a row, or, without a name, are whole and mostly differ."""
    try:
        numbers = np.array(column, np.float64)
    except ValueError:
        return False
    if name in COUNTERS and (numbers == np.round(numbers)).all():
        return 2 * len(set(column)) >= len(column)
    steps = np.diff(numbers)
    return bool((steps > 0).all() and np.ptp(steps) <= 1e-9 * np.abs(numbers).max())


def _horizon(path: Path, wanted: str | None, most: int) -> int:
    if wanted is None:
        return max(1, min(24, most))
    if not wanted.isdigit() or not 1 <= int(wanted) <= most:
        raise TaskError(f"{path}: horizon={wanted} must be from 1 to {most} for its rows")
    return int(wanted)


def _table(
    path: Path, header: list[str], rows: Rows, names: list[str], training: int
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
        if np.abs(column).max() > LARGEST:
            raise TaskError(
                f"{path}: column {name!r} holds {column[np.abs(column).argmax()]:g}, too large to "
                "train on; correct it, or leave the column out with columns=..."
            )
        if varies(column[:training]):
            kept.append(name)
            found.append(column)
        else:
            constant.append(name)
    if not kept:
        raise TaskError(
            f"{path}: no column ever changes in the first {training:,} rows, which are trained on: "
            f"{shown(constant)}"
        )
    repairs = [f"missing numbers, interpolated: {filled:,}"] * bool(filled)
    repairs += [f"never changing in training and left out: {shown(constant)}"] * bool(constant)
    return np.stack(found, axis=1), kept, repairs


def _scaled(path: Path, names: list[str], table: Array, training: int) -> Array:
    """Standardised by the training rows; TaskError where another is out of all reach of them."""
    scaled = standardised(table, training)
    row, place = np.unravel_index(np.abs(scaled).argmax(), scaled.shape)
    if (far := abs(scaled[row, place])) > FARTHEST:
        raise TaskError(
            f"{path}, row {row + 1} after the header: {table[row, place]:g} in column "
            f"{names[place]!r} is {far:.0e} standard deviations from the mean of the training "
            "part; correct it, or leave the column out with columns=..."
        )
    return scaled


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
