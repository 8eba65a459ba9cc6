"""Sweeps from Python, as the command line runs them. Nothing heavy loads before one starts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import ConfigError

if TYPE_CHECKING:
    from .search.outcome import SweepResult
    from .space import Space
    from .task import Task


def sweep(
    task: str | type[Task],
    space: str | Path | Mapping[str, Any] | None = None,
    *,
    name: str | None = None,
    folder: str | Path = "sweeps",
    resume: bool = False,
    quiet: bool = False,
    **settings: Any,
) -> SweepResult:
    """Search the best pattern for a task; what `patternsearch sweep` does.

    task: a sweep of configs/, a YAML file, a task's name, an .npz, or a subclass of Task that a
    module defines. space: a name in spaces/, a YAML file, or what such a file holds; the task's own
    by default. name: the sweep's, `folder`/`name` then holds it; resume=True goes on with it.
    settings: the keys of a sweep's YAML (SweepConfig), such as trials=64, sampler="gp",
    executor="inline", objectives={...}, caps={"parameters": 7500}, train={"epochs": 20},
    start_from=["best.yaml", "other-sweep", an Assignment, {"width": 16}].

        result = patternsearch.sweep("digits", trials=64, caps={"parameters": 7500})
        result.trials.sort_values("accuracy")
        model = patternsearch.build(result.export("best.yaml"))

    Raises PatternSearchError on what cannot be used, before anything is trained.
    """
    try:
        from .config import load_config
        from .search.folders import find_sweep, new_folder
        from .search.launch import launch, resumed, terminal
        from .search.outcome import SweepResult
        from .search.sweep import Sweep
    except ModuleNotFoundError as e:
        raise ConfigError(f"{e.name} is not installed; pip install 'patternsearch[sweep]'") from e
    if "start_from" in settings:
        settings["start_from"] = _sources(settings["start_from"])
    given = None if space is None or isinstance(space, Mapping) else str(space)
    config = load_config(_named(task), python=True, **{"space": given, **settings})
    root = Path(folder)
    if resume:
        place = find_sweep(name, root, config.task if name is None else None)
    else:
        place = new_folder(config.task, name, root)
    own = None
    if isinstance(space, Mapping):
        own = _own(space, place)
        config = config.model_copy(update={"space": own.source})
    if resume:
        config = resumed(config, place)
    launch(Sweep(config, place, terminal(quiet), resume, own))
    return SweepResult.read(place)


def _own(data: Mapping[str, Any], place: Path) -> Space:
    """A space given as data: from now on the file that the sweep keeps of it."""
    from .search.folders import SPACE
    from .space import as_space

    return as_space(data, str(place / SPACE))


def _sources(given: Any) -> list[Any]:
    """What `start_from` names, one or several, as a sweep's YAML holds them."""
    return [_plain(source) for source in (given if isinstance(given, list | tuple) else [given])]


def _plain(source: Any) -> Any:
    if isinstance(source, Path):
        return str(source)
    return {"assignment": source.to_dict()} if hasattr(source, "to_dict") else source


def _named(task: str | type[Task]) -> str:
    """A task by the name under which workers and later sessions find it."""
    if isinstance(task, str):
        return task
    if task.__module__ == "__main__" or "<" in task.__qualname__:
        raise ConfigError(
            f"{task.__qualname__} is defined in {task.__module__}, where workers cannot import it; "
            "put it into a file of its own (%%writefile in a notebook) and import it from there"
        )
    return f"{task.__module__}:{task.__qualname__}"
