"""Spaces: what their YAML means, what is wrong with it; the shipped ones fit their tasks."""

import random

import optuna
import pytest
import torch
import yaml
from support import SPACE

from patternsearch.config import Caps, load_config
from patternsearch.describe import short
from patternsearch.domains import Choice, FloatRange, IntRange
from patternsearch.errors import PatternSearchError, SpaceError
from patternsearch.files import shipped
from patternsearch.model import build_model
from patternsearch.pattern import families
from patternsearch.sizes import Spec, model_cost, resolve
from patternsearch.space import FixedTrial, Space, load_space, sample
from patternsearch.space_check import check_caps, check_space
from patternsearch.task import get_task, tasks
from patternsearch.train import TrainSettings

DIGITS = Spec(grid=(8, 8), channels=1, classes=10)


def space(text: str) -> Space:
    data = yaml.safe_load(text)
    return Space(data["assignment"], data.get("train", {}), data.get("experts", {}), "test.yaml")


SUM = """
assignment:
  width: 8
  blocks:
    - mixer:                       # X-volution: a convolution and an attention of the same input
        positions:
          {family: banded, lower: {int: [1, 2]}, upper: {same_as: lower}, entry: {family: dense}}
        plus:
          order: 3
          positions: {families: {dense: {}, banded: {lower: 2, upper: 2}}}
          heads: {choice: [1, 2]}
          maps: {query: dense, key: dense, value: dense, output: dense}
"""


def test_a_sum_of_mixers_is_searched():
    found = space(SUM)
    name = "blocks0.mixer.plus.positions"
    assert set(found.parameters()) == {
        "blocks0.mixer.positions.lower",
        name,
        f"{name}.banded.dilation",
        "blocks0.mixer.plus.heads",
    }
    params = {"blocks0.mixer.positions.lower": 1, name: "dense", "blocks0.mixer.plus.heads": 2}
    assignment = resolve(found.point(params)[1], DIGITS)
    assert short(assignment) == "w8 | conv 3 & attention h2 full | average 1"
    model = build_model(assignment, DIGITS)
    parts = model.blocks[0].mixer.parts
    assert [type(part).__name__ for part in parts] == ["LinearMixer", "AttentionMixer"]
    x = torch.randn(2, 8, 8, 8)
    torch.testing.assert_close(model.blocks[0].mixer(x), parts[0](x) + parts[1](x))


def test_parameters_are_named_by_their_path():
    found = space(SPACE).parameters()
    assert found["train.lr"] == FloatRange(1e-3, 2e-2, log=True)
    assert found["width"] == IntRange(4, 12, step=4)
    assert found["stem.mixer.positions.lower"] == IntRange(0, 1)
    assert "stem.mixer.positions.upper" not in found  # the same as lower
    assert found["blocks"] == IntRange(0, 2)
    for i in range(2):
        assert found[f"block{i}"] == Choice(("conv", "attention", "mlp"))
        entry = found[f"block{i}.conv.mixer.positions.entry"]
        assert entry == Choice(("dense", "diagonal"))
        assert found[f"block{i}.attention.mixer.heads"] == Choice((1, 2))
        declared = families()["low_rank"].domains()
        assert found[f"block{i}.mlp.channel0.low_rank.rank"] == declared["rank"]
    assert found["head.regions"] == Choice((1, 2))


def test_a_point_is_an_assignment():
    params = {
        "train.lr": 0.01,
        "width": 8,
        "stem.mixer.positions.lower": 1,
        "blocks": 2,
        "block0": "conv",
        "block0.conv.mixer.positions.entry": "diagonal",
        "block1": "mlp",
        "block1.mlp.channel0": "dense",
        "head.regions": 2,
    }
    used, assignment = space(SPACE).point(params)
    assert used == params
    assert assignment.width == 8 and assignment.head.regions == 2
    stem = assignment.stem.mixer.positions
    assert (stem.lower, stem.upper, stem.entry.family) == (1, 1, "dense")
    assert [b.mixer.positions.entry.family if b.mixer else None for b in assignment.blocks] == [
        "diagonal",
        None,
    ]
    with pytest.raises(SpaceError, match="width=5 is not 4 to 12 by 4"):
        space(SPACE).point({**params, "width": 5})
    del params["width"]
    with pytest.raises(SpaceError, match="width is left open; give it a value"):
        space(SPACE).point(params)


