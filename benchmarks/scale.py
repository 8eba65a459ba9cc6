"""What the driver of a sweep does a trial, as the trials become many: 200 workers that only sleep.

    python benchmarks/scale.py

The driver is the real one: `Sweep` with the configuration of the digits, its study in a journal or
a database, its record in MLflow, its files. Only the workers are simulated: trials take a random
time of a virtual clock, report ten times and end with a value that is a fixed function of their
parameters. After every call of the driver its record is waited for, so that all of the work is
counted, once, and to the trial that it is for. Work is CPU time of all threads, with the wall time
beside it. Points are drawn at random here, and what that takes is not in the work. `--storage`
takes several: `journal` and URLs of databases, in which {folder} is an empty folder.

What a sampler takes is measured beside it: a study in memory of so many ended trials and one for
every worker, then CPU time of the next proposals. Writes benchmarks/results/scale.json and .md.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import heapq
import io
import json
import os
import random
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import fmean
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import optuna
from rich.console import Console
from small_tasks import RESULTS, machine

from patternsearch.config import load_config
from patternsearch.errors import PatternSearchError
from patternsearch.search.executor import Source
from patternsearch.search.knowledge import PatternKnowledge
from patternsearch.search.sampler import StructuredSampler
from patternsearch.search.setup import complete
from patternsearch.search.sweep import Sweep
from patternsearch.search.worker import Job, Step
from patternsearch.space import load_space
from patternsearch.task import get_task

WORKERS, REPORTS = 200, 10
AT = (10, 100, 1000, 5000)
CALLS = ("infer_relative_search_space", "sample_relative", "sample_independent")
PROPOSALS = 20
Times = tuple[float, float, float]  # seconds: CPU of all threads, wall, CPU of the sampler


class Clock:
    """Times of calls, with the sampler's apart."""

    def __init__(self) -> None:
        self.sampler, self.inside = 0.0, False

    def watch(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **keywords: Any) -> Any:
            if self.inside:
                return method(*args, **keywords)
            self.inside, began = True, time.thread_time()
            try:
                return method(*args, **keywords)
            finally:
                self.inside = False
                self.sampler += time.thread_time() - began

        return timed

    def now(self) -> Times:
        return time.process_time(), time.perf_counter(), self.sampler


