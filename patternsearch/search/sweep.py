"""The sweep: proposals to workers, results to the study and the record, the best to disk."""

from __future__ import annotations

import contextlib
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from .. import describe
from ..codec import decode, encode
from ..config import METRICS, SweepConfig, saved_config
from ..errors import ConfigError
from ..export import Export, load, make_export, save
from ..space import Space, load_space
from ..space_check import check_caps, check_space
from ..store import check_store, default_uri
from ..task import get_task, open_task
from ..tracking import Tracker
from ..train import TrainSettings
from ..yamlfile import read_yaml
from .confirm import confirm
from .executor import Executor
from .folders import CONFIG, ENVIRONMENT, SPACE, STARTS, create, hold, replace
from .interrupts import bookkeeping
from .live import LiveView, Row
from .provenance import provenance
from .recording import described, known, last_line, past, texts
from .results import BEST, conclusion, export_of, export_trial, read_results, record, source_of
from .setup import check_resources, complete, make_executor, make_folder, remove_empty
from .start import Start, starts
from .storage import check_storage
from .study import INTERRUPTED, Proposal, Study, is_past
from .worker import Job, Step


@dataclass
class Running:
    """A trial that is with a worker."""

    proposal: Proposal
    curve: list[dict[str, float]] = field(default_factory=list)
    costs: dict[str, float] = field(default_factory=dict)


