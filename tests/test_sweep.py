"""Sweeps, inline and on Ray: honest states, one record, nothing lost when something dies."""

import io
import json
import os
import re
import signal
import warnings
from pathlib import Path

import optuna
import pytest
import yaml
from rich.console import Console
from support import command, end_session, processes, start, wait_for

from patternsearch.cli import main
from patternsearch.config import Caps, load_config
from patternsearch.errors import ConfigError, TrackingError
from patternsearch.sizes import model_cost
from patternsearch.space import load_space
from patternsearch.sweep.executor import InlineExecutor
from patternsearch.sweep.live import LiveView, Row
from patternsearch.sweep.results import read_results
from patternsearch.sweep.study import INTERRUPTED, Study, open_storage, trained
from patternsearch.sweep.worker import Job, Step
from patternsearch.task import get_task
from patternsearch.tracking import Tracker

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from mlflow.tracking import MlflowClient

# MLflow's own use of SQLAlchemy, in this process
pytestmark = pytest.mark.filterwarnings("ignore::sqlalchemy.exc.SADeprecationWarning")
SPEC = get_task("digits").spec


def trials(folder: Path, name: str) -> list[optuna.trial.FrozenTrial]:
    storage = open_storage(None, folder / "sweeps" / name)
    return optuna.load_study(study_name=name, storage=storage).get_trials()


