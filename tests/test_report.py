"""Several objectives, what was trained again, and the page: one real sweep, inline."""

import io
import itertools
import math
import re
import shutil
import statistics
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from patternsearch.cli import main
from patternsearch.config import Confirm, SweepConfig
from patternsearch.errors import ConfigError
from patternsearch.export import load
from patternsearch.search.confirm import Confirmed, confirm, lines, read_confirmed
from patternsearch.search.effects import early_epoch, factors
from patternsearch.search.executor import InlineExecutor
from patternsearch.search.interval import difference, estimate
from patternsearch.search.pareto import dominates, turned
from patternsearch.search.report import busy_hours, cost, write_report
from patternsearch.search.results import Results, _importances, read_results
from patternsearch.search.storage import open_storage
from patternsearch.search.study import curve_of
from patternsearch.task import get_task

# MLflow's own use of SQLAlchemy, in this process
pytestmark = pytest.mark.filterwarnings("ignore::sqlalchemy.exc.SADeprecationWarning")
GOALS = {"accuracy": "maximize", "parameters": "minimize", "latency_ms": "minimize"}


def run(*arguments: str) -> None:
    with pytest.raises(SystemExit) as caught:
        main(list(arguments))
    assert not caught.value.code, caught.value.code


@pytest.fixture(scope="module")
def swept(tmp_path_factory, empty_store):
    """A folder with a sweep for three objectives, and what the command printed."""
    import contextlib
    import os
    import sqlite3

    from support import write_sweep

    folder = tmp_path_factory.mktemp("several")
    write_sweep(folder)
    (folder / "sweeps").mkdir()
    with sqlite3.connect(empty_store) as old, sqlite3.connect(folder / "sweeps/mlflow.db") as new:
        old.backup(new)
    said, before = io.StringIO(), Path.cwd()
    os.chdir(folder)
    try:
        with contextlib.redirect_stdout(said):
            run("sweep", "sweep.yaml", "--name", "three", "--trials", "14", "--confirm", "2",
                "--set", "objectives={latency_ms: minimize, accuracy: maximize, "
                "parameters: minimize}", "--set", "confirm.seeds=3", "--set", "pruner=halving",
                "--set", "train.epochs=4", "--set", "caps.memory_mb=0.2")  # fmt: skip
    finally:
        os.chdir(before)
    return folder, said.getvalue()


@pytest.fixture(scope="module")
def results(swept) -> Results:
    return read_results(swept[0] / "sweeps" / "three")


def test_several_objectives_give_a_front(swept, results):
    said = swept[1]
    assert list(results.config.objectives) == ["accuracy", "parameters", "latency_ms"]
    done = results.complete()
    points = {t.number: turned(t.values, GOALS) for t in done}
    front = [t.number for t in results.front()]
    for number, point in points.items():
        assert (number in front) != any(dominates(other, point) for other in points.values())
    written = sorted((results.folder / "front").iterdir())
    assert written == [results.folder / f"front/t{n:04}.yaml" for n in sorted(front)]
    first = load(written[0])
    assert first.provenance["trial"] == min(front) and first.metrics["latency_ms"] > 0
    assert f"Front: {len(front)} trials" in said and "*winner*" in said
    assert (results.folder / "front.png").stat().st_size > 5000


def test_stopped_trials_are_dominated_and_curves_are_kept(results):
    states = {t.state for t in results.trials}
    assert states <= {"COMPLETE", "PRUNED"} and len(results.trials) == 14
    stopped = [t for t in results.trials if t.state == "PRUNED" and t.reason is None]
    for trial in stopped:
        epoch = trial.curve[-1]["epoch"]
        assert epoch < 4 and "latency_ms" in trial.values  # measured before training
        rung = [
            turned({**t.values, **row}, GOALS)
            for t in results.trials
            for row in t.curve
            if row["epoch"] == epoch
        ]
        own = turned({**trial.values, **trial.curve[-1]}, GOALS)
        assert any(dominates(other, own) for other in rung)
    for trial in results.complete():
        assert [row["epoch"] for row in trial.curve] == [1, 2, 3, 4]
        assert trial.curve[-1]["accuracy"] == trial.values["accuracy"]
        assert {"train_loss", "valid_loss", "seconds"} <= trial.curve[0].keys()