class Sweep:
    """One sweep in its folder: `prepare`, `run`, `close`; it is the executor's `Source`.

    The folder holds sweep.yaml (the configuration), space.yaml, study.log (the study) and the best
    pattern so far. With `resume` an interrupted sweep in it goes on. executor: makes what
    runs the trials.
    """

    def __init__(
        self,
        config: SweepConfig,
        folder: Path,
        console: Console,
        resume: bool = False,
        space: Space | None = None,
        executor: Callable[[SweepConfig], Executor] = make_executor,
    ) -> None:
        self.folder, self.console, self.resume = folder, console, resume
        self.make_executor = executor
        own = ":" in config.task  # a class of the user's; what we ship is known to be right
        self.task = open_task(config.task)[0] if own else get_task(config.task)
        self.config = complete(config, self.task)
        self.space = space or load_space(self.config.space or self.task.space)
        self.settings = decode(TrainSettings, self.config.train.model_dump(), "train")
        self._check()
        self.running: dict[int, Running] = {}
        wanted = {*self.config.objectives, *self.config.caps.measured()}
        self.measure_first = bool({"latency_ms", "memory_mb"} & wanted)
        self.exhausted = False
        self.interrupted = self.closing = False
        self.depth = 0  # of bookkeeping, which Ctrl-C does not cut
        self.dismissing: threading.Thread | None = None
        self.deadline = float("inf")

    def _check(self) -> None:
        """Whatever can go wrong before anything is written or started."""
        self.settings.check(self.task)
        check_space(self.space, self.task.spec, self.settings)
        check_caps(self.space, self.task.spec, self.config.caps)
        if self.config.address is None:  # else other machines have them
            check_resources(self.config.resources)
        uri = self.config.tracking_uri or default_uri(self.folder)
        if self.config.tracking_uri is not None or self.folder.parent.is_dir():
            check_store(uri)
        if self.resume:
            given = read_yaml(self.folder / STARTS) if (self.folder / STARTS).exists() else {}
            self.starts = [Start(origin, params) for origin, params in given.items()]
        else:
            root, sources = self.folder.parent, self.config.start_from
            self.starts = starts(sources, self.space, self.task.spec, root)
        if self.resume and read_yaml(self.folder / SPACE) != self._space():
            raise ConfigError(
                f"the space {self.config.space} is not the one {self.folder.name} was started with "
                f"({self.folder / SPACE}); go on with that one, or start a new sweep"
            )

    def _space(self) -> dict[str, Any]:
        """As its file has it."""
        names = ("assignment", "train", "experts")
        return {name: encode(getattr(self.space, name)) for name in names}

    def prepare(self) -> None:
        """Open study, record and workers; nothing is written before everything was checked."""
        open_task(self.config.task)  # data that is missing or broken is found here, not by workers
        if self.config.storage is not None:
            begun = self.resume and (self.folder / BEST).exists()
            check_storage(self.config.storage, self.folder, begun)
        if self.config.tracking_uri is None:
            make_folder(self.folder.parent)  # for the embedded store
        with contextlib.ExitStack() as undo:
            self._own_folder(undo)
            self.executor = self.make_executor(self.config)
            self.executor.start()
            undo.callback(self.executor.stop)
            uri = self.config.tracking_uri or default_uri(self.folder)
            self.tracker = Tracker(uri, self.config.task, self.folder.name, self.origin["id"])
            if self.config.tracking_uri is not None:
                self.tracker.ready()  # a server that is away is found before anything is trained
            undo.callback(self.tracker.close, "FAILED")
            self._open_study()
            self._describe()
            undo.pop_all()

    def _own_folder(self, undo: contextlib.ExitStack) -> None:
        """Make the folder, or take it over from a process that is gone."""
        if not self.resume:
            self.origin = provenance()
            files = {SPACE: self._space(), ENVIRONMENT: self.origin}
            if self.starts:
                files[STARTS] = {start.origin: start.params for start in self.starts}
            if not self.folder.parent.exists():
                undo.callback(remove_empty, self.folder.parent)
            create(self.folder, {**files, CONFIG: self.config.model_dump(exclude_none=True)})
            undo.callback(shutil.rmtree, self.folder, ignore_errors=True)
        self.lock = hold(self.folder)
        undo.callback(self.lock.release)
        self.origin = read_yaml(self.folder / ENVIRONMENT)

    def _open_study(self) -> None:
        self.study = Study(self.config, self.space, self.task.spec, self.folder, self.resume)
        self.study.reconcile()
        for start in self.starts:
            self.study.enqueue_once(start.params, start.origin)
        if self.config.experts:
            self.study.enqueue_experts()
        self.done = sum(self.study.counts()[s] for s in ("COMPLETE", "PRUNED", "FAIL"))
        best = self.study.best()
        self.best: float | None = best.values[0] if best else None
        self.best_number = best.number if best else 0
        kept = self.folder / CONFIG
        if self.resume:
            self._make_up()
            if self.done <= self.config.trials and saved_config(kept) != self.config:
                replace(kept, self.config.model_dump(exclude_none=True))  # more trials, mostly

    def _make_up(self) -> None:
        """Bring the record and the best pattern to what the study says: it is always ahead."""
        for trial in self.study.study.get_trials(deepcopy=False):
            if is_past(trial):
                self.tracker.restore(past(record(trial)))
        results = read_results(self.folder)
        winner = results.winner()
        path = self.folder / BEST
        kept = load(path).provenance.get("trial") if path.exists() else None
        if winner is not None and kept != winner.number:
            path.with_suffix(".safetensors").unlink(missing_ok=True)
            save(export_of(results, self.task, winner), path, self.header())

    def _describe(self) -> None:
        params, tags = described(self.config, self.space, self.origin)
        self.tracker.describe(params, tags, texts(self.folder))

    def run(self) -> None:
        """Train until the trials, the time or the space are used up."""
        names = list(self.config.objectives)
        title = f"{self.folder.name}: {self.config.trials} trials on {self.config.task}"
        if self.config.time is not None:
            self.deadline = time.monotonic() + self.config.time
        self.started = time.monotonic()
        self.view = LiveView(self.console, title, names[0], self.config.trials, self.done)
        with self.view:
            try:
                self.executor.run(self)
            finally:
                for number in list(self.running):
                    self.lost(number, INTERRUPTED)

    # What the executor calls.

    @bookkeeping
    def next(self) -> Job | None:
        over = self.done + len(self.running) >= self.config.trials
        if over or self.interrupted or time.monotonic() >= self.deadline:
            return None
        if (proposal := self.study.ask()) is None:
            self.exhausted = True
            return None
        self.running[proposal.number] = Running(proposal)
        pattern = describe.short(proposal.assignment)
        cost = proposal.cost
        self.view.start(Row(proposal.number, proposal.origin, pattern, cost.parameters, cost.flops))
        name = f"t{proposal.number:04} {pattern}"
        tags = {"origin": proposal.origin, "trial": proposal.number, "pattern": pattern}
        self.tracker.start(proposal.number, name, proposal.params, tags)
        return Job(
            number=proposal.number,
            task=self.config.task,
            assignment=proposal.assignment.to_dict(),
            train=proposal.train,
            seed=self.config.seed,
            device=self.config.resources.device,
            objective=next(iter(self.config.objectives.items())),
            keep_above=self.best,
            caps=self.config.caps.measured(),
            measure_first=self.measure_first,
            latency_batch=self.config.latency_batch,
            seconds=self.config.trial_time,
            share=self.config.resources.share,
        )

    @bookkeeping
    def handle(self, step: Step) -> bool:
        running = self.running[step.number]
        running.costs |= step.costs or {}
        if step.row is not None:
            running.curve.append(step.row)
        if step.error is not None and step.memory:
            self._out_of_memory(step.number, step.error)
            return False
        if step.error is not None or step.over is not None:
            state = "PRUNED" if step.error is None else "FAIL"
            self._end(step.number, state, running.costs, step.error or step.over)
            return False
        assert step.row is not None
        metric = next(iter(self.config.objectives))
        self.view.update(step.number, int(step.row["epoch"]), step.row.get(metric))
        prune = self.study.report(step.number, step.row, running.costs)
        if step.done:
            values = {**step.row, **running.costs}
            self._end(step.number, "COMPLETE", values, weights=step.weights)
            return False
        costs = {**running.costs, "seconds": step.row["seconds"]}
        if self.interrupted or time.monotonic() >= self.deadline:
            self._end(step.number, "FAIL", costs, INTERRUPTED)
            return True
        if prune:
            self._end(step.number, "PRUNED", costs)
        return prune

    @bookkeeping
    def lost(self, number: int, why: str, memory: bool = False) -> None:
        if number not in self.running:
            return
        if memory:
            self._out_of_memory(number, why)
        elif why == INTERRUPTED or self.running[number].proposal.tried:
            self._end(number, "FAIL", {}, why)
        else:
            self._again(number, why, {})

    def _out_of_memory(self, number: int, why: str) -> None:
        """Once more with half the batch, then it fails."""
        proposal = self.running[number].proposal
        batch = proposal.train["batch"]
        if proposal.tried or batch == 1:
            self._end(number, "FAIL", {}, f"out of memory with batch {batch}: {last_line(why)}")
        else:
            self._again(number, f"out of memory: {last_line(why)}", {"batch": batch // 2})

    def _again(self, number: int, why: str, train: dict[str, Any]) -> None:
        """The trial does not count, and is run once more with these settings changed."""
        running = self.running.pop(number)
        self.study.try_again(number, why, train)
        self.view.end(number, "FAIL", best=False, counts=False)
        tags = {"reason": f"{why}; run again"}
        self.tracker.finish(number, "FAIL", running.curve, known(running.proposal.cost), tags)

    def _end(
        self,
        number: int,
        state: str,
        values: dict[str, float],
        why: str | None = None,
        weights: bytes | None = None,
    ) -> None:
        running = self.running.pop(number)
        values = {k: v for k, v in values.items() if k != "epoch"}
        state = self.study.end(number, state, values, why, running.curve)
        self.done += 1
        best = state == "COMPLETE" and self._keep_best(running, values, weights)
        self.view.end(number, state, best)
        tags = {"reason": last_line(why)} if why else {}
        costs = {k: values[k] for k in METRICS if k in values}
        logged = {**known(running.proposal.cost), **costs}
        self.tracker.finish(number, state, running.curve, logged, tags)
        self._progress()

    def _progress(self) -> None:
        counts = self.study.counts()
        values = {
            "trials_complete": counts["COMPLETE"],
            "trials_pruned": counts["PRUNED"],
            "trials_failed": counts["FAIL"],
            "hours": (time.monotonic() - self.started) / 3600,
        }
        if self.best is not None:
            values["best_" + next(iter(self.config.objectives))] = self.best
        self.tracker.progress(self.done, values)

    def _keep_best(self, running: Running, values: dict[str, float], weights: bytes | None) -> bool:
        """Write best.yaml and its weights where the trial is the best, of equals the first."""
        number = running.proposal.number
        name, direction = next(iter(self.config.objectives.items()))
        value, sign = values[name], -1 if direction == "maximize" else 1
        if self.best is not None and (sign * self.best, self.best_number) < (sign * value, number):
            return False
        self.best, self.best_number = value, number
        path = (self.folder / BEST).with_suffix(".safetensors")
        try:
            path.unlink(missing_ok=True)  # first: weights never lie beside another pattern
            save(self.export(running.proposal, values), self.folder / BEST, self.header())
            if weights is not None:
                temporary = path.with_name(f".{path.name}.part")
                temporary.write_bytes(weights)
                temporary.replace(path)
        except (OSError, ConfigError) as e:  # the study has the trial, an export trains it again
            said = f"warning: {self.folder / BEST} is not written: {e}"
            self.console.print(said, soft_wrap=True, markup=False)
        return True

    def header(self) -> str:
        return f"Written by patternsearch. Train it again: patternsearch train {BEST}"

    def export(self, proposal: Proposal, values: dict[str, float]) -> Export:
        """A trial as it is taken away."""
        return make_export(
            self.task,
            self.config.task,
            proposal.assignment.to_dict(),
            proposal.train,
            self.config.seed,
            values,
            source_of(self.config, self.folder.name, proposal.number, proposal.origin),
        )

    def interrupt(self) -> None:
        """Finish cleanly: no new trials, and running ones stop at their next report."""
        self.interrupted = True

    def conclude(self) -> str:
        """Train the best again, write what the sweep leaves; the end in words."""
        results = read_results(self.folder)
        notes = ["The space has no further point within the caps."] if self.exhausted else []
        if self.view.first >= self.config.trials:
            notes.append(f"Nothing to train: {self.done} trials are over; give a higher --trials.")
        if self.interrupted:
            notes.append(f"Interrupted; go on with --resume --name {self.folder.name}")
        wanted = self.config.confirm
        if wanted.top and results.complete() and not self.interrupted:
            confirm(results, wanted, self.executor, self.console, lambda: self.interrupted)
            results = read_results(self.folder)
        self._dismiss()  # beside the rest
        if results.complete():
            if not (self.folder / BEST).with_suffix(".safetensors").exists():
                export_trial(self.folder, None, self.folder / BEST)  # a kill came before them
            from .settle import settle  # draws: slow to load, and not needed before

            settle(results, self.tracker)
        return conclusion(results, self.folder, notes)

    def _dismiss(self) -> threading.Thread:
        """Let the workers go, once, without waiting for them."""
        if self.dismissing is None:
            self.dismissing = threading.Thread(target=self.executor.stop)
            self.dismissing.start()
        return self.dismissing

    def close(self, status: str) -> None:
        """Write what is left of the record and wait until the workers have gone."""
        self.closing = True
        dismissing = self._dismiss()
        self.tracker.close(status)
        dismissing.join()
        self.study.close()
        self.lock.release()
        if self.tracker.problem is not None:
            self.console.print(f"warning: {self.tracker.problem}", soft_wrap=True, markup=False)