class Sleepers:
    """An executor whose trials only take time, of a clock that does not wait for it."""

    def __init__(self, clock: Clock, names: dict[str, str]) -> None:
        self.clock, self.names = clock, names
        self.rows: list[dict[str, Any]] = []
        self.spent: dict[int, list[float]] = defaultdict(lambda: [0.0] * 3)
        self.order: list[int] = []  # trials in the order of their ends

    def start(self) -> None:
        """Nothing to get ready."""

    def stop(self) -> None:
        """Nothing to let go of."""

    def run(self, source: Source) -> None:
        assert isinstance(source, Sweep)
        events: list[tuple[float, int, int]] = []  # when, trial, report
        jobs: dict[int, Job] = {}
        now, more = 0.0, True
        while True:
            while more and len(jobs) < WORKERS:
                job = self._measured(source, lambda _: source.next(), None)
                if (more := job is not None) and job is not None:
                    jobs[job.number] = job
                    heapq.heappush(events, (now + pause(job, 1), job.number, 1))
            if not events:
                return
            now, number, report = heapq.heappop(events)
            step = reported(jobs[number], report)
            if self._measured(source, source.handle, step) or step.done:
                del jobs[number]
                self.order.append(number)
                if len(self.order) in AT:
                    self._count()
            else:
                heapq.heappush(events, (now + pause(jobs[number], report), number, report + 1))

    def _measured(self, source: Sweep, call: Callable[[Any], Any], step: Step | None) -> Any:
        before = self.clock.now()
        result = call(step)
        written(source)
        number = step.number if step is not None else result.number if result is not None else -1
        spent = self.spent[number]
        for i, (a, b) in enumerate(zip(before, self.clock.now(), strict=True)):
            spent[i] += b - a
        return result

    def _count(self) -> None:
        """A row of the last tenth of the trials so far, at least ten."""
        at = len(self.order)
        last = [self.spent[n] for n in self.order[at - max(10, at // 10) :]]
        work = [1e3 * (cpu - sampler) for cpu, _, sampler in last]
        wall = [1e3 * (wall - sampler) for _, wall, sampler in last]
        asked = [1e3 * sampler for *_, sampler in last]
        names = ("work_ms", "work_most_ms", "wall_ms", "sampler_ms", "sampler_most_ms")
        numbers = (fmean(work), max(work), fmean(wall), fmean(asked), max(asked))
        values = dict(zip(names, (round(v, 1) for v in numbers), strict=True))
        self.rows.append({**self.names, "trials": at, **values})
        print(self.rows[-1], flush=True)


def written(sweep: Sweep) -> None:
    """Wait until the record has everything it was told."""
    done = threading.Event()
    sweep.tracker._put(done.set)
    done.wait()


def pause(job: Job, report: int) -> float:
    return random.Random(f"{job.number}/{report}").expovariate(1)


def reported(job: Job, report: int) -> Step:
    """What a trial of these patterns would say: better with every epoch, by a fixed rate."""
    text = json.dumps([job.assignment, job.train], sort_keys=True, default=str)
    quality = int(hashlib.md5(text.encode()).hexdigest()[:8], 16) / 16**8
    epochs = job.train["epochs"]
    metric = 0.1 + 0.8 * quality * (1 - 0.5 ** (1 + 4 * report / REPORTS))
    row = {"epoch": float(epochs * report // REPORTS), "accuracy": metric, "valid_loss": 1 - metric}
    row |= {"train_loss": 1 - metric, "seconds": report / 10}
    done = report == REPORTS
    costs = {"latency_ms": 1.0, "memory_mb": 1.0, "seconds": 1.0} if done else None
    return Step(job.number, row, done, costs)


@contextlib.contextmanager
def watched(clock: Clock) -> Iterator[None]:
    kind = optuna.samplers.RandomSampler
    old = {call: getattr(kind, call) for call in CALLS}
    for call, method in old.items():
        setattr(kind, call, clock.watch(method))
    try:
        yield
    finally:
        for call, method in old.items():
            setattr(kind, call, method)


def driven(trials: int, storage: str) -> list[dict[str, Any]]:
    """A sweep of so many trials; a row for each of `AT`."""
    clock = Clock()
    sleepers = Sleepers(clock, {"study in": storage.split(":")[0]})
    with tempfile.TemporaryDirectory() as folder, watched(clock):
        root = Path(folder)
        url = None if storage == "journal" else storage.format(folder=folder)
        config = load_config("digits", trials=trials, sampler="random", storage=url)
        place, console = root / "sweeps" / "scale", Console(file=io.StringIO())
        sweep = Sweep(config, place, console, executor=lambda _: sleepers)
        sweep.prepare()
        written(sweep)  # opening a store takes seconds, once a sweep
        sweep.run()
        sweep.close("FINISHED")
        assert sweep.tracker.problem is None and sweep.done == trials, sweep.tracker.problem
    return sleepers.rows


def asked(trials: list[int]) -> Iterator[dict[str, Any]]:
    """CPU time of a proposal by each sampler where so many trials have ended; a row each."""
    task = get_task("digits")
    config = complete(load_config("digits", trials=max(trials)), task)
    assert config.space is not None
    space, rng = load_space(config.space), random.Random(0)
    study = optuna.create_study(direction="maximize")
    spread = optuna.samplers.RandomSampler(0)
    knowledge = PatternKnowledge(config, space, task.spec)
    samplers = {
        "structured": StructuredSampler(0, knowledge=knowledge, startup=24, spread=1 / 3),
        "tpe": optuna.samplers.TPESampler(seed=0, multivariate=True, group=True),
    }

    def ask(sampler: optuna.samplers.BaseSampler) -> optuna.Trial:
        study.sampler = sampler
        trial = study.ask()
        with contextlib.suppress(PatternSearchError):
            space.suggest(trial)
        return trial

    for count in trials:
        while len(study.get_trials(False)) < count:
            study.tell(ask(spread), rng.random())
        running = [ask(spread) for _ in range(WORKERS)]
        for name, sampler in samplers.items():
            spent = []
            for _ in range(PROPOSALS + 1):  # the first one looks at what the others ended
                began = time.process_time()
                trial = ask(sampler)
                spent.append(1e3 * (time.process_time() - began))
                study.tell(trial, state=optuna.trial.TrialState.FAIL)
            values = {"sampler_ms": fmean(spent[1:]), "sampler_most_ms": max(spent[1:])}
            values = {key: round(value, 1) for key, value in values.items()}
            yield {"sampler": name, "trials": count, **values}
        for trial in running:
            study.tell(trial, rng.random())


def table(title: str, columns: dict[str, str], rows: list[dict[str, Any]]) -> list[str]:
    lines = ["", f"## {title}", "", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for row in rows:
        lines.append("| " + " | ".join(text.format(**row) for text in columns.values()) + " |")
    return lines


def write(report: dict[str, Any], output: Path) -> None:
    output.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
    lines = [
        "# A sweep with many trials and workers",
        "",
        f"`benchmarks/scale.py` on {report['machine']}. {report['note']}".strip(),
    ]
    work = {
        "study in": "{study in}",
        "trials": "{trials:,}",
        "CPU, ms (most)": "{work_ms} ({work_most_ms})",
        "wall, ms": "{wall_ms}",
    }
    what = f"The driver's work a trial, {WORKERS} simulated workers, {REPORTS} reports a trial"
    lines += table(f"{what}; mean of the last tenth", work, report["driver"])
    cost = {
        "sampler": "{sampler}",
        "ended trials": "{trials:,}",
        "CPU, ms (most)": "{sampler_ms} ({sampler_most_ms})",
    }
    proposals = f"A proposal while {WORKERS} trials run, mean of {PROPOSALS}"
    lines += table(proposals, cost, report["samplers"])
    output.with_suffix(".md").write_text("\n".join(lines) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=AT[-1])
    parser.add_argument("--storage", nargs="+", default=["journal"])
    parser.add_argument("--note", default="", help="what else the machine was doing")
    parser.add_argument("--output", type=Path, default=RESULTS / "scale")
    options = parser.parse_args()
    report: dict[str, Any] = {"machine": machine(), "note": options.note}
    report |= {"workers": WORKERS, "reports": REPORTS, "driver": [], "samplers": []}
    for storage in options.storage:
        report["driver"] += driven(options.trials, storage)
        write(report, options.output)
    for row in asked([n for n in AT if n <= options.trials]):
        print(row, flush=True)
        report["samplers"].append(row)
        write(report, options.output)


if __name__ == "__main__":
    main()
