import os
import sqlite3
import subprocess
from pathlib import Path

import pytest
import torch
import yaml
from support import SPACE, command, write_sweep

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # must be set before triton is imported

torch.set_num_threads(1)  # the test tensors are tiny: threads cost more than they save


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """An empty folder to work in, with a small space and a sweep over it."""
    monkeypatch.chdir(tmp_path)
    write_sweep(tmp_path)
    return tmp_path


@pytest.fixture
def stocked(here, empty_store) -> Path:
    """The same, with an empty tracking store in sweeps/: MLflow takes seconds to make one."""
    (here / "sweeps").mkdir()
    with sqlite3.connect(empty_store) as old, sqlite3.connect(here / "sweeps/mlflow.db") as new:
        old.backup(new)
    return here


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory) -> Path:
    from patternsearch.tracking import Tracker

    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    tracker = Tracker(f"sqlite:///{path}", "nothing", "nothing")
    tracker.ready()
    tracker.close()
    return path


@pytest.fixture(scope="session")
def ray_sweep(tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """The folder of one sweep by Ray with trials that finish, are pruned and fail; what it said."""
    folder = tmp_path_factory.mktemp("ray")
    write_sweep(folder)
    data = yaml.safe_load(SPACE)
    data["train"]["lr"]["float"] = [1e-7, 1e30]
    good = data["experts"].pop("cnn")
    for i in range(8):
        data["experts"][f"good{i}"] = {**good, "train.lr": 0.01 + 0.001 * i}
    for i in range(2):
        data["experts"][f"idle{i}"] = {**good, "train.lr": (1 + i) * 1e-7}
    data["experts"]["wild"] = {**good, "train.lr": 1e30}
    (folder / "small.yaml").write_text(yaml.safe_dump(data, sort_keys=False))
    done = command(
        folder,
        *("sweep", "sweep.yaml", "--executor", "ray", "--name", "whole", "--workers", "2"),
        *("--trials", "16", "--set", "train.epochs=8", "--set", "caps.parameters=1000"),
        *("--sampler", "random"),
    )
    return folder, done


@pytest.fixture(scope="session")
def exported(tmp_path_factory) -> Path:
    """A small untrained pattern for the digits, as YAML with its weights beside it."""
    from patternsearch import Assignment, Block, Head, Mixer, Stem, build_model
    from patternsearch.export import make_export, save, save_weights, weights_path
    from patternsearch.patterns.banded import Banded
    from patternsearch.patterns.dense import Dense
    from patternsearch.patterns.monarch import Monarch
    from patternsearch.task import get_task

    task = get_task("digits")
    conv = Mixer(positions=Banded(entry=Dense()))
    assignment = Assignment(
        width=8,
        stem=Stem(mixer=conv, stride=2, activation="relu"),
        blocks=(Block(channel=(Monarch(blocks=2), Dense())),),
        head=Head(regions=2),
    )
    train = {"epochs": 2, "batch": 50}
    export = make_export(task, "digits", assignment.to_dict(), train, 0, {}, {"sweep": "none"})
    path = tmp_path_factory.mktemp("exported") / "best.yaml"
    save(export, path)
    model = build_model(assignment, task.spec)
    for parameter in model.parameters():  # a fresh head is zero and would hide everything before it
        torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(0))
    save_weights(model, weights_path(path))
    return path
