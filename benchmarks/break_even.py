"""Structures over widths: time beside dense, share of the floor, where they break even."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Row = dict[str, Any]


def break_even(widths: dict[int, float]) -> int | None:
    """The least measured width from which on the ratio to dense stays above 1; None: no such."""
    found = None
    for width in sorted(widths, reverse=True):
        if widths[width] <= 1:
            break
        found = width
    return found


def floor_share(row: Row, what: str, ceiling: dict[str, float]) -> float:
    """The floor's seconds over those taken: least traffic or work at the measured ceilings."""
    return max(
        row[f"{what}_bytes_per_s"] / ceiling["copy_bytes_per_s"],
        row[f"{what}_flops_per_s"] / ceiling["matmul_flops_per_s"],
    )


def structures(rows: Sequence[Row], ceiling: dict[str, float]) -> list[str]:
    """A table of the rows that carry a scale, forward+backward; [] where none does."""
    ours = {tuple(r["scale"]): r for r in rows if "scale" in r and r["way"] == "ours"}
    dense = {tuple(r["scale"]): r for r in rows if "scale" in r and r["way"] == "dense"}
    shared = [key for key in ours if "both_ratio" in dense.get(key, {})]
    if not shared:
        return []
    widths = sorted({width for _, width in shared})
    head = ["structure", *(f"{w}: x dense (of floor)" for w in widths), "breaks even at"]
    lines = ["", f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for name in dict.fromkeys(structure for structure, _ in shared):
        ratios = {w: dense[name, w]["both_ratio"] for w in widths if (name, w) in shared}
        cells = [
            f"{ratios[w]:.2f} ({floor_share(ours[name, w], 'both', ceiling):.0%})"
            if w in ratios
            else ""
            for w in widths
        ]
        found = break_even(ratios)
        cells.append("no measured width" if found is None else str(found))
        lines.append(f"| {' | '.join([name, *cells])} |")
    return lines
