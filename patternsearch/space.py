"""A search space: an assignment in YAML with domains where an assignment has values.

Anywhere in it may stand
  {int: [low, high], step: 4}, {float: [low, high], log: true}, {choice: [a, b]}   a domain
  {same_as: sibling}                        the value of a key beside it
  {one_of: {name: ..., name: ...}}          named alternatives; keys beside it go with each of them
  {families: [banded, low_rank]}            a pattern: each family with the domains it declares, or
  {families: {banded: {lower: ...}}}        with those given instead
  {repeat: {int: [1, 3]}, each: ...}        a list; with `same: true` its elements are alike

Every choice is one flat parameter named by its path, as in block0.mixer.positions.banded.lower.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .assignment import Assignment
from .codec import decode
from .domains import Choice, Domain, FloatRange, IntRange, Trial
from .errors import PatternSearchError, SpaceError, unknown
from .files import find
from .pattern import get_family
from .yamlfile import read_yaml

Params = dict[str, Any]
ROOT = "frame"  # the name of a choice at the very top, which the names below do not repeat
_OPTIONS = {"int": ("log", "step"), "float": ("log",), "choice": ()}


@dataclass(frozen=True)
class Space:
    """`assignment` and `train` are trees as above; `experts` name points of them by parameters."""

    assignment: Any
    train: Any = field(default_factory=dict)
    experts: Mapping[str, Params] = field(default_factory=dict)
    source: str = "space"

    def suggest(self, trial: Trial) -> tuple[Assignment, dict[str, Any]]:
        """An assignment and training settings, as the trial's parameters say."""
        data = _walk(self.assignment, ROOT, trial)
        return decode(Assignment, data, self.source), _walk(self.train, "train", trial)

    def parameters(self) -> dict[str, Domain]:
        """Every parameter that can occur, in the order of the file."""
        return {name: domain for name, domain, _ in leaves(self.assignment, ROOT, {})} | {
            name: domain for name, domain, _ in leaves(self.train, "train", {})
        }

    def size(self) -> float:
        """How many points it has; infinite with a continuous parameter."""
        return _size(self.assignment) * _size(self.train)

    def point(self, params: Params, rng: random.Random | None = None) -> tuple[Params, Assignment]:
        """The point with these parameters. What they leave open is drawn from `rng`, if given.

        Raises SpaceError for a value out of its domain or, without `rng`, an open one.
        """
        fixed = FixedTrial(params, rng)
        assignment, _ = self.suggest(fixed)
        return fixed.used, assignment

    def neighbour(self, params: Params, rng: random.Random) -> Params:
        """The point with one parameter moved: a number to the next value, a choice to another."""
        domains = self.parameters()
        movable = [n for n in params if domains[n].size() > 1]
        if not movable:
            return dict(params)
        name = rng.choice(movable)
        moved = {**params, name: _move(domains[name], params[name], rng)}
        return self.point({k: v for k, v in moved.items() if k in domains}, rng)[0]


class FixedTrial:
    """Answers suggestions from given parameters, and draws the rest where it may."""

    def __init__(self, params: Params, rng: random.Random | None = None) -> None:
        self.params, self.rng, self.used = params, rng, dict[str, Any]()

    def _answer(self, name: str, domain: Domain) -> Any:
        if name in self.params:
            value = self.params[name]
            if not domain.contains(value):
                raise SpaceError(f"{name}={value!r} is not {domain}")
        elif self.rng is None:
            raise SpaceError(f"{name} is left open; give it a value ({domain})")
        else:
            value = sample(domain, self.rng)
        self.used[name] = value
        return value

    def suggest_categorical(self, name: str, choices: Any) -> Any:
        return self._answer(name, Choice(tuple(choices)))

    def suggest_int(
        self, name: str, low: int, high: int, *, step: int = 1, log: bool = False
    ) -> int:
        return int(self._answer(name, IntRange(low, high, log, step)))

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float:
        return float(self._answer(name, FloatRange(low, high, log)))


def sample(domain: Domain, rng: random.Random) -> Any:
    """A value drawn uniformly, in the logarithm where the domain says so."""
    if isinstance(domain, Choice):
        return rng.choice(domain.options)
    low, high = float(domain.low), float(domain.high)
    if isinstance(domain, IntRange) and not domain.log:
        return rng.randrange(domain.low, domain.high + 1, domain.step)
    value = low * (high / low) ** rng.random() if domain.log else rng.uniform(low, high)
    return round(value) if isinstance(domain, IntRange) else value


def _move(domain: Domain, value: Any, rng: random.Random) -> Any:
    if isinstance(domain, IntRange):
        near = (value - domain.step, value + domain.step)
        return rng.choice([v for v in near if domain.contains(v)])
    if isinstance(domain, FloatRange):
        factor = rng.choice([0.7, 1.4])
        moved = value * factor if domain.log else value + (factor - 1) * (domain.high - domain.low)
        return min(max(moved, domain.low), domain.high)
    return rng.choice([v for v in domain.options if v != value])