def test_a_measured_cap_is_hard(results):
    for trial in results.trials:
        if trial.reason is not None:
            assert trial.state == "PRUNED" and not trial.curve
            assert re.fullmatch(r"memory_mb=[\d.]+ is over the cap of 0.2", trial.reason)
        assert trial.state == "PRUNED" or trial.values["memory_mb"] <= 0.2
    assert any(t.reason for t in results.trials)


def test_the_winner_is_the_best_mean_of_fresh_seeds(swept, results):
    found = results.confirmed
    assert found.seeds == [1, 2, 3] and found.metric == "accuracy"
    trials = [row for row in found.rows if row.trial is not None]
    assert {r.trial for r in trials} == {t.number for t in results.front()[:2]}
    assert found.best() is max(trials, key=lambda r: statistics.mean(r.valid.values()))
    for row in found.rows:
        assert list(row.valid) == [1, 2, 3]
        assert bool(row.test) == (row.expert or row.name == found.winner)  # no other's is kept
    (expert,) = found.experts()
    assert "cnn" in expert.name
    kept = load(results.folder / "best.yaml")
    mean = statistics.mean(found.best().valid.values())
    assert kept.provenance["trial"] == found.best().trial == results.winner().number
    assert kept.provenance["confirmed"]["accuracy"][0] == pytest.approx(mean, abs=1e-6)
    assert kept.provenance["confirmed"]["test_accuracy"][1] > 0
    assert "Trained again from 3 fresh seeds" in swept[1]


class Counting(InlineExecutor):
    """Counts what it is given; `until`: no more after so many."""

    def __init__(self, until: int | None = None) -> None:
        self.jobs, self.until = 0, until

    def run(self, source):
        ask = source.next

        def count():
            job = ask()
            self.jobs += job is not None
            return job

        source.next = count
        super().run(source)

    def over(self) -> bool:
        return self.until is not None and self.jobs > self.until


@pytest.fixture
def copied(results, tmp_path) -> Path:
    """The sweep's folder, to be changed."""
    return Path(shutil.copytree(results.folder, tmp_path / "sweeps" / "three"))


def again(folder: Path, top: int, seeds: int, executor: Counting) -> Confirmed | None:
    wanted, console = Confirm(top=top, seeds=seeds), Console(file=io.StringIO())
    return confirm(read_results(folder), wanted, executor, console, executor.over)


def said(found: Confirmed) -> list:
    runs = [(row.name, row.valid, row.test, row.failed) for row in found.rows]
    return [found.winner, found.seeds, runs]


def hidden(results: Results, found: Confirmed) -> int:
    """How many runs of a new winner are done once more, for the test metric."""
    return 3 * any(r.name == found.winner and not r.test for r in results.confirmed.rows)


def test_confirm_goes_on_where_it_was(results, copied):
    """Runs that are on disk are not trained again; a larger command adds seeds to all."""
    kept, executor = {row.key: row for row in results.confirmed.rows}, Counting()
    found = again(copied, 1, 4, executor)
    assert executor.jobs == len(found.rows) + hidden(results, found)
    for row in found.rows:
        assert list(row.valid) == [1, 2, 3, 4]
        assert all(row.valid[s] == v for s, v in kept.pop(row.key).valid.items())
    assert not kept
    assert read_confirmed(copied) == found


def test_a_smaller_confirm_takes_nothing_away(results, copied):
    executor = Counting()
    assert again(copied, 1, 2, executor) == results.confirmed and executor.jobs == 0
    assert read_results(copied).winner().number == results.winner().number


