"""The Optuna study of a sweep: the only truth about its trials."""

from __future__ import annotations

import logging
import math
import random
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna.trial import FrozenTrial, TrialState

from ..assignment import Assignment
from ..config import SweepConfig
from ..errors import ConfigError, PatternSearchError, SpaceError
from ..pattern import Cost
from ..sizes import Spec, model_cost, resolve
from ..space import Params, Space
from ..space_check import within
from .folders import CONFIG
from .knowledge import PatternKnowledge, identity
from .known import Row
from .pruning import Pruning
from .sampler import StructuredSampler
from .storage import JOURNAL, close_storage, mend, open_storage, own_study

optuna.logging.set_verbosity(logging.WARNING)

INTERRUPTED = "interrupted"  # the reason of trials that a resumed sweep trains again
_TRIES = 200  # points that are rejected or known, in a row, before a space counts as exhausted


@dataclass(frozen=True)
class Proposal:
    """A point to train: the trial's number in the study, what it is and where it comes from.

    tried: it was given to a worker before, which was lost or had not memory enough.
    """

    number: int
    params: Params
    assignment: Assignment
    train: dict[str, Any]
    origin: str
    cost: Cost
    digest: str
    tried: bool = False


class _Study(optuna.Study):
    """Optuna's, whose driver is alone: it looks through all trials only where some wait."""

    waiting = 0

    def _pop_waiting_trial_id(self) -> int | None:
        return super()._pop_waiting_trial_id() if self.waiting else None


class _Structured(StructuredSampler):
    """Learns nothing of a point that was cut short while it was drawn: it is drawn again."""

    def _rows(self, study: optuna.Study, trials: Sequence[FrozenTrial]) -> list[Row]:
        whole = [t for t in trials if "record" in t.user_attrs or not _interrupted(t)]
        return super()._rows(study, whole)


class _NSGAII(optuna.samplers.NSGAIISampler):
    """Parents in one order: Optuna has another before they are kept in the study than after."""

    def select_parent(self, study: optuna.Study, generation: int) -> list[FrozenTrial]:
        return sorted(super().select_parent(study, generation), key=lambda t: t.number)