def runs(folder: Path, name: str) -> tuple:
    """The sweep's parent run in MLflow and its children, by trial number."""
    client = MlflowClient(f"sqlite:///{folder / 'sweeps' / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("digits")
    found = client.search_runs([experiment.experiment_id], max_results=1000)
    parent = next(r for r in found if r.info.run_name == name)
    children = [r for r in found if r.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    return client, parent, {int(r.data.tags["trial"]): r for r in children}


def tuned(**changes) -> dict[str, float]:
    return {"accuracy": 0.5, "parameters": 100, "flops": 100, "seconds": 1.0, **changes}


# One sweep on Ray: it finishes, prunes and fails.


def test_the_sweep_ends_well_and_says_what_it_found(ray_sweep):
    _, done = ray_sweep
    assert done.returncode == 0 and done.stderr == "", done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "whole: 16 trials on digits"
    reports = [line for line in lines if line.startswith("trial ")]
    assert len(reports) == 16
    pattern = r"trial \d+ (COMPLETE|PRUNED|FAIL) (accuracy=0\.\d{4}|-) [\d,]+ params [\d,]+ FLOPs "
    assert all(re.match(pattern, line) for line in reports), reports
    assert "16/16 trials" in reports[-1] and "an hour" in reports[-1]
    for text in ("Best pattern: trial", "best: accuracy", "best expert design, good", "YAML: "):
        assert text in done.stdout
    assert "Look:  patternsearch ui --dir sweeps" in lines


def test_every_trial_has_an_honest_state(ray_sweep):
    folder, _ = ray_sweep
    found = trials(folder, "whole")
    ran = [t for t in found if trained(t)]
    assert len(ran) == 16
    states = {t.user_attrs["record"]["origin"]: t.state.name for t in ran}
    assert states["good0"] == "COMPLETE" and states["wild"] == "FAIL"
    assert "PRUNED" in (states["idle0"], states["idle1"])
    assert {t.state.name for t in found} == {"COMPLETE", "PRUNED", "FAIL"}  # none RUNNING
    for trial in ran:
        record = trial.user_attrs["record"]
        if trial.state.name == "COMPLETE":
            assert trial.user_attrs["values"]["accuracy"] == trial.value
            assert len(trial.intermediate_values) == 8
        elif trial.state.name == "FAIL":
            assert "nan after epoch" in trial.user_attrs["reason"] or (
                "inf after epoch" in trial.user_attrs["reason"]
            )
        else:
            assert 2 <= len(trial.intermediate_values) < 8
            assert "reason" not in trial.user_attrs
        assert record["train"]["lr"] == trial.params["train.lr"]


def test_caps_hold_before_a_worker_is_used(ray_sweep):
    folder, _ = ray_sweep
    found = trials(folder, "whole")
    rejected = [t for t in found if not trained(t)]
    over = [t for t in rejected if "is over the cap of 1000" in t.user_attrs["rejected"]]
    assert over and all(t.state.name == "FAIL" and not t.intermediate_values for t in rejected)
    for trial in found:
        if trained(trial):
            assert trial.user_attrs["record"]["parameters"] <= 1000
    _, _, children = runs(folder, "whole")
    assert set(children) == {t.number for t in found if trained(t)}


def test_no_assignment_is_trained_twice(ray_sweep):
    folder, _ = ray_sweep
    digests = [t.user_attrs["record"]["digest"] for t in trials(folder, "whole") if trained(t)]
    assert len(set(digests)) == len(digests)


def test_workers_are_used_again(ray_sweep):
    """Only the first trials pay for loading torch and the data: the median is far below."""
    folder, _ = ray_sweep
    seconds = sorted(r.data.metrics["seconds"] for r in runs(folder, "whole")[2].values()
                     if "seconds" in r.data.metrics)  # fmt: skip
    assert len(seconds) >= 6 and seconds[len(seconds) // 2] < 1.5


def test_the_record_in_mlflow(ray_sweep):
    folder, _ = ray_sweep
    client, parent, children = runs(folder, "whole")
    assert parent.info.status == "FINISHED"
    statuses = {"COMPLETE": "FINISHED", "PRUNED": "KILLED", "FAIL": "FAILED"}
    for trial in filter(trained, trials(folder, "whole")):
        run = children[trial.number]
        assert run.info.status == statuses[trial.state.name]
        assert run.data.tags["state"] == trial.state.name
        assert run.data.tags["origin"] == trial.user_attrs["record"]["origin"]
        # the parameters are those that this trial has, and no others
        assert run.data.params == {k: str(v) for k, v in trial.params.items()}
        curve = {m.step: m.value for m in client.get_metric_history(run.info.run_id, "accuracy")}
        assert curve == trial.intermediate_values
        assert run.data.metrics["parameters"] == trial.user_attrs["record"]["parameters"]
        if trial.state.name == "COMPLETE":
            assert {"latency_ms", "memory_mb", "seconds", "flops"} <= run.data.metrics.keys()
        if trial.state.name == "FAIL":
            assert "after epoch" in run.data.tags["reason"]
    assert parent.data.params["task"] == "digits" and parent.data.params["train.epochs"] == "8"
    assert parent.data.metrics["trials_complete"] >= 6
    kept = {f.path for f in client.list_artifacts(parent.info.run_id)}
    wanted = {"sweep.yaml", "space.yaml", "best.yaml", "best.safetensors"}
    assert wanted | {"best.png", "history.png", "front.png"} <= kept
    assert not (folder / "mlruns").exists()  # artifacts lie beside the store


def test_the_best_pattern_is_trained_again_to_the_logged_number(ray_sweep, tmp_path, capsys):
    folder, _ = ray_sweep
    results = read_results(folder / "sweeps" / "whole")
    best = results.best()
    kept = yaml.safe_load((folder / "sweeps" / "whole" / "best.yaml").read_text())
    assert kept["provenance"]["trial"] == best.number
    assert kept["metrics"]["accuracy"] == best.objectives[0]
    other = results.complete()[-1]
    for arguments, trial in (([], best), (["--trial", str(other.number)], other)):
        path = tmp_path / f"t{trial.number}.yaml"
        main_(["export", *arguments, "-o", str(path), "--dir", str(folder / "sweeps")])
        assert path.read_text().startswith(f"# {trial.pattern}\n")
        assert path.with_suffix(".safetensors").exists()
        capsys.readouterr()
        main_(["train", str(path)])  # in this process, not in a worker of Ray
        value = repr(trial.objectives[0])
        said = f"validation accuracy: {value} (equal to the logged {value})"
        assert capsys.readouterr().out.splitlines()[0] == said


# When something dies.


def recorded(folder: Path, name: str) -> str:
    log = folder / "sweeps" / name / "study.log"
    return log.read_text() if log.exists() else ""


def workers_of(process) -> list[int]:
    return [n for n, line in processes(process.pid).items() if "ray::_Trainable" in line]


def test_a_worker_dies_then_the_driver_and_the_sweep_goes_on(stocked):
    options = ("--name", "hit", "--trials", "4", "--set", "train.epochs=150")
    options += ("--set", "pruner=none", "--set", "experts=false")
    process = start(stocked, "sweep", "sweep.yaml", "--executor", "ray", "--workers", "1", *options)
    try:
        wait_for(lambda: '"intermediate_value"' in recorded(stocked, "hit"), 60, "the first report")
        (worker,) = wait_for(lambda: workers_of(process), 20, "a worker")
        os.kill(worker, signal.SIGKILL)
        wait_for(lambda: "the worker died" in recorded(stocked, "hit"), 60, "its trial to fail")
        failed = next(t for t in trials(stocked, "hit") if "reason" in t.user_attrs)
        assert failed.state.name == "FAIL" and failed.intermediate_values

        def another():
            running = [t for t in trials(stocked, "hit") if t.state.name == "RUNNING"]
            return running and running[0].intermediate_values and running[0]

        cut = wait_for(another, 60, "the next trial on a new worker")
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        wait_for(lambda: not workers_of(process), 30, "the workers to follow the driver")
    finally:
        end_session(process)
    assert any(t.state.name == "RUNNING" for t in trials(stocked, "hit"))

    done = command(stocked, "sweep", "sweep.yaml", "--resume", *options)
    assert done.returncode == 0, done.stderr
    found = trials(stocked, "hit")
    assert not any(t.state.name == "RUNNING" for t in found)
    old = next(t for t in found if t.number == cut.number)
    assert (old.state.name, old.user_attrs["reason"]) == ("FAIL", INTERRUPTED)
    again = next(t for t in found if t.user_attrs.get("retry_of") == cut.number)
    assert again.params == cut.params and again.state.name == "COMPLETE"
    ran = [t for t in found if trained(t)]
    assert len(ran) == 4 and sum(t.state.name == "FAIL" for t in ran) == 1
    assert len({t.user_attrs["record"]["digest"] for t in ran}) == 4
    _, parent, children = runs(stocked, "hit")
    assert parent.info.status == "FINISHED"
    assert {r.info.status for r in children.values()} == {"FINISHED", "FAILED", "KILLED"}
    assert children[cut.number].info.status == "KILLED"


@pytest.mark.parametrize("presses, code", [(1, 0), (2, 130)])
def test_ctrl_c(stocked, presses, code):
    """Once finishes cleanly, twice stops at once; the record and the study stay honest."""
    long = ("--set", "train.epochs=5000", "--set", f"train.eval_every={1 if presses == 1 else 500}")
    process = start(stocked, "sweep", "sweep.yaml", "--name", "cut", *long)
    try:
        started = '"record"' if presses == 2 else '"intermediate_value"'
        wait_for(lambda: started in recorded(stocked, "cut"), 60, "the first trial")
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        if presses == 2:
            line = process.stdout.readline() + process.stdout.readline()
            assert "Ctrl-C again stops at once" in line
            os.killpg(process.pid, signal.SIGINT)
        out, err = process.communicate(timeout=60)
    finally:
        end_session(process)
    assert process.returncode == code and err == "", out + err
    (trial,) = (t for t in trials(stocked, "cut") if "record" in t.user_attrs)
    state = "PRUNED" if presses == 1 else "FAIL"
    assert (trial.state.name, trial.user_attrs["reason"]) == (state, INTERRUPTED)
    _, parent, children = runs(stocked, "cut")
    assert parent.info.status == "KILLED"
    assert children[trial.number].info.status == {"PRUNED": "KILLED", "FAIL": "FAILED"}[state]
    if presses == 1:
        assert "Interrupted; go on with --resume --name cut" in out


# In this process.


def test_inline_is_the_same_search(stocked, capsys):
    main_(["sweep", "sweep.yaml", "--name", "one"])
    main_(["sweep", "sweep.yaml", "--name", "two"])
    one, two = (trials(stocked, name) for name in ("one", "two"))
    assert [(t.params, t.values) for t in one] == [(t.params, t.values) for t in two]
    main_(["sweep", "sweep.yaml", "--name", "three", "--seed", "1"])
    assert [t.params for t in trials(stocked, "three")] != [t.params for t in one]
    assert "Best pattern: trial" in capsys.readouterr().out


def main_(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert not caught.value.code, caught.value.code


def test_resume_takes_up_where_it_ended(stocked, capsys):
    main_(["sweep", "sweep.yaml", "--name", "more", "--trials", "2"])
    before = trials(stocked, "more")
    main_(["sweep", "sweep.yaml", "--trials", "5", "--resume"])  # the latest of the task
    after = trials(stocked, "more")
    assert [t.params for t in after[: len(before)]] == [t.params for t in before]
    assert sum(map(trained, after)) == 5
    main_(["sweep", "sweep.yaml", "--trials", "5", "--resume"])  # nothing left to do
    assert len(trials(stocked, "more")) == len(after)
    _, parent, children = runs(stocked, "more")
    assert parent.info.status == "FINISHED" and len(children) == 5


def test_resume_finds_the_task_not_a_name_that_begins_alike(stocked, capsys):
    main_(["sweep", "sweep.yaml", "--name", "a", "--trials", "1"])
    full = ["sweep", "sweep.yaml", "--set", "task=digits-full", "--trials", "1"]
    main_([*full, "--name", "digits-full-later", "--set", "train.epochs=1"])
    main_(["sweep", "sweep.yaml", "--trials", "2", "--resume"])
    assert sum(map(trained, trials(stocked, "a"))) == 2


def test_time_is_up(stocked, capsys):
    arguments = ["--set", "train.epochs=100000", "--set", "pruner=none", "--name", "short"]
    with pytest.raises(SystemExit) as caught:
        main(["sweep", "sweep.yaml", "--time", "1", *arguments])
    assert caught.value.code == 1  # no trial finished
    (trial,) = trials(stocked, "short")[:1]
    assert (trial.state.name, trial.user_attrs["reason"]) == ("PRUNED", INTERRUPTED)
    assert "No trial finished" in capsys.readouterr().out


def test_a_small_space_is_used_up(stocked, capsys):
    (stocked / "tiny.yaml").write_text(
        "assignment: {width: {choice: [4, 8, 12]}, head: {regions: {choice: [1, 2]}}}"
    )
    main_(["sweep", "sweep.yaml", "--trials", "50", "--set", "space=tiny.yaml", "--name", "tiny"])
    assert sum(map(trained, trials(stocked, "tiny"))) == 6
    assert "no further point within the caps" in capsys.readouterr().out


def test_a_task_that_raises_in_training_fails_its_trials(stocked, capsys, monkeypatch):
    (stocked / "scales.py").write_text(
        "from patternsearch.tasks.digits import Digits\n"
        "class Broken(Digits):\n"
        "    name = ''\n"
        "    def score(self, output, y):\n"
        "        raise RuntimeError('the scale is out of order')\n"
    )
    monkeypatch.syspath_prepend(str(stocked))
    with pytest.raises(SystemExit) as caught:
        main(["sweep", "sweep.yaml", "--set", "task=scales:Broken", "--name", "b", "--trials", "2"])
    assert caught.value.code == 1
    ran = [t for t in trials(stocked, "b") if trained(t)]
    assert len(ran) == 2 and all(t.state.name == "FAIL" for t in ran)
    assert "RuntimeError: the scale is out of order" in ran[0].user_attrs["reason"]
    out = capsys.readouterr().out
    assert "No trial finished (RuntimeError: the scale is out of order)" in out


# Its parts.


@pytest.fixture
def study(here):
    def make(changes=(), **options) -> Study:
        config = load_config("sweep.yaml", ["objectives={accuracy: maximize}", *changes], **options)
        (here / "s").mkdir(exist_ok=True)
        return Study(config, load_space("small.yaml"), SPEC, here / "s", resume=True)

    return make


@pytest.mark.parametrize("sampler", ["tpe", "gp", "nsga2", "random"])
def test_samplers_propose_new_points_within_the_caps(study, sampler):
    searched = study(["caps.parameters=800", "caps.flops=5e4"], sampler=sampler)
    searched.enqueue_experts()
    digests = set()
    for _ in range(24):
        proposal = searched.ask()
        assert proposal.digest not in digests
        digests.add(proposal.digest)
        cost = model_cost(proposal.assignment, SPEC)
        assert cost == proposal.cost and cost.parameters <= 800 and cost.flops <= 5e4
        value = 1 / (1 + abs(proposal.assignment.width - 8))
        assert searched.end(proposal.number, "COMPLETE", tuned(accuracy=value)) == "COMPLETE"
    assert searched.counts()["COMPLETE"] == 24 and searched.best_value() == 1.0


def test_several_objectives_make_a_front(study):
    changes = ["objectives={accuracy: maximize, parameters: minimize}"]
    searched = study(changes, sampler="nsga2")
    for i in range(6):
        proposal = searched.ask()
        assert not searched.report(proposal.number, {"epoch": 1.0, "accuracy": 0.1})
        searched.end(proposal.number, "COMPLETE", tuned(accuracy=0.1 * i, parameters=100 - i))
    assert len(searched.study.best_trials) == 1  # the last beats all in both


def test_an_objective_that_is_no_number_fails_the_trial(study):
    searched = study()
    proposal = searched.ask()
    assert searched.end(proposal.number, "COMPLETE", tuned(accuracy=float("nan"))) == "FAIL"
    assert "not a number" in searched.study.trials[0].user_attrs["reason"]


def test_the_median_pruner_waits_then_stops(study):
    searched = study(["train.epochs=8"])
    for i in range(7):
        proposal = searched.ask()
        stopped = [
            searched.report(proposal.number, {"epoch": e, "accuracy": 0.5 if i < 6 else 0.1})
            for e in range(1, 9)
        ]
        assert any(stopped) == (i == 6)
        if i == 6:
            assert not any(stopped[:1])
            searched.end(proposal.number, "PRUNED", {})
        else:
            searched.end(proposal.number, "COMPLETE", tuned())
    assert searched.counts()["PRUNED"] == 1


def test_what_was_left_running_is_queued_again_once(study):
    first = study()
    first.enqueue_experts()
    left = first.ask()
    second = study()
    assert second.reconcile() == 1
    again = second.ask()
    assert again.params == left.params and again.origin == "cnn" and again.number != left.number
    second.end(again.number, "COMPLETE", tuned())
    third = study()
    assert third.reconcile() == 0
    assert third.counts()["COMPLETE"] == 1
    assert not any(t.state.name == "RUNNING" for t in third.study.trials)
    assert third.ask().digest != left.digest


def test_a_line_cut_off_by_a_crash_is_left_out(study, here):
    first = study()
    first.enqueue_experts()
    first.end(first.ask().number, "COMPLETE", tuned())
    log = here / "s" / "study.log"
    with log.open("ab") as file:
        file.write(b'{"op_code": 4, "worker_id"')
    again = study()
    again.end(again.ask().number, "COMPLETE", tuned())
    assert study().counts()["COMPLETE"] == 2


def test_a_damaged_study_is_said(stocked, capsys):
    main_(["sweep", "sweep.yaml", "--name", "torn", "--trials", "1"])
    log = stocked / "sweeps" / "torn" / "study.log"
    log.write_bytes(log.read_bytes()[200:])
    with pytest.raises(ConfigError, match=r"torn: its study cannot be read: .*start a new sweep"):
        read_results(log.parent)


def test_a_database_as_storage(here, study):
    url = f"sqlite:///{here / 'studies.db'}"
    searched = study([f"storage={url}"])
    proposal = searched.ask()
    searched.end(proposal.number, "COMPLETE", tuned())
    assert optuna.load_study(study_name="s", storage=url).best_value == 0.5
    config = load_config("sweep.yaml", [f"storage={url}", "objectives={accuracy: maximize}"])
    with pytest.raises(ConfigError, match=r"has a study 's' already; choose another --name"):
        Study(config, load_space("small.yaml"), SPEC, here / "s")
    with pytest.raises(ConfigError, match=r"storage=nonsense: .*check the URL"):
        open_storage("nonsense", here)


class Jobs:
    """A source of three jobs that stops the first at its second report."""

    def __init__(self) -> None:
        point = load_space("small.yaml").experts["cnn"]
        assignment = load_space("small.yaml").point(point)[1].to_dict()
        self.left = [
            Job(
                n, "digits", assignment, {"epochs": 3, "batch": 50}, n, "cpu", ("accuracy", up), 2.0
            )
            for n, up in enumerate(("maximize", "maximize", "minimize"))
        ]
        self.steps: list[Step] = []

    def next(self) -> Job | None:
        return self.left.pop(0) if self.left else None

    def handle(self, step: Step) -> bool:
        self.steps.append(step)
        return step.number == 0 and step.row["epoch"] == 2

    def lost(self, number: int, why: str) -> None:
        raise AssertionError(why)


def test_the_inline_executor_runs_jobs_step_by_step(here):
    source = Jobs()
    InlineExecutor().run(source)
    seen = [(s.number, int(s.row["epoch"]), s.done) for s in source.steps]
    ends = [(n, e, e == 3) for n in (1, 2) for e in (1, 2, 3)]
    assert seen == [(0, 1, False), (0, 2, False), *ends]
    # weights come back only where the objective is better than the best so far
    assert [s.weights is not None for s in source.steps if s.done] == [False, True]


def test_a_store_that_breaks_is_said_and_does_not_stop_the_sweep(stocked):
    tracker = Tracker(f"sqlite:///{stocked / 'sweeps' / 'mlflow.db'}", "digits", "s")
    tracker.ready()
    tracker.start(1, "t1", {"a": 1}, {})
    tracker.finish(7, "COMPLETE", [], {}, {})  # of a trial that never began
    tracker.start(2, "t2", {"a": 1}, {})
    tracker.close()
    assert "cannot be used" in tracker.problem


def test_an_unreachable_server(here, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    tracker = Tracker("http://127.0.0.1:9", "digits", "s")
    with pytest.raises(TrackingError, match=r"http://127\.0\.0\.1:9 cannot be used.*start the"):
        tracker.ready()
    tracker.close()


def test_the_live_table():
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=120)
    view = LiveView(console, "s: 3 trials on digits", "accuracy", 3, 0)
    with view:
        view.start(Row(0, "cnn", "w8 | conv 3", 500, 2000))
        view.update(0, 4, 0.75)
        view.end(0, "COMPLETE", best=True)
        view.start(Row(1, "sampler", "w12 | average", 700, 3000))
        view.update(1, 2, 0.25)
        console.print(view.render())
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", out.getvalue())
    for expected in ("0.7500", "COMPLETE", "epoch 2", "best so far: trial 0, accuracy=0.7500",
                     "1/3 trials", "an hour", "left", "700"):  # fmt: skip
        assert expected in text, expected


def test_study_log_is_readable_by_optuna_alone(ray_sweep):
    folder, _ = ray_sweep
    lines = recorded(folder, "whole").splitlines()
    assert all(isinstance(json.loads(line), dict) for line in lines)
    assert Caps(parameters=1000) == load_config(str(folder / "sweeps/whole/sweep.yaml")).caps
