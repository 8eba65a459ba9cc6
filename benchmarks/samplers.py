"""Regret against evaluations of the structured sampler and of Optuna's, on tables of outcomes.

    python benchmarks/samplers.py FOLDER [--tables macro ...] [--samplers gp ...] [--seeds 100]

FOLDER holds nas_bench_macro_cifar10.json (NAS-Bench-Macro, Apache-2.0) and nas_bench_201.csv.gz
(NAS-Bench-201, MIT; columns cellstr and DATASET-val, DATASET-test). The first shows the accuracy of
one training seed of three and measures regret on their mean, the second shows validation accuracy
and measures regret on test accuracy, in points. `nested` is a table of our own without training: a
matrix as the sum of two patterns of conditional families, fitted in turn in closed form;
its objective, 100 (relative squared error + parameters / 2048), is to be minimised.

Every sampler sees the same tables, a seed draws the same noise for all, and a repeated point counts
as an evaluation. The regret of a run is that of the best point shown so far. Results are added to
benchmarks/results/samplers.json seed by seed, so that it can be stopped and started again; runs of
the structured sampler are dropped by themselves when its code has changed. Times are of the CPU.
"""

from __future__ import annotations

import argparse
import csv
import functools
import gzip
import hashlib
import json
import math
import random
import re
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from small_tasks import machine

from patternsearch.domains import Trial
from patternsearch.search.sampler import StructuredSampler
from patternsearch.space import FixedTrial

RESULTS = Path(__file__).parent / "results" / "samplers.json"
SEARCH = Path(__file__).parent.parent / "patternsearch" / "search"
OURS = "sampler proposal surrogate points nested acquisition covering knowledge known".split()
AT = (10, 25, 50, 75, 100)
OPERATIONS = ("none", "skip_connect", "nor_conv_1x1", "nor_conv_3x3", "avg_pool_3x3")
SAMPLERS: dict[str, Callable[[int], optuna.samplers.BaseSampler]] = {
    "structured": StructuredSampler,
    "tpe": lambda seed: optuna.samplers.TPESampler(seed=seed, multivariate=True, group=True),
    "gp": lambda seed: optuna.samplers.GPSampler(seed=seed),
    "nsga2": lambda seed: optuna.samplers.NSGAIISampler(seed=seed, population_size=20),
    "random": lambda seed: optuna.samplers.RandomSampler(seed=seed),
}
WAYS = [*SAMPLERS, "evolution"]
TABLES = ["macro", "cifar10", "cifar100", "imagenet", "nested"]


def code() -> str:
    """Of the structured sampler: what was measured with another is not of this one."""
    return hashlib.sha256(b"".join((SEARCH / f"{n}.py").read_bytes() for n in OURS)).hexdigest()[
        :12
    ]


@dataclass(frozen=True)
class Table:
    """`look(trial, seed)`: (what is shown, what counts) of the point a trial chooses, minimised."""

    name: str
    look: Callable[[Trial, int], tuple[float, float]]
    best: float


def places(
    name: str, outcomes: dict[tuple[str, ...], tuple[list[float], float]], options: tuple[str, ...]
) -> Table:
    """A table over places with the same unordered options each; accuracies."""
    length = len(next(iter(outcomes)))

    def look(trial: Trial, seed: int) -> tuple[float, float]:
        point = tuple(trial.suggest_categorical(f"place{i}", options) for i in range(length))
        shown, counts = outcomes[point]
        noise = random.Random(f"{seed}/{point}").randrange(len(shown))
        return -shown[noise], -counts

    return Table(name, look, -max(counts for _, counts in outcomes.values()))


def macro(folder: Path) -> Table:
    data = json.loads((folder / "nas_bench_macro_cifar10.json").read_text())
    found = {tuple(key): (row["test_acc"], row["mean_acc"]) for key, row in data.items()}
    return places("macro", found, ("0", "1", "2"))


def nas_bench_201(folder: Path, name: str) -> Table:
    with gzip.open(folder / "nas_bench_201.csv.gz", "rt") as file:
        rows = list(csv.DictReader(file))
    found = {
        tuple(re.findall(r"([a-z_0-9]+)~\d", row["cellstr"])): (
            [float(row[f"{name}-val"])],
            float(row[f"{name}-test"]),
        )
        for row in rows
    }
    return places(name, found, OPERATIONS)


FAMILIES = ("banded", "toeplitz", "low_rank", "block_diagonal")
SIZE = 32


