"""Where sweeps start from, and that they go on as if they had never been cut short."""

import random

import pytest
import yaml
from support import SPACE

import patternsearch
from patternsearch.config import TrainConfig, load_config
from patternsearch.errors import ConfigError
from patternsearch.export import make_export, save
from patternsearch.inverse import params_of
from patternsearch.search.start import starts
from patternsearch.search.study import Study, trained
from patternsearch.sizes import resolve
from patternsearch.space import as_space, load_space
from patternsearch.task import get_task

# MLflow's own use of SQLAlchemy, in this process
pytestmark = pytest.mark.filterwarnings("ignore::sqlalchemy.exc.SADeprecationWarning")
SPEC = get_task("digits").spec
QUICK = {"executor": "inline", "train": {"epochs": 1, "batch": 200}, "quiet": True}


def test_an_assignment_is_found_in_its_space(here):
    space, rng = load_space("small.yaml"), random.Random(0)
    for _ in range(30):
        params, assignment = space.point({}, rng)
        wanted = resolve(assignment, SPEC)
        found = params_of(space, wanted, {"lr": 0.004}, SPEC)
        assert resolve(space.point(found)[1], SPEC) == wanted and found["train.lr"] == 0.004
    for name in ("vision", "sequences"):
        task = get_task({"vision": "digits", "sequences": "mqar"}[name])
        space = load_space(name)
        for params in space.experts.values():
            wanted = resolve(space.point(params)[1], task.spec)
            found = params_of(space, wanted, {"lr": params["train.lr"]}, task.spec)
            assert resolve(space.point(found)[1], task.spec) == wanted


def test_first_trials_from_a_file_a_sweep_and_by_hand(stocked):
    first = patternsearch.sweep("digits", "small.yaml", name="first", trials=3, **QUICK)
    path = first.export("mine.yaml")
    (stocked / "named.yaml").write_text("wide: {width: 12, blocks: 0}\n")
    sources = [path, "first:2", "named.yaml", {"width": 4}]
    second = patternsearch.sweep(
        "digits", "small.yaml", name="second", trials=5, start_from=sources, experts=False, **QUICK
    )
    origins = list(second.trials.origin)
    assert origins[0] == "from mine.yaml"  # the best of the sweep as well, which is not run twice
    assert origins[1].startswith("from first trial ")
    assert origins[2:4] == ["from named.yaml: wide", "from start_from[3]"]
    assert second.results.trials[0].assignment == first.best.assignment
    assert list(second.trials.width)[2:4] == [12, 4]
    assert second.results.best_expert() is None  # what was given is no expert's design


def test_sources_of_one_name_stay_apart(stocked):
    texts = {"one": "wide: {width: 4, blocks: 0}", "two": "wide: {width: 8, blocks: 0}"}
    for folder, text in texts.items():
        (stocked / folder).mkdir()
        (stocked / folder / "named.yaml").write_text(text)
        point = text.replace("wide", "from first trial 3")  # as a sweep keeps it
        (stocked / folder / "start.yaml").write_text(point)
    sources = [f"{folder}/{file}.yaml" for file in ("named", "start") for folder in texts]
    space = load_space("small.yaml")
    found = starts(sources, space, SPEC, stocked)
    origins = ["from named.yaml: wide", "from named.yaml: wide (2)"]
    origins += ["from first trial 3", "from first trial 3 (2)"]
    assert [start.origin for start in found] == origins
    assert [start.params["width"] for start in found] == [4, 8, 4, 8]
    result = patternsearch.sweep(
        "digits", "small.yaml", name="z", trials=2, start_from=sources[:2], experts=False, **QUICK
    )
    assert list(result.trials.origin) == origins[:2] and list(result.trials.width) == [4, 8]
    assert starts(["sweeps/z/start.yaml"], space, SPEC, stocked) == found[:2]


def test_settings_of_training_that_are_not_given(here):
    """An export leaves out what is as by default; else the sampler completes them."""
    data = yaml.safe_load(SPACE)
    data["train"]["batch"] = {"choice": [16, 64]}
    data["experts"]["cnn"]["train.batch"] = 16
    space = as_space(data, "small.yaml")
    assignment = resolve(space.point(data["experts"]["cnn"])[1], SPEC).to_dict()

    def given(source) -> tuple[object, object]:
        (start,) = starts([source], space, SPEC, here)
        assert resolve(space.point(start.params, random.Random(0))[1], SPEC).to_dict() == assignment
        return start.params.get("train.lr"), start.params.get("train.batch")

    task = get_task("digits")
    train = {**TrainConfig().model_dump(), "batch": 64, "lr": 0.005}  # both are the defaults
    save(make_export(task, "digits", assignment, train, 0, {}, {}), here / "best.yaml")
    assert given("best.yaml") == (0.005, 64)
    assert given({"assignment": assignment}) == (None, None)
    assert given({"assignment": assignment, "train": None}) == (None, None)
    assert given({"assignment": assignment, "train": {"batch": 16}}) == (None, 16)
    assert given({"assignment": assignment, "train": {"lr": "4e-3"}}) == (0.004, None)