class Study:
    """Ask for proposals, tell what became of them.

    Every proposal is resolved for the task, within the caps, and new: nothing is trained twice.
    A trial's state is COMPLETE, PRUNED, or FAIL with its reason in the user attribute `reason`;
    points rejected before training are FAIL too, with the attribute `rejected`.
    """

    def __init__(
        self, config: SweepConfig, space: Space, spec: Spec, folder: Path, resume: bool = False
    ) -> None:
        self.config, self.space, self.spec = config, space, spec
        if resume and config.storage is None:
            mend(folder / JOURNAL)
        opened = open_storage(config.storage, folder)
        self.storage = optuna.storages.get_storage(opened)
        self.close = partial(close_storage, opened)
        self.study = self._open(folder, own_study(opened, folder) if resume else None)
        trials = self.study.get_trials(deepcopy=False)
        self._ended = Counter(t.state.name for t in trials if trained(t))
        over = (t for t in trials if trained(t) or _smaller(t))
        self.seen = {t.user_attrs["record"]["digest"] for t in over}
        self.pruning = Pruning(config)
        for t in trials:
            if trained(t) and t.state.is_finished():
                done = t.state == TrialState.COMPLETE
                self.pruning.replay(_turn(t), curve_of(t), known_costs(t), done)
        counted = [t for t in trials if t.state.is_finished() and not _interrupted(t)]
        self.turn = len(counted)  # what was drawn so far, as if nothing had been cut short
        self.rejections = _tail(counted)
        self.study.waiting = sum(t.state == TrialState.WAITING for t in trials)
        self.knowledge = PatternKnowledge(config, space, spec)
        self.study.sampler = _sampler(config, config.seed, self.knowledge)
        self.running: dict[int, optuna.Trial] = {}
        self.static: dict[int, dict[str, float]] = {}  # costs of running trials
        self.turns: dict[int, int] = {}  # theirs, which a resumed sweep gives again

    def _open(self, folder: Path, known: str | None) -> _Study:
        """The study `known`, or a new one; ConfigError where it is of other objectives."""
        goals = self.config.objectives
        if known is None:
            known = folder.name
            try:
                directions = list(goals.values())
                optuna.create_study(study_name=known, storage=self.storage, directions=directions)
            except optuna.exceptions.DuplicatedStudyError:
                raise ConfigError(
                    f"the storage has a study {known!r} already; choose another --name"
                ) from None
        study = _Study(known, self.storage)
        begun = [direction.name.lower() for direction in study.directions]
        if begun != list(goals.values()):
            self.close()
            told = ", ".join(f"{how} {name}" for name, how in goals.items())
            raise ConfigError(
                f"{folder.name}: its study was begun to {', '.join(begun)}, which is not {told}; "
                f"give the objectives it began with, also in {folder / CONFIG}, or start a new "
                "sweep"
            )
        return study

    def reconcile(self) -> int:
        """Queue again what was cut short; fail what a dead driver left open. How many trials.

        What was cut short goes first, so that a sweep with one worker goes on as if it had never
        been interrupted: what waits is queued anew behind it.
        """
        trials = self.study.get_trials(deepcopy=False)
        queued = {t.user_attrs.get("retry_of") for t in trials}
        stale = [t for t in trials if t.number not in queued and _cut_short(t)]
        if stale:
            stale += [t for t in trials if t.state == TrialState.WAITING]
        for trial in sorted(stale, key=_first):
            self._requeue(trial)
        return sum(t.state != TrialState.WAITING for t in stale)

    def _requeue(self, trial: FrozenTrial) -> None:
        again = trial.user_attrs.get("again", {})
        if not trial.state.is_finished():
            self.storage.set_trial_user_attr(trial._trial_id, "reason", INTERRUPTED)
            self.storage.set_trial_state_values(trial._trial_id, TrialState.FAIL)
            self.study.waiting -= trial.state == TrialState.WAITING
        record = trial.user_attrs.get("record")
        if record is not None and not _smaller(trial):
            self.seen.discard(record["digest"])
        params = trial.params if record else trial.system_attrs.get("fixed_params")
        if params is not None:  # else it was cut short while it was drawn, and is drawn again
            kept = {k: v for k, v in trial.user_attrs.items() if k in ("train", "tried")} | again
            origin = record["origin"] if record else trial.user_attrs["origin"]
            kept |= {"retry_of": trial.number, "first": _first(trial)}
            self._enqueue(params, origin, kept, trial.system_attrs)

    def enqueue_once(self, params: Params, origin: str) -> None:
        """Queue a first trial, unless it was before the sweep was cut short."""
        if not any(t.user_attrs.get("origin") == origin for t in self.study.get_trials(False)):
            self._enqueue(params, origin)

    def enqueue_experts(self) -> None:
        """Queue the designs an expert would start from, in the order of the space's file."""
        for name, params in self.space.experts.items():
            self.enqueue_once(self.space.point(params)[0], name)

    def _enqueue(
        self, params: Params, origin: str, attrs: Params | None = None, own: Params | None = None
    ) -> None:
        """As Optuna does; own: what its samplers keep of a trial, such as its generation."""
        waiting = optuna.trial.create_trial(
            state=TrialState.WAITING,
            system_attrs={**(own or {}), "fixed_params": params},
            user_attrs={"origin": origin, **(attrs or {})},
        )
        self.study.add_trial(waiting)
        self.study.waiting += 1

    def ask(self) -> Proposal | None:
        """The next point to train; None where the space has no new one to offer.

        What is drawn follows from the seed and the study alone, so that it is drawn again where a
        sweep was cut short.
        """
        while self.rejections < _TRIES or self.study.waiting:
            seed = int(np.random.SeedSequence([self.config.seed, self.turn]).generate_state(1)[0])
            if self.rejections and self.rejections % 5 == 0 and not self.study.waiting:
                self._enqueue_unseen(random.Random(seed))
            if self.config.sampler != "structured":  # which draws from the study, whenever made
                self.study.sampler = _sampler(self.config, seed, self.knowledge)
            trial = self.study.ask()
            self.study.waiting -= trial.user_attrs.get("origin") is not None
            self.turn += 1
            try:
                proposal = self._propose(trial)
            except PatternSearchError as e:
                self.rejections += 1
                self._reject(trial, str(e))
                continue
            self.rejections = 0
            self.running[trial.number] = trial
            self.static[trial.number] = known_costs(trial)
            self.turns[trial.number] = self.turn - 1
            self.seen.add(proposal.digest)
            return proposal
        return None

    def _propose(self, trial: optuna.Trial) -> Proposal:
        """Raises the reason where the trial's point cannot or need not be trained."""
        assignment, train = self.space.suggest(trial)
        assignment = resolve(assignment, self.spec)
        train = {**train, **trial.user_attrs.get("train", {})}
        settings = {**self.config.train.model_dump(), **train}
        name = identity(self.config, assignment, train)
        cost = model_cost(assignment, self.spec)
        within(cost, self.config.caps)
        if name in self.seen:
            raise SpaceError(f"the same as an earlier trial ({name})")
        origin = trial.user_attrs.get("origin", self.config.sampler)
        record = {
            "digest": name,
            "origin": origin,
            "assignment": assignment.to_dict(),
            "train": settings,
            "parameters": cost.parameters,
            "flops": cost.flops,
            "turn": self.turn - 1,
        }
        trial.set_user_attr("record", record)
        tried = bool(trial.user_attrs.get("tried", False))
        return Proposal(trial.number, trial.params, assignment, settings, origin, cost, name, tried)

    def _reject(self, trial: optuna.Trial, why: str) -> None:
        trial.set_user_attr("rejected", why)
        self.study.tell(trial, state=TrialState.FAIL)

    def _enqueue_unseen(self, rng: random.Random) -> None:
        """Help a sampler that repeats itself: a neighbour of a good trial, or a random point."""
        done = self.study.get_trials(states=(TrialState.COMPLETE,), deepcopy=False)
        if done and rng.random() < 0.7:
            best = sorted(done, key=self._rank)[: max(1, len(done) // 4)]
            params = self.space.neighbour(rng.choice(best).params, rng)
        else:
            params = self.space.point({}, rng)[0]
        self._enqueue(params, "neighbour")

    def _rank(self, trial: FrozenTrial) -> float:
        value: float = trial.values[0]
        return -value if self.study.directions[0].name == "MAXIMIZE" else value

    def report(self, number: int, row: Mapping[str, float], costs: Mapping[str, float]) -> bool:
        """Take an evaluation and what was measured so far; whether the trial should stop."""
        trial, names = self.running[number], list(self.config.objectives)
        if len(names) == 1 and names[0] in row:  # Optuna keeps these for one objective only
            trial.report(row[names[0]], int(row["epoch"]))
        costs = {**self.static[number], **costs}
        return self.pruning.report(self.turns[number], row, costs)

    def end(
        self,
        number: int,
        state: str,
        values: Mapping[str, float],
        why: str | None = None,
        curve: Sequence[Mapping[str, float]] = (),
    ) -> str:
        """Tell what became of a trial; the state it got. An objective of nan fails it."""
        trial = self.running.pop(number)
        found = [values[name] for name in self.config.objectives] if state == "COMPLETE" else None
        if found is not None and not all(map(math.isfinite, found)):
            state, found, why = "FAIL", None, f"an objective is not a number: {found}"
        if values:
            trial.set_user_attr("values", dict(values))
        if curve:
            trial.set_user_attr("curve", {k: [row[k] for row in curve] for k in curve[0]})
        if why is not None:
            trial.set_user_attr("reason", why)
        self.pruning.end(self.turns.pop(number), state == "COMPLETE")
        del self.static[number]
        self.study.tell(trial, found, state=TrialState[state])
        self._ended[state] += why != INTERRUPTED
        return state

    def try_again(self, number: int, why: str, train: Mapping[str, Any]) -> None:
        """Fail a trial and queue it once more, with other settings of training."""
        trial = self.running.pop(number)
        trial.set_user_attr("reason", why)
        trial.set_user_attr("again", {"train": dict(train), "tried": True})
        self.pruning.end(self.turns.pop(number), False)
        del self.static[number]
        self.study.tell(trial, state=TrialState.FAIL)
        self._requeue(self.study.get_trials(deepcopy=False)[number])

    def best(self) -> FrozenTrial | None:
        """The best trial by the first objective so far; of equal ones the first by number."""
        done = self.study.get_trials(states=(TrialState.COMPLETE,), deepcopy=False)
        return min(done, key=lambda t: (self._rank(t), t.number), default=None)

    def counts(self) -> dict[str, int]:
        """How many trials are complete, pruned and failed; rejected points are not counted."""
        return {name: self._ended[name] for name in ("COMPLETE", "PRUNED", "FAIL")}


def trained(trial: FrozenTrial) -> bool:
    """Whether a trial took a worker, and was not to be run again."""
    attrs = trial.user_attrs
    return "record" in attrs and attrs.get("reason") != INTERRUPTED and "again" not in attrs


def curve_of(trial: FrozenTrial) -> Iterator[dict[str, float]]:
    """What was evaluated of a trial that is over, a row an evaluation."""
    columns: Mapping[str, list[float]] = trial.user_attrs.get("curve", {})
    for row in zip(*columns.values(), strict=True):
        yield dict(zip(columns, row, strict=True))


def known_costs(trial: FrozenTrial | optuna.Trial) -> dict[str, float]:
    """What is known of a trial's costs: before training always, measured ones once it is over."""
    record = trial.user_attrs["record"]
    static = {"parameters": record["parameters"], "flops": record["flops"]}
    return {**static, **trial.user_attrs.get("values", {})}


def _smaller(trial: FrozenTrial) -> bool:
    """Whether a trial is run again with other settings, as what it was it never is."""
    return bool(trial.user_attrs.get("again", {}).get("train"))


def _cut_short(trial: FrozenTrial) -> bool:
    left = trial.state == TrialState.RUNNING or "again" in trial.user_attrs
    return left or _interrupted(trial)


def _interrupted(trial: FrozenTrial) -> bool:
    return trial.user_attrs.get("reason") == INTERRUPTED


def _turn(trial: FrozenTrial) -> int:
    """What a trial's bracket is chosen by: its number, had nothing been cut short."""
    return int(trial.user_attrs["record"].get("turn", trial.number))


def is_past(trial: FrozenTrial) -> bool:
    """Whether a trial took a worker and was over by itself."""
    attrs = trial.user_attrs
    over = trial.state.is_finished() and attrs.get("reason") != INTERRUPTED
    return over and "record" in attrs


def _first(trial: FrozenTrial) -> int:
    """The number under which a trial was queued at first."""
    return int(trial.user_attrs.get("first", trial.number))


def _tail(trials: list[FrozenTrial]) -> int:
    """How many of the last trials were rejected in a row."""
    kept = (i for i, t in enumerate(reversed(trials)) if "rejected" not in t.user_attrs)
    return next(kept, len(trials))


def _sampler(
    config: SweepConfig, seed: int, knowledge: PatternKnowledge
) -> optuna.samplers.BaseSampler:
    startup = max(10, config.trials // 3)  # conditional spaces need a look at every branch first
    makers: dict[str, Callable[[], optuna.samplers.BaseSampler]] = {
        "tpe": lambda: optuna.samplers.TPESampler(
            seed=seed, multivariate=True, group=True, constant_liar=True, n_startup_trials=startup
        ),
        "gp": lambda: optuna.samplers.GPSampler(seed=seed, n_startup_trials=startup),
        "nsga2": lambda: _NSGAII(seed=seed, population_size=16),
        "random": lambda: optuna.samplers.RandomSampler(seed=seed),
        "structured": lambda: _Structured(
            config.seed, knowledge=knowledge, startup=min(24, config.trials // 2), spread=1 / 3
        ),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)  # settled for years
        return makers[config.sampler]()
