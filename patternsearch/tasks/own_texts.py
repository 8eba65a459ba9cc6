"""A user's own texts: rows with a label, or running text as a language model."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path

import numpy as np

from ..data import text
from ..data.tables import Rows, prose
from ..errors import TaskError
from ..kinds import LanguageModel
from ..sizes import Spec
from ..task import Array, Data, Task, stratified
from .own import fifths, sizes

LENGTH, WORDS = 64, 10_000
LABELS = ("label", "class", "category", "target", "y", "sentiment", "topic")
FEWEST = 2_000  # characters of running text
ENOUGH = 50_000  # words from which words, and not characters, are predicted


class LabelledTexts(Task):
    """Classes of the texts in a table: the longest, and a label by name or few values.

    The first 64 words at most, in a vocabulary of the 10,000 most frequent of training. Split
    60/20/20 %, with equal shares of every class.
    """

    space = "texts"

    def __init__(self, path: Path, header: list[str], rows: Rows) -> None:
        label, body = _roles(path, header, rows)
        full = [row for row in rows if row[body].strip() and row[label].strip()]
        names = sorted({row[label].strip() for row in full})
        if len(names) < 2:
            found = names[0] if names else "nothing"
            raise TaskError(
                f"{path}: two classes or more must be in column {header[label]!r}, found {found!r}"
            )
        valid, test = fifths(len(full), f"{path}: {len(full):,} texts with a label")
        y = np.array([names.index(row[label].strip()) for row in full], np.int64)
        texts = [text.words(row[body]) for row in full]
        length = min(LENGTH, max(LENGTH // 2, *map(len, texts)))
        splits = stratified(y, valid, test)
        first = (text.PAD, text.UNKNOWN)
        known = text.vocabulary((w for i in splits[0] for w in texts[i]), WORDS, first)
        x = text.padded(texts, known, length)
        self._data = Data(*((x[i], y[i]) for i in splits))
        self._spec = Spec(grid=(length,), vocabulary=len(known), classes=len(names))
        self.note = (
            f"{path}: texts in column {header[body]!r}, {len(names)} classes in column "
            f"{header[label]!r}; the first {length} words of each, {len(known):,} told apart; "
            f"texts: {sizes(self._data)}"
        )
        if lost := len(rows) - len(full):
            self.note += f"; rows without text or label were left out: {lost:,}"

    @property
    def spec(self) -> Spec:
        return self._spec

    def load(self) -> Data:
        return self._data


def _roles(path: Path, header: list[str], rows: Rows) -> tuple[int, int]:
    """Columns of the label and of the text."""
    if len(header) < 2:
        raise TaskError(
            f"{path}: expected a column of texts and one of labels, found one column; cells are "
            "parted by a comma, a semicolon, a tab or |"
        )
    columns = list(zip(*rows, strict=True))
    texts = [i for i, column in enumerate(columns) if prose(column)]
    body = max(texts, key=lambda i: sum(map(len, columns[i])))
    others = [i for i in range(len(header)) if i != body]
    others = [i for i in others if len(set(columns[i])) > 1] or others
    named = [i for i in others if header[i].lower() in LABELS]
    label = (named or sorted(others, key=lambda i: len(set(columns[i]))))[0]
    if (values := len(set(columns[label]))) > max(2, len(rows) // 4):
        raise TaskError(
            f"{path}: expected a column of labels, but {header[label]!r} has {values:,} values in "
            f"{len(rows):,} rows; name the right one {LABELS[0]!r}"
        )
    return label, body


class PlainText(LanguageModel):
    """The next word of a text file, or the next character where it has fewer than 50,000 words.

    Split 80/10/10 % in its own order; the 10,000 most frequent words of training are told apart.
    """

    def __init__(self, path: Path) -> None:
        content = text.read_text(path)
        if len(content) < FEWEST:
            raise TaskError(
                f"{path}: {len(content):,} characters; a language model needs at least {FEWEST:,}"
            )
        tokens = text.line_words(content)
        unit = "word" if len(tokens) >= ENOUGH else "character"
        tokens = tokens if unit == "word" else list(content)
        if len(set(tokens)) < 2:
            raise TaskError(
                f"{path}: only {tokens[0]!r} in it; two different {unit}s are the least"
            )
        cut = [0, 8 * len(tokens) // 10, 9 * len(tokens) // 10, len(tokens)]
        parts = [tokens[a:b] for a, b in itertools.pairwise(cut)]
        known = text.vocabulary(parts[0], WORDS, (text.UNKNOWN,))
        self._data = Data(*(_windows(part, known) for part in parts))
        n = len(known)
        self._spec = Spec(grid=(LENGTH,), vocabulary=n, classes=n, per_position=True, causal=True)
        new = sum(m for t, m in Counter(tokens).items() if t not in known)
        self.note = (
            f"{path}: running text of {len(tokens):,} {unit}s, {n:,} told apart; the next {unit} "
            f"in windows of {LENGTH}: {sizes(self._data)}"
        )
        if new:
            self.note += f"; rare or new {unit}s are read as <unk>: {new:,}"

    @property
    def spec(self) -> Spec:
        return self._spec

    def load(self) -> Data:
        return self._data


def _windows(tokens: list[str], known: dict[str, int]) -> tuple[Array, Array]:
    return text.next_tokens(text.encode(tokens, known), LENGTH)
