"""The best trials and the expert designs, trained again from fresh seeds.

The best of many noisy trials is in part the luckiest one. So the winner is chosen by its mean
over seeds that the search has not seen, and only then is the test metric read: of the winner, and
of every expert design trained the same way.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from .. import describe
from ..assignment import Assignment
from ..codec import digest
from ..config import Confirm
from ..errors import PatternSearchError
from ..sizes import Spec, model_cost, resolve
from ..space import FixedTrial, load_space
from ..space_check import within
from ..task import get_task
from ..yamlfile import read_yaml, write_yaml
from .executor import Executor
from .folders import SPACE
from .interval import Estimate, difference, estimate
from .worker import Job, Step

if TYPE_CHECKING:
    from .results import Results, TrialRecord

T = TypeVar("T")
FILE = "confirm.yaml"
_HEADER = (
    "Trained again from fresh seeds, the metric by seed: on the validation set and, of the winner "
    "and the expert designs, on the test set."
)


@dataclass
class Again:
    """One design trained again. valid, test: the metric by seed; failed: reason by seed."""

    name: str
    trial: int | None
    expert: bool
    pattern: str
    parameters: int
    flops: int
    key: str
    assignment: dict[str, Any]
    train: dict[str, Any]
    valid: dict[int, float] = field(default_factory=dict)
    test: dict[int, float] = field(default_factory=dict)
    failed: dict[int, str] = field(default_factory=dict)
    seconds: float = 0.0

    def has(self, seeds: Sequence[int]) -> bool:
        """Whether it was trained from all of these seeds, with or without success."""
        return set(seeds) <= self.valid.keys() | self.failed.keys()

    def only(self, seeds: Sequence[int]) -> Again:
        """Its runs from these seeds alone."""
        valid, test = _only(self.valid, seeds), _only(self.test, seeds)
        return replace(self, valid=valid, test=test, failed=_only(self.failed, seeds))

    def mean(self) -> Estimate:
        return estimate(list(self.valid.values()))

    def tested(self) -> Estimate | None:
        return estimate(list(self.test.values())) if self.test else None

    def summary(self, metric: str) -> dict[str, Any]:
        """Mean and half of the 95 % interval, for a YAML."""
        found: dict[str, Any] = {"seeds": len(self.valid), metric: _pair(self.mean())}
        test = self.tested()
        return found | ({f"test_{metric}": _pair(test)} if test is not None else {})


def _only(runs: Mapping[int, T], seeds: Sequence[int]) -> dict[int, T]:
    return {seed: runs[seed] for seed in seeds if seed in runs}


def _pair(value: Estimate) -> list[float]:
    return [round(value.mean, 6), round(value.half, 6)]


@dataclass
class Confirmed:
    """The designs of a sweep that were trained again, best first, and the winner's name.

    The winner was chosen over `seeds`. What rows have besides is of a command that was ended before
    it could choose, and waits for the next one: nothing is trained twice.
    """

    metric: str
    direction: str
    seeds: list[int] = field(default_factory=list)
    rows: list[Again] = field(default_factory=list)
    winner: str | None = None

    def table(self) -> Confirmed:
        """What was compared: the designs that were trained from all seeds, and those runs."""
        through = [row for row in self.rows if self.seeds and row.has(self.seeds)]
        return replace(self, rows=[row.only(self.seeds) for row in through])

    def add(self, designs: Sequence[Again]) -> None:
        """Take designs in, known ones with their runs; those that failed are to be done again."""
        known = {row.key: row for row in self.rows}
        for row in designs:
            before = known.get(row.key)
            if before is None:
                self.rows.append(row)
                continue
            before.failed.clear()
            if row.trial is not None:
                before.name, before.trial = row.name, row.trial

    def best(self) -> Again | None:
        return next((row for row in self.rows if row.name == self.winner), None)

    def has(self, trials: Sequence[TrialRecord]) -> bool:
        """Whether these trials are among them."""
        return {t.number for t in trials} <= {row.trial for row in self.rows}

    def experts(self) -> list[Again]:
        return [row for row in self.rows if row.expert]

    def left(self, keys: set[str], seeds: Sequence[int]) -> list[tuple[Again, int]]:
        """The runs of these designs that are missing; once none is, the winner is chosen.

        Its test metric may be missing then, where it is another than before.
        """
        rows = [row for row in self.rows if row.key in keys]
        if missing := [(row, s) for row in rows for s in seeds if not row.has([s])]:
            return missing
        self._choose(seeds)
        rows = [row for row in self.rows if row.has(seeds) and self._tested(row)]
        return [(row, s) for row in rows for s in seeds if s not in row.test.keys() | row.failed]

    def _choose(self, seeds: Sequence[int]) -> None:
        """Sort by the mean, what is not through at the end; the first of the trials wins."""
        self.seeds, sign = list(seeds), -1 if self.direction == "maximize" else 1

        def rank(row: Again) -> tuple[bool, bool, float]:
            runs = row.only(seeds)
            return not row.has(seeds), bool(runs.failed), sign * runs.mean().mean

        self.rows.sort(key=rank)
        sound = [row for row in self.table().rows if row.trial is not None and row.valid]
        self.winner = sound[0].name if sound else None

    def _tested(self, row: Again) -> bool:
        return row.expert or row.name == self.winner

    def hide(self) -> None:
        """Forget the test metric of all but the winner and the expert designs."""
        for row in self.rows:
            if not self._tested(row):
                row.test.clear()

    def verdict(self) -> str:
        """The winner beside the best expert design, on the test set, as a sentence."""
        best = self.best()
        rivals = [r for r in self.experts() if r is not best and len(r.test) > 1]
        if best is None or best.expert or not rivals or len(best.test) < 2:
            return ""
        sign = 1 if self.direction == "maximize" else -1
        rival = max(rivals, key=lambda r: sign * estimate(list(r.test.values())).mean)
        gap = difference(list(best.test.values()), list(rival.test.values()))
        says = f"The test {self.metric} of {best.name} minus that of the best expert design, "
        says += f"{rival.name}, is {gap.mean:+.4f} ± {gap.half:.4f} (95 % interval): "
        if abs(gap.mean) <= gap.half:
            return says + "these seeds do not tell them apart."
        return says + f"it is {'better' if sign * gap.mean > 0 else 'worse'}."

    def save(self, folder: Path) -> None:
        write_yaml(folder / FILE, asdict(self), _HEADER)


def read_confirmed(folder: Path) -> Confirmed | None:
    """What was trained again in a sweep's folder, as far as it came."""
    if not (folder / FILE).exists():
        return None
    data = read_yaml(folder / FILE)
    return Confirmed(**{**data, "rows": [Again(**row) for row in data["rows"]]})