@pytest.mark.parametrize(
    "train, said",
    [
        (
            {"lr": 0.01, "batch": 200},
            {"train": "slow", "train.slow.lr": 0.01, "train.slow.batch": 200},
        ),
        ({"batch": 100}, {"train": "slow", "train.slow.batch": 100}),
        ({"lr": 0.01, "batch": 50}, {"train": "fast"}),
        ({}, {}),
    ],
)
def test_alternatives_of_training_are_found(train, said):
    data = yaml.safe_load(SPACE)
    point = data.pop("experts")["cnn"]
    del point["train.lr"]
    slow = {"lr": data["train"]["lr"], "batch": {"choice": [100, 200]}}
    data["train"] = {"one_of": {"fast": {"lr": 0.01, "batch": 50}, "slow": slow}}
    space = as_space(data, "small.yaml")
    assignment = space.point(point, random.Random(0))[1]
    found = params_of(space, assignment, train, SPEC)
    assert {k: v for k, v in found.items() if k.startswith("train")} == said


@pytest.mark.parametrize(
    "source, message",
    [
        ("none.yaml", "no file none.yaml"),
        ("none", "no sweep 'none'"),
        ("none:x", "expected SWEEP or SWEEP:NUMBER"),
        ({"widht": 4}, "no parameter 'widht'. Did you mean 'width'"),
        ({"width": 5}, "width=5 is not"),
        ({"assignment": {"width": 16}}, "no point of the space small.yaml: width is 16, and 12"),
        ({"assignment": {}, "train": 3}, "train: got 3, expected a mapping"),
        ({"assignment": {}, "train": {"lrr": 1}}, "unknown key 'lrr'. Did you mean 'lr'"),
        ({"assignment": {}, "trian": {"lr": 1}}, "no key 'trian'. Did you mean 'train'"),
    ],
)
def test_what_cannot_be_started_from(here, source, message):
    with pytest.raises(ConfigError, match=message):
        starts([source], load_space("small.yaml"), SPEC, here / "sweeps")


@pytest.mark.parametrize("sampler", ["structured", "tpe", "random"])
def test_a_study_cut_short_anywhere_goes_on_alike(here, sampler):
    """Killed before, while and after a trial is drawn: the same trials in the same order."""

    def opened(name: str, cuts: random.Random | None) -> list:
        folder = here / name
        folder.mkdir()
        config = load_config(
            "sweep.yaml", ["objectives={accuracy: maximize}", "trials=12"], sampler=sampler
        )

        def start() -> Study:
            study = Study(config, load_space("small.yaml"), SPEC, folder, resume=True)
            study.reconcile()
            study.enqueue_once({"width": 4}, "from hand")
            study.enqueue_experts()
            return study

        study = start()
        while study.counts()["COMPLETE"] < 16:
            cut = cuts.random() if cuts else 1.0
            if cut < 0.15:
                study.study.ask()  # drawn, and nothing more
                study = start()
                continue
            proposal = study.ask()
            if cut < 0.4:
                study = start()
                continue
            value = 1 / (1 + abs(proposal.assignment.width - 8)) + proposal.params["train.lr"]
            study.end(proposal.number, "COMPLETE", {"accuracy": value})
        assert not any(t.state.name == "RUNNING" for t in study.study.trials)
        return [(t.params, t.values) for t in study.study.trials if trained(t)]

    whole = opened("whole", None)
    assert opened("cut", random.Random(1)) == whole


def test_a_sweep_is_repeated_from_what_it_kept(stocked, capsys):
    from patternsearch.cli import main

    one = patternsearch.sweep(
        "digits", "small.yaml", name="one", trials=4, seed=3, start_from=[{"width": 4}], **QUICK
    )
    kept = yaml.safe_load((stocked / "sweeps/one/environment.yaml").read_text())
    assert {"torch", "optuna", "ray", "mlflow", "python"} <= kept["versions"].keys()
    assert kept["device"]["cores"] and len(kept["id"]) == 32
    (stocked / "small.yaml").write_text(SPACE.replace("[4, 12]", "[4, 8]"))  # no longer the same
    with pytest.raises(SystemExit) as caught:
        main(["sweep", "--from", "one", "--name", "two"])
    assert not caught.value.code, capsys.readouterr().err
    two = patternsearch.search.outcome.SweepResult.read("sweeps/two")
    same = ["state", "origin", "accuracy", "valid_loss", "train.lr", "width"]
    assert two.trials[same].equals(one.trials[same])


def test_a_folder_is_held_by_one_process(stocked):
    from patternsearch.search.folders import create, hold

    create(stocked / "sweeps" / "s", {"sweep.yaml": {}})
    with pytest.raises(ConfigError, match="choose another --name"):
        create(stocked / "sweeps" / "s", {"sweep.yaml": {}})
    lock = hold(stocked / "sweeps" / "s")
    with pytest.raises(ConfigError, match="s is running in another process"):
        hold(stocked / "sweeps" / "s")
    lock.release()
