"""In which order the axes of an array lie in memory through a chain of products along them.

A product along an axis is one matrix product where the axis is outermost, or innermost. So the
array stays as a product left it, and before each the axis alone is brought to the front.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple


class Move(NamedTuple):
    """The array seen with `shape`, its axes then in `order`; `back` is the inverse."""

    shape: tuple[int, ...]
    order: tuple[int, ...]

    @property
    def turned(self) -> tuple[int, ...]:
        return tuple(self.shape[axis] for axis in self.order)

    @property
    def turns(self) -> bool:
        return self.order != tuple(range(len(self.order)))

    @property
    def back(self) -> Move:
        return Move(self.turned, tuple(self.order.index(k) for k in range(len(self.order))))


class Step(NamedTuple):
    """moves: before the product; last: whether its axis is then the innermost, or the outermost."""

    moves: tuple[Move, ...]
    last: bool


class _Layout:
    """Axes of an array of rows: [size, ...] as memory holds them, and as they are meant."""

    def __init__(self, row: int) -> None:
        self.size = {0: -1, 1: row}  # the axis of rows, then others
        self.held, self.meant = [0, 1], [0, 1]

    def move(self, order: Sequence[int]) -> Move:
        found = Move(
            tuple(self.size[a] for a in self.held), tuple(self.held.index(a) for a in order)
        )
        self.held = list(order)
        return found

    def cut(self, size: int) -> int | None:
        """How many axes come before the last `size` numbers of a row; None where none end there."""
        at, inner = len(self.meant), 1
        while inner < size:
            at -= 1
            inner *= self.size[self.meant[at]]
        if inner == size:
            return at
        axis = self.meant[at]
        whole = self.size[axis]
        part, rest = divmod(size * whole, inner)
        if rest or whole % part:
            return None
        fresh = max(self.size) + 1
        self.size |= {axis: whole // part, fresh: part}
        for axes in (self.held, self.meant):
            axes.insert(axes.index(axis) + 1, fresh)
        return at + 1

    def merge(self) -> None:
        row = 1
        for axis in self.meant[1:]:
            row *= self.size[axis]
        self.size, self.held, self.meant = {0: -1, 1: row}, [0, 1], [0, 1]

    def step(self, inputs: int, outputs: int, after: int) -> Step:
        moves = []
        end, start = self.cut(after), self.cut(inputs * after)
        if end is None or start is None:
            moves.append(self.move(self.meant))
            self.merge()
            self.cut(after), self.cut(inputs * after)
        start, end = self.cut(inputs * after) or 0, self.cut(after) or 0
        axes = self.meant[start:end]
        others = [axis for axis in self.held if axis not in axes]
        last = after == 1
        moves.append(self.move([*others, *axes] if last else [*axes, *others]))
        fresh = max(self.size) + 1
        self.size[fresh] = outputs
        self.meant[start:end] = [fresh]
        self.held = [*others, fresh] if last else [fresh, *others]
        return Step(tuple(moves), last)


@lru_cache(maxsize=256)
def plan(row: int, steps: tuple[tuple[int, int, int], ...]) -> tuple[tuple[Step, ...], Move]:
    """Of rows of `row` numbers and steps (inputs, outputs, after); the move that ends the chain."""
    layout = _Layout(row)
    found = tuple(layout.step(*step) for step in steps)
    return found, layout.move(layout.meant)
