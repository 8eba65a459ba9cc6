"""What a sweep leaves: the winner's YAML, the front's, pictures, the report, and all in MLflow."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

from ..export import save
from ..task import get_task
from ..tracking import Tracker
from .confirm import Confirmed
from .report import write_report
from .results import BEST, REPORT, Results, TrialRecord, export_of, export_trial
from .setup import note

FRONT = "front"  # folder of the front's YAMLs


def settle(results: Results, tracker: Tracker | None = None) -> None:
    """Write everything into the sweep's folder and hand it to the record; needs a finished trial.

    The winner takes the place of the best trial in best.yaml where it is another.
    """
    folder, winner = results.folder, results.winner()
    assert winner is not None
    if results.confirmed is not None:
        export_trial(folder, winner.number, folder / BEST)
    front = write_front(results, folder / FRONT)
    drawn = write_report(results, folder / REPORT)
    if tracker is None:
        return
    files = [folder / name for name in (REPORT, BEST, "best.safetensors", "confirm.yaml")]
    for path in [*files, *drawn]:
        if path.exists():
            tracker.artifact(path)
    for path in front:
        tracker.artifact(path, FRONT)
    tracker.describe({}, {"mlflow.note.content": f"{_result(results)}\n\n{note(results.config)}"})
    tracker.front([t.number for t in results.front()], winner.number)
    if results.confirmed is not None and (again := results.confirmed.best()) is not None:
        numbers: dict[str, float] = {}
        metric = results.confirmed.metric
        for name, found in ((metric, again.mean()), (f"test_{metric}", again.tested())):
            if found is not None and math.isfinite(found.half):
                numbers |= {f"winner_{name}": found.mean, f"winner_{name}_plus_minus": found.half}
        tracker.progress(len(results.trials), numbers)


def _result(results: Results) -> str:
    winner, expert = results.winner(), results.best_expert()
    assert winner is not None
    lines = [f"**Result.** Trial {winner.number}, {_numbers(winner, results)}: `{winner.pattern}`"]
    if expert is not None and expert is not winner:
        lines.append(f"Best expert design: {expert.origin}, {_numbers(expert, results)}.")
    if results.confirmed is not None:
        lines += [_again(results.confirmed), results.confirmed.verdict()]
    return "\n\n".join(line for line in lines if line)


def _numbers(trial: TrialRecord, results: Results) -> str:
    v = trial.values
    return f"{results.metric} {v[results.metric]:.4f}, {v['parameters']:,} parameters"


def _again(confirmed: Confirmed) -> str:
    best = confirmed.best()
    if best is None:
        return ""
    test = f", test {best.tested()}" if best.test else ""
    return (
        f"Trained again from {len(confirmed.seeds)} fresh seeds: validation {confirmed.metric} "
        f"{best.mean()}{test} (mean and 95 % interval)."
    )


def write_front(results: Results, folder: Path) -> list[Path]:
    """One YAML a trial of the front, named by its number; files of an older front go."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    task, written = get_task(results.config.task), []
    for trial in results.front():
        path = folder / f"t{trial.number:04}.yaml"
        header = f"{trial.pattern}\nTrain it: patternsearch train {path.name}"
        save(export_of(results, task, trial), path, header)
        written.append(path)
    return written
