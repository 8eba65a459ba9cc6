"""A comparison as a picture."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullFormatter

from ..pictures import save_figure
from .interval import estimate

COLOURS = {"found": "tab:blue", "expert": "tab:red", "native": "tab:green"}
WORDS = {"found": "found by the search", "expert": "expert designs", "native": "torch's layers"}


def draw(rows: list[dict[str, Any]], metric: str, title: str, path: Path) -> Path:
    """How every design learned, and what it reached for its parameters and FLOPs."""
    figure = Figure(figsize=(12, 3.8), layout="constrained")
    figure.suptitle(title, fontsize=10)
    learning, *costs = figure.subplots(1, 3)
    named: list[tuple[Axes, str, tuple[float, float]]] = []
    for row in rows:
        best = bool(row.get("winner"))
        style = {"color": COLOURS[row["role"]], "alpha": 1.0 if best else 0.45}
        epochs, values = list(row["curve"]), list(row["curve"].values())
        learning.plot(epochs, values, linewidth=2.2 if best else 1.0, marker=".", **style)
        if not row["test"]:
            continue
        test = estimate(row["test"])
        half = test.half if math.isfinite(test.half) else 0.0
        for axis, name in zip(costs, ("parameters", "flops"), strict=True):
            axis.errorbar(row[name], test.mean, half, fmt="o", ms=8 if best else 4, **style)
            if best or row["thrifty"]:
                named.append((axis, row["name"], (row[name], test.mean)))
    learning.xaxis.set_major_locator(MaxNLocator(integer=True))
    learning.set_xlabel("epoch")
    learning.set_ylabel(f"validation {metric}, mean of the seeds")
    for axis, name in zip(costs, ("parameters", "FLOPs of an example"), strict=True):
        low, high = axis.get_xlim()
        axis.set_xscale("log")
        wide = high > 30 * max(low, 1)
        axis.xaxis.set_major_locator(LogLocator(subs=(1,) if wide else (1, 2, 5)))
        axis.xaxis.set_major_formatter(EngFormatter(sep=""))
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.set_xlabel(name)
        axis.set_ylabel(f"test {metric}, mean and 95 %")
    for axis, name, at in named:
        across = axis.transAxes.inverted().transform(axis.transData.transform(at))[0]
        side = "left" if across < 0.5 else "right"
        axis.annotate(name, at, (6 if side == "left" else -6, 6), ha=side,
                      textcoords="offset points", fontsize=8)  # fmt: skip
    for role, colour in COLOURS.items():
        learning.plot([], [], color=colour, label=WORDS[role])
    learning.legend(fontsize=8)
    return save_figure(figure, path)