def _walk(node: Any, path: str, trial: Trial) -> Any:
    """Plain data of one point."""
    if isinstance(node, list):
        return [_walk(item, f"{path}{i}", trial) for i, item in enumerate(node)]
    if not isinstance(node, Mapping):
        return node
    if (domain := as_domain(node, path)) is not None:
        return domain.suggest(trial, path)
    if "families" in node:
        options = families(node, path)
        name = _pick(options, path, trial)
        return {"family": name, **_walk(options[name], join(path, name), trial)}
    if "one_of" in node:
        name = _pick(node["one_of"], path, trial)
        beside = {k: _walk(v, join(path, k), trial) for k, v in common(node).items()}
        chosen = _walk(node["one_of"][name], join(path, name), trial)
        return {**beside, **chosen} if beside else chosen
    if "repeat" in node:
        count = _walk(node["repeat"], path, trial)
        return [_walk(node["each"], element(node, path, i), trial) for i in range(count)]
    data = {k: _walk(v, join(path, k), trial) for k, v in node.items() if not _refers(v)}
    return data | {k: _beside(v["same_as"], data, path) for k, v in node.items() if _refers(v)}


def _beside(name: Any, data: Params, path: str) -> Any:
    if not isinstance(name, str) or name not in data:
        raise SpaceError(f"{path}: same_as: {unknown('key beside it', str(name), data)}")
    return data[name]


def common(node: Mapping[str, Any]) -> dict[str, Any]:
    """What stands beside `one_of`: the same for all alternatives."""
    return {k: v for k, v in node.items() if k != "one_of"}


def _pick(options: Mapping[str, Any], path: str, trial: Trial) -> str:
    if len(options) == 1:
        return next(iter(options))
    return str(trial.suggest_categorical(path, list(options)))


def join(path: str, key: str) -> str:
    return f"{path}.{key}" if path and path != ROOT else key


def element(node: Mapping[str, Any], path: str, i: int) -> str:
    single = path.removesuffix("s")
    return single if node.get("same") else f"{single}{i}"


def _refers(node: Any) -> bool:
    return isinstance(node, Mapping) and "same_as" in node


def as_domain(node: Mapping[str, Any], path: str) -> Domain | None:
    """The domain a mapping spells, None where it is something else."""
    if not (kind := _OPTIONS.keys() & node.keys()):
        return None
    name = kind.pop()
    if extra := node.keys() - {name, *_OPTIONS[name]}:
        raise SpaceError(f"{path}: {unknown('key of a domain', sorted(extra)[0], _OPTIONS[name])}")
    if name == "choice":
        options = node["choice"]
        if not isinstance(options, list) or not options:
            raise SpaceError(f"{path}: choice={options!r} must be a list with at least one value")
        if bad := [o for o in options if not isinstance(o, str | int | float | bool | None)]:
            raise SpaceError(f"{path}: choice {bad[0]!r} must be one number or text; use one_of")
        return Choice(tuple(options))
    low, high = _bounds(node[name], name, path)
    log = bool(node.get("log", False))
    if low > high or (log and low <= 0):
        raise SpaceError(
            f"{path}: {name}=[{low}, {high}] must ascend"
            + (" from above 0 with log" if log else "")
        )
    if name == "float":
        return FloatRange(low, high, log)
    step = decode(int, node.get("step", 1), f"{path}.step")
    if step < 1 or (log and step != 1):
        raise SpaceError(f"{path}: step={step} must be at least 1, and 1 with log")
    return IntRange(int(low), int(high) - (int(high) - int(low)) % step, log, step)


def _bounds(value: Any, name: str, path: str) -> tuple[float, float]:
    kind = tuple[int, ...] if name == "int" else tuple[float, ...]
    bounds = decode(kind, value, f"{path}.{name}")
    if len(bounds) != 2:
        raise SpaceError(f"{path}: {name}={list(bounds)} must be [low, high]")
    return bounds[0], bounds[1]


def families(node: Mapping[str, Any], path: str) -> dict[str, Any]:
    """Family name -> its fields, the domains it declares filled in."""
    given = node["families"]
    if not isinstance(given, list | Mapping):
        raise SpaceError(f"{path}: families={given!r} must be a list or a mapping of families")
    if extra := node.keys() - {"families"}:
        raise SpaceError(f"{path}: {sorted(extra)[0]!r} beside families; put it into each of them")
    named = {name: {} for name in given} if isinstance(given, list) else dict(given)
    if not named:
        raise SpaceError(f"{path}: families is empty; name at least one")
    found = {}
    for name, fields in named.items():
        try:
            declared = get_family(name).domains()
        except PatternSearchError as e:
            raise SpaceError(f"{path}: {e}") from None
        if not isinstance(fields or {}, Mapping):
            raise SpaceError(f"{path}.{name}: got {fields!r}, expected a mapping of its fields")
        found[name] = {k: _spell(d) for k, d in declared.items()} | dict(fields or {})
    return found


def _spell(domain: Domain) -> dict[str, Any]:
    """A domain as the YAML has it."""
    if isinstance(domain, Choice):
        return {"choice": list(domain.options)}
    name = "int" if isinstance(domain, IntRange) else "float"
    spelt: dict[str, Any] = {name: [domain.low, domain.high], "log": domain.log}
    return spelt | ({"step": domain.step} if isinstance(domain, IntRange) else {})


