"""Trainings that are done once: kept as JSON lines, so that what was killed goes on."""

from __future__ import annotations

import json
import math
import os
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..codec import digest
from ..config import SweepConfig
from ..task import Task, get_task
from .executor import Executor
from .worker import Job, Step


@dataclass(frozen=True)
class Training:
    """One to be done: a design as plain data, its settings and its seed."""

    design: dict[str, Any]
    train: dict[str, Any]
    seed: int

    @property
    def key(self) -> str:
        return digest([self.design, self.train, self.seed])


@dataclass(frozen=True)
class Outcome:
    """One that is done: a row an evaluation, and the costs with the test metrics; or why not."""

    key: str
    curve: list[dict[str, float]]
    costs: dict[str, float]
    error: str | None = None


class Trainings:
    """The outcomes in a file of JSON lines; `run` adds those that are missing.

    A line that was cut off by a kill is done again.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.known = path, dict[str, Outcome]()
        for line in path.read_text().splitlines() if path.exists() else ():
            try:
                outcome = Outcome(**json.loads(line))
            except (ValueError, TypeError):
                continue
            self.known[outcome.key] = outcome

    def of(self, training: Training) -> Outcome:
        return self.known[training.key]

    def missing(self, wanted: Sequence[Training]) -> list[Training]:
        return list({t.key: t for t in wanted if t.key not in self.known}.values())

    def add(self, outcome: Outcome) -> None:
        self.known[outcome.key] = outcome
        line = json.dumps(asdict(outcome)).encode() + b"\n"
        with self.path.open("ab+") as file:
            if end := file.seek(0, os.SEEK_END):
                file.seek(end - 1)
                line = line if file.read() == b"\n" else b"\n" + line
            file.write(line)

    def run(
        self,
        config: SweepConfig,
        wanted: Sequence[Training],
        executor: Executor,
        said: Callable[[str], None] = lambda text: None,
        test: bool = True,
    ) -> None:
        """Train what is missing, as a sweep of the configuration would; test: on the test set."""
        left = self.missing(wanted)
        if left:
            said(f"{len(left)} of {len(wanted)} trainings to do")
            executor.run(_Queue(self, config, left, test))


class _Queue:
    """The executor's source of what is missing."""

    def __init__(
        self, kept: Trainings, config: SweepConfig, left: Sequence[Training], test: bool
    ) -> None:
        self.kept, self.config, self.test = kept, config, test
        self.left = deque(enumerate(left))
        self.running: dict[int, tuple[Training, list[dict[str, float]]]] = {}
        self.metric = get_task(config.task).metric

    def next(self) -> Job | None:
        if not self.left:
            return None
        number, training = self.left.popleft()
        self.running[number] = training, []
        return Job(
            number=number,
            task=self.config.task,
            assignment=training.design,
            train=training.train,
            seed=training.seed,
            device=self.config.resources.device,
            objective=(self.metric, "maximize"),
            keep_above=math.inf,  # their weights are not wanted
            test=self.test,
            seconds=self.config.trial_time,
            share=self.config.resources.share,
        )

    def handle(self, step: Step) -> bool:
        if step.error is not None:
            self.lost(step.number, step.error)
            return False
        training, curve = self.running[step.number]
        if step.row is not None:
            curve.append(step.row)
        if step.done:
            del self.running[step.number]
            self.kept.add(Outcome(training.key, curve, step.costs or {}))
        return False

    def lost(self, number: int, why: str, memory: bool = False) -> None:
        if number in self.running:
            training, curve = self.running.pop(number)
            self.kept.add(Outcome(training.key, curve, {}, why.strip().splitlines()[-1]))


def best_of(kept: Trainings, wanted: Sequence[Training], task: Task) -> Training | None:
    """The training whose last value of the task's metric is the best."""
    sign = 1 if task.higher_is_better else -1
    sound = [t for t in wanted if kept.of(t).error is None]
    return max(sound, key=lambda t: sign * kept.of(t).curve[-1][task.metric], default=None)


def mean_curve(outcomes: Sequence[Outcome], metric: str) -> Mapping[int, float]:
    """Epoch -> mean over the seeds."""
    values: dict[int, list[float]] = {}
    for outcome in outcomes:
        for row in outcome.curve:
            values.setdefault(int(row["epoch"]), []).append(row[metric])
    return {e: sum(v) / len(v) for e, v in sorted(values.items()) if len(v) == len(outcomes)}
