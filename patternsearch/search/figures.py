"""Pictures of a sweep."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from ..export import build
from ..pictures import draw_model, save_figure
from .confirm import Again
from .effects import Factor
from .interval import Estimate
from .results import BEST, Results, TrialRecord

SEARCH, EXPERT, STOPPED = "tab:blue", "tab:red", "0.6"
NAMES = {
    "parameters": "parameters",
    "flops": "FLOPs of an example",
    "latency_ms": "latency in ms",
    "memory_mb": "memory to train in MB",
    "seconds": "seconds to train",
    "valid_loss": "validation loss",
}


def title(name: str) -> str:
    """An objective as an axis says it."""
    return NAMES.get(name, f"validation {name}")


def draw_sweep(
    results: Results, factors: Sequence[Factor], folder: Path, prefix: str = ""
) -> dict[str, Path]:
    """Name -> PNG in a folder, of a sweep that has a best trial; only what there is to show."""
    winner = results.winner()
    assert winner is not None
    model = build(results.folder / BEST)
    drawn = {"best": draw_model(model, folder / f"{prefix}best.png", winner.pattern)}
    makers = {"history": _history, "front": _front, "curves": _curves}
    if results.importances:
        makers["importances"] = _importances
    if results.confirmed is not None and results.confirmed.winner is not None:
        makers["confirm"] = _confirmed
    for name, make in makers.items():
        drawn[name] = save_figure(make(results), folder / f"{prefix}{name}.png")
    if factors:
        figure = _effects(factors, results.metric)
        drawn["effects"] = save_figure(figure, folder / f"{prefix}effects.png")
    return drawn


def _history(results: Results) -> Figure:
    """Value of every trial in order, and the best so far."""
    name, direction = results.metric, results.config.objectives[results.metric]
    figure = Figure(figsize=(8, 3.6), layout="constrained")
    axis = figure.subplots()
    pruned = [t for t in results.trials if t.state == "PRUNED" and name in (t.curve or ({},))[-1]]
    _dots(axis, [t.number for t in pruned], [t.curve[-1][name] for t in pruned])
    done = sorted(results.complete(), key=lambda t: t.number)
    _scatter(axis, done, [t.number for t in done], [t.objectives[0] for t in done])
    pick: Callable[[float, float], float] = max if direction == "maximize" else min
    best = list(accumulate((t.objectives[0] for t in done), pick))
    axis.step([t.number for t in done], best, where="post", color="black", label="best so far")
    _focus(axis, [t.objectives[0] for t in done], direction)
    axis.set_xlabel("trial, in the order of the search")
    axis.set_ylabel(title(name))
    _legend(axis)
    return figure


def _dots(axis: Any, x: Sequence[float], y: Sequence[float]) -> None:
    axis.scatter(x, y, marker="x", s=18, color=STOPPED, label="stopped early, last value")


def _front(results: Results) -> Figure:
    """The first objective against the others, or the costs known before; fronts joined."""
    names = list(results.config.objectives)
    others = names[1:] or ["parameters", "flops"]
    figure = Figure(figsize=(5 * len(others), 3.8), layout="constrained")
    axes = figure.subplots(1, len(others), squeeze=False)[0]
    done, front = results.complete(), results.front()
    for axis, cost in zip(axes, others, strict=True):
        _scatter(axis, done, [t.values[cost] for t in done], [t.objectives[0] for t in done])
        if len(names) > 2:  # the front of all objectives is no line in two of them
            x, y = [t.values[cost] for t in front], [t.objectives[0] for t in front]
            axis.scatter(x, y, s=70, facecolors="none", edgecolors="black", label="on the front")
        else:
            line = sorted(results.front(names[0], cost), key=lambda t: t.values[cost])
            x, y = [t.values[cost] for t in line], [t.objectives[0] for t in line]
            axis.step(x, y, where="post", color="black", label="front: none is better in both")
        _focus(axis, [t.objectives[0] for t in done], results.config.objectives[names[0]])
        axis.set_xscale("log")
        axis.set_xlabel(title(cost))
        axis.set_ylabel(title(names[0]))
        _legend(axis)
    return figure


def _curves(results: Results) -> Figure:
    """The metric while training: of the winner, the experts, the rest and what was stopped."""
    name, winner = results.metric, results.winner()
    figure = Figure(figsize=(8, 3.8), layout="constrained")
    axis = figure.subplots()
    seen: set[str] = set()
    order = sorted(results.trials, key=lambda t: (t is winner, t.expert, t.state == "COMPLETE"))
    for trial in order:
        points = [(row["epoch"], row[name]) for row in trial.curve if name in row]
        kind, style = _kind(trial, trial is winner)
        if points:
            x, y = zip(*points, strict=True)
            axis.plot(x, y, **style, label=None if kind in seen else kind)
            seen.add(kind)
    axis.set_xlabel("epoch")
    axis.set_ylabel(title(name))
    if seen:
        _legend(axis)
    return figure


def _kind(trial: TrialRecord, winner: bool) -> tuple[str, dict[str, Any]]:
    if winner:
        return f"the winner, trial {trial.number}", {"color": "black", "linewidth": 2.2}
    if trial.expert:
        return "expert designs", {"color": EXPERT, "linewidth": 1.2}
    if trial.state == "COMPLETE":
        return "found by the search", {"color": SEARCH, "linewidth": 0.6, "alpha": 0.6}
    return "stopped early", {"color": STOPPED, "linewidth": 0.6, "alpha": 0.7}


def _importances(results: Results) -> Figure:
    """How much each parameter tells the best tenth of the finished trials from the rest."""
    shown = sorted((item for item in results.importances.items() if item[1] > 0.001),
                   key=lambda item: item[1])[-12:]  # fmt: skip
    figure = Figure(figsize=(8, 0.8 + 0.3 * len(shown)), layout="constrained")
    axis = figure.subplots()
    axis.barh([name for name, _ in shown], [value for _, value in shown], color=SEARCH)
    axis.set_xlabel(f"importance for {title(results.metric)} (PED-ANOVA)")
    return figure


def _confirmed(results: Results) -> Figure:
    """Every design that was trained again: its mean and interval, validation beside test."""
    assert results.confirmed is not None
    c = results.confirmed
    rows: list[Again] = [row for row in c.rows if row.valid][::-1]
    figure = Figure(figsize=(8, 1.0 + 0.45 * len(rows)), layout="constrained")
    axis = figure.subplots()
    for i, row in enumerate(rows):
        colour = EXPERT if row.expert else SEARCH
        _interval(axis, row.mean(), i + 0.12, colour, "o")
        if (test := row.tested()) is not None:
            _interval(axis, test, i - 0.12, "black", "s")
    kinds = ("validation", SEARCH, "o"), ("validation, expert", EXPERT, "o"), ("test", "black", "s")
    for kind, colour, marker in kinds:
        axis.plot([], [], marker, color=colour, label=kind)
    names = [f"{r.name} (winner)" if r.name == c.winner else r.name for r in rows]
    axis.set_yticks(range(len(rows)), names)
    axis.set_xlabel(f"{c.metric}: mean and 95 % interval of {len(c.seeds)} fresh seeds")
    axis.grid(axis="x", alpha=0.3)
    _legend(axis)
    return figure


def _interval(axis: Any, value: Estimate, y: float, colour: str, marker: str) -> None:
    half = value.half if math.isfinite(value.half) else 0.0
    axis.errorbar([value.mean], [y], xerr=[half], fmt=marker, color=colour, capsize=3, ms=5)


def _effects(factors: Sequence[Factor], metric: str) -> Figure:
    """Mean and interval of the trials of every level, factor by factor."""
    heights = [len(f.levels) + 1.2 for f in factors]
    figure = Figure(figsize=(8, 0.27 * sum(heights) + 0.6), layout="constrained")
    axes = figure.subplots(len(factors), 1, sharex=True, squeeze=False,
                           gridspec_kw={"height_ratios": heights})[:, 0]  # fmt: skip
    for axis, factor in zip(axes, factors, strict=True):
        for i, level in enumerate(reversed(factor.levels)):
            if level.early.n:
                _interval(axis, level.early, i, STOPPED, "o")
            if level.final.n:
                _interval(axis, level.final, i + 0.2, SEARCH, "o")
        labels = [f"{level.name} ({level.final.n} of {level.early.n})" for level in factor.levels]
        axis.set_yticks(range(len(labels)), labels[::-1], fontsize=8)
        axis.set_ylim(-0.6, len(labels) - 0.2)
        axis.set_title(factor.name, fontsize=9, loc="left")
        axis.grid(axis="x", alpha=0.3)
    means = [x.mean for f in factors for v in f.levels for x in (v.final, v.early) if x.n]
    margin = 0.15 * (max(means) - min(means)) or 0.01
    axes[-1].set_xlim(min(means) - margin, max(means) + margin)  # not by the widest interval
    axes[-1].set_xlabel(title(metric))
    return figure


def _focus(axis: Any, values: list[float], direction: str) -> None:
    """Leave trials far off the others out of the picture, and say how many."""
    ordered = sorted(values, reverse=direction == "maximize")  # the best first
    best, far = ordered[0], ordered[math.ceil(0.8 * (len(ordered) - 1))]
    end = far + 1.5 * (far - best)
    worse = sum(abs(v - best) > abs(end - best) for v in values)
    if not worse or far == best:
        return
    margin = 0.05 * (best - end)
    axis.set_ylim(*sorted((end, best + margin)))
    axis.set_title(f"{worse} much worse are outside", fontsize=8, loc="right", color="0.4")


def _scatter(axis: Any, trials: Iterable[TrialRecord], x: list[float], y: list[float]) -> None:
    """Experts by name in colour, what the search found in blue."""
    expert = [t.expert for t in trials]
    for kind, colour, label in ((False, SEARCH, "search"), (True, EXPERT, "expert designs")):
        chosen = [i for i, e in enumerate(expert) if e is kind]
        axis.scatter(
            [x[i] for i in chosen], [y[i] for i in chosen], s=22, color=colour, label=label
        )


def _legend(axis: Any) -> None:
    axis.legend(fontsize=8, frameon=False)
