"""best.yaml and its weights: read as written, refused when anything about them is wrong."""

import copy
import math

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from patternsearch import Assignment, build, build_model
from patternsearch.errors import ConfigError, PatternSearchError
from patternsearch.export import load, load_weights, save, save_weights, weights_path
from patternsearch.sizes import model_cost
from patternsearch.task import get_task

RICH = {
    "width": 8,
    "stem": {"mixer": {"positions": {"family": "banded", "entry": {"family": "dense"}}}},
    "blocks": [
        {
            "mixer": {
                "positions": {
                    "family": "banded",
                    "lower": 1,
                    "upper": 1,
                    "dilation": 1,
                    "tie": "none",
                    "entry": {"family": "block_diagonal", "blocks": 2},
                },
                "bias": True,
            },
            "stride": 2,
            "pool": "max",
            "expansion": 2.0,
        },
        {
            "mixer": {
                "order": 3,
                "heads": 2,
                "positions": {"family": "banded", "lower": "full", "upper": 0},
                "maps": {
                    "query": {"family": "low_rank", "rank": 0.5},
                    "key": {"family": "dense"},
                    "value": {"family": "dense"},
                },
                "encoding": "rotary",
            },
            "channel": [{"family": "kronecker", "modes": 2}, {"family": "monarch", "blocks": 2}],
        },
    ],
    "head": {"regions": 2, "positions": {"family": "average"}, "map": {"family": "dense"}},
}


def rich(exported) -> dict:
    data = yaml.safe_load(exported.read_text())
    data["assignment"] = copy.deepcopy(RICH)
    data["train"] |= {"lr": 0.01, "weight_decay": 0.0, "warmup": 0.1, "stop_at": 0.9}
    return data


def test_the_yaml_is_readable_and_whole(exported):
    text = exported.read_text()
    data = yaml.safe_load(text)
    assert list(data)[:4] == ["schema", "task", "spec", "assignment"]
    assert data["spec"] == {"grid": [8, 8], "classes": 10, "channels": 1}
    assert data["assignment"]["blocks"] == [
        {"channel": [{"family": "monarch", "blocks": 2}, {"family": "dense"}]}
    ]
    assert data["provenance"]["torch"] == torch.__version__
    assert max(map(len, text.splitlines())) <= 100


def test_saved_and_loaded_again(exported, tmp_path):
    export = load(exported)
    path = tmp_path / "again.yaml"
    save(export, path, "a header")
    assert load(path) == export and path.read_text().startswith("# a header\n")
    assert [p.name for p in tmp_path.iterdir()] == ["again.yaml"]


def test_build_gives_the_module_with_its_weights(exported):
    model = build(exported)
    tensors = load_file(weights_path(exported))
    assert {n: p.tolist() for n, p in model.state_dict().items()} == {
        n: t.tolist() for n, t in tensors.items()
    }
    assert isinstance(model, torch.nn.Module)
    assert model(torch.ones(3, 8, 8, 1)).shape == (3, 10)
    fresh, other = build(exported, weights=False), build(exported, weights_path(exported))
    assert float(fresh.head.numbers["weight"].detach().abs().max()) == 0  # as initialised
    assert torch.equal(other(torch.ones(1, 8, 8, 1)), model(torch.ones(1, 8, 8, 1)))


def test_weights_are_optional_only_where_they_were_not_asked_for(exported, tmp_path):
    path = tmp_path / "alone.yaml"
    path.write_text(exported.read_text())
    assert build(path)(torch.ones(1, 8, 8, 1)).shape == (1, 10)
    with pytest.raises(ConfigError, match="cannot read the weights"):
        build(path, tmp_path / "none.safetensors")


@pytest.mark.parametrize("kept", [0.0, 0.001, 0.5, 0.999])
def test_truncated_weights(exported, tmp_path, kept):
    whole = weights_path(exported).read_bytes()
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(whole[: int(kept * len(whole))])
    with pytest.raises(
        ConfigError, match=r"cannot read the weights .*cut.*train the pattern again"
    ):
        build(exported, cut)


