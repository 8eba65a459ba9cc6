"""Trials on Ray Tune: with `cluster`, all that knows Ray.

Tune schedules and places the trials on workers that are re-used; what is tried, stopped and kept is
decided by the study through the `Source`. Tune's own Optuna searcher would file pruned trials as
complete, leave failed ones running and cannot be resumed after a kill, so a searcher and a
scheduler of a few lines stand in its place, and nothing of Tune's state is ever restored.
"""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")  # the record is MLflow's
os.environ.setdefault("TUNE_DISABLE_STRICT_METRIC_CHECKING", "1")
os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")  # the sweep has its own
os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")  # a user's path is relative to where we are
os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # the new output ignores verbose=0 on errors

import ray
import torch
from ray import tune
from ray.air.execution._internal.actor_manager import RayActorManager
from ray.exceptions import OutOfMemoryError, RayActorError
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from ..config import Resources
from ..data.fetch import CACHE, FOLDER
from ..errors import ConfigError
from .cluster import Cluster, cpu_workers
from .executor import Source
from .worker import Step, Worker

T = TypeVar("T")
_STARVED = "ended by Ray's memory monitor"
_GONE = "the worker died; it may have run out of memory or been killed"
_FULL = "the worker was ended because the machine had no memory left"


def _told(method: Callable[..., None]) -> Callable[..., None]:
    """A handler of failures that takes a worker ended for want of memory as one that died.

    Ray raises OutOfMemoryError then, which is no RayActorError: Tune 2.60 would end the whole sweep
    with "Caught unexpected exception", or forget why the worker died.
    """

    def handle(self: Any, *, exception: Exception, **actor: Any) -> None:
        if isinstance(exception, OutOfMemoryError):
            exception = RayActorError(error_msg=f"{_STARVED}: {exception}")
        method(self, exception=exception, **actor)

    return handle


for _name in ("_actor_task_failed", "_actor_start_failed"):
    setattr(RayActorManager, _name, _told(getattr(RayActorManager, _name)))


class _Trainable(tune.Trainable):
    """A worker of ours as Tune wants one: a step a report."""

    def setup(self, config: dict[str, Any]) -> None:
        os.environ |= config["environment"]
        self.worker = Worker()
        self.worker.start(config["job"])

    def step(self) -> dict[str, Any]:
        limit = self.worker.job.seconds if self.worker.job is not None else None
        if limit is not None:  # a hang that no signal ends: the process ends itself
            faulthandler.dump_traceback_later(1.5 * limit + 10, exit=True)
        step = self.worker.step()
        faulthandler.cancel_dump_traceback_later()
        return {"step": step, "done": step.done}

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        os.environ |= new_config["environment"]
        self.worker.start(new_config["job"])
        return True

    def cleanup(self) -> None:
        self.worker.stop()


class _Here:
    """The source, which stays in this process: Tune pickles its searcher and scheduler."""

    def __init__(self, source: Source | None) -> None:
        self.held = source
        self.failure: Exception | None = None

    def __reduce__(self) -> tuple[type[_Here], tuple[None]]:
        return _Here, (None,)

    def guard(self, call: Callable[..., T], *args: Any) -> T | None:
        """Keep an error of the source from Tune, which would go on; `RayExecutor.run` raises it."""
        if self.failure is not None:
            return None
        try:
            return call(*args)
        except Exception as e:  # whatever it is, of the driver and not of a trial
            self.failure = e
            return None

    @property
    def source(self) -> Source:
        assert self.held is not None, "Tune's copies are never run"
        return self.held


class _SourceSearcher(Searcher):
    """Asks the source for the next job, tells it of trials that ended without a report."""

    def __init__(self, here: _Here) -> None:
        super().__init__()
        self.here = here
        self.numbers: dict[str, int] = {}
        self.ended: set[str] = set()
        self.starved: set[str] = set()  # ended by Ray for want of the machine's memory

    def suggest(self, trial_id: str) -> Any:
        if (job := self.here.guard(self.here.source.next)) is None:
            alone = self.numbers.keys() <= self.ended
            return Searcher.FINISHED if alone else None  # one that is lost is run again
        self.numbers[trial_id] = job.number
        own = {name: os.environ[name] for name in (FOLDER, CACHE) if name in os.environ}
        return {"job": job, "environment": own}  # a Ray that ran before knows none of it

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        if trial_id in self.numbers and trial_id not in self.ended:
            killed = trial_id in self.starved
            why = _FULL if killed else _GONE
            self.here.guard(self.here.source.lost, self.numbers[trial_id], why, killed)
        self.ended.add(trial_id)

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the study is the only state."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing: the study is the only state."""


