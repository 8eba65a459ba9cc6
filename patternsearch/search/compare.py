"""`patternsearch compare`: the pattern found, expert designs and native baselines, side by side.

One sweep under caps of parameters and FLOPs; as many trials, shared by the native baselines, for
their own settings under the same caps and the same budget. Then the best of the sweep, its best
with at most half of the parameters of the best native baseline, every expert design and the best of
every native baseline are trained again from fresh seeds, and only then the test metric is read.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from rich.console import Console

from ..config import SweepConfig, load_config
from ..errors import ConfigError, unknown
from ..native import Native, settings, suited
from ..sizes import model_cost, resolve
from ..space import load_space
from ..task import get_task
from .confirm import designs
from .executor import Executor
from .folders import CONFIG
from .launch import launch, resumed
from .results import Results, read_results
from .setup import make_executor, make_folder
from .sweep import Sweep
from .trainings import Training, Trainings, best_of

TOP = 3  # trials of the sweep that are trained again
THRIFTY = 0.5  # of the best native baseline's parameters, at most: how little is enough
FIRST_SEED = 101  # no seed of a search
_DECAYS = (0.01, 0.1)


@dataclass(frozen=True)
class Scale:
    """How many trials, how much of a task is trained on, and caps of what is compared."""

    trials: int
    train: dict[str, Any] = field(default_factory=dict)
    caps: dict[str, float] = field(default_factory=dict)

    def changes(self) -> list[str]:
        parts = {"train": self.train, "caps": self.caps}
        return [
            f"{part}.{key}={'null' if value is None else value}"
            for part, values in parts.items()
            for key, value in values.items()
        ]


_ALL = {"examples": None, "valid_examples": None}
SCALES: dict[str, dict[str, Scale]] = {
    "small": {
        "mnist": Scale(
            12, {"epochs": 4, "examples": 4000, "valid_examples": 2000}, {"flops": 5.2e6}
        ),
        "cifar10": Scale(12, {"epochs": 4, "examples": 3000, "valid_examples": 2000}),
        "cifar100": Scale(12, {"epochs": 4, "examples": 3000, "valid_examples": 2000}),
        "tiny-imagenet": Scale(8, {"epochs": 3, "examples": 2000, "valid_examples": 1000}),
        "etth1": Scale(12, {"epochs": 3, "examples": 3000}, {"flops": 3e6}),
        "electricity": Scale(8, {"epochs": 2, "examples": 600, "valid_examples": 200}),
        "ag-news": Scale(16, {"epochs": 4, "examples": 8000, "valid_examples": 2000}),
        "ptb": Scale(12, {"epochs": 4, "examples": 800, "valid_examples": 150}),
        "wikitext2": Scale(
            8, {"epochs": 4, "examples": 360, "valid_examples": 100, "test_examples": 500}
        ),
    },
    "full": {
        "mnist": Scale(32, {"epochs": 10, "shift": 2, **_ALL}),
        "cifar10": Scale(32, {"epochs": 20, "shift": 4, "flip": True, **_ALL}),
        "cifar100": Scale(32, {"epochs": 20, "shift": 4, "flip": True, **_ALL}),
        "tiny-imagenet": Scale(24, {"epochs": 12, "shift": 4, "flip": True, **_ALL}),
        "etth1": Scale(32, {"epochs": 10, **_ALL}),
        "electricity": Scale(24, {"epochs": 5, **_ALL}),
        "ag-news": Scale(32, {"epochs": 5, **_ALL}),
        "ptb": Scale(24, {"epochs": 10, **_ALL}),
        "wikitext2": Scale(24, {"epochs": 6, **_ALL}),
    },
}


@dataclass
class Row:
    """One design in the table; `role` is found, expert or native.

    thrifty: the best of the sweep that has at most half of the best native baseline's parameters.
    """

    role: str
    name: str
    pattern: str
    parameters: int
    flops: int
    trainings: list[Training]
    thrifty: bool = False


def command(
    task: str, scale: str, trials: int | None, seeds: int, folder: Path, **options: Any
) -> None:
    """Compare and print the table; after Ctrl-C the same command goes on."""
    path = compare(task, scale, trials, seeds, folder, Console(), **options)
    print(f"{path.read_text()}\n{path}")


def configured(task: str, scale: str, trials: int | None, options: dict[str, Any]) -> SweepConfig:
    """The task's sweep at a scale, under caps that every design of the comparison is under.

    Where the sweep's file gives no cap, it is what the largest expert design takes.
    """
    if scale not in SCALES:
        raise ConfigError(f"--scale {scale}: {unknown('scale', scale, SCALES)}")
    found = SCALES[scale].get(task)
    wanted = trials or (found.trials if found else None)
    changes = [*(found.changes() if found else ()), *options.pop("changes", ())]
    config = load_config(task, changes, trials=wanted, **options)
    own, spec = get_task(config.task), get_task(config.task).spec
    space = load_space(config.space or own.space)
    costs = [
        model_cost(resolve(space.point(params)[1], spec), spec) for params in space.experts.values()
    ]
    largest = {
        name: max((float(getattr(cost, name)) for cost in costs), default=None)
        for name in ("parameters", "flops")
    }
    caps = {name: getattr(config.caps, name) or value for name, value in largest.items()}
    return config.model_copy(update={"caps": config.caps.model_copy(update=caps)})


def compare(
    task: str,
    scale: str,
    trials: int | None,
    seeds: int,
    folder: Path,
    console: Console,
    **options: Any,
) -> Path:
    """Run what of it is missing in the folder; the path of the table."""
    from .comparison import write

    if seeds < 2:
        raise ConfigError(f"--seeds {seeds}: at least two, for an interval")
    config = configured(task, scale, trials, options)
    names = _fitting(config)
    make_folder(folder)

    def said(text: str) -> None:
        console.print(text, soft_wrap=True, markup=False, highlight=False)

    if note := get_task(config.task).note:
        said(note)
    results = _swept(config, folder, console)
    kept = Trainings(folder / "trainings.jsonl")
    executor = make_executor(config)
    executor.start()
    try:
        tuned = _tuned(config, names, kept, executor, said)
        few = THRIFTY * _parameters(tuned, kept, config.task)
        rows = [*_searched(results, few, seeds), *(_native_row(t, config, seeds) for t in tuned)]
        wanted = [training for row in rows for training in row.trainings]
        kept.run(config, wanted, executor, said)
    finally:
        executor.stop()
    return write(folder, config, scale, rows, kept)


def _swept(config: SweepConfig, folder: Path, console: Console) -> Results:
    """The sweep in its folder, gone on with where it stopped."""
    place = folder / "sweep"
    resume = (place / CONFIG).exists()
    if resume:
        config = resumed(config, place)
    if not resume or len(read_results(place).trials) < config.trials:
        sweep = Sweep(config, place, console, resume)
        launch(sweep)
        if sweep.interrupted:
            raise ConfigError(f"{place}: stopped before its end; the same command goes on")
    results = read_results(place)
    if results.best() is None:
        raise ConfigError(f"{place}: no trial finished, nothing to compare; give more --trials")
    return results


def _caps(config: SweepConfig) -> dict[str, float]:
    caps = {name: getattr(config.caps, name) for name in ("parameters", "flops")}
    return {name: cap for name, cap in caps.items() if cap is not None}


def _fitting(config: SweepConfig) -> list[str]:
    """The native baselines that are suited to the task and have a design under the caps."""
    spec, caps = get_task(config.task).spec, _caps(config)
    names = suited(spec)
    if not names:
        raise ConfigError(
            f"no native baseline is for data like that of {config.task} ({spec}), so there is "
            "nothing to compare with; `patternsearch sweep` searches it"
        )
    found = [name for name in names if next(settings(name, spec, caps), None) is not None]
    if not found:
        most = " and ".join(f"{name}={cap:,.0f}" for name, cap in caps.items())
        raise ConfigError(
            f"no native baseline ({', '.join(names)}) is within the caps {most}, so there is "
            "nothing to compare with; raise them, such as --set caps.parameters=50000"
        )
    return found


def _tuned(
    config: SweepConfig,
    names: list[str],
    kept: Trainings,
    executor: Executor,
    said: Callable[[str], None],
) -> list[Training]:
    """The best settings of every native baseline, of as many trials together as the sweep had."""
    task, plain = get_task(config.task), config.train.model_dump()
    wanted: dict[str, list[Training]] = {}
    for i, name in enumerate(names):
        share = len(range(i, config.trials, len(names))) or 1
        found = islice(settings(name, task.spec, _caps(config)), share)
        wanted[name] = [
            Training(
                design.to_dict(),
                {**plain, "lr": lr, "weight_decay": _DECAYS[k % len(_DECAYS)]},
                config.seed,
            )
            for k, (design, lr) in enumerate(found)
        ]
    every = [training for trainings in wanted.values() for training in trainings]
    said(f"native baselines: {', '.join(names)}, {len(every)} trials")
    kept.run(config, every, executor, said, test=False)
    best = [best_of(kept, trainings, task) for trainings in wanted.values()]
    if not any(best):
        raise ConfigError(f"no native baseline could be trained: {kept.of(every[0]).error}")
    return [training for training in best if training is not None]


def _parameters(tuned: list[Training], kept: Trainings, name: str) -> int:
    """Of the best native baseline as it was tuned; 0 where there is none."""
    task = get_task(name)
    best = best_of(kept, tuned, task)
    return 0 if best is None else Native(**best.design).cost(task.spec).parameters


def _again(design: dict[str, Any], train: dict[str, Any], seeds: int) -> list[Training]:
    return [Training(design, train, FIRST_SEED + i) for i in range(seeds)]


def _searched(results: Results, few: float, seeds: int) -> list[Row]:
    """The best of the sweep, the best of so few parameters, and the expert designs."""
    small = next((t for t in results.complete() if t.values["parameters"] <= few), None)
    return [
        Row(
            "expert" if row.trial is None else "found",
            row.name,
            row.pattern,
            row.parameters,
            row.flops,
            _again(row.assignment, row.train, seeds),
            small is not None and row.trial == small.number,
        )
        for row in designs(results, TOP, () if small is None else (small,))
    ]


def _native_row(tuned: Training, config: SweepConfig, seeds: int) -> Row:
    design = Native(**tuned.design)
    cost = design.cost(get_task(config.task).spec)
    again = _again(tuned.design, tuned.train, seeds)
    return Row("native", design.native, design.short(), cost.parameters, cost.flops, again)