def test_what_was_confirmed_stays_until_more_is(results, copied):
    """A larger command that is ended: the winner is as before, what it did is not done twice."""
    executor = Counting(until=2)
    assert again(copied, 3, 5, executor) is None and executor.jobs == 3  # one of them was cut
    later = read_results(copied)
    assert said(later.confirmed) == said(results.confirmed)
    assert later.winner().number == results.winner().number
    spent = cost(later)["runs"]
    assert spent == cost(results)["runs"] + 2
    assert said(again(copied, 2, 3, Counting())) == said(results.confirmed)
    rest = Counting()
    found = again(copied, 3, 5, rest)
    assert {row.trial for row in found.rows} >= {t.number for t in results.front()[:3]}
    assert rest.jobs == 5 * len(found.rows) - spent + hidden(results, found)


def test_a_run_that_hangs_fails_after_its_time(results, copied):
    config = results.config.model_copy(update={"trial_time": 1e-3})
    late = replace(read_results(copied), config=config)
    console = Console(file=io.StringIO())
    found = confirm(late, Confirm(top=1, seeds=4), InlineExecutor(), console)
    assert all("longer than trial_time" in row.failed[4] for row in found.rows)
    assert all("1 of 4 failed (it ran longer" in line for line in lines(found)[1:-1])


def test_importances_are_of_what_is_good():
    """b makes the best tenth and a the worst, whichever way it is told."""
    import optuna
    from optuna.distributions import CategoricalDistribution

    def told(direction: str, sign: float) -> dict[str, float]:
        study = optuna.create_study(direction=direction)
        ten = CategoricalDistribution(tuple(range(10)))
        for a, b in itertools.product(range(10), range(10)):
            value = 0.1 if a == 1 else 0.95 if b == 1 else 0.8
            value += 1e-4 * ((37 * a + 11 * b) % 100)  # no two alike
            point = {"a": a, "b": b}
            study.add_trial(
                optuna.trial.create_trial(
                    params=point, distributions=dict.fromkeys(point, ten), value=sign * value
                )
            )
        return _importances(study)

    found = told("maximize", 1.0)
    assert found["b"] > 0.8 and found == told("minimize", -1.0)


def test_a_better_trial_ends_what_was_confirmed(results, copied):
    found = read_confirmed(copied)
    first = results.ranked()[0].number
    found.rows = [row for row in found.rows if row.trial != first]  # as if it had come after
    found.save(copied)
    later = read_results(copied)
    assert later.confirmed is None and later.winner() == later.best()


