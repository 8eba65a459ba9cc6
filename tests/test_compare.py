"""The comparison with native baselines: the same caps and budget for all, and it goes on."""

import json
from itertools import islice, product

import pytest
import torch
from rich.console import Console

from patternsearch.config import load_config
from patternsearch.errors import ConfigError
from patternsearch.native import Native, NativeModel, kinds, positions, settings, sized, suited
from patternsearch.search.compare import SCALES, compare, configured
from patternsearch.search.comparison import summary, table
from patternsearch.search.executor import InlineExecutor
from patternsearch.search.results import read_results
from patternsearch.search.trainings import Outcome, Training, Trainings
from patternsearch.search.worker import task_on
from patternsearch.sizes import Spec
from patternsearch.task import get_task, tasks
from patternsearch.train import TrainSettings, TrialRun

pytestmark = pytest.mark.filterwarnings("ignore::sqlalchemy.exc.SADeprecationWarning")
SPECS = {
    "images": Spec(grid=(16, 16), channels=3, classes=10),
    "texts": Spec(grid=(16,), vocabulary=50, classes=4),
    "series": Spec(grid=(48,), channels=3, classes=3, horizon=12),
    "language": Spec(grid=(16,), vocabulary=50, classes=50, per_position=True, causal=True),
}
SUITED = {
    "images": {"cnn", "transformer"},
    "texts": {"cnn", "gru", "lstm", "transformer"},
    "series": {"dlinear", "gru", "lstm", "transformer"},
    "language": {"gru", "lstm", "transformer"},
}
EACH = [(kind, name) for kind, names in SUITED.items() for name in sorted(names)]