def fitted(rest: np.ndarray, family: str, fields: tuple[int, ...]) -> tuple[np.ndarray, int]:
    """The nearest matrix of a pattern and its parameters."""
    i, j = np.indices(rest.shape)
    if family == "low_rank":
        u, s, v = np.linalg.svd(rest)
        rank = fields[0]
        return (u[:, :rank] * s[:rank]) @ v[:rank], 2 * rank * SIZE
    if family == "block_diagonal":
        kept = i // (SIZE // fields[0]) == j // (SIZE // fields[0])
        return rest * kept, int(kept.sum())
    kept = (i - j <= fields[0]) & (j - i <= fields[1])
    if family == "banded":
        return rest * kept, int(kept.sum())
    means = np.zeros(2 * SIZE - 1)
    for d in range(-fields[0], fields[1] + 1):
        means[d + SIZE - 1] = np.diagonal(rest, d).mean()
    return means[j - i + SIZE - 1], sum(fields) + 1


def nested(folder: Path) -> Table:
    """What is to be found: a triangular band of 6 whose entries differ, and a rank of 2."""
    rng = np.random.default_rng(0)
    i, j = np.indices((SIZE, SIZE))
    target = rng.standard_normal((SIZE, SIZE)) * ((i - j <= 5) & (j <= i))
    target += rng.standard_normal((SIZE, 2)) @ rng.standard_normal((2, SIZE)) * 0.7
    target += 0.1 * rng.standard_normal((SIZE, SIZE))

    @functools.cache
    def value(*parts: tuple[str, tuple[int, ...]]) -> float:
        rest, parameters = target, 0
        for part in parts:
            found, count = fitted(rest, *part)
            rest, parameters = rest - found, parameters + count
        return 100 * (float((rest**2).sum() / (target**2).sum()) + parameters / 2048)

    def look(trial: Trial, seed: int) -> tuple[float, float]:
        parts = []
        for k in range(trial.suggest_int("parts", 1, 2)):
            family = trial.suggest_categorical(f"part{k}", FAMILIES)
            at = f"part{k}.{family}"
            if family == "low_rank":
                fields = (trial.suggest_int(f"{at}.rank", 1, 12),)
            elif family == "block_diagonal":
                fields = (2 ** trial.suggest_int(f"{at}.halvings", 1, 4),)
            else:
                fields = tuple(trial.suggest_int(f"{at}.{w}", 0, 7) for w in ("lower", "upper"))
            parts.append((family, fields))
        found = value(*parts)
        return found, found

    widths = [(a, b) for a in range(8) for b in range(8)]
    every = [(f, w) for f in ("banded", "toeplitz") for w in widths]
    every += [("low_rank", (r,)) for r in range(1, 13)]
    every += [("block_diagonal", (2**h,)) for h in range(1, 5)]
    best = min(min(value(a), *(value(a, b) for b in every)) for a in every)
    return Table("nested", look, best)


def evolution(table: Table, seed: int, trials: int) -> list[tuple[float, float]]:
    """Regularised evolution (Real et al. 2019, arXiv 1802.01548): population 20, samples of 5."""
    rng = random.Random(seed)
    population: list[tuple[float, dict[str, Any]]] = []
    found: list[tuple[float, float]] = []
    while len(found) < trials:
        parent: dict[str, Any] = {}
        if len(found) >= 20:
            parent = min(rng.sample(population, 5), key=lambda member: member[0])[1]
        while True:
            redrawn = rng.choice(list(parent)) if parent else None
            trial = FixedTrial({k: v for k, v in parent.items() if k != redrawn}, rng)
            shown, counts = table.look(trial, seed)
            if trial.used != parent:
                break
        population = [*population, (shown, trial.used)][-20:]
        found.append((shown, counts))
    return found


def run(table: Table, sampler: str, seed: int, trials: int) -> tuple[list[float], float]:
    """Regret after AT evaluations, and seconds of CPU a proposal."""
    start, spent = time.process_time(), 0.0
    if sampler == "evolution":
        found = evolution(table, seed, trials)
        spent = time.process_time() - start
    else:
        study, found = optuna.create_study(sampler=SAMPLERS[sampler](seed)), []
        for _ in range(trials):
            start = time.process_time()
            trial = study.ask()
            found.append(table.look(trial, seed))
            spent += time.process_time() - start
            study.tell(trial, found[-1][0])
    best = [min(found[:n], key=lambda f: f[0]) for n in AT if n <= trials]
    regret = [counts - table.best for _, counts in best]
    return regret, spent / trials


