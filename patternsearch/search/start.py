"""Where a sweep starts from: patterns given by files, by other sweeps, or by hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from ..assignment import Assignment
from ..codec import decode
from ..errors import ConfigError, PatternSearchError, unknown
from ..export import Export
from ..inverse import params_of
from ..sizes import Spec
from ..space import Params, Space
from ..train import TrainSettings
from ..yamlfile import read_yaml
from .folders import CONFIG, find_sweep
from .results import FROM, read_results

_BEST = 5  # trials taken over from another sweep, where its number is not given


@dataclass(frozen=True)
class Start:
    """A first trial: its parameters, which the sampler completes, and where they come from."""

    origin: str
    params: Params


def starts(
    sources: Sequence[str | Mapping[str, Any]], space: Space, spec: Spec, root: Path
) -> list[Start]:
    """The points that `start_from` names, in order, each with an origin of its own.

    A source is an exported YAML; a YAML of named points, as `experts` of a space has them; a sweep
    of `root` by name, whose best five trials are taken (NAME:12 for twelve); or, as a mapping, the
    parameters of a point or {assignment: ..., train: ...}. Of training an export says everything,
    a mapping what it names; the sampler completes the rest. Raises ConfigError on what cannot be
    read, and where none of a source's patterns is a point of the space.
    """
    found: list[Start] = []
    for i, source in enumerate(sources):
        if isinstance(source, Mapping):
            found.append(_point(source, f"{FROM}start_from[{i}]", space, spec))
        elif Path(source).suffix in (".yaml", ".yml"):
            found += _from_file(Path(source), space, spec)
        else:
            found += _from_sweep(source, space, spec, root)
    return _numbered(found)


def _numbered(found: Sequence[Start]) -> list[Start]:
    """With a number after an origin that an earlier one has: a study tells them apart by it."""
    named: dict[str, Params] = {}
    for start in found:
        again = (f"{start.origin} ({n})" for n in range(2, len(found) + 1))
        named[next(o for o in (start.origin, *again) if o not in named)] = start.params
    return [Start(origin, params) for origin, params in named.items()]


def _from_file(path: Path, space: Space, spec: Spec) -> list[Start]:
    if not path.is_file():
        raise ConfigError(f"start_from: no file {path}")
    data = read_yaml(path)
    if not isinstance(data, Mapping):
        raise ConfigError(f"start_from: {path}: expected an exported pattern or named points")
    if "assignment" in data:
        return [_point(data, f"{FROM}{path.name}", space, spec)]
    found = []
    for name, point in data.items():
        if not isinstance(point, Mapping):
            raise ConfigError(f"start_from: {path}: {name}: got {point!r}, expected parameters")
        own = str(name).startswith(FROM)  # a file that a sweep wrote
        origin = str(name) if own else f"{FROM}{path.name}: {name}"
        found.append(_point(point, origin, space, spec))
    return found


def _from_sweep(source: str, space: Space, spec: Spec, root: Path) -> list[Start]:
    name, colon, count = source.partition(":")
    if colon and not (count.isdigit() and int(count)):
        raise ConfigError(f"start_from: {source}: expected SWEEP or SWEEP:NUMBER of its trials")
    path = Path(name)
    folder = path if (path / CONFIG).is_file() else find_sweep(name, root)
    found: list[Start] = []
    reason = "it has no finished trial"
    for trial in read_results(folder).complete():
        origin = f"{FROM}{folder.name} trial {trial.number}"
        try:
            found.append(Start(origin, params_of(space, trial.assignment, trial.train, spec)))
        except PatternSearchError as e:
            reason = f"trial {trial.number} is {e}"
        if len(found) == (int(count) if colon else _BEST):
            break
    if not found:
        raise ConfigError(f"start_from: {source}: {reason}")
    return found


def _point(data: Mapping[str, Any], origin: str, space: Space, spec: Spec) -> Start:
    try:
        if "assignment" in data:
            train = _settings(data)
            assignment = Assignment.from_dict(data["assignment"])
            return Start(origin, params_of(space, assignment, train, spec))
        domains = space.parameters()
        for name, value in data.items():
            if name not in domains:
                raise ConfigError(unknown("parameter", name, domains))
            if not domains[name].contains(value):
                raise ConfigError(f"{name}={value!r} is not {domains[name]}")
    except PatternSearchError as e:
        raise ConfigError(f"start_from: {origin.removeprefix(FROM)}: {e}") from None
    return Start(origin, dict(data))


def _settings(data: Mapping[str, Any]) -> dict[str, Any]:
    """What a source says of training. An export leaves out what is as by default."""
    known = [f.name for f in fields(Export)]
    if other := [name for name in data if name not in known]:
        raise ConfigError(unknown("key", other[0], known))
    settings: TrainSettings = decode(TrainSettings, data.get("train"), "train")
    said = vars(settings) if "schema" in data else data.get("train") or {}
    return {name: getattr(settings, name) for name in said}
