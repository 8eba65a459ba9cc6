"""Sweeps killed at random moments, short of memory, time, disk or a record: nothing is lost."""

import os
import random
import signal
import time

import optuna
import pytest
import torch
import yaml
from support import command, end_session, start
from test_sweep import recorded, runs, trials

import patternsearch
from patternsearch.errors import ConfigError
from patternsearch.measure import out_of_memory
from patternsearch.search.storage import Journal
from patternsearch.search.study import trained
from patternsearch.tracking import Past, Tracker

# MLflow's own use of SQLAlchemy, in this process
pytestmark = pytest.mark.filterwarnings("ignore::sqlalchemy.exc.SADeprecationWarning")
TRIALS = 8
OPTIONS = ("--trials", str(TRIALS), "--workers", "1", "--set", "train.epochs=6")
QUICK = {"executor": "inline", "train": {"epochs": 2, "batch": 50}, "quiet": True}
STATUS = {"COMPLETE": "FINISHED", "PRUNED": "KILLED", "FAIL": "FAILED"}


def numbers(found) -> list:
    """What training gave, the seconds apart."""
    measured = ("seconds", "latency_ms")
    return [
        (t.params, t.state.name, {k: v for k, v in t.user_attrs["values"].items()
                                  if k not in measured})
        for t in found if trained(t)
    ]  # fmt: skip


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory) -> list:
    """The trials of the sweep that nobody kills."""
    from support import write_sweep

    folder = tmp_path_factory.mktemp("undisturbed")
    write_sweep(folder)
    done = command(folder, "sweep", "sweep.yaml", "--name", "hit", *OPTIONS)
    assert done.returncode == 0, done.stderr
    return numbers(trials(folder, "hit"))


def moments() -> list:
    """Two for every day, the others slow; every other of these on Ray."""
    found = []
    for i in range(20):
        marks = [pytest.mark.slow] if i > 1 else []
        found.append(pytest.param(i, "ray" if i > 1 and i % 2 else "inline", marks=marks))
    return found


@pytest.mark.parametrize("moment, executor", moments())
def test_killed_at_a_random_moment(stocked, undisturbed, moment, executor):
    rng = random.Random(moment)
    part, pause = rng.random(), rng.uniform(0, 0.3)
    options = ("--name", "hit", "--executor", executor, *OPTIONS)
    process = start(stocked, "sweep", "sweep.yaml", *options)
    try:
        while recorded(stocked, "hit").count('"record"') < part * TRIALS:
            if process.poll() is not None:
                break
            time.sleep(0.01)
        time.sleep(pause)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    finally:
        end_session(process)
    before = [t for t in trials(stocked, "hit") if trained(t) and t.state.is_finished()]

    done = command(stocked, "sweep", "sweep.yaml", "--resume", *options)
    assert done.returncode == 0, done.stderr
    found = trials(stocked, "hit")
    assert not {t.state.name for t in found} & {"RUNNING", "WAITING"}
    assert numbers(found) == undisturbed  # so many, once each, and with the same numbers
    after = {t.number: t for t in found}
    for trial in before:
        assert after[trial.number].values == trial.values, "a finished trial is intact"
    retried = [t.user_attrs["retry_of"] for t in found if "retry_of" in t.user_attrs]
    assert len(set(retried)) == len(retried), "what was interrupted is run again once"

    _, parent, children = runs(stocked, "hit")
    assert parent.info.status == "FINISHED"
    for trial in filter(trained, found):
        run = children[trial.number]
        assert run.info.status == STATUS[trial.state.name]
        assert run.data.tags["state"] == trial.state.name
        for name, value in trial.user_attrs["values"].items():
            assert name == "epochs" or run.data.metrics[name] == value
    assert not any(run.info.status == "RUNNING" for run in children.values())
    best = max((t for t in found if t.state.name == "COMPLETE"), key=lambda t: t.value)
    kept = yaml.safe_load((stocked / "sweeps/hit/best.yaml").read_text())
    assert kept["metrics"]["accuracy"] == best.value
    model = patternsearch.build(stocked / "sweeps/hit/best.yaml")
    assert (stocked / "sweeps/hit/best.safetensors").exists()
    assert sum(p.numel() for p in model.parameters()) == kept["metrics"]["parameters"]


def own_task(folder, monkeypatch, module: str, body: str) -> str:
    """A task whose `loss` is this, but when it is tried on two examples."""
    lines = "".join(f"        {line}\n" for line in body.splitlines())
    (folder / f"{module}.py").write_text(
        "import time, torch\nfrom patternsearch.tasks.digits import Digits\n"
        f"class Hurt(Digits):\n    name = ''\n    def loss(self, output, y):\n"
        f"        if len(y) == 2:\n            return super().loss(output, y)\n{lines}"
        "        return super().loss(output, y)\n"
    )
    monkeypatch.syspath_prepend(str(folder))
    return f"{module}:Hurt"


