"""A user's tables: CSV by its rows, Parquet by pandas, all as text cells."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Sequence
from pathlib import Path

from ..errors import TaskError
from .text import read_text

MISSING = ("", "na", "n/a", "#n/a", "<na>", "nan", "null", "none", "-", "?")
END = "\x1e"
SAMPLE = 50  # rows that tell what a column is
_GROUPED = re.compile(r"[-+]?(\d{1,3}([.,'’\s]\d{3})+([.,]\d+)?|\d+,\d+)")
Rows = list[list[str]]


def read_table(path: Path) -> tuple[list[str], Rows]:
    """Header and rows of a CSV, TSV or Parquet file; names are made up where there is no header.

    Raises TaskError naming the first row that has another number of cells.
    """
    if path.suffix.lower() == ".parquet":
        return _parquet(path)
    text = read_text(path)
    delimiter = "\t" if path.suffix.lower() == ".tsv" else _delimiter(text)
    rows = _split(path, text, delimiter)
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
    beside something else or over numbers that are not whole.
    """
    first = [cell.strip() for cell in rows[0]]
    counts = [cell for cell in first if _number(cell) is not None]
    if not counts:
        return not _repeated(rows)
    if len({*first}) < len(first) or not all(cell.isdecimal() for cell in counts):
        return False
    if len(counts) > 1 and counts == [str(i) for i in range(len(counts))]:
        broken = rows[1:] and all("." in cell or missing(cell) for cell in rows[1])
        return len(counts) < len(first) or bool(broken)
    words = (i for i, cell in enumerate(first) if _number(cell) is None and not missing(cell))
    return any(numeric([row[i] for row in rows[1:]]) for i in words)


def _repeated(rows: Rows) -> bool:
    """Whether the first row has a cell that comes again: no header has."""
    return any(
        cell.strip() and any(row[i] == cell for row in rows[1:]) for i, cell in enumerate(rows[0])
    )


def _split(path: Path, text: str, delimiter: str) -> Rows:
    """Rows that are not blank, with cells of any length."""
    limit = csv.field_size_limit(max(len(text), csv.field_size_limit()))
    lines = io.StringIO(f"{text}\n{END}", newline="")  # a quotation mark left open swallows the end
    try:
        rows = [row for row in csv.reader(lines, delimiter=delimiter) if row]
    except csv.Error as e:
        raise TaskError(f"{path}: expected rows of cells, found {e}; correct the file") from None
    finally:
        csv.field_size_limit(limit)
    if rows.pop() != [END]:
        raise TaskError(
            f"{path}, row {len(rows) + 1}: a quotation mark is left open; close or remove it"
        )
    return rows


def _delimiter(text: str) -> str:
    line = text.lstrip().partition("\n")[0]
    return max(",;\t|", key=line.count)


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


def grouped(column: Sequence[str]) -> str | None:
    """A number with commas, apostrophes or spaces in it, where a column has such numbers."""
    cells = [cell.strip() for cell in column if not missing(cell)]
    found = [cell for cell in cells if _GROUPED.fullmatch(cell)]
    plain = [cell for cell in cells if _number(cell) is not None]
    return found[0] if found and len(found) + len(plain) >= 0.8 * len(cells) else None


def prose(column: Sequence[str]) -> bool:
    """Whether a column holds texts: mostly different, of more than two words, and no dates."""
    cells = [cell for cell in column[:SAMPLE] if not missing(cell)]
    return (
        any(len(cell.split()) > 2 for cell in cells)
        and 2 * len(set(cells)) > len(cells)
        and 2 * sum(map(_date, cells)) < len(cells)
    )


def _date(cell: str) -> bool:
    """Two numbers or more among at most one word, or four beside a year or a time of day."""
    numbers, words = re.findall(r"\d+", cell), re.findall(r"[^\W\d_]+", cell)
    clear = re.search(r"\b(1[5-9]|2\d)\d\d\b|\d:\d\d", cell)
    return len(numbers) >= 2 and len(words) <= (4 if clear else 1)


def shown(row: Sequence[str]) -> str:
    text = ", ".join(row)
    return repr(text if len(text) < 60 else f"{text[:60]}...")
