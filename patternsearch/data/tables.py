"""A user's tables: CSV by its rows, Parquet by pandas, all as text cells."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path

from ..errors import TaskError
from .text import read_text

MISSING = ("", "na", "nan", "null", "none", "-", "?")
Rows = list[list[str]]


def read_table(path: Path) -> tuple[list[str], Rows]:
    """Header and rows of a CSV, TSV or Parquet file; names are made up where there is no header.

    Raises TaskError naming the first row that has another number of cells.
    """
    if path.suffix.lower() == ".parquet":
        return _parquet(path)
    text = read_text(path)
    delimiter = "\t" if path.suffix.lower() == ".tsv" else _delimiter(text)
    rows = [row for row in csv.reader(io.StringIO(text, newline=""), delimiter=delimiter) if row]
    if not rows:
        raise TaskError(f"{path}: expected a table, found nothing in it")
    for i, row in enumerate(rows):
        if len(row) != len(rows[0]):
            raise TaskError(
                f"{path}, row {i + 1}: expected {len(rows[0])} cells like the first row, found "
                f"{len(row)}: {shown(row)}; correct or remove it"
            )
    if _headed(rows):
        return [cell.strip() for cell in rows[0]], rows[1:]
    return [f"column {i + 1}" for i in range(len(rows[0]))], rows


def _headed(rows: Rows) -> bool:
    """Whether the first row names the columns: words, or counts such as pandas writes beside them.

    Counts are names where a word stands over a column of numbers, or where they are 0, 1, 2, ...
    beside something else.
    """
    first = [cell.strip() for cell in rows[0]]
    counts = [cell for cell in first if _number(cell) is not None]
    if not counts:
        return not _repeated(rows)
    if len({*first}) < len(first) or not all(cell.isdecimal() for cell in counts):
        return False
    if 1 < len(counts) < len(first) and counts == [str(i) for i in range(len(counts))]:
        return True
    words = (i for i, cell in enumerate(first) if _number(cell) is None and not missing(cell))
    return any(numeric([row[i] for row in rows[1:]]) for i in words)


def _repeated(rows: Rows) -> bool:
    """Whether the first row has a cell that comes again: no header has."""
    return any(
        cell.strip() and any(row[i] == cell for row in rows[1:]) for i, cell in enumerate(rows[0])
    )


def _delimiter(text: str) -> str:
    line = text.partition("\n")[0]
    return max(",;\t", key=line.count)


def _parquet(path: Path) -> tuple[list[str], Rows]:
    import pandas

    try:
        frame = pandas.read_parquet(path)
    except (OSError, ValueError) as e:  # pyarrow's errors are among them
        raise TaskError(f"{path}: expected a Parquet file, found {e}") from None
    cells = frame.astype(object).where(frame.notna(), "").astype(str)
    return [str(name) for name in frame.columns], cells.to_numpy().tolist()


def _number(cell: str) -> float | None:
    try:
        return float(cell)
    except ValueError:
        return None


def missing(cell: str) -> bool:
    return cell.strip().lower() in MISSING


def numeric(column: Sequence[str]) -> bool:
    """Whether a column holds numbers, apart from one cell in five at most."""
    values = [cell for cell in column if not missing(cell)]
    numbers = sum(_number(cell) is not None for cell in values)
    return bool(values) and numbers >= 0.8 * len(values)


def shown(row: Sequence[str]) -> str:
    text = ", ".join(row)
    return repr(text if len(text) < 60 else f"{text[:60]}...")
