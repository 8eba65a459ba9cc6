"""What runs in a worker: trials by number, with the task's data loaded once a process."""

from __future__ import annotations

import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from safetensors.torch import save

from ..assignment import Assignment
from ..codec import decode
from ..errors import PatternSearchError
from ..task import Task, open_task
from ..train import Splits, TrainSettings, TrialRun


@dataclass(frozen=True)
class Job:
    """A trial as plain data: what travels to a worker.

    Its weights come back where `objective` (a name and a direction) ends better than `keep_above`.
    """

    number: int
    task: str
    assignment: dict[str, Any]
    train: dict[str, Any]
    seed: int
    device: str
    objective: tuple[str, str]
    keep_above: float | None = None

    def improves(self, values: Mapping[str, float]) -> bool:
        name, direction = self.objective
        if self.keep_above is None:
            return True
        better = values[name] > self.keep_above
        return better if direction == "maximize" else values[name] < self.keep_above


@dataclass(frozen=True)
class Step:
    """One report of a trial; `done` with `costs` or `error` ends it. `weights` are safetensors."""

    number: int
    row: dict[str, float] | None = None
    done: bool = False
    costs: dict[str, float] | None = None
    error: str | None = None
    weights: bytes | None = None


@lru_cache(maxsize=4)
def task_on(name: str, device: str) -> tuple[Task, Splits]:
    """A task and its data on the device, loaded once a process."""
    task, data = open_task(name)
    return task, Splits(data, torch.device(device))


class Worker:
    """Runs one trial after another, a step a call; no exception leaves it."""

    def __init__(self) -> None:
        torch.set_num_threads(1)
        self.job: Job | None = None
        self.run: TrialRun | None = None
        self.failed: str | None = None
        self.busy = 0.0  # seconds of work on this trial, waiting between steps left out

    def start(self, job: Job) -> None:
        self.job, self.run, self.failed = job, None, None
        started = time.perf_counter()
        try:
            task, splits = task_on(job.task, job.device)
            assignment = Assignment.from_dict(job.assignment)
            settings = decode(TrainSettings, job.train, "train")
            self.run = TrialRun(assignment, task, splits, settings, job.seed)
        except Exception as e:  # the trial fails with its reason; the worker lives on
            self.failed = reason(e)
        self.busy = time.perf_counter() - started

    def step(self) -> Step:
        assert self.job is not None
        number = self.job.number
        if self.run is None:
            return Step(number, done=True, error=self.failed)
        started = time.perf_counter()
        try:
            row = self.run.advance()
            self.busy += time.perf_counter() - started
            if not self.run.finished:
                return Step(number, row)
            costs = {**self.run.result().costs, "seconds": self.busy}
            weights = None
            if self.job.improves({**row, **costs}):
                weights = save(self.run.model.state_dict())
            self.stop()
            return Step(number, row, done=True, costs=costs, weights=weights)
        except Exception as e:  # as above
            self.stop()
            return Step(number, done=True, error=reason(e))

    def stop(self) -> None:
        """Give up the trial and its memory."""
        self.run = None
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def reason(error: Exception) -> str:
    """One line for a user's mistake or bad luck, the traceback for a fault of the program."""
    if isinstance(error, PatternSearchError | torch.OutOfMemoryError):
        return str(error)
    return "".join(traceback.format_exception(error)).strip()
