"""Sweeps with their study in PostgreSQL and their record on an MLflow server: both are real."""

import contextlib
import os
import signal
import time
import warnings
from pathlib import Path

import optuna
import pytest
import yaml
from servers import MlflowServer, answers, free_port, postgresql
from support import command, end_session, processes, start, wait_for
from test_survive import STATUS, own_task
from test_sweep import recorded, trials

from patternsearch.config import saved_config
from patternsearch.errors import ConfigError
from patternsearch.search.results import read_results
from patternsearch.search.storage import close_storage, open_storage
from patternsearch.search.study import trained

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from mlflow.tracking import MlflowClient

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::sqlalchemy.exc.SADeprecationWarning"),
]
QUICK = ("--trials", "5", "--workers", "1", "--set", "train.epochs=4")


@pytest.fixture(scope="module")
def database():
    with postgresql() as url:
        yield url


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    found = MlflowServer(tmp_path_factory.mktemp("server"))
    try:
        found.start()
        yield found
    finally:
        found.stop()


def runs(uri: str, name: str) -> tuple:
    """The client, the sweep's run and those of its trials by number."""
    client = MlflowClient(uri)
    experiments = [e.experiment_id for e in client.search_experiments()]
    found = client.search_runs(experiments, max_results=1000)
    (parent,) = (r for r in found if r.info.run_name == name)
    ours = [r for r in found if r.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    return client, parent, {int(r.data.tags["trial"]): r for r in ours}


def trials_in(url: str, name: str) -> list:
    """Of a study in a database; none while it is not there."""
    storage = open_storage(url, Path())
    try:
        return optuna.load_study(study_name=name, storage=storage).get_trials()
    except KeyError:
        return []
    finally:
        close_storage(storage)


def complete(url: str, name: str) -> int:
    return sum(t.state.name == "COMPLETE" for t in trials_in(url, name))


def check_record(found: list, uri: str, name: str) -> None:
    """Study and record say the same of every trial, and nothing is left open."""
    assert not {t.state.name for t in found} & {"RUNNING", "WAITING"}
    _, parent, children = runs(uri, name)
    assert parent.info.status == "FINISHED"
    for trial in filter(trained, found):
        run = children[trial.number]
        assert run.info.status == STATUS[trial.state.name]
        assert run.data.tags["state"] == trial.state.name
        for key, value in trial.user_attrs["values"].items():
            assert key == "epochs" or run.data.metrics[key] == value
    assert not any(run.info.status == "RUNNING" for run in children.values())


def test_a_database_and_a_server(stocked, database, server):
    """Killed in mid-sweep and gone on with; what is left is complete in both, and exported."""
    options = ("--name", "far", "--storage", database, "--tracking-uri", server.uri, *QUICK)
    process = start(stocked, "sweep", "sweep.yaml", *options)
    try:
        wait_for(lambda: complete(database, "far") >= 2, 120, "two trials")
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    finally:
        end_session(process)
    done = command(stocked, "sweep", "sweep.yaml", "--resume", *options)
    assert done.returncode == 0, done.stderr
    found = trials_in(database, "far")
    assert sum(map(trained, found)) == 5
    check_record(found, server.uri, "far")

    client, parent, _ = runs(server.uri, "far")
    kept = {f.path for f in client.list_artifacts(parent.info.run_id)}
    assert {"sweep.yaml", "best.yaml", "best.safetensors", "report.html", "best.png"} <= kept
    local = client.download_artifacts(parent.info.run_id, "best.yaml", str(stocked))
    best = read_results(stocked / "sweeps" / "far").best()
    assert yaml.safe_load(Path(local).read_text())["provenance"]["trial"] == best.number
    assert not (stocked / "sweeps/far/study.log").exists()
    exported = command(stocked, "export", "far", "-o", "taken.yaml")
    assert exported.returncode == 0 and (stocked / "taken.safetensors").exists(), exported.stderr


def test_a_password_is_not_in_the_record(stocked, database, server):
    options = ("--name", "quiet", "--storage", database, "--tracking-uri", server.uri)
    done = command(stocked, "sweep", "sweep.yaml", *options, *QUICK, "--trials", "1")
    assert done.returncode == 0, done.stderr
    client, parent, _ = runs(server.uri, "quiet")
    assert parent.data.params["storage"] == database.replace("secret", "***")
    for name in ("sweep.yaml", "environment.yaml", "report.html"):
        path = client.download_artifacts(parent.info.run_id, name, str(stocked))
        assert "secret" not in Path(path).read_text(), name
    config = stocked / "sweeps/quiet/sweep.yaml"
    assert saved_config(config).storage == database  # to go on with
    assert config.stat().st_mode & 0o077 == 0


def test_a_database_that_goes_away_in_mid_sweep(stocked):
    """The sweep ends with one line, whose password is hidden; nothing hangs."""
    with contextlib.ExitStack() as there:
        url = there.enter_context(postgresql())
        options = ("--name", "cut", "--storage", url, "--executor", "ray", *QUICK)
        process = start(stocked, "sweep", "sweep.yaml", *options, "--trials", "5000")
        try:
            wait_for(lambda: complete(url, "cut") > 0, 120, "a trial")
            there.close()
            out, err = process.communicate(timeout=60)
        finally:
            end_session(process)
    assert process.returncode == 2, out + err
    (line,) = err.splitlines()
    assert line.startswith("error: storage=postgresql+psycopg://sweeps:***@127.0.0.1:")
    assert "go on with --resume" in line


@pytest.mark.parametrize("part, other, why", [
    ("secret", "guess", r"\*\*\*@.*password authentication failed"),
    ("postgres", "nothing", 'database "nothing" does not exist'),
    ("psycopg", "pg8000", r"its driver is not installed; pip install 'patternsearch\[postgre"),
])  # fmt: skip
def test_a_database_that_cannot_be_used(stocked, database, part, other, why):
    head, _, tail = database.rpartition(part)
    with pytest.raises(ConfigError, match=f"storage=.*{why}.*"):
        open_storage(f"{head}{other}{tail}", stocked)


@pytest.fixture
def restless(tmp_path):
    """A server that a test may end."""
    found = MlflowServer(tmp_path)
    try:
        found.start()
        yield found
    finally:
        found.stop()


def napping(folder, monkeypatch) -> tuple[str, ...]:
    """Options of a sweep whose trials take five seconds on any machine, and wait most of it."""
    task = own_task(folder, monkeypatch, "napping", "time.sleep(0.125 * output.requires_grad)")
    changes = (f"task={task}", "train.epochs=10", "pruner=none")
    return ("--workers", "1", *(part for change in changes for part in ("--set", change)))


def ended(folder, name: str) -> int:
    return sum(t.state.is_finished() for t in trials(folder, name)) if recorded(folder, name) else 0


def test_a_server_that_is_away_for_a_minute(stocked, monkeypatch, restless):
    """The trials go on without it, and the record has all of them in the end."""
    options = ("--name", "away", "--tracking-uri", restless.uri, *napping(stocked, monkeypatch))
    process = start(stocked, "sweep", "sweep.yaml", *options, "--trials", "18")
    try:
        wait_for(lambda: ended(stocked, "away") > 0, 100, "a trial")
        restless.stop()
        gone, before = time.monotonic(), ended(stocked, "away")
        wait_for(lambda: ended(stocked, "away") > before + 1, 60, "trials without the server")
        time.sleep(max(0.0, 60 - (time.monotonic() - gone)))
        assert process.poll() is None
        restless.start()
        out, err = process.communicate(timeout=170)
    finally:
        end_session(process)
    assert process.returncode == 0 and "warning" not in out + err, out + err
    found = trials(stocked, "away")
    assert sum(map(trained, found)) == 18
    check_record(found, restless.uri, "away")


def test_a_server_that_is_away_for_good(stocked, monkeypatch, restless):
    """The sweep ends, says what is missing and with status 1; --resume makes up for it later."""
    options = ("--name", "lone", "--tracking-uri", restless.uri, *napping(stocked, monkeypatch))
    options += ("--trials", "4")
    process = start(stocked, "sweep", "sweep.yaml", *options)
    try:
        wait_for(lambda: ended(stocked, "lone") > 0, 100, "a trial")
        restless.stop()
        out, err = process.communicate(timeout=170)
    finally:
        end_session(process)
    assert process.returncode == 1, out + err
    (said,) = (line for line in out.splitlines() if line.startswith("warning: "))
    assert f"the tracking store {restless.uri} cannot be used" in said
    assert "--resume writes what is missing" in said
    found = trials(stocked, "lone")
    assert sum(map(trained, found)) == 4
    for name in ("best.yaml", "best.safetensors", "report.html"):
        assert (stocked / "sweeps/lone" / name).exists()
    restless.start()
    done = command(stocked, "sweep", "sweep.yaml", "--resume", *options)
    assert done.returncode == 0 and "warning" not in done.stdout, done.stdout + done.stderr
    assert trials(stocked, "lone") == found
    check_record(found, restless.uri, "lone")


def test_the_ui_answers_and_ends(stocked):
    port = free_port()
    process = start(stocked, "ui", "--port", str(port))
    try:
        wait_for(lambda: answers(f"http://127.0.0.1:{port}/"), 120, "the UI")
        again = command(stocked, "ui", "--port", str(port))
        said = f"error: --port {port}: Address already in use; give another\n"
        assert again.returncode == 2 and again.stderr == said
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        assert process.wait(60) == 0
        assert "Warning" not in process.stderr.read()
        wait_for(lambda: not processes(process.pid), 20, "its processes to end")
    finally:
        end_session(process)
