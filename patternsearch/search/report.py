"""A sweep as one HTML page that explains itself to somebody who was not there."""

from __future__ import annotations

import base64
import math
import time
from collections import Counter
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2

from .. import describe
from ..config import masked
from ..errors import ConfigError
from ..export import load
from ..sizes import model_cost, places
from ..space import Space, load_space
from ..task import get_task
from ..yamlfile import write_text
from . import effects
from .confirm import read_confirmed
from .figures import draw_sweep, title
from .folders import CONFIG, SPACE
from .interval import Estimate
from .results import BEST, Results


def write_report(results: Results, path: Path) -> list[Path]:
    """Write the page, and its pictures beside it as PNG; the paths of those.

    Beside a page of another name than report.html their names begin with its name.
    """
    if results.best() is None:
        raise ConfigError(f"{results.name} has no finished trial yet; nothing to report")
    if path.suffix != ".html" or not path.parent.is_dir():
        raise ConfigError(f"--output {path}: give an .html file in a folder that exists")
    found = effects.factors(results)
    prefix = "" if path.stem == "report" else f"{path.stem}-"
    drawn = draw_sweep(results, found, path.parent, prefix)
    source = resources.files("patternsearch.search").joinpath("report.html").read_text("utf-8")
    page = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True,
                              undefined=jinja2.StrictUndefined).from_string(source)  # fmt: skip
    page.globals.update(title=title, number=_number, interval=_interval)
    pictures = {name: _inline(file) for name, file in drawn.items()}
    write_text(path, page.render(_content(results, found), pictures=pictures))
    return list(drawn.values())


def _content(results: Results, found: Sequence[effects.Factor]) -> dict[str, Any]:
    """Everything the page says."""
    config, winner, expert = results.config, results.winner(), results.best_expert()
    assert winner is not None
    task = get_task(config.task)
    space = load_space(results.folder / SPACE)
    confirmed = results.confirmed
    return {
        "r": results,
        "c": config,
        "task": task,
        "output": describe.outputs(task.spec),
        "about": " ".join((type(task).__doc__ or "").split()),
        "space": space,
        "points": _count(Space(space.assignment).size()),
        "winner": winner,
        "expert": expert,
        "again": confirmed if confirmed is not None and confirmed.winner is not None else None,
        "places": list(places(winner.assignment, task.spec)),
        "total": model_cost(winner.assignment, task.spec),
        "front": results.front(),
        "front_names": _front_names(results),
        "factors": found,
        "epoch": effects.early_epoch(results),
        "cost": cost(results),
        "reasons": Counter(t.reason.strip().splitlines()[-1] for t in results.trials if t.reason),
        "export": load(results.folder / BEST),
        "sweep_yaml": masked((results.folder / CONFIG).read_text(encoding="utf-8")),
        "space_yaml": (results.folder / SPACE).read_text(encoding="utf-8"),
        "written": time.strftime("%Y-%m-%d %H:%M"),
        "words": describe.short(winner.assignment),
    }


def _front_names(results: Results) -> list[str]:
    names = list(results.config.objectives)
    return names if len(names) > 1 else [*names, "parameters", "flops"]


def cost(results: Results) -> dict[str, Any]:
    """What a sweep cost. Trials by state, hours at least one ran, and seconds of workers by state.

    A trial has its worker from its start to its end, waiting included. device: `GPU` with the
    fraction a worker took, else `CPU` with its cores.
    """
    resources_ = results.config.resources
    device, share = ("GPU", resources_.gpu) if resources_.gpu else ("CPU", resources_.cpu)
    seconds: dict[str, float] = dict.fromkeys(("COMPLETE", "PRUNED", "FAIL", "RUNNING"), 0.0)
    for t in results.trials:
        seconds[t.state] += 3600 * share * (t.hours[1] - t.hours[0])
    found = read_confirmed(results.folder)  # also what is not through, or no longer compared
    again = found.rows if found is not None else []
    return {
        "states": Counter(t.state for t in results.trials),
        "device": device,
        "share": share,
        "seconds": seconds,
        "searched": sum(seconds.values()),
        "again": share * sum(row.seconds for row in again),
        "runs": sum(len(row.valid) + len(row.failed) for row in again),
        "hours": busy_hours([t.hours for t in results.trials]),
    }


def busy_hours(spans: Sequence[tuple[float, float]]) -> float:
    """Length of the union of intervals: what a resumed sweep waited in between does not count."""
    total, end = 0.0, -math.inf
    for start, stop in sorted(spans):
        total += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return total


def _inline(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()


def _number(value: float | None, name: str = "") -> str:
    """A value as a table has it."""
    if value is None:
        return ""
    if name in ("parameters", "flops"):
        return f"{value:,.0f}"
    return f"{value:,.2f}" if name in ("latency_ms", "memory_mb", "seconds") else f"{value:.4f}"


def _count(value: float) -> str:
    """`12,288` or `3.1e+14`, in words where it has no end."""
    if math.isinf(value):
        return "infinitely many"
    return f"{value:,.0f}" if value < 1e6 else f"{value:.2g}"


def _interval(value: Estimate | None) -> str:
    """An estimate with its interval; without one where it is of a single value."""
    return "–" if value is None or value.n == 0 else str(value)