def designs(results: Results, top: int, more: Sequence[TrialRecord] = ()) -> list[Again]:
    """The best finished trials (of the front, where there is one), `more`, and the expert designs.

    An expert design is trained as it was in the sweep; one that is over a cap is left out.
    """
    chosen = [*results.ranked()[:top], *more]
    spec = get_task(results.config.task).spec
    rows: dict[str, Again] = {}
    for trial in chosen:
        row = _again(trial.assignment, trial.train, spec, f"trial {trial.number}")
        row.trial = trial.number
        rows[row.key] = row
    space = load_space(results.folder / SPACE)
    for name, params in space.experts.items() if results.config.experts else ():
        assignment, own = space.suggest(FixedTrial(params, None))
        assignment = resolve(assignment, spec)
        try:
            within(model_cost(assignment, spec), results.config.caps)
        except PatternSearchError:
            continue
        row = _again(assignment, {**results.config.train.model_dump(), **own}, spec, name)
        known = rows.setdefault(row.key, row)
        known.expert = True
        if known is not row:
            known.name = f"{known.name}, {name}"
    return list(rows.values())


def _again(assignment: Assignment, train: dict[str, Any], spec: Spec, name: str) -> Again:
    cost, data = model_cost(assignment, spec), assignment.to_dict()
    return Again(
        name=name,
        trial=None,
        expert=False,
        pattern=describe.short(assignment),
        parameters=cost.parameters,
        flops=cost.flops,
        key=digest([data, train]),
        assignment=data,
        train=train,
    )