def test_shared_and_repeated_parts():
    found = space(
        """
        assignment:
          width: 8
          blocks:
            repeat: {choice: [1, 3]}
            same: true
            each:
              one_of: {a: {channel: [dense]}, b: {channel: [low_rank]}}
              expansion: {choice: [1.0, 2.0]}
        """
    )
    assert list(found.parameters()) == ["blocks", "block", "block.expansion"]
    assert found.size() == 2 * 2 * 2
    point = found.point({"blocks": 3, "block": "b", "block.expansion": 2.0})[1]
    assert len(point.blocks) == 3 and len(set(point.blocks)) == 1
    assert point.blocks[0].channel[0].family == "low_rank"


def test_size_counts_the_points():
    one = space("assignment: {width: {int: [4, 12], step: 4}}")
    assert one.size() == 3
    two = space(
        """
        assignment:
          width: 4
          blocks:
            repeat: {int: [0, 2]}
            each: {channel: [{families: {dense: {}, diagonal: {}}}], norm: {choice: [none, rms]}}
        """
    )
    assert two.size() == 1 + 4 + 16
    seen = {two.point({}, random.Random(i))[1] for i in range(400)}
    assert len(seen) == 21


@pytest.mark.parametrize(
    "domain, values",
    [
        (IntRange(2, 11, step=3), {2, 5, 8, 11}),
        (IntRange(1, 4, log=True), {1, 2, 3, 4}),
        (Choice(("a", "b")), {"a", "b"}),
    ],
)
def test_samples_cover_the_domain(domain, values):
    rng = random.Random(0)
    assert {sample(domain, rng) for _ in range(200)} == values
    assert all(domain.contains(v) for v in values)


def test_neighbours_differ_in_one_choice_and_its_consequences():
    found = space(SPACE)
    rng = random.Random(0)
    params, _ = found.point({}, rng)
    for _ in range(50):
        near = found.neighbour(params, rng)
        assert near != params
        common = params.keys() & near.keys()
        changed = [k for k in common if near[k] != params[k]]
        assert len(changed) == 1, changed
        assert all(k.startswith(changed[0].removesuffix("s")) for k in near.keys() ^ params.keys())
        params = near


@pytest.mark.parametrize(
    "old, new, message",
    [
        ("family: banded", "family: bandde", "no pattern family 'bandde'. Did you mean 'banded'?"),
        ("{int: [0, 1]}", "{int: [9, 12]}", "stem.mixer.positions: banded: lower=9 at"),
        ("width:", "widht:", "unknown key 'widht'. Did you mean 'width'?"),
        ("[4, 12], step", "[four, 12], step", "width.int[0]: got 'four', expected a number"),
        ("[4, 12], step", "[4, 12], stpe", "no key of a domain 'stpe'. Did you mean 'step'?"),
        ("[4, 12], step", "[12, 4], step", "width: int=[12, 4] must ascend"),
        ("step: 4", "step: 0", "width: step=0 must be at least 1"),
        ("[1e-3, 2.0e-2]", "[1e-3]", "train.lr: float=[0.001] must be [low, high]"),
        ("[1e-3, 2.0e-2]", "[0, 2.0e-2]", "must ascend from above 0 with log"),
        ("lr: {", "lrr: {", "unknown key 'lrr'. Did you mean 'lr'?"),
        ("{choice: [1, 2]}}\nexp", "{choice: []}}\nexp", "head.regions: choice=[] must be a list"),
        ("{choice: [1, 2]}}\nexp", "{choice: [[1]]}}\nexp", "must be one number or text"),
        ("same_as: lower", "same_as: lowr", "no key beside it 'lowr'. Did you mean 'lower'?"),
        ("repeat: {int: [0, 2]}", "repeat: {int: [-1, 2]}", "must be whole numbers"),
        ("repeat: {int: [0, 2]}", "repeat: two", "blocks: repeat='two' must be whole numbers"),
        ("[{families: [dense, low_rank]}]", "[{families: []}]", "families is empty"),
        ("[{families: [dense, low_rank]}]", "[{families: dense}]", "must be a list or a mapping"),
        ("[{families: [dense, low_rank]}]", "[{families: {dense: 3}}]", "a mapping of its fields"),
        ("[{families: [dense, low_rank]}]", "[{families: [dens]}]", "no pattern family 'dens'"),
        ("one_of:", "one_off:", "unknown key 'one_off'"),
        ("        conv:", "        3:", "block0: one_of: the name 3 is no text; write '3'"),
        ("        mlp:", "        no:", "the name False is no text; write 'False'"),
        ("    each:", "    eech:", "blocks: 'each' is missing beside repeat"),
        ("      one_of:", "      pool: max\n      one_of:\n        x: text", "x: got 'text'; an"),
        ("same_as: lower", "same_as: [lower]", "no key beside it \"['lower']\""),
        ("    width: 8", "    widht: 8", "experts.cnn: width is left open"),
        ("    width: 8", "    width: 88", "experts.cnn: width=88 is not 4 to 12"),
        (
            "    width: 8",
            "    width: 8\n    wdith: 8",
            "no parameter 'wdith'. Did you mean 'width'?",
        ),
        ("block0: conv", "block0: cnv", "experts.cnn: block0='cnv' is not one of conv"),
    ],
)
def test_mistakes_are_found_before_anything_starts(here, old, new, message):
    assert SPACE.count(old) >= 1
    (here / "bad.yaml").write_text(SPACE.replace(old, new, 1))
    with pytest.raises(PatternSearchError) as caught:
        check_space(load_space("bad.yaml"), DIGITS, TrainSettings())
    text = str(caught.value)
    assert message in text and text.startswith("bad.yaml") and "\n" not in text


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "expected a mapping with 'assignment'"),
        ("train: {}", "'assignment' is missing"),
        ("assignmnt: {}", "no key 'assignmnt'. Did you mean 'assignment'?"),
        ("assignment: {width: 4}\nexperts: [1]", "experts: got [1], expected a mapping"),
        ("assignment: {width: 4}\nexperts: {a: 1}", "experts.a: got 1, expected a mapping"),
        ("assignment: {width: 4}\ntrain: 3", "train: got 3, expected a mapping"),
        ("assignment: {width: 4}\nassignment: {width: 5}", "line 2: the key 'assignment' stands"),
    ],
)
def test_files_that_are_no_spaces(here, text, message):
    (here / "bad.yaml").write_text(text)
    with pytest.raises(PatternSearchError) as caught:
        load_space("bad.yaml")
    assert message in str(caught.value) and "bad.yaml" in str(caught.value)