def tables(folder: Path) -> dict[str, Callable[[], Table]]:
    found = {
        name: functools.partial(nas_bench_201, folder, name)
        for name in ("cifar10", "cifar100", "imagenet")
    }
    return {"macro": lambda: macro(folder), **found, "nested": lambda: nested(folder)}


def interval(values: list[float]) -> str:
    if len(values) < 2:
        return f"{values[0]:.3f}"
    half = 1.96 * statistics.stdev(values) / math.sqrt(len(values))
    return f"{statistics.fmean(values):.3f} ± {half:.3f}"


def report(results: dict[str, Any]) -> str:
    """One table a benchmark: mean regret with its 95 % interval at numbers of evaluations."""
    lines = ["# Regret against evaluations", ""]
    lines += [
        "Mean over paired seeds ± 95 % interval; accuracy points, `nested`: percent of the squared",
        "norm plus the share of parameters. A proposal: milliseconds of CPU, median over seeds. A",
        "sampler of fewer seeds has the first of them. The structured sampler was developed with",
        "some of these tables at hand.",
        f"Written by benchmarks/samplers.py on {machine()}.",
    ]
    for table in (t for t in TABLES if t in results):
        by_sampler = results[table]
        lines += ["", f"## {table}", ""]
        lines.append("| sampler | seeds | " + " | ".join(map(str, AT)) + " | CPU ms a proposal |")
        lines.append("|---" * (len(AT) + 3) + "|")
        for sampler in (s for s in WAYS if by_sampler.get(s)):
            runs = by_sampler[sampler]
            regrets = list(zip(*(r["regret"] for r in runs.values()), strict=True))
            cells = [interval(list(column)) for column in regrets]
            times = [1000 * r["cpu"] for r in runs.values() if "cpu" in r]
            cells.append(f"{statistics.median(times):.1f}" if times else "")
            lines.append(f"| {sampler} | {len(runs)} | " + " | ".join(cells) + " |")
    return "\n".join(lines + margins(results)) + "\n"


def margins(results: dict[str, Any]) -> list[str]:
    """`structured` beside that of Optuna's samplers with the least mean, over the seeds of both."""
    lines = ["", "## structured beside the best of Optuna's samplers", ""]
    lines.append("| table | evaluations | best | seeds | its regret | structured | difference |")
    lines.append("|---" * 7 + "|")
    for table in (t for t in TABLES if results.get(t, {}).get("structured")):
        by_sampler = results[table]
        ours = by_sampler["structured"]
        for n in (50, 100):
            at = AT.index(n)
            means: list[tuple[float, str, list[float], list[float]]] = []
            for other in (s for s in SAMPLERS if s != "structured"):
                runs = by_sampler.get(other, {})
                seeds = [s for s in runs if s in ours and len(ours[s]["regret"]) > at]
                theirs, own = ([r[s]["regret"][at] for s in seeds] for r in (runs, ours))
                if seeds:
                    means.append((statistics.fmean(theirs), other, theirs, own))
            if not means:
                continue
            _, other, theirs, own = min(means)
            gain = [a - b for a, b in zip(own, theirs, strict=True)]
            cells = [table, str(n), other, str(len(gain)), *map(interval, (theirs, own, gain))]
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def write(results: dict[str, Any], stored: Path) -> None:
    for path, text in (
        (stored, json.dumps(results) + "\n"),
        (stored.with_suffix(".md"), report(results)),
    ):
        part = path.with_name(f".{path.name}.part")
        part.write_text(text)
        part.replace(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=TABLES)
    parser.add_argument("--samplers", nargs="+", choices=WAYS, default=WAYS)
    parser.add_argument("--seeds", type=int, default=100)
    parser.add_argument("--trials", type=int, default=100)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
    stored = options.results
    results = json.loads(stored.read_text()) if stored.exists() else {}
    for by_sampler in results.values():
        ours = by_sampler.get("structured", {})
        by_sampler["structured"] = {k: r for k, r in ours.items() if r.get("code") == code()}
    opened = {name: tables(options.folder)[name]() for name in options.tables}
    for seed in range(options.seeds):
        for name, table in opened.items():
            for sampler in options.samplers:
                runs = results.setdefault(name, {}).setdefault(sampler, {})
                if str(seed) not in runs:
                    regret, seconds = run(table, sampler, seed, options.trials)
                    rounded = [round(r, 6) for r in regret]
                    runs[str(seed)] = {"regret": rounded, "cpu": round(seconds, 5)}
                    if sampler == "structured":
                        runs[str(seed)]["code"] = code()
        write(results, stored)
    print(report(results))


if __name__ == "__main__":
    main()