class Page(HTMLParser):
    """Texts, ids and what a page refers to."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []
        self.ids: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.links += [found[k] for k in ("src", "href") if k in found]
        self.ids |= {found["id"]} if "id" in found else set()
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_stands_alone(swept, results, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run("report", "three", "--dir", str(swept[0] / "sweeps"), "-o", "mine.html")
    text = Path("mine.html").read_text(encoding="utf-8")
    page = Page(text)
    assert not page.open
    for link in page.links:
        assert link.startswith("data:image/png;base64,") or link[1:] in page.ids, link[:80]
    names = {p.name for p in tmp_path.iterdir()}
    assert {"mine-best.png", "mine-front.png", "mine-curves.png", "mine-confirm.png"} <= names
    winner = results.winner()
    for said in (f"is trial {winner.number}:", "95 % interval", "CPU-seconds", "cnn",
                 f"memory to train in MB at most {0.2}", "successive halving"):  # fmt: skip
        assert said in text, said
    assert "&lt;" not in page.links and (results.folder / "report.html").exists()


def test_a_page_while_the_sweep_runs(results, tmp_path):
    """Or after a kill: an expert design may still stand as running."""
    cut = replace(results.trials[0], state="RUNNING", objectives=(), values={
        k: v for k, v in results.trials[0].values.items() if k in ("parameters", "flops")
    }, curve=())  # fmt: skip
    assert cut.expert
    running = replace(results, trials=(cut, *results.trials[1:]), confirmed=None)
    write_report(running, tmp_path / "report.html")
    assert (tmp_path / "report.html").read_text().count("cut short or running") == 2


def test_a_sweep_without_results_has_no_page(here):
    config = SweepConfig(task="digits", objectives={"accuracy": "maximize"})
    empty = Results("none", config, (), {}, here)
    with pytest.raises(ConfigError, match="none has no finished trial yet; nothing to report"):
        write_report(empty, here / "report.html")


def test_mlflow_knows_the_front_and_the_winner(swept, results):
    from test_sweep import runs

    client, parent, children = runs(swept[0], "three")
    front = {t.number for t in results.front()}
    assert {n for n, run in children.items() if "front" in run.data.tags} == front
    winner = results.winner().number
    assert [n for n, run in children.items() if "winner" in run.data.tags] == [winner]
    mean = results.confirmed.best().mean()
    assert parent.data.metrics["winner_accuracy"] == mean.mean
    assert parent.data.metrics["winner_test_accuracy_plus_minus"] >= 0
    kept = {f.path for f in client.list_artifacts(parent.info.run_id)}
    assert {"report.html", "confirm.yaml", "confirm.png", "front", "effects.png"} <= kept
    kept = {f.path for f in client.list_artifacts(parent.info.run_id, "front")}
    assert kept == {f"front/t{n:04}.yaml" for n in front}


def test_marginal_means_are_of_the_trials(results):
    found = {f.name.split(":")[0]: f for f in factors(results)}
    widths = found["channels between the blocks"]
    done = results.complete()
    assert sum(level.final.n for level in widths.levels) == len(done)
    for level in widths.levels:
        values = [t.values["accuracy"] for t in done if str(t.assignment.width) == level.name]
        assert level.final.mean == estimate(values).mean or not values
    epoch = early_epoch(results)
    reached = [t for t in results.trials if any(r["epoch"] == epoch for r in t.curve)]
    assert len(reached) >= 0.95 * sum(bool(t.curve) for t in results.trials)
    assert sum(level.early.n for level in widths.levels) == len(reached)


def test_cost_is_of_all_trials(results):
    spent = cost(results)
    assert spent["device"] == "CPU" and sum(spent["states"].values()) == 14
    assert spent["searched"] >= sum(t.values.get("seconds", 0) for t in results.complete())
    assert spent["runs"] == 3 * len(results.confirmed.rows) and spent["again"] > 0
    assert busy_hours([(0, 2), (1, 3), (10, 11), (10.2, 10.5)]) == 4


def test_intervals_against_scipy():
    from scipy import stats

    a, b = [0.81, 0.84, 0.79, 0.90, 0.85], [0.70, 0.78, 0.74]
    low, high = stats.t.interval(0.95, 4, statistics.mean(a), stats.sem(a))
    found = estimate(a)
    assert (found.mean - found.half, found.mean + found.half) == pytest.approx((low, high))
    welch = stats.ttest_ind(a, b, equal_var=False).confidence_interval(0.95)
    gap = difference(a, b)
    assert (gap.mean - gap.half, gap.mean + gap.half) == pytest.approx((welch.low, welch.high))
    assert estimate([0.5]).half == math.inf and math.isnan(estimate([]).mean)
    assert difference([1.0, 1.0], [0.5, 0.5]).half == 0


def test_the_configuration_of_confirm_and_its_errors(swept, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    where = ["--dir", str(swept[0] / "sweeps")]
    for arguments, said in (
        (["confirm", "three", "--seeds", "1"], "at least one trial and two seeds"),
        (["confirm", "thre"], "Did you mean 'three'?"),
        (["export", "three", "--front", "--trial", "2"], "leave out --trial 2"),
        (["report", "three", "-o", "no/where.html"], "folder that exists"),
    ):
        with pytest.raises(SystemExit) as caught:
            main([*arguments, *where])
        assert caught.value.code == 2 and said in capsys.readouterr().err
    run("export", "three", "--front", *where)
    assert capsys.readouterr().out.count("front/t") >= 1


def test_the_study_holds_the_curves(swept):
    import optuna

    folder = swept[0] / "sweeps" / "three"
    study = optuna.load_study(study_name="three", storage=open_storage(None, folder))
    trials = [t for t in study.trials if "curve" in t.user_attrs]
    assert trials and all(t.state.is_finished() for t in study.trials)
    rows = list(curve_of(trials[0]))
    assert rows[0]["epoch"] == 1.0 and "accuracy" in rows[0]
    task = get_task("digits")
    assert yaml.safe_load((folder / "sweep.yaml").read_text())["task"] == task.name
