"""Which of several points none beats: the front of a sweep, and of a rung."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

Point = tuple[float, ...]


def turned(values: Mapping[str, float], objectives: Mapping[str, str]) -> Point:
    """The values of the objectives, in their order, turned so that less is better."""
    return tuple(-values[n] if how == "maximize" else values[n] for n, how in objectives.items())


def dominates(a: Point, b: Point) -> bool:
    """Whether a is as good as b in everything and better in something; less is better."""
    return a != b and all(x <= y for x, y in zip(a, b, strict=True))


def nondominated(points: Sequence[Point]) -> list[int]:
    """Indices of the points that none dominates, in order; of equal points the first.

    In the order of their coordinates no point dominates an earlier one, so each is compared with
    the front before it alone.
    """
    front: list[int] = []
    for i in sorted(range(len(points)), key=lambda i: (points[i], i)):
        if not any(points[j] == points[i] or dominates(points[j], points[i]) for j in front):
            front.append(i)
    return sorted(front)