def leaves(node: Any, path: str, chosen: Params) -> Iterator[tuple[str, Domain, Params]]:
    """(name, domain, choices that lead to it) of every parameter below a node."""
    if isinstance(node, list):
        for i, item in enumerate(node):
            yield from leaves(item, f"{path}{i}", chosen)
    if not isinstance(node, Mapping) or _refers(node):
        return
    if (domain := as_domain(node, path)) is not None:
        yield path, domain, chosen
    elif "families" in node or "one_of" in node:
        options = families(node, path) if "families" in node else _alternatives(node, path)
        if len(options) > 1:
            yield path, Choice(tuple(options)), chosen
        for name, option in options.items():
            here = {**chosen, path: name} if len(options) > 1 else chosen
            yield from leaves(option, join(path, name), here)
        if "one_of" in node:
            yield from leaves(common(node), path, chosen)
    elif "repeat" in node:
        if "each" not in node:
            raise SpaceError(f"{path}: 'each' is missing beside repeat: what is repeated")
        yield from leaves(node["repeat"], path, chosen)
        for i in range(_most(node["repeat"], path)):
            here = {**chosen, path: max(i + 1, _least(node["repeat"], path))}
            yield from leaves(node["each"], element(node, path, i), here)
    else:
        for key, value in node.items():
            yield from leaves(value, join(path, key), chosen)


def _alternatives(node: Mapping[str, Any], path: str) -> Mapping[str, Any]:
    """Name -> alternative of a `one_of`."""
    options = node["one_of"]
    if not isinstance(options, Mapping) or not options:
        raise SpaceError(f"{path}: one_of must be a mapping with at least one alternative")
    for name, option in options.items():
        if not isinstance(name, str):
            raise SpaceError(f"{path}: one_of: the name {name!r} is no text; write '{name}'")
        if common(node) and not isinstance(option, Mapping):
            beside = next(iter(common(node)))
            raise SpaceError(
                f"{path}: one_of: {name}: got {option!r}; an alternative is a mapping where a key "
                f"such as {beside!r} stands beside one_of"
            )
    return options


def _most(node: Any, path: str) -> int:
    return max(_counts(node, path))


def _least(node: Any, path: str) -> int:
    return min(_counts(node, path))


def _counts(node: Any, path: str) -> tuple[int, ...]:
    """Every value of a `repeat`."""
    domain = as_domain(node, path) if isinstance(node, Mapping) else None
    counts = domain.options if isinstance(domain, Choice) else (node,)
    if isinstance(domain, IntRange):
        counts = tuple(range(domain.low, domain.high + 1, domain.step))
    if not all(type(n) is int and n >= 0 for n in counts):
        raise SpaceError(f"{path}: repeat={node!r} must be whole numbers, such as {{int: [1, 3]}}")
    return counts


def _size(node: Any) -> float:
    if isinstance(node, list):
        return _product(_size(v) for v in node)
    if not isinstance(node, Mapping) or _refers(node):
        return 1
    if (domain := as_domain(node, "")) is not None:
        return domain.size()
    if "families" in node or "one_of" in node:
        options = families(node, "") if "families" in node else node["one_of"]
        beside = _size(common(node)) if "one_of" in node else 1
        return beside * sum(_size(option) for option in options.values())
    if "repeat" in node:
        one = _size(node["each"])
        return sum(one if node.get("same") else one**n for n in _counts(node["repeat"], ""))
    return _product(_size(v) for v in node.values())


def ends(domain: Domain) -> tuple[Any, ...]:
    """The first and the last of its values."""
    if isinstance(domain, Choice):
        return (domain.options[0], domain.options[-1])
    return (domain.low, domain.high)


def _product(values: Iterator[float]) -> float:
    total = 1.0
    for v in values:
        total *= v
    return total


def load_space(name: str | Path) -> Space:
    """A space by its name in spaces/ or by the path of a YAML file."""
    path = find("spaces", name, SpaceError)
    return as_space(read_yaml(path), str(path), str(name))


def as_space(data: Any, path: str, name: str | None = None) -> Space:
    """A space from what its file holds; `path` and `name` say in messages where that is from."""
    if not isinstance(data, Mapping):
        raise SpaceError(f"{path}: expected a mapping with 'assignment', got {data!r}")
    known = ("assignment", "train", "experts")
    for key in data:
        if key not in known:
            raise SpaceError(f"{path}: {unknown('key', key, known)}")
    if "assignment" not in data:
        raise SpaceError(f"{path}: 'assignment' is missing: the tree of what is searched")
    train, experts = data.get("train") or {}, data.get("experts") or {}
    parts = {"train": train, "experts": experts}
    if isinstance(experts, Mapping):
        parts |= {f"experts.{name}": params for name, params in experts.items()}
    for where, part in parts.items():
        if not isinstance(part, Mapping):
            raise SpaceError(f"{path}: {where}: got {part!r}, expected a mapping")
    return Space(data["assignment"], train, experts, name or path)