def test_too_little_memory_is_seen_behind_other_errors():
    """A graph's capture that ends for want of memory says that it ended."""
    with pytest.raises(RuntimeError) as ended:
        try:
            raise torch.OutOfMemoryError("CUDA out of memory")
        finally:
            raise RuntimeError("operation failed due to a previous error during capture")
    assert out_of_memory(ended.value)
    assert out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling ..."))
    assert not out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


@pytest.mark.parametrize("name, fault", [
    ("host", "torch.empty(2**60, dtype=torch.uint8)"),  # no machine has room for it
    ("device", "raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 9 GiB')"),
])  # fmt: skip
def test_out_of_memory_is_tried_once_smaller(stocked, monkeypatch, name, fault):
    """torch's own errors, where a batch is large and where it is small too."""
    body = f"if len(y) > 30 and output.requires_grad:\n    {fault}"
    task = own_task(stocked, monkeypatch, f"large_{name}", body)
    result = patternsearch.sweep(task, "small.yaml", name="m", trials=2, **QUICK)
    found = [t for t in trials(stocked, "m") if "record" in t.user_attrs]
    first = [t for t in found if "again" in t.user_attrs]
    assert len(first) == 2 and all("out of memory" in t.user_attrs["reason"] for t in first)
    assert list(result.trials.state) == ["COMPLETE"] * 2  # the count is met without them
    assert {t.train["batch"] for t in result.results.trials} == {25}

    task = own_task(stocked, monkeypatch, f"larger_{name}", fault)
    result = patternsearch.sweep(task, "small.yaml", name="n", trials=1, **QUICK)
    assert list(result.trials.state) == ["FAIL"]
    assert "out of memory with batch 25" in result.trials.reason.iloc[0]


def test_a_trial_that_hangs_fails_after_its_time(stocked, monkeypatch):
    task = own_task(stocked, monkeypatch, "slow", "time.sleep(60)")
    began = time.monotonic()
    result = patternsearch.sweep(task, "small.yaml", name="h", trials=1, trial_time=0.5, **QUICK)
    assert time.monotonic() - began < 30
    assert "longer than trial_time" in result.trials.reason.iloc[0]


def test_a_full_disk_ends_the_sweep_and_not_the_study(tmp_path, monkeypatch):
    log = tmp_path / "study.log"
    storage = optuna.storages.JournalStorage(Journal(str(log)))
    study = optuna.create_study(storage=storage)
    whole = log.read_bytes()
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) + 20, hard))
    try:
        with pytest.raises(ConfigError, match=r"cannot write .*study\.log: .*go on with --resume"):
            study.ask()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert log.read_bytes() == whole  # no part of a line is left


def test_the_record_makes_up_for_what_it_missed(stocked):
    """A trial that the study has and the record not, or only begun."""
    uri = f"sqlite:///{stocked / 'sweeps' / 'mlflow.db'}"
    tracker = Tracker(uri, "digits", "s")
    tracker.start(1, "t1", {"a": 1}, {"trial": 1})
    tracker.close("KILLED")
    curve = [{"epoch": 1.0, "accuracy": 0.25}, {"epoch": 2.0, "accuracy": 0.5}]
    tracker = Tracker(uri, "digits", "s")
    for n in (1, 2):
        tracker.restore(Past(n, f"t{n}", "COMPLETE", {"a": n}, {"trial": n}, curve,
                             {"flops": 3.0}, None, 1000, 2000))  # fmt: skip
    tracker.close()
    assert tracker.problem is None
    client, parent, children = runs(stocked, "s")
    assert parent.info.status == "FINISHED" and set(children) == {1, 2}
    for n, run in children.items():
        assert (run.info.status, run.data.params["a"]) == ("FINISHED", str(n))
        assert run.info.end_time == 2000 and run.data.metrics["flops"] == 3.0
        assert len(client.get_metric_history(run.info.run_id, "accuracy")) == 2


def test_an_experiment_deleted_in_the_ui_is_there_again(stocked):
    uri = f"sqlite:///{stocked / 'sweeps' / 'mlflow.db'}"
    for name in ("one", "two"):
        tracker = Tracker(uri, "digits", name)
        tracker.close()
        assert tracker.problem is None
        client, parent, _ = runs(stocked, name)
        assert parent.info.status == "FINISHED"
        client.delete_experiment(parent.info.experiment_id)


def test_a_store_that_is_away_for_good_does_not_hold_the_sweep(stocked, monkeypatch):
    import sqlite3

    monkeypatch.setattr(Tracker, "patience", 0.2)
    path = stocked / "sweeps" / "mlflow.db"
    tracker = Tracker(f"sqlite:///{path}", "digits", "s")
    tracker.ready()
    with sqlite3.connect(path) as store:
        store.execute("ALTER TABLE runs RENAME TO away")
    tracker.start(1, "t1", {"a": 1}, {"trial": 1})
    time.sleep(0.3)
    tracker.start(2, "t2", {"a": 1}, {"trial": 2})
    tracker.close()
    assert "--resume writes what is missing" in tracker.problem