def test_weights_of_another_pattern(exported, tmp_path):
    other, tensors = tmp_path / "other.safetensors", load_file(weights_path(exported))
    name = next(iter(tensors))
    for wrong, message in (
        ({k: v for k, v in tensors.items() if k != name}, f"'{name}' is missing"),
        ({**tensors, name: torch.zeros(2, 3)}, f"{name} is [2, 3], the pattern wants"),
        ({**tensors, "extra": torch.zeros(1)}, "no use for 'extra'"),
    ):
        save_file(wrong, other)
        model = build(exported)
        before = {n: p.clone() for n, p in model.state_dict().items()}
        with pytest.raises(ConfigError) as caught:
            load_weights(model, other)
        assert message in str(caught.value) and "of another pattern" in str(caught.value)
        assert all(torch.equal(before[n], p) for n, p in model.state_dict().items())


@pytest.mark.parametrize(
    "old, new, message",
    [
        ("schema: 1", "schema: 2", "schema 2 is not 1"),
        ("schema: 1", "shema: 1", "'schema' is missing"),
        ("task: digits", "taks: digits", "unknown key 'taks'. Did you mean 'task'?"),
        ("width: 8", "width: eight", "assignment.width: got 'eight', expected a number"),
        ("width: 8", "width: 0", "width=0 must be at least 1"),
        ("width: 8", "width: !!python/object/apply:os.system ['touch pwned']", "without tags"),
        ("family: monarch", "family: monarhc", "Did you mean 'monarch'?"),
        ("blocks: 2\n", "blocks: 3\n", "blocks=3"),
        ("regions: 2", "regions: 0", "regions=0 must be at least 1"),
        ("stride: 2", "stride: 0", "stride=0 must be at least 1"),
        ("epochs: 2", "epochs: 0", "epochs=0 must be at least 1"),
        ("grid: [8, 8]", "grid: []", "grid=() must be positions an axis"),
        ("channels: 1", "channels: 0", "channels=0 must be at least 1"),
    ],
)
def test_mistakes_in_the_yaml(exported, tmp_path, monkeypatch, old, new, message):
    monkeypatch.chdir(tmp_path)
    text = exported.read_text()
    assert old in text
    path = tmp_path / "bad.yaml"
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(PatternSearchError) as caught:
        build(path)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ["bad.yaml"]


@pytest.mark.parametrize("width", [8 * 10**12, 8 * 10**30])
def test_a_model_larger_than_memory(exported, tmp_path, width):
    path = tmp_path / "large.yaml"
    path.write_text(exported.read_text().replace("width: 8", f"width: {width}"))
    with pytest.raises(ConfigError, match=r"large\.yaml: not enough memory for a model of"):
        build(path)


def test_weights_are_as_readable_as_the_yaml(exported, tmp_path):
    save_weights(build(exported), tmp_path / "w.safetensors")
    (tmp_path / "plain").touch()
    assert (tmp_path / "w.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize("text", ["", "- 1", "3", "text"])
def test_files_that_are_no_exports(tmp_path, text):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match="expected an exported pattern"):
        build(path)


def paths(node, path=()):
    yield path
    if isinstance(node, dict | list):
        for key, value in node.items() if isinstance(node, dict) else enumerate(node):
            yield from paths(value, (*path, key))


WRONG = (0, -1, 2.5, "x", None, [], {}, math.nan, {"family": "dense", "entry": {"family": "dense"}})


def test_whatever_stands_in_the_yaml_builds_or_is_refused(exported, tmp_path):
    """Every value of a file, replaced by each of WRONG: a model that runs, or one clear line."""
    data, path = rich(exported), tmp_path / "any.yaml"
    path.write_text(yaml.safe_dump(data))
    assert build(path)(torch.zeros(1, 8, 8, 1)).shape == (1, 10)
    refused = built = 0
    for place in [p for p in paths(data) if p and p[0] in ("spec", "assignment", "train")]:
        for value in WRONG:
            changed = copy.deepcopy(data)
            node = changed
            for key in place[:-1]:
                node = node[key]
            node[place[-1]] = value
            path.write_text(yaml.safe_dump(changed))
            try:
                model = build(path)
                model_cost(model.assignment, model.spec)
            except PatternSearchError as e:
                assert "\n" not in str(e) and len(str(e)) > 20, f"{place} = {value!r}: {e}"
                refused += 1
                continue
            if model.spec.channels is not None:
                model(torch.zeros(1, *model.spec.grid, model.spec.channels))
            built += 1
    assert refused > 200 and built > 20, (refused, built)


def test_an_assignment_by_hand_is_the_same_model(exported):
    export = load(exported)
    model = build_model(Assignment.from_dict(export.assignment.to_dict()), get_task("digits").spec)
    assert [p.shape for p in model.parameters()] == [p.shape for p in build(exported).parameters()]
