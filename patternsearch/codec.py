"""Dataclasses to and from plain data (YAML, JSON): the one place that checks types of user data."""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import types
import typing
from collections.abc import Mapping
from functools import cache
from typing import Any, Literal, TypeVar, Union

from .errors import ConfigError, PatternError, PatternSearchError
from .pattern import Pattern, get_family

T = TypeVar("T")


def digest(data: Any, digits: int = 12) -> str:
    """Hexadecimal digits that name plain data, whatever the order of its keys."""
    text = json.dumps(data, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:digits]


class FrozenDict(dict[str, Any]):
    """A dict that is never changed once made, and so can be hashed."""

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(tuple(sorted(self.items(), key=lambda item: item[0])))


def encode(value: Any) -> Any:
    """Plain data: dataclasses become mappings of what differs from the defaults, tuples lists."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        data: dict[str, Any] = {}
        if isinstance(value, Pattern):
            data["family"] = value.family
        for f in dataclasses.fields(value):
            item = getattr(value, f.name)
            if item != _default(f):
                data[f.name] = encode(item)
        return data
    if isinstance(value, Mapping):
        return {k: encode(v) for k, v in value.items()}
    if isinstance(value, tuple | list):
        return [encode(v) for v in value]
    return value


def _default(f: dataclasses.Field[Any]) -> Any:
    return f.default_factory() if callable(f.default_factory) else f.default


def decode(kind: Any, data: Any, where: str) -> Any:
    """`data` as an instance of `kind` (a type as written in an annotation).

    Raises ConfigError naming the place `where`, what was found and what was expected.
    """
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if isinstance(kind, type) and issubclass(kind, Pattern):
        return _decode_pattern(data, where)
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        return _decode_fields(kind, data, where)
    if origin in (Union, types.UnionType):
        return _decode_union(args, data, where)
    if origin is Literal:
        if data in args and type(data) in {type(a) for a in args}:
            return data
        raise _mismatch(where, data, _near(data, args) + " or ".join(map(repr, args)))
    if origin is tuple:
        items = data if isinstance(data, list | tuple) else None
        if items is None:
            raise _mismatch(where, data, "a list")
        return tuple(decode(args[0], v, f"{where}[{i}]") for i, v in enumerate(items))
    if origin in (Mapping, dict):
        if not isinstance(data, Mapping):
            raise _mismatch(where, data, "a mapping")
        return FrozenDict({str(k): decode(args[1], v, f"{where}.{k}") for k, v in data.items()})
    if kind is Any:
        return data
    return _decode_scalar(kind, data, where)


def _decode_scalar(kind: Any, data: Any, where: str) -> Any:
    if kind is type(None):
        if data is None:
            return None
        raise _mismatch(where, data, "nothing")
    if kind in (int, float) and isinstance(data, str):
        try:  # PyYAML reads 1e-3 as a string
            number = float(data)
        except ValueError:
            raise _mismatch(where, data, "a number") from None
        data = int(number) if kind is int and number.is_integer() else number
    if kind is float and isinstance(data, int) and not isinstance(data, bool):
        return float(data)
    if isinstance(data, kind) and not (kind is int and isinstance(data, bool)):
        return data
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    raise _mismatch(where, data, names.get(kind, str(kind)))


def _decode_union(kinds: tuple[Any, ...], data: Any, where: str) -> Any:
    problems: list[PatternSearchError] = []
    exact = [k for k in kinds if isinstance(k, type) and type(data) is k]
    for kind in [*exact, *(k for k in kinds if k not in exact)]:
        try:
            return decode(kind, data, where)
        except PatternSearchError as e:
            problems.append(e)
    if isinstance(data, Mapping):
        raise problems[0]  # the structured alternative comes first in our annotations
    expected = " or ".join(str(p).partition("expected ")[2] or str(p) for p in problems)
    raise _mismatch(where, data, expected)


def _decode_pattern(data: Any, where: str) -> Pattern:
    if isinstance(data, Pattern):
        return data
    if isinstance(data, str):
        data = {"family": data}
    if not isinstance(data, Mapping) or "family" not in data:
        raise _mismatch(where, data, "a pattern such as {family: dense}")
    try:
        family = get_family(data["family"])
        rest = {k: v for k, v in data.items() if k != "family"}
        return typing.cast(Pattern, _decode_fields(family, rest, f"{where} ({family.family})"))
    except PatternError as e:
        raise PatternError(f"{where}: {e}") from None


def _decode_fields(kind: type, data: Any, where: str) -> Any:
    if isinstance(data, kind):
        return data
    if data is None:
        data = {}
    if not isinstance(data, Mapping):
        raise _mismatch(where, data, "a mapping")
    hints = _hints(kind)
    known = {f.name: f for f in dataclasses.fields(kind) if f.init}
    if isinstance(kind, type) and issubclass(kind, Pattern) and not kind.takes_entry:
        known.pop("entry")
    for key in data:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ConfigError(f"{where}: unknown key {key!r}.{hint} Known: {', '.join(known)}.")
    for name, f in known.items():
        required = f.default is f.default_factory is dataclasses.MISSING
        if name not in data and required:
            raise ConfigError(f"{where}: {name!r} is missing")
    return kind(**{k: decode(hints[k], v, f"{where}.{k}") for k, v in data.items()})


@cache
def _hints(kind: type) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def _near(data: Any, options: tuple[Any, ...]) -> str:
    near = difflib.get_close_matches(str(data), [str(o) for o in options], n=1)
    return f"(did you mean {near[0]!r}?) " if near else ""


def _mismatch(where: str, data: Any, expected: str) -> ConfigError:
    return ConfigError(f"{where}: got {data!r}, expected {expected}")
