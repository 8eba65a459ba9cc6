"""Going on with a sweep: what it keeps, what is refused, and folders that moved or are gone."""

from pathlib import Path

import pytest
import yaml
from support import SPACE
from test_survive import own_task
from test_sweep import trials

import patternsearch
from patternsearch.config import load_config
from patternsearch.errors import ConfigError
from patternsearch.export import load
from patternsearch.search.confirm import Confirmed, designs
from patternsearch.search.executor import InlineExecutor
from patternsearch.search.folders import create, find_sweep
from patternsearch.search.launch import launch, resumed, terminal
from patternsearch.search.results import read_results
from patternsearch.search.settle import settle
from patternsearch.search.sweep import Sweep
from patternsearch.search.worker import Step, Worker

# MLflow's own use of SQLAlchemy, in this process
pytestmark = pytest.mark.filterwarnings("ignore::sqlalchemy.exc.SADeprecationWarning")
QUICK = {"executor": "inline", "train": {"epochs": 1, "batch": 200}, "quiet": True}
BOTH = {"valid_loss": "minimize", "parameters": "minimize"}


def swept(count: int, name: str = "x", **settings):
    Path("bare.yaml").write_text("task: digits\n")
    return patternsearch.sweep("bare.yaml", name=name, trials=count, **{**QUICK, **settings})


def test_what_is_not_given_is_as_it_began(stocked):
    begun = swept(2, space="small.yaml", objectives=BOTH, start_from=[{"width": 12}])
    more = swept(3, resume=True)
    assert more.config == begun.config.model_copy(update={"trials": 3})
    assert len(more.trials) == 3 and more.trials.origin.iloc[0] == "from start_from[0]"
    done = more.results.complete()
    assert all(t.objectives == tuple(t.values[name] for name in BOTH) for t in done)
    assert more.best.values["valid_loss"] == more.trials.valid_loss.min()
    with pytest.raises(ConfigError, match=r"x was started with objectives={'valid_loss': .*, not"):
        swept(4, resume=True, objectives={"accuracy": "maximize"})


def test_a_folder_that_was_renamed(stocked):
    space = yaml.safe_load(SPACE)
    begun = swept(1, space=space)
    (stocked / "sweeps/x").rename(stocked / "sweeps/y")
    found = read_results(stocked / "sweeps/y")
    assert [t.params for t in found.trials] == [t.params for t in begun.results.trials]
    more = swept(2, "y", resume=True)
    assert more.name == "y" and len(more.trials) == 2
    assert more.trials[:1].accuracy.equals(begun.trials.accuracy)
    with pytest.raises(ConfigError, match=r"go on with that one, or start a new sweep"):
        swept(3, "y", space="vision", resume=True)


def test_a_folder_that_was_renamed_with_its_study_in_a_database(stocked):
    storage = f"sqlite:///{stocked / 'studies.db'}"
    swept(1, space="small.yaml", storage=storage)
    (stocked / "sweeps/x").rename(stocked / "sweeps/y")
    said = r"y: its study cannot be read: .*no study 'y'; if the folder was renamed, rename it back"
    with pytest.raises(ConfigError, match=said):
        swept(2, "y", resume=True, storage=storage)
    with pytest.raises(ConfigError, match=said):
        read_results(stocked / "sweeps/y")
    (stocked / "sweeps/y").rename(stocked / "sweeps/x")
    assert len(read_results(stocked / "sweeps/x").trials) == 1


def test_a_folder_that_is_deleted_while_the_sweep_runs(stocked, monkeypatch):
    body = "import shutil\nshutil.rmtree('sweeps/x', ignore_errors=True)"
    task = own_task(stocked, monkeypatch, "cleaning", body)
    with pytest.raises(ConfigError, match=r"^sweeps/x/study\.log was deleted while the sweep ran"):
        patternsearch.sweep(task, "small.yaml", name="x", trials=2, **QUICK)
    assert not (stocked / "sweeps/x").exists()


def test_what_a_kill_left_of_a_folder_is_no_sweep(here):
    files = {"sweep.yaml": {"task": "digits"}}
    create(here / "sweeps/x", files)
    create(here / "sweeps/.y-1a2b3c", files)  # the later one
    assert find_sweep(None, here / "sweeps").name == "x"


class Crossed(InlineExecutor):
    """Two workers: the second trial ends before the first, as good as it."""

    def run(self, source):
        for job in reversed([source.next(), source.next()]):
            worker = Worker()
            worker.start(job)
            while not (step := worker.step()).done:
                source.handle(step)
            row = {**step.row, "accuracy": 0.5}
            source.handle(Step(step.number, row, True, step.costs, weights=step.weights))


def test_of_equal_trials_one_is_the_best_everywhere(stocked):
    options = {k: v for k, v in QUICK.items() if k != "quiet"}
    config = load_config("digits", space="small.yaml", trials=2, **options)
    place = stocked / "sweeps/x"
    launch(Sweep(config, place, terminal(True), executor=lambda config: Crossed()))
    weights = place / "best.safetensors"
    written = weights.stat().st_mtime_ns
    best = read_results(place).winner()
    assert [t.values[0] for t in trials(stocked, "x")] == [0.5, 0.5]
    assert load(place / "best.yaml").provenance["trial"] == best.number == 0
    assert load(place / "best.yaml").metrics["parameters"] == best.values["parameters"]
    launch(Sweep(resumed(config, place), place, terminal(True), resume=True))
    assert weights.stat().st_mtime_ns == written  # not trained again


def test_the_winner_of_fresh_seeds_is_not_trained_again(stocked):
    result = swept(3, space="small.yaml")
    best, second = result.results.complete()[:2]
    rows = designs(result.results, 2)
    for row in rows:  # the second is better by its mean
        value = 0.9 if row.trial == second.number else 0.2
        row.valid = row.test = {1: value, 2: value + 0.01}
    found = Confirmed("accuracy", "maximize", rows=rows)
    assert not found.left({row.key for row in rows}, [1, 2])
    found.save(result.folder)
    settle(read_results(result.folder))
    kept, weights = (result.folder / f"best.{kind}" for kind in ("yaml", "safetensors"))
    written = weights.stat().st_mtime_ns
    again = swept(3, space="small.yaml", resume=True)
    assert again.best.number == second.number != best.number
    assert load(kept).provenance["trial"] == second.number
    assert weights.stat().st_mtime_ns == written
