"""Does a sweep find the pattern that made the data?

    python benchmarks/planted.py --cache FOLDER [--teachers 20] [--samplers structured gp ...]

A teacher is a random assignment of planted.yaml (one block; its band, order, rank and family are
hidden) with random weights. Data is what it makes of random inputs, plus noise of 1 % of the
output's deviation. The error is the root mean square on validation data over that deviation, so its
floor is 0.01. A teacher counts if its own assignment reaches twice the floor from three fresh
seeds, within 15 s each. A sweep over (error, parameters) has solved it with the first trial at
twice the floor with no more parameters than the teacher.

Every sampler runs in the sweep's own study, which refuses before training what does not fit or is
known; such a refusal is no trial. All are told the logarithm of the error, which suits a Gaussian
process. A fit follows from (teacher, assignment, seed). Fits and outcomes are kept in FOLDER and
shared by the samplers, so that a run can be killed at any moment and goes on where it was. Empty
FOLDER when the trainer or a teacher has changed; outcomes of the structured sampler are dropped by
themselves when its code has. Writes benchmarks/results/planted.json and .md.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import optuna
import torch
from planted_teachers import SPEC, TARGET, TRAIN, Fits, Kept, Planted, counts, space
from samplers import code
from scipy.stats import binom, binomtest
from small_tasks import RESULTS, machine

from patternsearch.config import SweepConfig
from patternsearch.search.study import Study

SAMPLERS = ("structured", "random", "tpe", "gp")


@dataclass(frozen=True)
class Outcome:
    """A sweep: the trial that solved it (None in none), and all trials up to it."""

    solved: int | None
    trials: list[tuple[float, int]]  # log10 of the error, parameters
    sampler_seconds: float  # of CPU, a proposal


def sweep(number: int, sampler: str, trials: int, folder: Path) -> Outcome:
    fits = Fits(number, folder)
    config = SweepConfig(
        task="planted",
        sampler=sampler,
        trials=trials,
        seed=number,
        objectives={"error": "minimize", "parameters": "minimize"},
        pruner="none",
        train=TRAIN,
    )
    found: list[tuple[float, int]] = []
    asking = 0.0
    with tempfile.TemporaryDirectory() as place:
        study = Study(config, space(), SPEC, Path(place))
        while len(found) < trials:
            started = time.process_time()
            proposal = study.ask()
            asking += time.process_time() - started
            if proposal is None:
                break
            error, parameters = fits(proposal.assignment)[0], proposal.cost.parameters
            found.append((error, parameters))
            if error <= TARGET and parameters <= fits.task.parameters:
                return Outcome(len(found), found, asking / len(found))
            study.end(proposal.number, "COMPLETE", {"error": error, "parameters": parameters})
    return Outcome(None, found, asking / len(found))


def kept(number: int, sampler: str, trials: int, folder: Path) -> dict[str, Any]:
    """The outcome of a sampler on a teacher."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    torch.set_num_threads(1)
    outcomes = Kept(folder / f"outcomes-{number}.jsonl")
    key = f"{sampler}/{trials}" + (f"/{code()}" if sampler == "structured" else "")
    if key not in outcomes.known:
        outcomes.add(key, asdict(sweep(number, sampler, trials, folder)))
    found: dict[str, Any] = outcomes.known[key]
    return found


def teachers(
    pool: ProcessPoolExecutor, first: int, wanted: int, folder: Path
) -> tuple[list[int], int]:
    """The candidates from `first` on that count, and how many were looked at."""
    found: list[int] = []
    looked = 0
    while len(found) < wanted:
        batch = range(first + looked, first + looked + 8)
        answers = pool.map(counts, batch, [folder] * len(batch))
        for number, good in zip(batch, answers, strict=True):
            if len(found) < wanted:
                looked += 1
                found += [number] * good
    return found, looked


