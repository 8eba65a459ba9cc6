"""What a sweep is made of: study, executor, tracker, live view."""

import io
import random
import re
from pathlib import Path

import optuna
import pytest
import yaml
from rich.console import Console

from patternsearch.config import load_config
from patternsearch.errors import ConfigError, TrackingError
from patternsearch.search.executor import InlineExecutor
from patternsearch.search.folders import CONFIG
from patternsearch.search.live import LiveView, Row
from patternsearch.search.storage import JOURNAL, open_storage
from patternsearch.search.study import INTERRUPTED, Study, curve_of, trained
from patternsearch.search.worker import Job, Step
from patternsearch.sizes import model_cost
from patternsearch.space import load_space
from patternsearch.task import get_task
from patternsearch.tracking import Tracker

# MLflow's own use of SQLAlchemy, in this process
pytestmark = pytest.mark.filterwarnings("ignore::sqlalchemy.exc.SADeprecationWarning")
SPEC = get_task("digits").spec


def tuned(**changes) -> dict[str, float]:
    return {"accuracy": 0.5, "parameters": 100, "flops": 100, "seconds": 1.0, **changes}


@pytest.fixture
def study(here):
    def make(changes=(), **options) -> Study:
        config = load_config("sweep.yaml", ["objectives={accuracy: maximize}", *changes], **options)
        (here / "s").mkdir(exist_ok=True)
        return Study(config, load_space("small.yaml"), SPEC, here / "s", resume=True)

    return make


@pytest.mark.parametrize("sampler", ["tpe", "gp", "nsga2", "random", "structured"])
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
    assert searched.counts()["COMPLETE"] == 24 and searched.best().value == 1.0


def test_several_objectives_make_a_front(study):
    changes = ["objectives={accuracy: maximize, parameters: minimize}"]
    searched = study(changes, sampler="nsga2")
    for i in range(6):
        proposal = searched.ask()
        assert not searched.report(proposal.number, {"epoch": 1.0, "accuracy": 0.1}, {})
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
            searched.report(proposal.number, {"epoch": e, "accuracy": 0.5 if i < 6 else 0.1}, {})
            for e in range(1, 9)
        ]
        assert any(stopped) == (i == 6)
        if i == 6:
            assert not any(stopped[:1])
            searched.end(proposal.number, "PRUNED", {})
        else:
            searched.end(proposal.number, "COMPLETE", tuned())
    assert searched.counts()["PRUNED"] == 1


@pytest.mark.parametrize("pruner", ["median", "halving", "hyperband"])
def test_pruning_is_decided_from_the_study(study, pruner):
    """What a study that is opened again knows is what the one that saw the trials knew."""
    changes = ["objectives={accuracy: maximize, latency_ms: minimize}", "train.epochs=8"]
    searched = study([*changes, f"pruner={pruner}"], sampler="random")
    rng = random.Random(0)
    for _ in range(20):
        proposal, curve, stop = searched.ask(), [], False
        costs = {"latency_ms": rng.random()}
        while not stop and len(curve) < 8:
            curve.append({"epoch": len(curve) + 1.0, "accuracy": rng.random()})
            stop = searched.report(proposal.number, curve[-1], costs)
        values = {**curve[-1], **costs}
        searched.end(proposal.number, "PRUNED" if stop else "COMPLETE", values, curve=curve)
    assert searched.counts()["PRUNED"] >= 2
    for trial in filter(trained, searched.study.trials):
        assert (len(list(curve_of(trial))) == 8) == (trial.state.name == "COMPLETE")
    again = study([*changes, f"pruner={pruner}"], sampler="random").pruning
    assert again.points == searched.pruning.points and again.losses == searched.pruning.losses


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


def test_a_study_of_other_objectives_is_refused(study):
    study(["objectives={valid_loss: minimize}"])
    for other in ("accuracy: maximize", "accuracy: maximize, parameters: minimize"):
        said = f"s: its study was begun to minimize, .* not maximize accuracy.*{CONFIG}, or start"
        with pytest.raises(ConfigError, match=said):
            study([f"objectives={{{other}}}"])
    assert study(["objectives={valid_loss: minimize}"]).ask() is not None


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

    def lost(self, number: int, why: str, memory: bool = False) -> None:
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


TINY = {"assignment": {"width": {"choice": [4, 8, 12]}, "head": {"regions": {"choice": [1, 2]}}}}


@pytest.fixture
def tiny(here):
    """A study of six points, opened again at every call."""
    (here / "tiny.yaml").write_text(yaml.safe_dump(TINY))
    (here / "t").mkdir()

    def make(sampler: str) -> Study:
        config = load_config("sweep.yaml", ["objectives={accuracy: maximize}"], sampler=sampler)
        searched = Study(config, load_space("tiny.yaml"), SPEC, here / "t", resume=True)
        searched.reconcile()
        return searched

    return make


@pytest.mark.parametrize("sampler", ["tpe", "random", "structured"])
@pytest.mark.parametrize("opened", ["once", "again"])
def test_a_point_without_memory_does_not_keep_a_sweep_going(tiny, sampler, opened):
    """Its smaller batch is another point; itself it is not proposed again, nor after a resume."""
    searched, begun, bad = tiny(sampler), 0, None
    while begun < 20 and (proposal := searched.ask()) is not None:
        begun += 1
        bad = bad or proposal.assignment
        if proposal.assignment != bad:
            searched.end(proposal.number, "COMPLETE", tuned(accuracy=0.5 + 0.01 * begun))
        elif proposal.tried:
            searched.end(proposal.number, "FAIL", {}, "out of memory")
        else:
            searched.try_again(proposal.number, "out of memory", {"batch": 25})
        if opened == "again":
            searched = tiny(sampler)
    assert begun == 6 + 1 and searched.counts() == {"COMPLETE": 5, "PRUNED": 0, "FAIL": 1}


@pytest.mark.parametrize("how", ["memory", "lost", "interrupted"])
def test_what_waits_behind_an_exhausted_space_is_run(tiny, how):
    searched, live = tiny("random"), []
    while (proposal := searched.ask()) is not None:
        live.append(proposal)
    *others, last = live
    for proposal in others:
        searched.end(proposal.number, "COMPLETE", tuned())
    if how == "interrupted":
        searched.end(last.number, "FAIL", {}, INTERRUPTED)
        searched = tiny("random")
    else:
        searched.try_again(last.number, how, {"batch": 25} if how == "memory" else {})
    again = searched.ask()
    assert again.assignment == last.assignment
    searched.end(again.number, "COMPLETE", tuned())
    assert searched.ask() is None and searched.counts()["COMPLETE"] == 6


def test_what_is_enough_is_said_of_the_metric_alone(study):
    costs = "valid_loss: minimize, parameters: minimize"
    for objectives, enough in ((f"accuracy: maximize, {costs}", {0: 0.9}), (costs, {})):
        changes = ["train.stop_at=0.9", f"objectives={{{objectives}}}", "trials=6"]
        (Path("s") / JOURNAL).unlink(missing_ok=True)
        searched = study(changes)
        assert searched.knowledge.enough == enough
        for i in range(8):
            proposal = searched.ask()
            loss, cost = 0.1 * i, proposal.cost.parameters
            values = tuned(accuracy=1 - loss / 2, valid_loss=loss, parameters=cost)
            assert searched.end(proposal.number, "COMPLETE", values) == "COMPLETE"