class Confirmation:
    """The executor's source of the runs that are left; every one is on disk when it is over."""

    def __init__(
        self,
        confirmed: Confirmed,
        left: Sequence[tuple[Again, int]],
        results: Results,
        stopped: Callable[[], bool],
    ) -> None:
        self.confirmed, self.config, self.folder = confirmed, results.config, results.folder
        self.stopped = stopped
        self.left = deque(left)
        self.running: dict[int, tuple[Again, int]] = {}
        self.progress: Callable[[], None] = lambda: None

    def next(self) -> Job | None:
        if not self.left or self.stopped():
            return None
        row, seed = self.left.popleft()
        number = len(self.left)
        self.running[number] = row, seed
        return Job(
            number=number,
            task=self.config.task,
            assignment=row.assignment,
            train=row.train,
            seed=seed,
            device=self.config.resources.device,
            objective=(self.confirmed.metric, "maximize"),
            keep_above=math.inf,  # their weights are not wanted
            test=True,
            seconds=self.config.trial_time,
            share=self.config.resources.share,
        )

    def handle(self, step: Step) -> bool:
        row, seed = self.running[step.number]
        metric = self.confirmed.metric
        if step.error is not None:
            self.lost(step.number, step.error)
        elif step.done and step.row is not None and step.costs is not None:
            row.valid[seed] = step.row[metric]
            row.test[seed] = step.costs[f"test_{metric.removeprefix('valid_')}"]
            row.seconds += step.costs["seconds"]
            self._over(step.number)
        return self.stopped()

    def lost(self, number: int, why: str, memory: bool = False) -> None:
        if number in self.running and not self.stopped():
            row, seed = self.running[number]
            row.failed[seed] = why.strip().splitlines()[-1]
            self._over(number)

    def _over(self, number: int) -> None:
        del self.running[number]
        self.confirmed.save(self.folder)
        self.progress()


def confirm(
    results: Results,
    wanted: Confirm,
    executor: Executor,
    console: Console,
    stopped: Callable[[], bool] = lambda: False,
) -> Confirmed | None:
    """Train again what was not yet, and choose the winner; None where it was stopped before.

    Designs that were compared before stay in the table, and all of it is over the same seeds: a
    smaller command takes nothing away, and one of more seeds brings them to all.
    """
    confirmed = read_confirmed(results.folder) or Confirmed(*judged(results))
    rows = designs(results, wanted.top)
    keys = {row.key for row in [*confirmed.table().rows, *rows]}
    fresh = range(results.config.seed + 1, results.config.seed + 1 + wanted.seeds)
    seeds = sorted({*confirmed.seeds, *fresh})
    confirmed.add(rows)
    while left := confirmed.left(keys, seeds):
        source = Confirmation(confirmed, left, results, stopped)
        _run(source, executor, console)
        if source.left or source.running:
            return None
    confirmed.hide()
    confirmed.save(results.folder)
    return confirmed.table()


def _run(source: Confirmation, executor: Executor, console: Console) -> None:
    designs = len({row.key for row, _ in source.left})
    title = f"{len(source.left)} runs of {designs} {'design' if designs == 1 else 'designs'} again"
    title += " from fresh seeds"
    columns = (TextColumn(title), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    if not console.is_terminal:
        console.print(title, soft_wrap=True)
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(title, total=len(source.left))
        source.progress = lambda: bar.advance(task)
        executor.run(source)


def judged(results: Results) -> tuple[str, str]:
    """The metric that is looked at again, and its direction: one that every task's test has."""
    task = get_task(results.config.task)
    if results.metric == "valid_loss":
        return "valid_loss", "minimize"
    return task.metric, "maximize" if task.higher_is_better else "minimize"


def lines(confirmed: Confirmed) -> list[str]:
    """What came out, for the terminal."""
    n = len(confirmed.seeds)
    found = [f"Trained again from {n} fresh seeds, mean and 95 % interval:"]
    width = max(len(row.name) for row in confirmed.rows)
    for row in confirmed.rows:
        test = f", test {row.tested()}" if row.test else ""
        reasons = "; ".join(sorted(set(row.failed.values())))
        failed = f", {len(row.failed)} of {n} failed ({reasons})" if row.failed else ""
        mark = "  *winner*" if row.name == confirmed.winner else ""
        found.append(
            f"  {row.name:<{width}}  validation {confirmed.metric} {row.mean()}{test}{failed}, "
            f"{row.parameters:,} parameters{mark}"
        )
    return [*found, *([confirmed.verdict()] if confirmed.verdict() else [])]
