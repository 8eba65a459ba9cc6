"""What runs in a worker: trials by number, with the task's data loaded once a process."""

from __future__ import annotations

import signal
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from safetensors.torch import save

from ..codec import decode
from ..errors import PatternSearchError
from ..evaluation import evaluate, some
from ..measure import LATENCY_BATCH, out_of_memory
from ..task import Task, open_task
from ..tasks.own import changed
from ..train import Splits, TrainSettings, TrialFailed, TrialRun, design_of


@dataclass(frozen=True)
class Job:
    """A trial as plain data: what travels to a worker. assignment: or a native baseline.

    Its weights come back where `objective` (a name and a direction) ends better than `keep_above`.
    caps: of what only a worker can measure. measure_first: latency and memory come with every
    report, and are measured before training. test: what is evaluated at the end is on the test set
    too, and comes with the costs. seconds: what it may take, hanging included. share: of the
    device's memory, where others work on it.
    """

    number: int
    task: str
    assignment: dict[str, Any]
    train: dict[str, Any]
    seed: int
    device: str
    objective: tuple[str, str]
    keep_above: float | None = None
    caps: Mapping[str, float] = field(default_factory=dict)
    measure_first: bool = False
    test: bool = False
    latency_batch: int = LATENCY_BATCH
    seconds: float | None = None
    share: float = 1.0

    def improves(self, values: Mapping[str, float]) -> bool:
        name, direction = self.objective
        if self.keep_above is None:
            return True
        better = values[name] > self.keep_above
        return better if direction == "maximize" else values[name] < self.keep_above


@dataclass(frozen=True)
class Step:
    """One report of a trial; `done` with `costs`, `over` or `error` ends it.

    over: the cap that it is over. memory: the error is that there was not enough. weights:
    safetensors.
    """

    number: int
    row: dict[str, float] | None = None
    done: bool = False
    costs: dict[str, float] | None = None
    over: str | None = None
    error: str | None = None
    memory: bool = False
    weights: bytes | None = None


def task_on(name: str, device: str) -> tuple[Task, Splits]:
    """A task and its data on the device, loaded once a process while its file stays as it is."""
    return _loaded(name, device, changed(name))


@lru_cache(maxsize=4)
def _loaded(name: str, device: str, _: int) -> tuple[Task, Splits]:
    task, data = open_task(name)
    return task, Splits(data, torch.device(device))


class Worker:
    """Runs one trial after another, a step a call; no exception leaves it."""

    def __init__(self) -> None:
        torch.set_num_threads(1)
        self.job: Job | None = None
        self.run: TrialRun | None = None
        self.failed: str | None = None
        self.measured: dict[str, float] | None = None
        self.memory = False
        self.busy = 0.0  # seconds of work on this trial, waiting between steps left out

    def start(self, job: Job) -> None:
        self.job, self.run, self.failed, self.measured = job, None, None, None
        started = time.perf_counter()
        try:
            with time_limit(job.seconds):
                if job.device == "cuda":
                    torch.cuda.set_per_process_memory_fraction(job.share)
                task, splits = task_on(job.task, job.device)
                design = design_of(job.assignment)
                settings = decode(TrainSettings, job.train, "train")
                self.run = TrialRun(design, task, splits, settings, job.seed)
                if job.measure_first:
                    self.measured = self.run.measure(job.latency_batch)
        except Exception as e:  # the trial fails with its reason; the worker lives on
            self.failed, self.memory = reason(e), out_of_memory(e)
        self.busy = time.perf_counter() - started

    def step(self) -> Step:
        assert self.job is not None
        number = self.job.number
        if self.run is None:
            return Step(number, done=True, error=self.failed, memory=self.memory)
        started = time.perf_counter()
        try:
            if over := self._over(self.measured or {}):
                self.stop()
                return Step(number, done=True, costs=self.measured, over=over)
            left = None if self.job.seconds is None else self.job.seconds - self.busy
            with time_limit(left):
                row = self.run.advance()
            self.busy += time.perf_counter() - started
            row = {**row, "seconds": self.busy}
            if self.run.finished or self._over(row):
                return self._end(row)
            return Step(number, row, costs=self.measured)
        except Exception as e:  # as above
            self.stop()
            return Step(number, done=True, error=reason(e), memory=out_of_memory(e))

    def _end(self, row: dict[str, float]) -> Step:
        """The last report, of a trial that is through or over a cap."""
        assert self.job is not None and self.run is not None
        costs = self.measured or self.run.measure(self.job.latency_batch)
        costs = {**self.run.result(costs).costs, "seconds": self.busy}
        if self.job.test:
            tested = some(self.run.splits.test, self.run.settings.test_examples)
            scores = evaluate(self.run.model, self.run.task, tested)
            costs |= {f"test_{k.removeprefix('valid_')}": v for k, v in scores.items()}
        over = self._over(row)
        weights = None
        if over is None and self.job.improves({**row, **costs}):
            weights = save(self.run.model.state_dict())
        self.stop()
        return Step(self.job.number, row, done=True, costs=costs, over=over, weights=weights)

    def _over(self, values: Mapping[str, float]) -> str | None:
        """Which cap the values are over."""
        assert self.job is not None
        for name, cap in self.job.caps.items():
            if (value := values.get(name, 0.0)) > cap:
                return f"{name}={value:.4g} is over the cap of {cap:g}"
        return None

    def stop(self) -> None:
        """Give up the trial and its memory."""
        self.run = None
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


@contextmanager
def time_limit(seconds: float | None) -> Iterator[None]:
    """Raise TrialFailed in what runs longer; only in the main thread, where signals arrive."""
    if seconds is None or threading.current_thread() is not threading.main_thread():
        yield
        return

    def ring(*_: object) -> None:
        raise TrialFailed("it ran longer than trial_time allows; give more, or a smaller space")

    old = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-3))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)


def reason(error: Exception) -> str:
    """One line for a user's mistake or bad luck, the traceback for a fault of the program."""
    if isinstance(error, PatternSearchError | torch.OutOfMemoryError):
        return str(error)
    return "".join(traceback.format_exception(error)).strip()
