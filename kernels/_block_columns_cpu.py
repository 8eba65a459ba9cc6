"""Block-sparse products of narrow blocks on several threads: vectors as columns.

A block of the vectors is then one run of memory, however narrow, and threads share the copies of
what lines see. So many lines that are alike are multiplied in one batch, in which each thread has
lines of its own: at a product a line the threads would meet as often as there are lines.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ._windows import threads, working_dtype

NARROW = 24  # rows and columns of a block at most: oneDNN is as fast at wider ones, line by line
WIDE = 64  # blocks across at least: with fewer, lines see what lies in the cache
TILE = 1 << 19  # numbers of the vectors at a time: 2 MB of float32
LEAST = 256  # vectors at a time, where that is more
PANEL = 1 << 20  # numbers that the lines of a batch see


def pays(values: Tensor, features: int) -> bool:
    """Whether blocks [blocks, o, i] are better taken from columns; features: of the wider side."""
    block = max(values.shape[1:])
    return threads() > 1 and block <= NARROW and features >= WIDE * block


class Run(NamedTuple):
    """Lines first .. end, each with `held` blocks, that are entries start .. stop."""

    first: int
    end: int
    held: int
    start: int
    stop: int


class Runs:
    """Rows of the grid, or its columns: where they look; those with as many blocks together."""

    def __init__(self, starts: Tensor, across: Tensor) -> None:
        """Line r holds entries starts[r] .. starts[r + 1]."""
        self.held: list[int] = starts.diff().tolist()
        self.across = across
        self.runs: list[Run] = []
        first = start = 0
        for line, held in enumerate(self.held):
            if line + 1 == len(self.held) or self.held[line + 1] != held:
                stop = start + held * (line + 1 - first)
                self.runs.append(Run(first, line + 1, held, start, stop))
                first, start = line + 1, stop

    def weights(self, values: Tensor) -> list[Tensor]:
        """Blocks [blocks, m, s] of each run: [lines, m, k s]."""
        _, m, s = values.shape
        found = []
        for run in self.runs:
            part = values[run.start : run.stop].view(run.end - run.first, run.held, m, s)
            found.append(part.transpose(1, 2).flatten(2))
        return found

    def zeros(self, values: Tensor, dtype: torch.dtype) -> list[Tensor]:
        """For gradients of `weights`."""
        _, m, s = values.shape
        shapes = [(run.end - run.first, m, run.held * s) for run in self.runs]
        return [values.new_zeros(shape, dtype=dtype) for shape in shapes]

    def blocks(self, weights: Sequence[Tensor], size: int) -> Tensor:
        """The inverse of `weights`, for blocks of `size` columns."""
        parts = [
            w.unflatten(2, (run.held, size)) for w, run in zip(weights, self.runs, strict=True)
        ]
        return torch.cat([part.transpose(1, 2).flatten(0, 1) for part in parts])


class Columns:
    """Items as pieces of [features, c] in their working dtype, and room for all that they take."""

    def __init__(self, x: Tensor, features: int, seen: int, first: bool) -> None:
        """features: of the wider side; seen: numbers that a line sees of a vector, at most."""
        vectors = x.shape[2 if first else 1]
        self.first, self.dtype = first, working_dtype(x)
        self.c = max(1, min(vectors, max(LEAST, TILE // features)))
        self.pieces = [slice(at, at + self.c) for at in range(0, vectors, self.c)]
        shared = threads()
        self.lines = max(shared, PANEL // (self.c * max(1, seen)) // shared * shared)
        self.panel = x.new_empty(self.lines * self.c * seen, dtype=self.dtype)
        self.rooms = x.new_empty(2, self.c * features, dtype=self.dtype)

    def part(self, x: Tensor, at: slice) -> Tensor:
        """Some vectors of an item [n, features], or [features, n]: [features, c]."""
        return x[:, at] if self.first else x[at].t()

    def room(self, which: int, like: Tensor) -> Tensor:
        return self.rooms[which, : like.numel()].view(like.shape)

    def read(self, which: int, x: Tensor, at: slice) -> Tensor:
        part = self.part(x, at)
        return self.room(which, part).copy_(part)

    def panels(self, seen: Tensor, runs: Runs, size: int) -> Iterator[tuple[int, slice, Tensor]]:
        """Of some lines of a run at a time: the run, which of its lines, and what they see."""
        c = seen.shape[1]
        blocks = seen.view(-1, size * c)
        for number, run in enumerate(runs.runs):
            for first in range(0, run.end - run.first, self.lines):
                own = slice(first, min(first + self.lines, run.end - run.first))
                held = slice(run.start + own.start * run.held, run.start + own.stop * run.held)
                across = runs.across[held]
                room = self.panel[: len(across) * size * c].view(len(across), size * c)
                panel = torch.index_select(blocks, 0, across, out=room)
                yield number, own, panel.view(own.stop - own.start, run.held * size, c)

    def multiply(
        self, x: Tensor, y: Tensor, at: slice, runs: Runs, weights: Sequence[Tensor], size: int
    ) -> None:
        """Some vectors of an item x, in blocks of `size`, to those of an item y."""
        part = self.part(y, at)
        out = self.room(1, part).unflatten(0, (-1, weights[0].shape[1]))
        for number, own, panel in self.panels(self.read(0, x, at), runs, size):
            lines = out[runs.runs[number].first :][own]
            torch.bmm(weights[number][own], panel, out=lines)
        part.copy_(out.flatten(0, 1))

    def outer(
        self, grad: Tensor, x: Tensor, at: slice, runs: Runs, sums: Sequence[Tensor], size: int
    ) -> None:
        """To `sums` [lines, m, k size]: each line's part of grad times what it sees of x turned."""
        parts = self.read(0, grad, at).unflatten(0, (-1, sums[0].shape[1]))
        for number, own, panel in self.panels(self.read(1, x, at), runs, size):
            lines = parts[runs.runs[number].first :][own]
            sums[number][own].baddbmm_(lines, panel.transpose(1, 2))
