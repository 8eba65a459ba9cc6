"""Language models of words: the base of the published sets."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from ..errors import TaskError
from ..kinds import LanguageModel
from ..task import Array, Data
from . import text
from .cache import parsed_data
from .fetch import Published, check_count


class Words(LanguageModel):
    """Three files of words between spaces, lines ended by <eos>; the vocabulary is of training.

    lines: of the files to train, to validate and to test.
    """

    published: ClassVar[Published]
    lines: ClassVar[tuple[int, int, int]]

    def load(self) -> Data:
        return parsed_data(self.name, self.published.locate(), self._parse)

    def _parse(self) -> Data:
        paths = self.published.locate()
        streams = [self._read(path, n) for path, n in zip(paths, self.lines, strict=True)]
        known = text.vocabulary(streams[0], len(set(streams[0])))
        if len(known) > (size := self.spec.vocabulary or 0):
            raise TaskError(f"{paths[0]}: expected at most {size:,} words, found {len(known):,}")
        return Data(*(self._windows(p, s, known) for p, s in zip(paths, streams, strict=True)))

    def _read(self, path: Path, lines: int) -> list[str]:
        tokens = text.line_words(text.read_text(path))
        check_count(path, "lines", lines, tokens.count(text.END))
        return tokens

    def _windows(self, path: Path, stream: list[str], known: dict[str, int]) -> tuple[Array, Array]:
        new = next((word for word in stream if word not in known), None)
        if new is not None and text.UNKNOWN not in known:
            raise TaskError(f"{path}: expected words of training or <unk>, found {new!r}")
        return text.next_tokens(text.encode(stream, known), self.spec.grid[0])