def test_a_space_that_no_task_fits():
    wrong = space("assignment: {width: 4, stem: {stride: 2}}")
    with pytest.raises(SpaceError, match=r"test\.yaml: nothing in it fits the task: stem"):
        check_space(wrong, DIGITS, TrainSettings())


def test_caps_nothing_can_meet():
    found = space(SPACE)
    check_caps(found, DIGITS, Caps())
    smallest = min(
        model_cost(resolve(found.point({}, random.Random(i))[1], DIGITS), DIGITS).parameters
        for i in range(100)
    )
    check_caps(found, DIGITS, Caps(parameters=smallest))
    with pytest.raises(SpaceError, match=r"nothing found within the caps.*raise caps or widen"):
        check_caps(found, DIGITS, Caps(parameters=smallest, flops=10))
    with pytest.raises(SpaceError, match=rf"the smallest model of 400 has parameters={smallest}"):
        check_caps(found, DIGITS, Caps(parameters=10))


@pytest.mark.parametrize("name", sorted(tasks()))
def test_shipped_spaces_fit_their_tasks(name):
    task = get_task(name)
    found = load_space(task.space)
    config = load_config(name) if name in shipped("configs") else None
    check_space(found, task.spec, TrainSettings())
    assert len(found.experts) >= 3
    costs = {}
    for expert, params in found.experts.items():
        used, assignment = found.point(params)
        assert used == dict(params), "an expert names what its point uses, and nothing else"
        costs[expert] = model_cost(resolve(assignment, task.spec), task.spec)
    if config is not None and config.caps.parameters is not None:
        for expert, cost in costs.items():
            assert cost.parameters <= config.caps.parameters, f"{expert} is never trained"


@pytest.mark.parametrize("name", sorted(shipped("spaces")))
def test_names_mean_the_same_in_every_trial(name):
    """Optuna refuses choices that change within a study, and ignores ranges that do."""
    found, seen = load_space(name), {}
    known = found.parameters()

    class Recorder(FixedTrial):
        def _answer(self, name, domain):
            assert known[name] == domain == seen.setdefault(name, domain)
            return super()._answer(name, domain)

    for i in range(300):
        found.suggest(Recorder({}, random.Random(i)))
    assert len(seen) > 0.9 * len(known)


def test_optuna_proposes_points():
    found = space(SPACE)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    for _ in range(20):
        trial = study.ask()
        assignment, train = found.suggest(trial)
        again = found.point(trial.params)
        assert again == (trial.params, assignment)
        assert train == {"lr": trial.params["train.lr"]}
        study.tell(trial, 0.0)
