"""Back from an assignment to the point of a space that makes it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from .assignment import Assignment
from .codec import encode
from .domains import Choice, Domain, FloatRange
from .errors import PatternSearchError, SpaceError
from .pattern import Pattern
from .sizes import Spec, resolve
from .space import ROOT, Params, Space, as_domain, common, element, families, join

_SET = "(not default)"  # the key under which a mapping keeps its fields that are
_OTHER = 10.0  # what another family costs, against 1 for another value
# how much differs, the parameters, and those of them whose values are only near
Match = tuple[float, Params, frozenset[str]]


def params_of(space: Space, assignment: Assignment, train: Mapping[str, Any], spec: Spec) -> Params:
    """The parameters whose point is this assignment on tasks of these sizes.

    Those of training are the nearest to `train`; what it does not say is left open. Raises
    SpaceError naming the first difference where the assignment is no point of the space.
    """
    wanted = resolve(assignment, spec)
    _, params, near = _match(space.assignment, _full(assignment), ROOT)
    params, found = _settle(dataclasses.replace(space, train={}), params, near, wanted, spec)
    if found != wanted:
        raise SpaceError(f"no point of the space {space.source}: {_difference(wanted, found)}")
    return params | _training(space, train)


def _training(space: Space, train: Mapping[str, Any]) -> Params:
    """The parameters of the settings that are said."""
    found = _match(space.train, dict(train), "train")[1] if train else {}
    return {
        name: value
        for name, value in found.items()
        if name == "train" or not train.keys().isdisjoint(name.split("."))
    }


def _settle(
    space: Space, params: Params, near: frozenset[str], wanted: Assignment, spec: Spec
) -> tuple[Params, Assignment]:
    """Move one of the near parameters at a time towards the wanted assignment.

    Domains are free of sizes, a rank is a fraction there, so values cannot be read off.
    """
    domains = space.parameters()
    params, assignment = space.point(params)
    found = resolve(assignment, spec)
    for name in [n for n in params if n in near]:
        for value in _values(domains[name]) if found != wanted else ():
            try:
                moved, other = space.point({**params, name: value})
                other = resolve(other, spec)
            except PatternSearchError:
                continue
            if _distance(other, wanted) < _distance(found, wanted):
                params, found = moved, other
    return params, found


def _distance(a: Assignment, b: Assignment) -> float:
    """Over the leaves: 1 for another value, less for a number that is near."""
    one, two = dict(_leaves(encode(a), "")), dict(_leaves(encode(b), ""))
    total = 0.0
    for name in {*one, *two}:
        x, y = one.get(name), two.get(name)
        if isinstance(x, int | float) and isinstance(y, int | float):
            total += abs(x - y) / (1 + abs(x - y))
        else:
            total += float(x != y)
    return total


def _values(domain: Domain) -> Sequence[Any]:
    """All values of a domain, or some along a long one."""
    if isinstance(domain, Choice):
        return domain.options
    if isinstance(domain, FloatRange):
        low, high = domain.low, domain.high
        shares = [i / 32 for i in range(33)]
        if domain.log:
            return [low * (high / low) ** share for share in shares]
        return [low + (high - low) * share for share in shares]
    values = range(domain.low, domain.high + 1, domain.step)
    return values[:: max(1, len(values) // 64)]


def _full(value: Any) -> Any:
    """Plain data with every field, and which of them are not as by default."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        data = {f.name: _full(getattr(value, f.name)) for f in dataclasses.fields(value)}
        if isinstance(value, Pattern):
            data["family"] = value.family
        return {**data, _SET: set(encode(value)) - {"family"}}
    if isinstance(value, Mapping):
        return {**{k: _full(v) for k, v in value.items()}, _SET: set(value)}
    if isinstance(value, tuple | list):
        return [_full(v) for v in value]
    return value


