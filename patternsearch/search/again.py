"""`patternsearch confirm`: the best of a sweep that is over, trained again."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from ..config import Confirm
from ..errors import ConfigError
from ..store import default_uri
from ..tracking import Tracker
from ..yamlfile import read_yaml
from .confirm import confirm, lines
from .folders import ENVIRONMENT, hold
from .results import BEST, Results, read_results
from .settle import settle
from .setup import make_executor


def again(folder: Path, top: int, seeds: int, executor: str | None, console: Console) -> bool:
    """Train the best `top` and the expert designs from fresh seeds; say and record what came out.

    Every run is on disk once it is over: after Ctrl-C the same command goes on. Whether all is in
    the record.
    """
    if top < 1 or seeds < 2:
        raise ConfigError(f"--top {top} --seeds {seeds}: at least one trial and two seeds")
    if executor not in (None, "ray", "inline"):
        raise ConfigError(f"--executor {executor}: ray or inline")
    lock = hold(folder)  # best.yaml and the run in MLflow are those of one process
    try:
        return _again(read_results(folder), Confirm(top=top, seeds=seeds), executor, console)
    finally:
        lock.release()


def _again(results: Results, wanted: Confirm, executor: str | None, console: Console) -> bool:
    folder = results.folder
    if results.best() is None:
        raise ConfigError(f"{results.name} has no finished trial yet; nothing to train again")
    config = results.config.model_copy(update={"executor": executor or results.config.executor})
    workers = make_executor(config)
    workers.start()
    uri, key = config.tracking_uri or default_uri(folder), read_yaml(folder / ENVIRONMENT)["id"]
    tracker = Tracker(uri, config.task, folder.name, key)
    status = "KILLED"
    try:
        found = confirm(results, wanted, workers, console)
        settle(read_results(folder), tracker)
        status = "FINISHED"
    finally:
        tracker.close(status)
        workers.stop()
    said = [*(lines(found) if found is not None else []), f"YAML: {folder / BEST}"]
    console.print("\n".join(said), soft_wrap=True, markup=False, highlight=False)
    if tracker.problem is not None:
        console.print(f"warning: {tracker.problem}", soft_wrap=True, markup=False)
    return tracker.problem is None
