"""The record of a sweep in MLflow: the one module that knows MLflow.

Experiment = task, parent run = sweep, child run = trial. One thread of the driver writes it all, in
batches, so that training never waits for the store and no two processes ever write it.
"""

from __future__ import annotations

import os
import queue
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import TrackingError
from .store import artifact_location, creation, why

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("DO_NOT_TRACK", "true")

Params = Mapping[str, Any]
Point = tuple[str, float, int, int]  # metric, value, step, milliseconds of the epoch
STATES = {"COMPLETE": "FINISHED", "PRUNED": "KILLED", "FAIL": "FAILED"}
_PARENT = "mlflow.parentRunId"
_STOP = object()
_PAUSE = 1.0  # seconds between two writes of the parent's charts
_KIND = {
    "mlflow.experimentKind": "custom_model_development",  # the UI's view of training runs
    "mlflow.note.content": "Sweeps over sparse patterns for a task. A run is a sweep; + shows its "
    "trials. Open a sweep, then Artifacts, report.html: it explains the whole sweep.",
}


@dataclass(frozen=True)
class Past:
    """A trial as the study keeps it; began and ended in milliseconds of the epoch."""

    number: int
    name: str
    state: str
    params: dict[str, Any]
    tags: dict[str, Any]
    curve: list[dict[str, float]]
    values: dict[str, float]
    reason: str | None
    began: int
    ended: int