class _SourceScheduler(FIFOScheduler):
    """Brings every report to the source, and stops the trial when it says so."""

    def __init__(self, here: _Here, searcher: _SourceSearcher) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.here, self.searcher = here, searcher

    def on_trial_result(self, controller: Any, trial: Any, result: dict[str, Any]) -> str:
        step: Step = result["step"]
        stop = self.here.guard(self.here.source.handle, step)
        stop = stop or self.here.failure is not None
        if stop or step.done:
            self.searcher.ended.add(trial.trial_id)
        return str(TrialScheduler.STOP if stop else TrialScheduler.CONTINUE)

    def on_trial_error(self, controller: Any, trial: Any) -> None:
        """Comes before the searcher hears of it."""
        said = Path(trial.error_file or "")  # the error reaches the trial's storage only later
        if said.is_file() and _STARVED in said.read_text():
            self.searcher.starved.add(trial.trial_id)
        super().on_trial_error(controller, trial)

    def on_trial_complete(self, controller: Any, trial: Any, result: dict[str, Any]) -> None:
        """The last report of a trial comes here instead of to `on_trial_result`."""
        if trial.trial_id not in self.searcher.ended:
            self.searcher.ended.add(trial.trial_id)
            self.here.guard(self.here.source.handle, result["step"])


class RayExecutor:
    """`workers` trials at a time, each with `resources`, on this machine or a running cluster.

    On a cluster None stands for as many as it has room for when the sweep starts.
    """

    def __init__(self, workers: int | None, resources: Resources, cluster: Cluster) -> None:
        self.workers, self.resources, self.cluster = workers, resources, cluster

    def start(self) -> None:
        """Begin to start or join Ray, beside other preparations."""
        self.cluster.start()

    def run(self, source: Source) -> None:
        self.cluster.ready.result()
        here = _Here(source)
        searcher = _SourceSearcher(here)
        needs = {"cpu": self.resources.cpu, "gpu": self.resources.gpu}
        room = self._room()
        with _quiet(), tempfile.TemporaryDirectory(prefix="patternsearch-") as folder:
            tuner = tune.Tuner(
                tune.with_resources(_Trainable, needs),
                tune_config=tune.TuneConfig(
                    search_alg=searcher,
                    scheduler=_SourceScheduler(here, searcher),
                    num_samples=-1,
                    max_concurrent_trials=self.workers or room,
                    reuse_actors=True,
                ),
                run_config=tune.RunConfig(
                    storage_path=folder,
                    verbose=0,
                    checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
                ),
            )
            tuner.fit()
        if here.failure is not None:
            raise here.failure

    def _room(self) -> int:
        """How many workers Ray has room for. ConfigError where it is none and stays none."""
        there = ray.cluster_resources()  # type: ignore[no-untyped-call]
        wanted = {"CPU": self.resources.cpu, "GPU": self.resources.gpu}
        least = {name: need for name, need in wanted.items() if need}
        room = min(int(there.get(name, 0) / need) for name, need in least.items())
        if not room:
            held = ", ".join(f"{there.get(name, 0):g} {name}" for name in least)
            asked = ", ".join(f"resources.{name.lower()}={need:g}" for name, need in least.items())
            said = f"a worker takes {asked}, and all of Ray has {held}"
            if self.cluster.address is None:
                raise ConfigError(f"{said}; lower them, or start a Ray that has as much")
            print(f"warning: {said}; trials wait until it has grown", file=sys.stderr)
        return max(1, room)

    def stop(self) -> None:
        self.cluster.stop()


def default_workers(resources: Resources) -> int:
    """As many as this machine's GPUs, or cores, have room for."""
    if resources.gpu:
        return max(1, int(torch.cuda.device_count() / resources.gpu))
    return cpu_workers(resources.cpu)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep Tune's own progress and warnings off the terminal: the sweep has a live view."""
    loggers = [logging.getLogger(name) for name in ("ray", "ray.tune", "ray.air", "ray.train")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