def _match(node: Any, data: Any, path: str) -> Match:
    """The parameters below a node of the space's tree that come nearest to the data."""
    if isinstance(node, list):
        items = data if isinstance(data, list) else []
        pairs = [_match(n, d, f"{path}{i}") for i, (n, d) in enumerate(_zip(node, items))]
        return _total(pairs, abs(len(items) - len(node)))
    if not isinstance(node, Mapping):
        spelt = isinstance(node, str) and isinstance(data, int)  # `full` becomes a number
        return 0.5 if spelt else float(node != data), {}, frozenset()
    if (domain := as_domain(node, path)) is not None:
        value = _nearest(domain, data)
        return float(value != data), {path: value}, frozenset([path] if value != data else [])
    if "families" in node:
        options = {k: {"family": k, **v} for k, v in families(node, path).items()}
        return _best(options, {}, data, path)
    if "one_of" in node:
        return _best(node["one_of"], common(node), data, path)
    if "repeat" in node:
        return _repeated(node, data if isinstance(data, list) else [], path)
    return _fields(node, data, path)


def _fields(node: Mapping[str, Any], data: Any, path: str) -> Match:
    known = data if isinstance(data, Mapping) else {}
    pairs: list[Match] = []
    for key, inner in node.items():
        if key == "family":
            pairs.append((_OTHER * (inner != known.get(key)), {}, frozenset()))
        elif not (isinstance(inner, Mapping) and "same_as" in inner):
            pairs.append(_match(inner, known.get(key), join(path, key)))
    return _total(pairs, len(known.get(_SET, set()) - node.keys()) + (data is None))


def _best(options: Mapping[str, Any], beside: Mapping[str, Any], data: Any, path: str) -> Match:
    found: list[Match] = []
    own = dict(data) if isinstance(data, Mapping) else {}
    shared = [_match(v, own.get(k), join(path, k)) for k, v in beside.items()]
    rest = {**own, _SET: own.get(_SET, set()) - beside.keys()} if own else data
    for name, option in options.items():
        cost, params, near = _total([_match(option, rest, join(path, name)), *shared], 0)
        found.append((cost, {path: name, **params} if len(options) > 1 else params, near))
    return min(found, key=lambda match: match[0])


def _repeated(node: Mapping[str, Any], items: list[Any], path: str) -> Match:
    counted = _match(node["repeat"], len(items), path)
    count = counted[1].get(path, node["repeat"])
    kept = items[:1] if node.get("same") else items[:count]
    pairs = [_match(node["each"], d, element(node, path, i)) for i, d in enumerate(kept)]
    return _total([counted, *pairs], 0)


def _nearest(domain: Domain, value: Any) -> Any:
    if domain.contains(value):
        return value
    if isinstance(domain, Choice):
        numbers = [v for v in domain.options if isinstance(v, int | float)]
        if isinstance(value, int | float) and numbers:
            return min(numbers, key=lambda v: abs(v - value))
        return domain.options[0]
    if not isinstance(value, int | float):
        return domain.low
    if isinstance(domain, FloatRange):
        return min(max(float(value), domain.low), domain.high)
    steps = round((min(max(value, domain.low), domain.high) - domain.low) / domain.step)
    return domain.low + steps * domain.step


def _total(pairs: list[Match], extra: float) -> Match:
    params: Params = {}
    for _, found, _ in pairs:
        params |= found
    near = frozenset[str]().union(*(names for _, _, names in pairs))
    return sum(cost for cost, _, _ in pairs) + extra, params, near


def _zip(node: list[Any], items: list[Any]) -> list[tuple[Any, Any]]:
    return [(n, items[i] if i < len(items) else None) for i, n in enumerate(node)]


def _difference(wanted: Assignment, found: Assignment) -> str:
    """The first place where the nearest point is another."""
    one, two = dict(_leaves(encode(wanted), "")), dict(_leaves(encode(found), ""))
    for name in [*one, *two]:
        if one.get(name) != two.get(name):
            a, b = one.get(name, "the default"), two.get(name, "the default")
            return f"{name} is {a}, and {b} in the nearest one there is"
    return "its sizes differ"


def _leaves(data: Any, path: str) -> list[tuple[str, Any]]:
    if isinstance(data, Mapping):
        return [x for k, v in data.items() for x in _leaves(v, join(path, str(k)))]
    if isinstance(data, list):
        return [x for i, v in enumerate(data) for x in _leaves(v, f"{path}[{i}]")]
    return [(path, data)]
