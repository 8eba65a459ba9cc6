"""Sweeps, inline and on Ray: honest states, one record, nothing lost when something dies."""

import json
import os
import re
import signal
import warnings
from pathlib import Path

import optuna
import pytest
import yaml
from support import command, end_session, processes, start, wait_for

from patternsearch.cli import main
from patternsearch.config import Caps, load_config
from patternsearch.errors import ConfigError
from patternsearch.search.folders import hold
from patternsearch.search.results import read_results
from patternsearch.search.storage import open_storage
from patternsearch.search.study import INTERRUPTED, trained
from patternsearch.task import get_task

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
    assert [t.state.name for t in ran] == ["COMPLETE"] * 4  # what the worker had is run again
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
    assert (trial.state.name, trial.user_attrs["reason"]) == ("FAIL", INTERRUPTED)
    _, parent, children = runs(stocked, "cut")
    assert parent.info.status == "KILLED"
    assert children[trial.number].info.status == "FAILED"
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
    assert yaml.safe_load(Path("sweeps/more/sweep.yaml").read_text())["trials"] == 5
    capsys.readouterr()
    main_(["sweep", "sweep.yaml", "--trials", "3", "--resume"])  # nothing left to do
    assert "Nothing to train: 5 trials are over; give a higher" in capsys.readouterr().out
    assert yaml.safe_load(Path("sweeps/more/sweep.yaml").read_text())["trials"] == 5
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
    assert (trial.state.name, trial.user_attrs["reason"]) == ("FAIL", INTERRUPTED)
    assert "No trial finished" in capsys.readouterr().out


def test_a_small_space_is_used_up(stocked, capsys):
    (stocked / "tiny.yaml").write_text(
        "assignment: {width: {choice: [4, 8, 12]}, head: {regions: {choice: [1, 2]}}}"
    )
    main_(["sweep", "sweep.yaml", "--trials", "50", "--set", "space=tiny.yaml", "--name", "tiny"])
    assert sum(map(trained, trials(stocked, "tiny"))) == 6
    assert "no further point within the caps" in capsys.readouterr().out


def test_a_task_that_is_wrong_in_training_fails_its_trials(stocked, capsys, monkeypatch):
    """With more examples than the two that it is tried on before."""
    (stocked / "scales.py").write_text(
        "from patternsearch.tasks.digits import Digits\n"
        "class Broken(Digits):\n    name = ''\n    def score(self, output, y):\n"
        "        if len(y) > 2: raise RuntimeError('the scale is out of order')\n"
        "        return super().score(output, y)\n"
    )
    monkeypatch.syspath_prepend(str(stocked))
    arguments = ["sweep", "sweep.yaml", "--set", "task=scales:Broken"]
    with pytest.raises(SystemExit) as caught:
        main([*arguments, "--name", "b", "--trials", "2"])
    assert caught.value.code == 1
    ran = [t for t in trials(stocked, "b") if trained(t)]
    assert len(ran) == 2 and all(t.state.name == "FAIL" for t in ran)
    message = "RuntimeError: the scale is out of order"
    assert message in ran[0].user_attrs["reason"]
    assert f"No trial finished ({message}" in capsys.readouterr().out


def test_a_damaged_study_is_said(stocked, capsys):
    main_(["sweep", "sweep.yaml", "--name", "torn", "--trials", "1"])
    log = stocked / "sweeps" / "torn" / "study.log"
    log.write_bytes(log.read_bytes()[200:])
    message = r"torn: its study cannot be read: .*start a new sweep"
    with pytest.raises(ConfigError, match=message):
        read_results(log.parent)
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        main(["sweep", "sweep.yaml", "--trials", "1", "--resume", "--name", "torn"])
    assert caught.value.code == 2 and re.search(message, capsys.readouterr().err)


def test_study_log_is_readable_by_optuna_alone(ray_sweep):
    folder, _ = ray_sweep
    lines = recorded(folder, "whole").splitlines()
    assert all(isinstance(json.loads(line), dict) for line in lines)
    assert Caps(parameters=1000) == load_config(str(folder / "sweeps/whole/sweep.yaml")).caps


def test_confirm_adds_to_the_run_of_the_sweep(stocked, capsys):
    main_(["sweep", "sweep.yaml", "--name", "again", "--trials", "2"])
    confirm = ["confirm", "again", "--top", "1", "--seeds", "2"]
    lock = hold(stocked / "sweeps" / "again")
    with pytest.raises(SystemExit) as caught:
        main(confirm)
    lock.release()
    assert caught.value.code == 2 and "again is running in another pro" in capsys.readouterr().err
    main_(confirm)
    client, parent, children = runs(stocked, "again")  # of which there is one
    assert parent.info.status == "FINISHED" and len(children) == 2
    assert "winner" in parent.data.tags and "winner_test_accuracy" in parent.data.metrics
    assert "confirm.yaml" in {file.path for file in client.list_artifacts(parent.info.run_id)}
