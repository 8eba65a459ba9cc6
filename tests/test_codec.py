"""Plain data to dataclasses and back: every wrong value is named with its place and the remedy."""

import math
from dataclasses import dataclass, field
from typing import Literal

import pytest
import yaml

from patternsearch import Assignment
from patternsearch.codec import FrozenDict, decode, digest, encode
from patternsearch.errors import ConfigError, PatternError, PatternSearchError
from patternsearch.pattern import Pattern
from patternsearch.patterns.banded import Banded
from patternsearch.patterns.low_rank import LowRank
from patternsearch.yamlfile import read_yaml, write_yaml


@dataclass(frozen=True, kw_only=True)
class Inner:
    size: int
    scale: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Outer:
    inner: Inner
    pattern: Pattern | None = None
    mode: Literal["fast", "slow"] = "fast"
    widths: tuple[int, ...] = ()
    named: dict[str, float] = field(default_factory=FrozenDict)
    on: bool = False
    stride: int | Literal["all"] = 1


def test_round_trip_leaves_defaults_out():
    value = Outer(
        inner=Inner(size=3),
        pattern=Banded(lower=2, entry=LowRank(rank=0.5)),
        widths=(1, 2),
        named=FrozenDict(a=0.5),
        stride="all",
    )
    data = yaml.safe_load(yaml.safe_dump(encode(value)))
    assert data == {
        "inner": {"size": 3},
        "pattern": {
            "family": "banded",
            "lower": 2,
            "entry": {"family": "low_rank", "rank": 0.5},
        },
        "widths": [1, 2],
        "named": {"a": 0.5},
        "stride": "all",
    }
    assert decode(Outer, data, "file") == value


@pytest.mark.parametrize(
    "data, expected",
    [
        ({"inner": {"size": "12"}}, 12),
        ({"inner": {"size": "1e3"}}, 1000),
        ({"inner": {"size": 7}}, 7),
    ],
)
def test_numbers_yaml_leaves_as_text(data, expected):
    size = decode(Outer, data, "file").inner.size
    assert size == expected and type(size) is int


def test_scientific_notation_is_a_number():
    data = yaml.safe_load("inner: {size: 3, scale: 1e-3}")
    assert data["inner"]["scale"] == "1e-3"  # what PyYAML makes of it
    scale = decode(Outer, data, "file").inner.scale
    assert scale == 1e-3 and type(scale) is float
    assert type(decode(Outer, {"inner": {"size": 1, "scale": 2}}, "file").inner.scale) is float


@pytest.mark.parametrize(
    "data, message",
    [
        ({"iner": {"size": 1}}, "file: unknown key 'iner'. Did you mean 'inner'? Known: inner,"),
        ({}, "file: 'inner' is missing"),
        ({"inner": 3}, "file.inner: got 3, expected a mapping"),
        ({"inner": {"size": "wide"}}, "file.inner.size: got 'wide', expected a number"),
        ({"inner": {"size": 1.5}}, "file.inner.size: got 1.5, expected a whole number"),
        ({"inner": {"size": True}}, "file.inner.size: got True, expected a whole number"),
        ({"inner": {"size": None}}, "file.inner.size: got None, expected a whole number"),
        ({"inner": {"size": 1}, "mode": "fats"}, "file.mode: got 'fats', expected (did you mean"),
        ({"inner": {"size": 1}, "mode": 1}, "file.mode: got 1, expected 'fast' or 'slow'"),
        ({"inner": {"size": 1}, "on": "yes"}, "file.on: got 'yes', expected true or false"),
        ({"inner": {"size": 1}, "widths": 3}, "file.widths: got 3, expected a list"),
        ({"inner": {"size": 1}, "widths": [1, "x"]}, "file.widths[1]: got 'x', expected a number"),
        ({"inner": {"size": 1}, "named": [1]}, "file.named: got [1], expected a mapping"),
        ({"inner": {"size": 1}, "named": {"a": "b"}}, "file.named.a: got 'b', expected a number"),
        ({"inner": {"size": 1}, "stride": "al"}, "file.stride: got 'al', expected"),
        ({"inner": {"size": 1}, "pattern": {"lower": 1}}, "such as {family: dense}"),
        (
            {"inner": {"size": 1}, "pattern": {"family": "bandde"}},
            "file.pattern: no pattern family 'bandde'. Did you mean 'banded'?",
        ),
        (
            {"inner": {"size": 1}, "pattern": {"family": "banded", "lowr": 1}},
            "file.pattern (banded): unknown key 'lowr'. Did you mean 'lower'?",
        ),
        (
            {"inner": {"size": 1}, "pattern": {"family": "low_rank", "entry": {"family": "dense"}}},
            "file.pattern (low_rank): unknown key 'entry'",
        ),
        (
            {"inner": {"size": 1}, "pattern": {"family": "low_rank", "rank": 0}},
            "rank=0 must be",
        ),
    ],
)
def test_every_mistake_has_its_place(data, message):
    with pytest.raises(PatternSearchError) as caught:
        decode(Outer, data, "file")
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert isinstance(caught.value, ConfigError | PatternError)


def test_a_family_by_its_name_alone():
    assert decode(Pattern, "banded", "file") == Banded()


def test_digests_name_content_not_order():
    assert digest({"a": 1, "b": [2]}) == digest({"b": [2], "a": 1})
    assert digest({"a": 1}) != digest({"a": 2})
    a, b = Assignment(width=8), Assignment(width=16)
    assert a.digest() == Assignment(width=8).digest() != b.digest()
    assert len(a.digest()) == 12


def test_yaml_files_are_whole_or_not_there(tmp_path):
    path = tmp_path / "a.yaml"
    write_yaml(path, {"a": [1, 2], "b": {"c": 0.5}}, "two\nlines")
    assert path.read_text() == "# two\n# lines\na: [1, 2]\nb:\n  c: 0.5\n"
    assert read_yaml(path) == {"a": [1, 2], "b": {"c": 0.5}}
    with pytest.raises(ConfigError, match=r"cannot write .*choose another place"):
        write_yaml(tmp_path / "none" / "a.yaml", {})
    assert [p.name for p in tmp_path.iterdir()] == ["a.yaml"]


@pytest.mark.parametrize(
    "text, message",
    [
        ("a: !!python/object/apply:os.system ['touch pwned']", "line 1: could not determine"),
        ("b: 1\na: !!python/name:os.system", "line 2: could not determine"),
        ("a: 1\nb: 2\na: 3", "line 3: the key 'a' stands twice"),
        ("a: {b: 1", "line 1: expected ',' or '}'"),
        ("a: [1\nb: 2]:", "only plain YAML is read, without tags such as !!python"),
        (b"\xff\xfe\x00", "it is not UTF-8 text"),
    ],
)
def test_unreadable_yaml(tmp_path, monkeypatch, text, message):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "bad.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError) as caught:
        read_yaml(path)
    assert message in str(caught.value) and str(path) in str(caught.value)
    assert not (tmp_path / "pwned").exists()


def test_missing_file(tmp_path):
    with pytest.raises(ConfigError, match="No such file or directory; give the path of a YAML"):
        read_yaml(tmp_path / "none.yaml")


def test_not_a_number_is_kept_as_one():
    assert math.isnan(decode(float, "nan", "file"))
