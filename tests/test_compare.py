"""The comparison with native baselines: the same caps and budget for all, and it goes on."""

import json
from itertools import islice

import pytest
import torch
from rich.console import Console

from patternsearch.errors import ConfigError
from patternsearch.native import Native, NativeModel, kinds, positions, settings, sized, suited
from patternsearch.search.compare import SCALES, compare, configured
from patternsearch.search.trainings import Outcome, Trainings
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


def test_caps_are_those_of_the_experts_where_none_are_given():
    config = configured("ag-news", "small", None, {})
    assert config.caps.parameters == 650_724 and config.train.examples == 8000
    assert configured("digits", "small", 2, {}).caps.parameters == 7500
    assert configured("mnist", "full", None, {}).train.examples is None
    with pytest.raises(ConfigError, match="--scale medium"):
        configured("mnist", "medium", None, {})


def test_a_comparison_and_that_it_goes_on(tmp_path, monkeypatch):
    changes = ["train.epochs=2", "train.eval_every=1"]
    options = {"executor": "inline", "changes": changes}
    quiet = Console(quiet=True)
    path = compare("digits", "small", 3, 2, tmp_path, quiet, **dict(options))
    text = path.read_text()
    data = json.loads((tmp_path / "compare.json").read_text())
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
    assert (tmp_path / "compare.png").read_bytes().startswith(b"\x89PNG")
    lines = (tmp_path / "trainings.jsonl").read_text().splitlines()
    (tmp_path / "trainings.jsonl").write_text("\n".join(lines[:-2]) + "\n")
    monkeypatch.setattr("patternsearch.search.compare.launch", None)  # the sweep is over
    compare("digits", "small", 3, 2, tmp_path, quiet, **dict(options))
    again = json.loads((tmp_path / "compare.json").read_text())
    assert [row["test"] for row in again["rows"]] == [row["test"] for row in data["rows"]]
    assert len((tmp_path / "trainings.jsonl").read_text().splitlines()) == len(lines)
