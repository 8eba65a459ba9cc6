"""A comparison as a table and as JSON."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path
from typing import Any

import torch

from ..config import STATIC, SweepConfig
from ..task import Task, get_task
from ..yamlfile import write_text
from .compare import THRIFTY, Row
from .comparison_figure import draw
from .interval import difference, estimate
from .provenance import device
from .trainings import Trainings, mean_curve


def measured(row: Row, kept: Trainings, task: Task) -> dict[str, Any]:
    """The numbers of a row: by seed, and what the table says of them."""
    every = [kept.of(training) for training in row.trainings]
    sound = [outcome for outcome in every if outcome.error is None]
    name = task.metric
    valid = [outcome.curve[-1][name] for outcome in sound]
    test = [outcome.costs[f"test_{name}"] for outcome in sound]
    return {
        "role": row.role,
        "name": row.name,
        "thrifty": row.thrifty,
        "pattern": row.pattern,
        "parameters": row.parameters,
        "flops": row.flops,
        "train": row.trainings[0].train,
        "design": row.trainings[0].design,
        "valid": valid,
        "test": test,
        "test_all": {
            key: statistics.fmean(outcome.costs[key] for outcome in sound)
            for key in (sound[0].costs if sound else ())
            if key.startswith("test_")
        },
        "failed": [outcome.error for outcome in every if outcome.error is not None],
        "latency_ms": statistics.median([o.costs["latency_ms"] for o in sound] or [math.nan]),
        "seconds": statistics.median([o.costs["seconds"] for o in sound] or [math.nan]),
        "curve": mean_curve(sound, name),
    }


def summary(rows: list[dict[str, Any]], sign: int) -> dict[str, Any]:
    """The winner and the best native baseline, by validation, and how they stand on the test set.

    Under `thrifty` the same of the thrifty design, where there is one. Every row gets `epochs`: the
    first at which its mean curve is as good as the best of the native baseline's.
    """

    def rank(row: dict[str, Any]) -> float:
        return sign * statistics.fmean(row["valid"]) if row["valid"] else -math.inf

    winner = max((r for r in rows if r["role"] == "found"), key=rank)
    native = max((r for r in rows if r["role"] == "native"), key=rank)
    winner["winner"] = native["winner"] = True
    goal = max((sign * v for v in native["curve"].values()), default=math.inf)
    for row in rows:
        row["epochs"] = next((e for e, v in row["curve"].items() if sign * v >= goal), None)
    found = {"winner": winner["name"], "native": native["name"], **beside(winner, native, sign)}
    if (small := next((r for r in rows if r["thrifty"]), None)) is not None:
        found["thrifty"] = {"name": small["name"], **beside(small, native, sign)}
    return found


def beside(row: dict[str, Any], native: dict[str, Any], sign: int) -> dict[str, Any]:
    """A row minus the native baseline on the test set, and its share of that one's costs."""
    shares = {cost: row[cost] / native[cost] for cost in STATIC}
    if min(len(row["test"]), len(native["test"])) < 2:
        return {"verdict": "not told: too few trainings ended", "shares": shares}
    gap = difference(row["test"], native["test"])
    verdict = "not told apart"
    if abs(gap.mean) > gap.half:
        verdict = "better" if sign * gap.mean > 0 else "worse"
    return {"gap": gap.mean, "half": gap.half, "verdict": verdict, "shares": shares}


def machine() -> str:
    """Cores and processor, or the GPU; nothing that identifies the host."""
    here = device()
    what = here["gpus"][0] if here["gpus"] else f"{here['cores']} cores of {here['cpu']}"
    return f"{what}, torch {torch.__version__}"


def table(
    config: SweepConfig, scale: str, rows: list[dict[str, Any]], found: dict[str, Any]
) -> str:
    task = get_task(config.task)
    lines = [
        f"# {config.task}, {scale} scale",
        "",
        setting(config, task.metric, len(rows[0]["test"]) + len(rows[0]["failed"])),
        "",
        f"| what | name | design | test {task.metric} | epochs | parameters | FLOPs | latency ms |",
        "|---|---|---|---|---|---|---|---|",
    ]
    sign = -1 if task.higher_is_better else 1
    order = ("found", "expert", "native")

    def place(row: dict[str, Any]) -> tuple[int, float]:
        value = statistics.fmean(row["valid"]) if row["valid"] else math.inf
        return order.index(row["role"]), sign * value

    lines += [f"| {' | '.join(cells(row))} |" for row in sorted(rows, key=place)]
    told = {found["winner"]: found}
    if "thrifty" in found:
        told.setdefault(found["thrifty"]["name"], found["thrifty"])
    for name, stands in told.items():
        lines += ["", sentence(name, found["native"], stands)]
    return "\n".join(lines) + "\n"


def sentence(name: str, native: str, stands: dict[str, Any]) -> str:
    gap = f"{stands['gap']:+.4f} ± {stands['half']:.4f}: " if "gap" in stands else ""
    at = " and ".join(f"{share:.2g} of its {cost}" for cost, share in stands["shares"].items())
    return f"{name} minus {native}: {gap}{stands['verdict']}, at {at}."


def setting(config: SweepConfig, metric: str, seeds: int) -> str:
    """What was trained, on what, and what the columns are."""
    train, caps = config.train, config.caps
    part = f"Subsampled: {train.examples:,} examples" if train.examples else "All examples"
    judged = f"{train.valid_examples:,}" if train.valid_examples else "all"
    tested = f"{train.test_examples:,}" if train.test_examples else "all"
    most = {name: cap for name in STATIC if (cap := getattr(caps, name)) is not None}
    limits = " and ".join(f"{cap:,.0f} {name}" for name, cap in most.items()) or "none"
    return (
        f"{machine()}. {part} an epoch, {train.epochs} epochs of batches of {train.batch}, "
        f"{judged} to validate, {tested} of the test set. Caps: {limits}. {config.trials} trials "
        f"of the search, as many of the native baselines together. Test {metric}: mean and 95 % "
        f"interval over {seeds} fresh seeds. Epochs: to the best mean validation value of the best "
        "native baseline. Bold: the best of the search and of the baselines. Italics: the best of "
        f"the search with at most {THRIFTY:g} of that baseline's parameters. Latency: of 64 "
        "examples, beside other trainings."
    )


def cells(row: dict[str, Any]) -> list[str]:
    mark = "**" * bool(row.get("winner")) + "*" * row["thrifty"]
    return [
        row["role"],
        f"{mark}{row['name']}{mark}",
        row["pattern"].replace("|", "/"),
        str(estimate(row["test"])) if row["test"] else "failed",
        str(row["epochs"] or "-"),
        f"{row['parameters']:,}",
        f"{row['flops']:,}",
        f"{row['latency_ms']:.1f}",
    ]


def write(folder: Path, config: SweepConfig, scale: str, rows: list[Row], kept: Trainings) -> Path:
    """compare.json, compare.png and compare.md in the folder."""
    task = get_task(config.task)
    found = [measured(row, kept, task) for row in rows]
    said = summary(found, 1 if task.higher_is_better else -1)
    data = {
        "task": config.task,
        "scale": scale,
        "machine": machine(),
        "config": config.model_dump(exclude_none=True),
        "summary": said,
        "rows": found,
    }
    write_text(folder / "compare.json", json.dumps(data, indent=1) + "\n")
    draw(found, task.metric, f"{config.task}, {scale} scale", folder / "compare.png")
    write_text(path := folder / "compare.md", table(config, scale, found, said))
    return path
