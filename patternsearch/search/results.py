"""What a sweep found: its trials read back from the study, the best, the experts, the front."""

from __future__ import annotations

import datetime
import shutil
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from shlex import quote
from typing import Any

import optuna
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from .. import describe
from ..assignment import Assignment
from ..codec import encode
from ..config import METRICS, SweepConfig, saved_config
from ..errors import ConfigError, PatternSearchError
from ..export import Export, load, make_export, save, save_weights, weights_path
from ..space import Params
from ..task import Task, get_task
from .confirm import Confirmed, read_confirmed
from .confirm import lines as confirmed_lines
from .folders import CONFIG
from .pareto import nondominated, turned
from .storage import close_storage, no_study, open_storage, own_study
from .study import curve_of, known_costs, trained

BEST, REPORT = "best.yaml", "report.html"
SAMPLED = (
    "tpe",
    "gp",
    "nsga2",
    "random",
    "structured",
    "neighbour",
)  # what no expert design is called
FROM = "from "  # how the origin of a trial that a sweep was told to start from begins


@dataclass(frozen=True)
class TrialRecord:
    """One trial. values: metrics and costs of its end. curve: a row an evaluation, by epoch.

    hours: (start, end) of its time with a worker, in hours of the epoch.
    """

    number: int
    state: str
    origin: str
    params: Params
    assignment: Assignment
    train: dict[str, Any]
    values: dict[str, float]
    objectives: tuple[float, ...]
    curve: tuple[dict[str, float], ...]
    hours: tuple[float, float]
    reason: str | None

    @property
    def expert(self) -> bool:
        """Whether it is one of the designs an expert would start from."""
        return self.origin not in SAMPLED and not self.origin.startswith(FROM)

    @property
    def pattern(self) -> str:
        return describe.short(self.assignment)


@dataclass(frozen=True)
class Results:
    """The trials of a sweep that took a worker, with what they were compared by.

    confirmed: what was trained again, where the best trial was; else one came later.
    """

    name: str
    config: SweepConfig
    trials: tuple[TrialRecord, ...]
    importances: Mapping[str, float]
    folder: Path
    confirmed: Confirmed | None = None

    def complete(self) -> list[TrialRecord]:
        """Trials that reached their end, the best by the first objective first."""
        direction = next(iter(self.config.objectives.values()))
        sign = -1 if direction == "maximize" else 1
        done = [t for t in self.trials if t.state == "COMPLETE"]
        return sorted(done, key=lambda t: (sign * t.objectives[0], t.number))

    def ranked(self) -> list[TrialRecord]:
        """What may win, the best by the first objective first: of several objectives the front."""
        return self.front() if len(self.config.objectives) > 1 else self.complete()

    def best(self) -> TrialRecord | None:
        return next(iter(self.complete()), None)

    def winner(self) -> TrialRecord | None:
        """The best by its mean over fresh seeds where the sweep went that far, else `best`."""
        again = self.confirmed.best() if self.confirmed is not None else None
        number = None if again is None else again.trial
        return next((t for t in self.complete() if t.number == number), self.best())

    def best_expert(self) -> TrialRecord | None:
        return next((t for t in self.complete() if t.expert), None)

    @property
    def metric(self) -> str:
        """The first objective: what trials are judged by while they train."""
        return next(iter(self.config.objectives))

    def front(self, *names: str) -> list[TrialRecord]:
        """Finished trials that none beats in all of these objectives, the best in the first first.

        By default those of the sweep; where that is one, it and the parameters.
        """
        known = {**dict.fromkeys(METRICS, "minimize"), **self.config.objectives}
        if not names:
            several = len(self.config.objectives) > 1
            names = tuple(self.config.objectives) if several else (self.metric, "parameters")
        goals = {name: known[name] for name in names}
        done = self.complete()
        points = [turned(t.values, goals) for t in done]
        return [done[i] for i in nondominated(points)]