class Tracker:
    """Queues what happens in a sweep and writes it from one thread.

    Trials are named by their number in the study. A store that is away does not stop the sweep: it
    is tried again until it is back. `close` waits for the queue, and for a store that is away
    `patience` seconds; `problem` then says what is missing, which `restore` makes up for.
    """

    patience = 20.0

    def __init__(self, uri: str, task: str, sweep: str, key: str | None = None) -> None:
        self.uri, self.task, self.sweep = uri, task, sweep
        self.key = key or sweep  # names of sweeps are not unique on a server
        self.problem: str | None = None
        self.parent: Future[str] = Future()
        self._queue: queue.SimpleQueue[Any] = queue.SimpleQueue()  # Ctrl-C cannot leave it locked
        self._runs: dict[int, tuple[str, dict[str, Any]]] = {}  # id and parameters of open runs
        self._charts: dict[tuple[str, int], Point] = {}  # the parent's, not yet written
        self._written = 0.0
        self._old: dict[int, Any] = {}  # runs of an earlier part of the sweep
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._write, name="tracking", daemon=True)
        self._thread.start()

    def ready(self) -> str:
        """The parent run's id, once the store is open. Raises TrackingError where it cannot be."""
        return self.parent.result()

    def describe(self, params: Params, tags: Params, files: Iterable[tuple[str, str]] = ()) -> None:
        """Parameters and tags of the sweep, and texts (file name, content) as artifacts."""
        self._put(self._describe, dict(params), dict(tags), list(files))

    def start(self, number: int, name: str, params: Params, tags: Params) -> None:
        """A trial begins."""
        self._put(self._start, number, name, dict(params), dict(tags), _now())

    def finish(
        self, number: int, state: str, curve: list[dict[str, float]], values: Params, tags: Params
    ) -> None:
        """A trial ended in a state of the study, with its curve (rows by epoch) and last values."""
        self._put(self._finish, number, state, list(curve), dict(values), dict(tags), _now())

    def restore(self, past: Past) -> None:
        """A trial that was over before this process began: written where the record lacks it."""
        self._put(self._restore, past)

    def progress(self, step: int, values: Params) -> None:
        """Numbers of the sweep after `step` trials: the parent's charts."""
        self._put(self._progress, step, dict(values), _now())

    def artifact(self, path: Path, folder: str | None = None) -> None:
        """A file of the sweep."""
        self._put(self._artifact, path, folder)

    def front(self, numbers: list[int], winner: int) -> None:
        """Tag the trials that none beats, and the winner among all; tags of before are taken."""
        self._put(self._front, list(numbers), winner)

    def close(self, status: str = "FINISHED") -> None:
        """Write what is queued, end the parent run."""
        self._put(self._end, status)
        self._queue.put(_STOP)
        self._closing.set()
        self._thread.join()

    def _put(self, action: Callable[..., None], *args: Any) -> None:
        self._queue.put((action, args))

    def _write(self) -> None:
        try:
            self._open()
        except Exception as e:  # the reason goes to whoever waits for `ready`
            self.problem = why(self.uri, e)
            self.parent.set_exception(TrackingError(self.problem))
        opened = self.problem is None
        while (item := self._queue.get()) is not _STOP:
            opened = opened and self._do(*item)

    def _do(self, action: Callable[..., None], args: tuple[Any, ...]) -> bool:
        """Do it, as often as a store that is away asks for; False where that is given up."""
        pause, ended = 0.5, None
        while True:
            try:
                action(*args)
                return True
            except Exception as e:  # the sweep goes on; what is lost is said at its end
                if not _passing(e):
                    self.problem = self.problem or why(self.uri, e)
                    return True
                if self._closing.is_set():
                    ended = ended or time.monotonic() + self.patience
                    if time.monotonic() >= ended:
                        self.problem = f"{why(self.uri, e)}; --resume writes what is missing"
                        return False
                    time.sleep(pause)
                else:
                    self._closing.wait(pause)
                pause = min(2 * pause, 10.0)

    def _open(self) -> None:
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")  # seconds; 120 by default
        import mlflow
        from mlflow.tracking import MlflowClient

        mlflow.utils.logging_utils.disable_logging()  # type: ignore[no-untyped-call]
        with creation(self.uri, mlflow.__version__):
            self.client = MlflowClient(self.uri)
            found = self.client.get_experiment_by_name(self.task)
            if found and found.lifecycle_stage == "deleted":  # in the UI; its name is taken
                self.client.restore_experiment(found.experiment_id)
            self.experiment = (
                found.experiment_id
                if found
                else self.client.create_experiment(self.task, artifact_location(self.uri), _KIND)
            )
        self.parent.set_result(self._parent_run())

    def _parent_run(self) -> str:
        """The sweep's run: the one of an earlier part of it, else a new one."""
        old = self._search(f"tags.sweep_id = '{self.key}' and tags.kind = 'sweep'")
        if not old:
            tags = {"sweep": self.sweep, "sweep_id": self.key, "kind": "sweep"}
            tags["mlflow.source.name"] = "patternsearch"
            run = self.client.create_run(self.experiment, tags=tags, run_name=self.sweep)
            return str(run.info.run_id)
        run_id = str(old[0].info.run_id)
        self.client.update_run(run_id, status="RUNNING")
        for child in self._search(f"tags.`{_PARENT}` = '{run_id}'"):
            if (number := child.data.tags.get("trial", "")).isdigit():
                self._old[int(number)] = child
            if child.info.status == "RUNNING":
                self.client.set_tag(child.info.run_id, "state", "INTERRUPTED")
                self.client.set_terminated(child.info.run_id, "KILLED")
        return run_id

    def _search(self, text: str) -> list[Any]:
        found, page = [], None
        while page != "":
            part = self.client.search_runs(
                [self.experiment], text, max_results=5000, page_token=page
            )
            found += list(part)
            page = part.token or ""
        return found

    def _describe(
        self, params: dict[str, Any], tags: dict[str, Any], files: list[tuple[str, str]]
    ) -> None:
        run_id = self.parent.result()
        old = self.client.get_run(run_id).data.params
        new = {k: v for k, v in params.items() if k not in old}
        self._batch(run_id, [], new, tags)
        for name, text in files:
            self.client.log_text(run_id, text, name)

    def _start(
        self, number: int, name: str, params: dict[str, Any], tags: dict[str, Any], now: int
    ) -> None:
        all_tags = {_PARENT: self.parent.result(), "kind": "trial", **_texts(tags)}
        run = self.client.create_run(self.experiment, now, all_tags, name)
        self._runs[number] = str(run.info.run_id), params  # which are written at its end: one call

    def _finish(
        self,
        number: int,
        state: str,
        curve: list[dict[str, float]],
        values: dict[str, Any],
        tags: dict[str, Any],
        now: int,
    ) -> None:
        points = [
            (key, value, int(row["epoch"]), now)
            for row in curve
            for key, value in row.items()
            if key != "epoch"
        ]
        last = curve[-1]["epoch"] if curve else 0
        points += [(key, value, int(last), now) for key, value in values.items()]
        run_id, params = self._runs[number]
        self._batch(run_id, points, params, {"state": state, **tags})
        self.client.set_terminated(run_id, STATES[state], now)
        del self._runs[number]

    def _restore(self, past: Past) -> None:
        old = self._old.get(past.number)
        if old is not None:
            if old.data.tags.get("state") == past.state and old.info.status == STATES[past.state]:
                return
            self.client.delete_run(old.info.run_id)  # cut short while it was written
            del self._old[past.number]
        self._start(past.number, past.name, past.params, past.tags, past.began)
        tags = {} if past.reason is None else {"reason": past.reason}
        self._finish(past.number, past.state, past.curve, past.values, tags, past.ended)

    def _progress(self, step: int, values: dict[str, Any], now: int) -> None:
        self._charts |= {(key, step): (key, value, step, now) for key, value in values.items()}
        if time.monotonic() - self._written >= _PAUSE:
            self._flush()

    def _flush(self) -> None:
        self._batch(self.parent.result(), list(self._charts.values()), {}, {})
        self._charts, self._written = {}, time.monotonic()

    def _front(self, numbers: list[int], winner: int) -> None:
        for child in self._children():
            number, run_id = int(child.data.tags["trial"]), child.info.run_id
            wanted = {"front": number in numbers, "winner": number == winner}
            for key, holds in wanted.items():
                if holds:
                    self.client.set_tag(run_id, key, "yes")
                elif key in child.data.tags:
                    self.client.delete_tag(run_id, key)
        named = {"front": ", ".join(map(str, sorted(numbers))), "winner": f"trial {winner}"}
        self._batch(self.parent.result(), [], {}, named)

    def _children(self) -> list[Any]:
        return self._search(f"tags.`{_PARENT}` = '{self.parent.result()}'")

    def _artifact(self, path: Path, folder: str | None) -> None:
        self.client.log_artifact(self.parent.result(), str(path), folder)

    def _end(self, status: str) -> None:
        self._flush()
        self.client.set_terminated(self.parent.result(), status)

    def _batch(
        self,
        run_id: str,
        points: list[Point],
        params: dict[str, Any],
        tags: dict[str, Any],
    ) -> None:
        """Metrics in batches of at most 1,000, MLflow's limit."""
        from mlflow.entities import Metric, Param, RunTag

        metrics = [Metric(key, float(value), now, step) for key, value, step, now in points]
        named = [Param(key, str(value)[:6000]) for key, value in params.items()]
        tagged = [RunTag(key, value) for key, value in _texts(tags).items()]
        for at in range(0, max(len(metrics), 1), 1000):
            first = at == 0
            self.client.log_batch(
                run_id, metrics[at : at + 1000], named if first else [], tagged if first else []
            )


def _texts(tags: Mapping[str, Any]) -> dict[str, str]:
    return {key: str(value)[:5000] for key, value in tags.items()}


def _now() -> int:
    return int(time.time() * 1000)


def _passing(error: Exception) -> bool:
    """Whether it may be over when tried again: no connection, a busy or a full disk."""
    from mlflow.exceptions import MlflowException

    if isinstance(error, MlflowException):
        status: int = error.get_http_status_code()  # type: ignore[no-untyped-call]
        return status >= 500
    return isinstance(error, OSError) or type(error).__module__.startswith("sqlalchemy")