def example(spec: Spec, n: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    if spec.vocabulary is not None:
        return torch.randint(spec.vocabulary, (n, *spec.grid), generator=generator)
    return torch.randn(n, *spec.grid, spec.channels, generator=generator)


def test_every_task_has_baselines():
    assert {kind: set(suited(spec)) for kind, spec in SPECS.items()} == SUITED
    assert set.union(*SUITED.values()) == set(kinds())
    assert all(suited(get_task(name).spec) for name in tasks())
    assert all(set(SCALES[scale]) <= set(tasks()) for scale in SCALES)


@pytest.mark.parametrize(("kind", "name"), EACH)
def test_a_baseline_fills_the_caps_and_not_more(kind, name):
    spec, caps = SPECS[kind], {"parameters": 30_000, "flops": 3e6}
    for design, lr in islice(settings(name, spec, caps), 4):
        cost = design.cost(spec)
        assert cost.parameters <= caps["parameters"] and cost.flops <= caps["flops"]
        low, high = kinds()[name].searched(spec)
        assert low <= lr <= high
        model = design.build(spec)
        assert sum(p.numel() for p in model.parameters()) == cost.parameters
        assert model(example(spec, 3)).shape == (3, *spec.rows, spec.classes)
        wider = Native(**{**design.to_dict(), "width": design.width + 8}).cost(spec)
        assert name == "dlinear" or any(getattr(wider, k) > cap for k, cap in caps.items())
    assert sized(Native(native=name), spec, {"parameters": 10}) is None
    assert list(settings(name, spec, {"parameters": 10})) == []


ODD = [
    Spec(grid=(64, 4), channels=3, classes=5),
    Spec(grid=(3, 40), channels=1, classes=2, causal=True),
    Spec(grid=(6, 6), channels=2, classes=2, per_position=True),
    Spec(grid=(6, 6), vocabulary=7, classes=3),
    Spec(grid=(6, 6), vocabulary=7, classes=7, per_position=True),
    Spec(grid=(4, 4, 4), channels=1, classes=2),
    Spec(grid=(1,), channels=1, classes=2),
    Spec(grid=(1, 1), channels=1, classes=2),
    Spec(grid=(5,), channels=3, classes=3, per_position=True),
    Spec(grid=(5,), vocabulary=9, classes=9, per_position=True),
    Spec(grid=(96,), channels=7, classes=1, horizon=24),
    Spec(grid=(96,), channels=1, classes=7, horizon=24),
    Spec(grid=(15,), channels=2, classes=2, horizon=3),
    Spec(grid=(16,), channels=2, classes=2, horizon=3, causal=True),
    Spec(grid=(1,), channels=1, classes=1, horizon=1),
    Spec(grid=(40,), vocabulary=9, classes=9, horizon=3),
    Spec(grid=(40,), vocabulary=9, classes=2, horizon=3),
]


@pytest.mark.parametrize("spec", ODD, ids=str)
def test_what_suits_odd_data_takes_it(spec):
    for name in suited(spec):
        model = kinds()[name]
        for depth, stride in product(model.depths, model.strides):
            design = Native(native=name, depth=depth, stride=stride)
            output = design.build(spec)(example(spec, 2))
            assert output.shape == (2, *spec.rows, spec.classes), design
        assert Native(native=name).cost(spec).flops > 0


def test_data_that_no_baseline_is_for(tmp_path, monkeypatch):
    (tmp_path / "solids.py").write_text(
        "import numpy as np\nfrom patternsearch import Data, Spec, Task\n"
        "class Solid(Task):\n    spec = Spec(grid=(4, 4, 4), channels=1, classes=2)\n"
        "    def load(self):\n"
        "        one = np.zeros((9, 4, 4, 4, 1), np.float32), np.arange(9) % 2\n"
        "        return Data(one, one, one)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    options = {"executor": "inline", "changes": ["caps.parameters=5000", "space=sequences"]}
    with pytest.raises(ConfigError, match=r"no native baseline is for data like that of solids"):
        compare("solids:Solid", "small", 1, 2, tmp_path / "c", Console(quiet=True), **options)


@pytest.mark.parametrize("name", sorted(SUITED["language"]))
def test_a_language_model_sees_no_later_word(name):
    spec = SPECS["language"]
    model = Native(native=name, width=16, depth=2).build(spec).eval()
    x = example(spec, 4)
    y = x.clone()
    y[:, 9:] = (y[:, 9:] + 1) % 50
    change = (model(x) - model(y)).abs()
    assert change[:, :9].max() == 0 < change[:, 9:].max()


def test_every_position_starts_with_a_code_of_its_own():
    for grid in ((12,), (3, 4)):
        where = positions(grid, 8).detach()
        assert where.shape == (12, 8)
        assert torch.allclose(where.square().sum(1), torch.tensor(4.0))  # sin^2 + cos^2, four times
        assert torch.cdist(where, where).fill_diagonal_(9).min() > 0.1


def test_a_recurrent_baseline_costs_what_torch_counts():
    spec = Spec(grid=(5,), channels=3, classes=2)
    design = Native(native="lstm", width=8, depth=2)
    with torch.device("meta"):
        model = design.build(spec).eval()
        x = torch.zeros(1, 5, 3)
    counted = NativeModel.flops(model, x)
    assert design.cost(spec).flops == counted > 0


def test_dropout_is_the_same_again():
    task, splits = task_on("digits", "cpu")
    design = Native(native="cnn", width=8, dropout=0.3)
    curves = []
    for noise in (1, 2):
        torch.manual_seed(noise)
        trial = TrialRun(design, task, splits, TrainSettings(epochs=2, batch=50), seed=3)
        curves.append([trial.advance(), trial.advance()])
    assert curves[0] == curves[1]
    assert trial.result().costs["parameters"] == design.cost(task.spec).parameters
    names = trial.model.decayed()
    assert "body.0.weight" in names and "body.1.weight" not in names and "head.bias" not in names


def test_a_cut_off_line_is_done_again(tmp_path):
    path = tmp_path / "t.jsonl"
    kept = Trainings(path)
    kept.add(Outcome("a", [{"epoch": 1.0}], {}))
    with path.open("a") as file:
        file.write('{"key": "b", "cur')
    kept = Trainings(path)
    assert set(kept.known) == {"a"}
    kept.add(Outcome("c", [], {}, "why"))
    assert set(Trainings(path).known) == {"a", "c"}


def test_a_training_that_hangs_fails_after_its_time(tmp_path):
    kept = Trainings(tmp_path / "t.jsonl")
    training = Training(Native(native="cnn", width=8).to_dict(), {}, 0)
    kept.run(load_config("digits", trial_time=1e-3), [training], InlineExecutor())
    assert "longer than trial_time" in kept.of(training).error


def test_caps_are_those_of_the_experts_where_none_are_given():
    config = configured("ag-news", "small", None, {})
    assert config.caps.parameters == 650_724 and config.train.examples == 8000
    assert configured("digits", "small", 2, {}).caps.parameters == 7500
    assert configured("mnist", "full", None, {}).train.examples is None
    with pytest.raises(ConfigError, match="--scale medium"):
        configured("mnist", "medium", None, {})


def test_caps_that_no_baseline_meets_are_refused_first(tmp_path):
    options = {"executor": "inline", "changes": ["caps.parameters=90"]}
    with pytest.raises(ConfigError, match=r"\(cnn, transformer\) is within .* parameters=90 and"):
        compare("digits", "small", 1, 2, tmp_path / "c", Console(quiet=True), **options)
    assert not (tmp_path / "c").exists()


def compared(folder):
    """Of the digits, gone on with where it stopped: the table and what is in compare.json."""
    options = {"executor": "inline", "changes": ["train.epochs=2", "train.eval_every=1"]}
    path = compare("digits", "small", 3, 2, folder, Console(quiet=True), **options)
    return path.read_text(), json.loads((folder / "compare.json").read_text())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("comparison")
    compared(place)
    return place


def test_a_comparison_and_that_it_goes_on(folder, monkeypatch):
    monkeypatch.setattr("patternsearch.search.compare.launch", None)  # the sweep is over
    text, data = compared(folder)
    rows = {(row["role"], row["name"]): row for row in data["rows"]}
    assert {name for role, name in rows if role == "native"} == {"cnn", "transformer"}
    for row in data["rows"]:
        assert len(row["test"]) == 2 and row["parameters"] <= 7500
        assert set(row["curve"]) == {"1", "2"}
    native = rows["native", data["summary"]["native"]]
    assert native["epochs"] in (1, 2) and "| native | **" in text
    winner = rows["found", data["summary"]["winner"]]
    share = winner["parameters"] / native["parameters"]
    assert data["summary"]["shares"]["parameters"] == share and f"{share:.2g} of its" in text
    assert (folder / "compare.png").read_bytes().startswith(b"\x89PNG")
    lines = (folder / "trainings.jsonl").read_text().splitlines()
    (folder / "trainings.jsonl").write_text("\n".join(lines[:-2]) + "\n")
    again = compared(folder)[1]
    assert [row["test"] for row in again["rows"]] == [row["test"] for row in data["rows"]]
    assert len((folder / "trainings.jsonl").read_text().splitlines()) == len(lines)


def test_how_little_is_enough(folder, monkeypatch):
    data = json.loads((folder / "compare.json").read_text())
    assert not any(row["thrifty"] for row in data["rows"]) and "thrifty" not in data["summary"]
    kept = Trainings(folder / "trainings.jsonl")

    def tuned(row):
        training = Training(row["design"], row["train"], data["config"]["seed"])
        return kept.of(training).curve[-1]["accuracy"]

    native = max((row for row in data["rows"] if row["role"] == "native"), key=tuned)
    done = read_results(folder / "sweep").complete()
    few = done[-1].values["parameters"]
    wanted = next(t for t in done if t.values["parameters"] <= few)
    assert wanted is not done[0]
    monkeypatch.setattr("patternsearch.search.compare.TOP", 1)
    monkeypatch.setattr("patternsearch.search.compare.THRIFTY", few / native["parameters"])
    text, data = compared(folder)
    (small,) = (row for row in data["rows"] if row["thrifty"])
    assert small["role"] == "found" and small["name"].split(",")[0] == f"trial {wanted.number}"
    assert data["summary"]["thrifty"]["name"] == small["name"] and f"*{small['name']}*" in text


def test_two_sentences_of_two_designs_and_one_of_one():
    def row(role, name, valid, test, parameters, thrifty=False):
        return {
            "role": role, "name": name, "pattern": "p", "valid": valid, "test": test,
            "parameters": parameters, "flops": 10 * parameters, "thrifty": thrifty, "failed": [],
            "latency_ms": 1.0, "curve": {1: valid[0]},
        }  # fmt: skip

    native = row("native", "gru", [0.7, 0.7], [0.70, 0.71], 1000)
    small = row("expert", "bag", [0.6, 0.6], [0.69, 0.72], 400, thrifty=True)
    for score, lines in ((0.8, 2), (0.5, 1)):
        small["role"] = "expert" if lines == 2 else "found"
        rows = [row("found", "trial 1", [score] * 2, [0.80, 0.81], 900), small, dict(native)]
        found = summary(rows, 1)
        assert found["thrifty"]["verdict"] == "not told apart"
        assert found["thrifty"]["shares"] == {"parameters": 0.4, "flops": 0.4}
        said = table(configured("digits", "small", 2, {}), "small", rows, found)
        told = [line for line in said.splitlines() if " minus gru: " in line]
        assert len(told) == lines and told[-1].startswith("bag minus gru: +0.0000")
        assert told[-1].endswith("not told apart, at 0.4 of its parameters and 0.4 of its flops.")
        assert (lines == 2) == told[0].startswith("trial 1 minus gru: +0.1000")