def read_results(folder: Path) -> Results:
    """The trials of the sweep in a folder."""
    config = saved_config(folder / CONFIG)
    try:
        storage = open_storage(config.storage, folder)
        if (name := own_study(storage, folder)) is None:
            raise no_study(folder)
        study = optuna.load_study(study_name=name, storage=storage)
    except PatternSearchError:
        raise
    except (KeyError, ValueError) as e:  # a journal that is damaged
        raise ConfigError(f"{folder}: its study cannot be read: {e}; start a new sweep") from None
    trials = tuple(record(t) for t in study.get_trials(deepcopy=False) if trained(t))
    results = Results(folder.name, config, trials, _importances(study), folder)
    close_storage(storage)
    if (again := read_confirmed(folder)) is None:
        return results
    table = again.table()
    return replace(results, confirmed=table) if table.has(results.ranked()[:1]) else results


def _importances(study: optuna.Study) -> dict[str, float]:
    """What tells the best tenth of the finished trials from the rest, as shares of a whole.

    By PED-ANOVA of the first objective; none below ten trials. A parameter that only some trials
    have counts by what its values tell among those, the more the more of the best have it.
    """
    done = study.get_trials(states=(TrialState.COMPLETE,), deepcopy=False)
    if len(done) < 10 or len({t.values[0] for t in done}) < 2:
        return {}
    sign = -1 if study.directions[0] == StudyDirection.MAXIMIZE else 1
    evaluator = optuna.importance.PedAnovaImportanceEvaluator()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # low is good here, and one trial's parameter gets none
        return optuna.importance.get_param_importances(
            study, evaluator=evaluator, target=lambda t: sign * t.values[0]
        )


def record(trial: FrozenTrial) -> TrialRecord:
    """A trial of the study as we speak of it."""
    kept: Mapping[str, Any] = trial.user_attrs["record"]
    return TrialRecord(
        number=trial.number,
        state=trial.state.name,
        origin=kept["origin"],
        params=dict(trial.params),
        assignment=Assignment.from_dict(kept["assignment"]),
        train=dict(kept["train"]),
        values=known_costs(trial),
        objectives=tuple(trial.values) if trial.state == TrialState.COMPLETE else (),
        curve=tuple(curve_of(trial)),
        hours=(_hours(trial.datetime_start), _hours(trial.datetime_complete)),
        reason=trial.user_attrs.get("reason"),
    )


def _hours(moment: datetime.datetime | None) -> float:
    return (moment or datetime.datetime.now()).timestamp() / 3600


def source_of(config: SweepConfig, sweep: str, trial: int, origin: str) -> dict[str, Any]:
    """Where an export comes from."""
    device = config.resources.device
    return {"sweep": sweep, "trial": trial, "origin": origin, "device": device}


def export_of(results: Results, task: Task, trial: TrialRecord) -> Export:
    """A trial as it is taken away, with what training it again has shown."""
    provenance = source_of(results.config, results.name, trial.number, trial.origin)
    confirmed = results.confirmed
    if confirmed is not None:
        for row in (row for row in confirmed.rows if row.trial == trial.number):
            provenance["confirmed"] = row.summary(confirmed.metric)
    config, assignment = results.config, encode(trial.assignment)
    numbers = trial.train, config.seed, trial.values
    return make_export(task, config.task, assignment, *numbers, provenance)


def export_trial(folder: Path, number: int | None, output: Path) -> str:
    """Write a trial's YAML and weights; what was written, as text.

    The best trial's weights were kept, another's are made again by training as it was trained.
    """
    if output.suffix not in (".yaml", ".yml") or not output.parent.is_dir():
        raise ConfigError(f"--output {output}: give a .yaml file in a folder that exists")
    results = read_results(folder)
    trial = _choose(results, number)
    task = get_task(results.config.task)
    export = export_of(results, task, trial)
    header = f"{trial.pattern}\nTrain it again: patternsearch train {output.name}"
    kept, weights = folder / BEST, weights_path(output)
    own = kept.exists() and load(kept).provenance.get("trial") == trial.number
    if own and weights_path(kept).exists():
        save(export, output, header)
        if weights_path(kept).resolve() != weights.resolve():
            shutil.copyfile(weights_path(kept), weights.with_name(f".{weights.name}.part"))
            weights.with_name(f".{weights.name}.part").replace(weights)
    else:
        from ..retrain import again

        model, _, _ = again(export)
        save(export, output, header)
        save_weights(model, weights)
    return f"trial {trial.number}: {trial.pattern}\n{output}\n{weights}"