def median(solved: list[int | None]) -> str:
    """Of the trials to solve, with the 95 % interval by order statistics."""
    values = sorted(math.inf if s is None else s for s in solved)
    n = len(values)
    low = int(binom.ppf(0.025, n, 0.5))
    ends = values[max(0, low - 1)], values[min(n - 1, n - low)]
    shown = [f"{v:g}" if math.isfinite(v) else "none" for v in (statistics.median(values), *ends)]
    return f"{shown[0]} ({shown[1]} to {shown[2]})"


def report(result: dict[str, Any]) -> str:
    rows, trials = result["teachers"], result["trials"]
    samplers = [s for s in SAMPLERS if any(s in row["outcomes"] for row in rows)]
    lines = ["# Patterns planted and found", ""]
    lines += [
        f"Measured on {result['machine']}; written by benchmarks/planted.py.",
        f"A space of {result['space']:,.0f} assignments; {len(rows)} teachers that count, of the",
        f"{result['looked']} drawn from number {result['first']:,} on. The sampler was tuned on",
        "some of numbers 0 to 61. Solved: an error of at most twice the noise floor with no more",
        f"parameters than the teacher, within {trials} trials. A sampler of fewer teachers did the",
        "first of them.",
        "",
        "| sampler | solved | 95 % interval | median trials to solve (95 %) | CPU ms a proposal |",
        "|---|---|---|---|---|",
    ]
    for sampler in samplers:
        outcomes = [row["outcomes"][sampler] for row in rows if sampler in row["outcomes"]]
        solved = [o["solved"] for o in outcomes]
        k, n = sum(s is not None for s in solved), len(solved)
        rate = binomtest(k, n).proportion_ci(method="wilson")
        ms = 1000 * statistics.median(o["sampler_seconds"] for o in outcomes)
        shown = f"{rate.low:.0%} to {rate.high:.0%}"
        lines.append(f"| {sampler} | {k} of {n} | {shown} | {median(solved)} | {ms:.0f} |")
    lines += ["", "Trials to solve each teacher (-: not within them; empty: not run):", ""]
    lines += ["| teacher | parameters | " + " | ".join(samplers) + " |"]
    lines += ["|---" * (2 + len(samplers)) + "|"]
    for row in rows:
        ran = row["outcomes"]
        cells = [str(ran[s]["solved"] or "-") if s in ran else "" for s in samplers]
        name = row["pattern"].replace("|", "/")
        lines.append(f"| {name} | {row['parameters']} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def write(result: dict[str, Any], stored: Path) -> None:
    for path, text in (
        (stored, json.dumps(result) + "\n"),
        (stored.with_suffix(".md"), report(result)),
    ):
        part = path.with_name(f".{path.name}.part")
        part.write_text(text)
        part.replace(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cache", type=Path, required=True, help="folder of fits and outcomes")
    parser.add_argument("--first", type=int, default=1000, help="number of the first candidate")
    parser.add_argument("--teachers", type=int, default=20)
    parser.add_argument("--trials", type=int, default=60)
    parser.add_argument("--samplers", nargs="+", choices=SAMPLERS, default=SAMPLERS)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--results", type=Path, default=RESULTS / "planted.json")
    options = parser.parse_args()
    options.cache.mkdir(parents=True, exist_ok=True)
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.processes, mp_context=spawn) as pool:
        chosen, looked = teachers(pool, options.first, options.teachers, options.cache)
        rows = {
            number: {
                "teacher": number,
                "pattern": Planted(number).words(),
                "parameters": Planted(number).parameters,
                "outcomes": {},
            }
            for number in chosen
        }
        result = {
            "machine": machine(),
            "space": space().size(),
            "trials": options.trials,
            "first": options.first,
            "looked": looked,
            "teachers": list(rows.values()),
        }
        running = {
            pool.submit(kept, number, sampler, options.trials, options.cache): (number, sampler)
            for sampler in options.samplers
            for number in chosen
        }
        for done in as_completed(running):
            number, sampler = running[done]
            rows[number]["outcomes"][sampler] = done.result()
            print(number, rows[number]["pattern"], sampler, done.result()["solved"], flush=True)
            write(result, options.results)
    print(report(result))


if __name__ == "__main__":
    main()
