"""A sweep before it starts: its configuration made whole, its folder and its workers."""

from __future__ import annotations

import contextlib
import math
from pathlib import Path

import torch

from .. import describe
from ..config import METRICS, Caps, Resources, SweepConfig
from ..errors import ConfigError, SpaceError, unknown
from ..pattern import Cost
from ..sizes import model_cost, resolve
from ..space import Space
from ..space_check import within
from ..task import Task
from .cluster import Cluster
from .executor import Executor, InlineExecutor


def complete(config: SweepConfig, task: Task) -> SweepConfig:
    """The configuration with the task's own space, and objectives: the metric before costs."""
    objectives = dict(config.objectives)
    if not objectives:
        objectives = {task.metric: "maximize" if task.higher_is_better else "minimize"}
    known = (task.metric, "valid_loss", *METRICS)
    for name, how in objectives.items():
        if name not in known:
            raise ConfigError(f"objectives: {unknown('objective', name, known)}")
        right = "maximize" if name == task.metric and task.higher_is_better else "minimize"
        if how != right:
            better = "more" if right == "maximize" else "less"
            raise ConfigError(f"objectives: {how} {name}, of which {better} is better; {right} it")
    objectives = {name: objectives[name] for name in known if name in objectives}
    return config.model_copy(update={"objectives": objectives, "space": config.space or task.space})


def check_resources(resources: Resources) -> None:
    """Raise ConfigError where a worker wants more than this machine has."""
    gpus, wanted = torch.cuda.device_count(), resources.gpu
    if wanted and not torch.cuda.is_available():
        raise ConfigError(f"resources.gpu={wanted:g}, but torch sees no GPU here; use 0")
    if wanted > gpus or (wanted > 1 and wanted != int(wanted)):
        raise ConfigError(
            f"resources.gpu={wanted:g} of {gpus} here; use a fraction up to 1, or a whole number"
        )


def remove_empty(folder: Path) -> None:
    """Remove a folder that nothing is in."""
    with contextlib.suppress(OSError):  # another sweep has begun in it
        folder.rmdir()


def make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise ConfigError(f"cannot make the folder {path}: {e.strerror}; give --dir") from None


def make_executor(config: SweepConfig, cluster: Cluster | None = None) -> Executor:
    """What runs the trials; `cluster` where Ray was begun early."""
    if config.executor == "inline":
        return InlineExecutor()
    from .ray_executor import RayExecutor, default_workers

    workers = config.workers
    if config.address is None:
        workers = workers or default_workers(config.resources)
    cpus = (workers or 1) * config.resources.cpu
    return RayExecutor(workers, config.resources, cluster or Cluster(config.address, cpus))


def plan(config: SweepConfig, space: Space, task: Task, folder: Path) -> str:
    """What a sweep would do, as text."""
    c, names, size = config, space.parameters(), space.size()
    points = f"{size:.4g} points" if math.isfinite(size) else "infinitely many points"
    lines = [
        f"task        {c.task}: grid {task.spec.grid}, {describe.outputs(task.spec)}",
        f"space       {c.space}: {points}, {len(names)} parameters",
        f"search      {c.trials} trials by {c.sampler}, pruner {c.pruner}, seed {c.seed}",
        f"objectives  {', '.join(f'{how} {what}' for what, how in c.objectives.items())}",
        f"caps        {c.caps.model_dump(exclude_none=True) or 'none'}",
        f"training    {c.train.model_dump(exclude_none=True)}",
        f"folder      {folder}",
        "experts",
    ]
    for name, params in space.experts.items() if c.experts else ():
        assignment = resolve(space.point(params)[1], task.spec)
        cost = model_cost(assignment, task.spec)
        lines.append(
            f"  {name}: {describe.short(assignment)}, {cost.parameters:,} parameters, "
            f"{cost.flops:,} FLOPs{_over(cost, c.caps)}"
        )
    return "\n".join(lines)


def _over(cost: Cost, caps: Caps) -> str:
    try:
        within(cost, caps)
    except SpaceError as e:
        return f"  (left out: {e})"
    return ""


def note(config: SweepConfig) -> str:
    """What a sweep's run in MLflow is, to somebody who opens it."""
    goals = " and ".join(f"{how} {what}" for what, how in config.objectives.items())
    return (
        f"**What this is.** A search over sparse patterns for the task {config.task}: {goals}. "
        "Each child run is one trial, a network described by its patterns: `w32 | conv 3 | "
        "attention h4 full + mlp dense-dense | average 2` has 32 channels, a convolution of width "
        "3, attention with 4 heads and two dense maps, and averages over 2 regions an axis. Its "
        "tags say where it comes from (`origin`: an expert's design or the sampler) and what "
        "became of it (`state`: PRUNED was stopped early); `front` and `winner` mark the best.\n\n"
        "**Where to look.** Artifacts, once the sweep is over: `report.html` explains it from "
        "beginning to end; `best.yaml` is the winner, to be built and trained again anywhere. "
        "Metrics here: the best value and the counts of trials as the search went on."
    )