def _choose(results: Results, number: int | None) -> TrialRecord:
    done = results.complete()
    if not done:
        raise ConfigError(f"{results.name} has no finished trial yet; nothing to export")
    if number is None:
        return results.winner() or done[0]
    for trial in done:
        if trial.number == number:
            return trial
    numbers = ", ".join(str(t.number) for t in sorted(done, key=lambda t: t.number))
    raise ConfigError(f"{results.name} has no finished trial {number}; it has {numbers}")


def conclusion(results: Results, folder: Path, notes: Sequence[str] = ()) -> str:
    """The end of a sweep in words: the best pattern beside the best expert's, and what next."""
    best, expert = results.winner(), results.best_expert()
    if best is None:
        reasons = {t.reason.strip().splitlines()[-1] for t in results.trials if t.reason}
        why = f" ({'; '.join(sorted(reasons)[:3])})" if reasons else ""
        return "\n".join([f"No trial finished{why}.", *notes])
    spec = get_task(results.config.task).spec
    lines = ["", f"Best pattern: trial {best.number}, {best.pattern}"]
    lines += [f"  {line}" for line in describe.sentences(best.assignment, spec)]
    lines += ["", _numbers("best", best, results)]
    if expert is not None:
        same = " (it is the best)" if expert is best else ""
        lines.append(_numbers(f"best expert design, {expert.origin}{same}", expert, results))
    if results.confirmed is not None and results.confirmed.winner is not None:
        lines += ["", *confirmed_lines(results.confirmed)]
    if len(results.config.objectives) > 1:
        lines += ["", *front_lines(results)]
    lines += [
        *notes,
        "",
        f"YAML: {folder / BEST}",
        *([f"Report: {folder / REPORT}"] if (folder / REPORT).exists() else []),
        f"Look:  patternsearch ui --dir {quote(str(folder.parent))}",
        f"Train: patternsearch train {quote(str(folder / BEST))}",
    ]
    return "\n".join(lines)


def _numbers(title: str, trial: TrialRecord, results: Results) -> str:
    v, metric = trial.values, results.metric
    value = "" if metric in METRICS else f"{metric} {v[metric]:.4f}, "
    return (
        f"{title}: {value}{v['parameters']:,} parameters, "
        f"{v['flops']:,} FLOPs, {v['latency_ms']:.2f} ms for {results.config.latency_batch} "
        f"examples, {v['memory_mb']:.1f} MB to train, {v['seconds']:.1f} s"
    )


def front_lines(results: Results, most: int = 20) -> list[str]:
    """The trials that none beats in all objectives, as a table."""
    front, names = results.front(), list(results.config.objectives)
    rows = [["trial", *names, "pattern"]]
    for trial in front[:most]:
        values = (f"{trial.values[n]:,.4g}" if n != names[0] else f"{trial.values[n]:.4f}"
                  for n in names)  # fmt: skip
        rows.append([str(trial.number), *values, trial.pattern])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]) - 1)]
    more = [f"  ... and {len(front) - most} more in front/"] if len(front) > most else []
    goals = ", ".join(f"{how} {name}" for name, how in results.config.objectives.items())
    return [
        f"Front: {len(front)} trials that none beats in everything ({goals})",
        *("  " + "  ".join([*map(str.rjust, row, widths), row[-1]]) for row in rows),
        *more,
    ]
