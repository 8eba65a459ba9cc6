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
import hashlib
import json
import math
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import optuna
import torch
from planted_teachers import SPEC, TARGET, TRAIN, Fits, Kept, Planted, counts, space
from scipy.stats import binom, binomtest
from small_tasks import RESULTS, machine

from patternsearch.config import SweepConfig
from patternsearch.search.study import Study

SAMPLERS = ("structured", "tpe", "gp", "random")
SEARCH = Path(__file__).parent.parent / "patternsearch" / "search"
OURS = "sampler proposal surrogate knowledge points nested acquisition covering study".split()


@dataclass(frozen=True)
class Outcome:
    """A sweep: the trial that solved it (None in none), and all trials up to it."""

    solved: int | None
    trials: list[tuple[float, int]]  # log10 of the error, parameters
    sampler_seconds: float  # a proposal


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
            started = time.perf_counter()
            proposal = study.ask()
            asking += time.perf_counter() - started
            if proposal is None:
                break
            error, parameters = fits(proposal.assignment)[0], proposal.cost.parameters
            found.append((error, parameters))
            if error <= TARGET and parameters <= fits.task.parameters:
                return Outcome(len(found), found, asking / len(found))
            study.end(proposal.number, "COMPLETE", {"error": error, "parameters": parameters})
    return Outcome(None, found, asking / len(found))


def sweeps(number: int, samplers: Iterable[str], trials: int, folder: Path) -> dict[str, Any]:
    """Outcomes by sampler, on one teacher."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    torch.set_num_threads(1)
    kept = Kept(folder / f"outcomes-{number}.jsonl")
    code = hashlib.sha256(b"".join((SEARCH / f"{n}.py").read_bytes() for n in OURS)).hexdigest()
    found = {}
    for sampler in samplers:
        key = f"{sampler}/{trials}" + (f"/{code[:12]}" if sampler == "structured" else "")
        if key not in kept.known:
            kept.add(key, asdict(sweep(number, sampler, trials, folder)))
        found[sampler] = kept.known[key]
    return found


def teachers(pool: ProcessPoolExecutor, wanted: int, folder: Path) -> tuple[list[int], int]:
    """The first candidates that count, and how many were looked at."""
    found: list[int] = []
    looked = 0
    while len(found) < wanted:
        batch = range(looked, looked + 8)
        answers = pool.map(counts, batch, [folder] * len(batch))
        for number, good in zip(batch, answers, strict=True):
            if len(found) < wanted:
                looked = number + 1
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
    samplers = list(rows[0]["outcomes"])
    lines = ["# Patterns planted and found", ""]
    looked = result["looked"]
    lines += [
        f"Measured on {result['machine']}; written by benchmarks/planted.py.",
        f"A space of {result['space']:,.0f} assignments; {len(rows)} teachers that count, of the",
        f"first {looked} drawn. Solved: an error of at most twice the noise floor with no more",
        f"parameters than the teacher, within {trials} trials.",
        "",
        "| sampler | solved | 95 % interval | median trials to solve (95 %) | ms a proposal |",
        "|---|---|---|---|---|",
    ]
    for sampler in samplers:
        outcomes = [row["outcomes"][sampler] for row in rows]
        solved = [o["solved"] for o in outcomes]
        k, n = sum(s is not None for s in solved), len(solved)
        rate = binomtest(k, n).proportion_ci(method="wilson")
        ms = 1000 * statistics.median(o["sampler_seconds"] for o in outcomes)
        shown = f"{rate.low:.0%} to {rate.high:.0%}"
        lines.append(f"| {sampler} | {k} of {n} | {shown} | {median(solved)} | {ms:.0f} |")
    lines += ["", "Trials to solve each teacher:", ""]
    lines += ["| teacher | parameters | " + " | ".join(samplers) + " |"]
    lines += ["|---" * (2 + len(samplers)) + "|"]
    for row in rows:
        cells = [str(row["outcomes"][s]["solved"] or "-") for s in samplers]
        name = row["pattern"].replace("|", "/")
        lines.append(f"| {name} | {row['parameters']} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def rows(pool: ProcessPoolExecutor, chosen: list[int], jobs: tuple[Any, ...]) -> Iterator[Any]:
    """What is reported of each teacher, in the order in which they are through."""
    running = {pool.submit(sweeps, number, *jobs): number for number in chosen}
    for done in as_completed(running):
        task = Planted(running[done])
        yield {
            "teacher": task.number,
            "pattern": task.words(),
            "parameters": task.parameters,
            "outcomes": done.result(),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cache", type=Path, required=True, help="folder of fits and outcomes")
    parser.add_argument("--teachers", type=int, default=20)
    parser.add_argument("--trials", type=int, default=60)
    parser.add_argument("--samplers", nargs="+", choices=SAMPLERS, default=list(SAMPLERS))
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--results", type=Path, default=RESULTS / "planted.json")
    options = parser.parse_args()
    options.cache.mkdir(parents=True, exist_ok=True)
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.processes, mp_context=spawn) as pool:
        chosen, looked = teachers(pool, options.teachers, options.cache)
        found: list[Any] = []
        for row in rows(pool, chosen, (options.samplers, options.trials, options.cache)):
            found = sorted([*found, row], key=lambda r: r["teacher"])
            shown = {s: o["solved"] for s, o in row["outcomes"].items()}
            print(row["teacher"], row["pattern"], row["parameters"], shown, flush=True)
            result = {
                "machine": machine(),
                "space": space().size(),
                "trials": options.trials,
                "looked": looked,
                "teachers": found,
            }
            for path, text in (
                (options.results, json.dumps(result) + "\n"),
                (options.results.with_suffix(".md"), report(result)),
            ):
                part = path.with_name(f".{path.name}.part")
                part.write_text(text)
                part.replace(path)
    print(report(result))


if __name__ == "__main__":
    main()
