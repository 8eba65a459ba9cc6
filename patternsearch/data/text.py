"""Text as whole numbers: words, vocabularies, contiguous windows."""

from __future__ import annotations

import codecs
import html
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from ..errors import TaskError
from ..task import IGNORE, Array

PAD, UNKNOWN, END = "<pad>", "<unk>", "<eos>"
_WORD = re.compile(r"[^\W_]+|[!?$]")


def read_text(path: Path) -> str:
    """A file of UTF-8 text, or UTF-16 by its mark; TaskError names the line that is neither."""
    data = path.read_bytes()
    marked = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        return data.decode("utf-16" if marked else "utf-8-sig")
    except UnicodeDecodeError as e:
        if b"\0" in data:
            raise TaskError(f"{path}: expected a text file, found bytes that are no text") from None
        line = data.count(b"\n", 0, e.start) + 1
        raise TaskError(
            f"{path}, line {line}: expected UTF-8 text, found byte {data[e.start]:#04x}; convert "
            f"it, for example: iconv -f latin1 -t utf-8 {path.name} > utf8-{path.name}"
        ) from None


def words(text: str) -> list[str]:
    """Lower-case words and the marks ! ? $ of running text; HTML entities are undone."""
    return _WORD.findall(html.unescape(text.replace("\\", " ")).lower())


def line_words(text: str) -> list[str]:
    """Words as they stand between spaces, each line ended by <eos>: a language model's text."""
    found: list[str] = []
    for line in text.splitlines():
        found += line.split()
        found.append(END)
    return found


def vocabulary(tokens: Iterable[str], size: int, first: Sequence[str] = ()) -> dict[str, int]:
    """Token -> number: `first`, then the most frequent, ties in the order of the alphabet."""
    counts = Counter(tokens)
    known = [*first, *(t for t, _ in sorted(counts.items(), key=_rank) if t not in first)]
    return {token: i for i, token in enumerate(known[:size])}


def _rank(item: tuple[str, int]) -> tuple[int, str]:
    return -item[1], item[0]


def encode(tokens: Iterable[str], numbers: dict[str, int]) -> Array:
    """int64 [n]; what is not in the vocabulary is <unk>. KeyError where that is needed but not."""
    unknown = numbers.get(UNKNOWN)
    if unknown is None:
        return np.fromiter((numbers[t] for t in tokens), np.int64)
    return np.fromiter((numbers.get(t, unknown) for t in tokens), np.int64)


def padded(texts: Iterable[list[str]], numbers: dict[str, int], length: int) -> Array:
    """int64 [n, length]: every text's first words, then <pad>, which is number 0."""
    rows = [encode(text[:length], numbers) for text in texts]
    out = np.zeros((len(rows), length), np.int64)
    for row, tokens in zip(out, rows, strict=True):
        row[: len(tokens)] = tokens
    return out


def next_tokens(stream: Array, length: int) -> tuple[Array, Array]:
    """x, y int64 [n, length]: windows that follow each other, and the token after each position.

    Every token but the first is predicted once; places past the end do not count.
    """
    n = max(1, -(-(len(stream) - 1) // length))
    x, y = np.zeros(n * length, np.int64), np.full(n * length, IGNORE, np.int64)
    x[: len(stream) - 1], y[: len(stream) - 1] = stream[:-1], stream[1:]
    return x.reshape(n, length), y.reshape(n, length)
