"""A sweep beside the same sweep written with Ray Tune, Optuna's searcher and MLflow's callback.

    python benchmarks/sweep_speed.py --peer PATH/naive_sweep.py

PEER is a script `TRIALS EPOCHS OUTDIR` that prints one JSON line with `best`, the best validation
accuracy on the digits, and logs an accuracy an epoch to OUTDIR/mlflow.db. Both search the same CNNs
(two convolutions of one kernel size and width, 2x2 regions) on the same split of all digits, at
most 10 epochs a trial, and stop trials by asynchronous successive halving with rungs at epochs 1
and 4 that one trial in four passes; the epochs that each trained are counted. Wall seconds count
from command to prompt; the runs alternate. Writes benchmarks/results/sweep_speed.json.
"""

from __future__ import annotations

import argparse
import json
import re
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
from small_tasks import RESULTS, machine

EPOCHS = 10
SPACE = """\
# The CNNs of the peer as patterns.
train:
  lr: {float: [1.0e-3, 5.0e-2], log: true}
assignment:
  width: {int: [8, 64], log: true}
  stem:
    mixer:
      positions: &conv
        family: banded
        lower: &reach {int: [0, 2]}
        upper: {same_as: lower}
        entry: {family: dense}
    activation: relu
  blocks:
    - mixer: {positions: *conv}
      activation: relu
      norm: none
      residual: false
  head: {regions: 2}
"""
CONFIG = """\
task: {data}
space: {space}
pruner: halving
min_epochs: 1
reduction_factor: 4
experts: false
train: {{epochs: {epochs}, batch: 64, lr: 2.0e-2, eval_every: 1}}
"""


def peer(script: Path, trials: int, folder: Path) -> dict[str, Any]:
    started = time.perf_counter()
    command = [sys.executable, str(script), str(trials), str(EPOCHS), str(folder)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    wall = time.perf_counter() - started
    last = json.loads(done.stdout.strip().splitlines()[-1])
    with closing(sqlite3.connect(folder / "mlflow.db")) as record:
        count = "SELECT COUNT(*) FROM metrics WHERE key = 'accuracy'"
        epochs = record.execute(count).fetchone()[0]
    return {"wall": wall, "best": last["best"], "epochs": epochs}


def ours(trials: int, folder: Path) -> dict[str, Any]:
    space, config, data = folder / "cnn.yaml", folder / "speed.yaml", folder / "digits.npz"
    split(data)
    space.write_text(SPACE)
    config.write_text(CONFIG.format(data=data, space=space, epochs=EPOCHS))
    command = [sys.executable, "-m", "patternsearch", "sweep", str(config), "--name", "speed"]
    started = time.perf_counter()
    done = subprocess.run(
        [*command, "--trials", str(trials), "--dir", str(folder / "sweeps")],
        check=True,
        capture_output=True,
        text=True,
    )
    wall = time.perf_counter() - started
    accuracy = float(re.findall(r"^best: accuracy ([\d.]+)", done.stdout, re.MULTILINE)[0])
    return {"wall": wall, "best": accuracy, **busy(folder / "sweeps" / "speed")}


def split(path: Path) -> None:
    """The peer's split; it has no test part, so its validation part stands in, unused."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    x, y = load_digits(return_X_y=True)
    x = (x / 16).astype(np.float32).reshape(-1, 8, 8)
    xa, xb, ya, yb = train_test_split(x, y, test_size=0.2, random_state=0, stratify=y)
    np.savez(path, x=xa, y=ya, x_valid=xb, y_valid=yb, x_test=xb, y_test=yb)


def busy(folder: Path) -> dict[str, float]:
    """Seconds that workers spent in trials, and epochs trained, all added up."""
    from patternsearch.search.results import read_results

    trials = read_results(folder).trials
    seconds = [t.values["seconds"] for t in trials if "seconds" in t.values]
    return {"training": sum(seconds), "epochs": sum(len(t.curve) for t in trials)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peer", type=Path, required=True)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, default=RESULTS / "sweep_speed.json")
    options = parser.parse_args()
    rows: dict[int, dict[str, list[dict[str, Any]]]] = {}
    for trials in (24, 96):
        rows[trials] = {"peer": [], "ours": []}
        for _ in range(options.repeats if trials == 24 else 1):
            for name in ("ours", "peer"):
                with tempfile.TemporaryDirectory() as folder:
                    path = Path(folder)
                    row = ours(trials, path) if name == "ours" else peer(options.peer, trials, path)
                rows[trials][name].append(row)
                print(trials, name, row, flush=True)
    report = summary(rows)
    options.output.write_text(json.dumps({"machine": machine(), **report}, indent=1))
    print(json.dumps(report, indent=1))


def summary(rows: dict[int, dict[str, list[dict[str, Any]]]]) -> dict[str, Any]:
    def median(trials: int, name: str, key: str) -> float:
        return statistics.median(row[key] for row in rows[trials][name])

    walls = {(t, n): median(t, n, "wall") for t in (24, 96) for n in ("ours", "peer")}
    hourly = {n: 3600 * 72 / (walls[96, n] - walls[24, n]) for n in ("ours", "peer")}
    workers = 2
    busy_72 = median(96, "ours", "training") - median(24, "ours", "training")
    return {
        "wall_24": {n: round(walls[24, n], 1) for n in ("ours", "peer")},
        "wall_96": {n: round(walls[96, n], 1) for n in ("ours", "peer")},
        "times_faster_24": round(walls[24, "peer"] / walls[24, "ours"], 2),
        "trials_an_hour_24_to_96": {n: round(v) for n, v in hourly.items()},
        "times_more_trials_an_hour": round(hourly["ours"] / hourly["peer"], 2),
        "overhead_s_a_trial_warm": round(
            (workers * (walls[96, "ours"] - walls[24, "ours"]) - busy_72) / 72, 3
        ),
        **{f"best_{t}": {n: median(t, n, "best") for n in ("ours", "peer")} for t in rows},
        **{f"epochs_{t}": {n: median(t, n, "epochs") for n in ("ours", "peer")} for t in rows},
    }


if __name__ == "__main__":
    main()
