"""What a sweep is told: a YAML file in configs/, and the command line's changes to it."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from .errors import ConfigError
from .files import find, shipped
from .yamlfile import read_yaml

_NESTED = ("train", "caps", "resources")
METRICS = ("parameters", "flops", "latency_ms", "memory_mb", "seconds")
STATIC = ("parameters", "flops")  # known before a trial takes a worker


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Caps(_Strict):
    """Hard limits on a trial. FLOPs are of one example.

    parameters and flops are checked before a trial takes a worker; latency_ms and memory_mb are
    measured on the worker before it trains, seconds while it does.
    """

    parameters: float | None = Field(None, gt=0)
    flops: float | None = Field(None, gt=0)
    latency_ms: float | None = Field(None, gt=0)
    memory_mb: float | None = Field(None, gt=0)
    seconds: float | None = Field(None, gt=0)

    def measured(self) -> dict[str, float]:
        """The caps that only a worker can check."""
        found = {name: getattr(self, name) for name in METRICS if name not in STATIC}
        return {name: cap for name, cap in found.items() if cap is not None}


class Confirm(_Strict):
    """The best `top` and every expert design, trained again from so many fresh `seeds`; 0: none."""

    top: int = Field(0, ge=0)
    seeds: int = Field(5, ge=2)


class Resources(_Strict):
    """What one worker takes. A fraction of a GPU shares it between workers."""

    cpu: float = Field(1, gt=0)
    gpu: float = Field(0, ge=0)

    @property
    def device(self) -> str:
        return "cuda" if self.gpu else "cpu"

    @property
    def share(self) -> float:
        """Of a GPU's memory, of one worker."""
        return min(self.gpu, 1.0)


class TrainConfig(_Strict):
    """See train.TrainSettings."""

    epochs: int = Field(40, ge=1)
    batch: int = Field(64, ge=1)
    lr: float = Field(5e-3, gt=0)
    weight_decay: float = Field(0.01, ge=0)
    warmup: float = Field(0.05, ge=0, lt=1)
    eval_every: int = Field(1, ge=1)
    examples: int | None = Field(None, ge=1)
    valid_examples: int | None = Field(None, ge=1)
    test_examples: int | None = Field(None, ge=1)
    stop_at: float | None = None
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    ema: float | None = Field(None, gt=0, lt=1)
    clip: float | None = Field(None, gt=0)
    shift: int = Field(0, ge=0)
    flip: bool = False
    precision: Literal["float32", "bfloat16"] = "float32"
    cuda_graph: bool = False


class SweepConfig(_Strict):
    """A whole sweep. Times are in seconds.

    objectives: what is optimised: the task's metric, valid_loss, or a cost, of parameters, flops,
    latency_ms, memory_mb, seconds. Several give a front. An empty mapping means the metric alone.
    min_epochs: what a trial trains before the pruner may stop it; a quarter of the epochs where not
    given, with hyperband an eighth. reduction_factor: of halving and hyperband, one in so many
    trials passes a rung, and the next rung is at so many times the epochs.
    address: of a running Ray cluster, `auto` on one of its machines; none starts Ray here.
    trial_time: what one trial may take before it fails, also where it hangs.
    storage: URL of a database for the study, which else is a file in the sweep's folder.
    tracking_uri: of an MLflow store or server; by default a store beside the sweep's folder.
    start_from: the first trials: exported YAMLs, sweeps by name, points by parameters.
    latency_batch: examples of the forward pass that latency_ms is the median time of.
    """

    task: str
    space: str | None = None
    sampler: Literal["tpe", "gp", "nsga2", "random", "structured"] = "structured"
    pruner: Literal["none", "median", "halving", "hyperband"] = "median"
    min_epochs: int | None = Field(None, ge=1)
    reduction_factor: int = Field(2, ge=2)
    trials: int = Field(32, ge=1)
    time: float | None = Field(None, gt=0)
    trial_time: float | None = Field(None, gt=0)
    workers: int | None = Field(None, ge=1)
    seed: int = Field(0, ge=0, lt=2**62)  # of torch's 64 bits, with room for fresh ones
    objectives: dict[str, Literal["maximize", "minimize"]] = {}
    caps: Caps = Caps()
    latency_batch: int = Field(64, ge=1)
    confirm: Confirm = Confirm()
    train: TrainConfig = TrainConfig()
    experts: bool = True
    start_from: list[str | dict[str, Any]] = []
    resources: Resources = Resources()
    executor: Literal["ray", "inline"] = "ray"
    address: str | None = None
    storage: str | None = None
    tracking_uri: str | None = None

    @field_validator("task")
    @classmethod
    def _named(cls, task: str) -> str:
        if not task.strip():
            raise ValueError("must name a task")
        return task


def load_config(
    name: str, changes: Sequence[str] = (), *, python: bool = False, **options: Any
) -> SweepConfig:
    """The sweep `name`: a file in configs/, a path to a YAML, or a task with the defaults.

    changes: `key=value` texts, keys dotted (train.lr=1e-2), values YAML. options: the command
    line's own, None where not given; a mapping for train, caps or resources changes what it names.
    python: the options are keywords of a call, and messages say so.
    """
    source, data = _read(name)
    told: dict[str, str] = {}  # key -> how the command line says it
    for change in changes:
        key, sign, text = change.partition("=")
        if not sign or not key:
            raise ConfigError(f"--set {change}: expected key=value, such as train.lr=1e-2")
        _set(data, key.strip().split("."), _value(change, text), change)
        told[key.strip()] = f"--set {change}"
    for key, value in options.items():
        if value is not None:
            told[key] = f"{key}=" if python else f"--{key.replace('_', '-')}"
            merges = key in _NESTED and isinstance(value, Mapping)
            data[key] = {**(data.get(key) or {}), **value} if merges else value
    try:
        return SweepConfig.model_validate(data)
    except ValidationError as e:
        raise ConfigError(_explain(e, source, told)) from None


def masked(text: str) -> str:
    """A text without the passwords of the URLs in it."""
    return re.sub(r"(://[^:/@\s'\"]*):[^/@\s'\"]+@", r"\1:***@", text)


def saved_config(path: Path) -> SweepConfig:
    """The configuration a sweep wrote when it started."""
    try:
        return SweepConfig.model_validate(read_yaml(path))
    except ValidationError as e:
        raise ConfigError(_explain(e, path, {})) from None


def changes(
    old: BaseModel, new: BaseModel, free: Sequence[str] = (), prefix: str = ""
) -> Iterator[str]:
    """`train.epochs=2, not 3` of every key that is not `free` to differ."""
    for key in type(old).model_fields:
        a, b = getattr(old, key), getattr(new, key)
        if key in free:
            continue
        if isinstance(a, BaseModel):
            yield from changes(a, b, prefix=f"{prefix}{key}.")
        elif a != b:
            yield masked(f"{prefix}{key}={a!r}, not {b!r}")


def _value(change: str, text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        raise ConfigError(f"--set {change}: the value is not YAML") from None


def _read(name: str) -> tuple[Path | None, dict[str, Any]]:
    known = shipped("configs")
    if name not in known and Path(name).suffix not in (".yaml", ".yml"):
        return None, _unwritten(name)
    path = find("configs", name, ConfigError)
    data = read_yaml(path)
    if not isinstance(data, Mapping):
        raise ConfigError(f"{path}: expected a mapping such as 'task: digits', got {data!r}")
    return path, dict(data)


def _unwritten(name: str) -> dict[str, Any]:
    """The sweep of a task without a file of its own; names are checked later, paths here."""
    from .task import get_task, tasks
    from .tasks.own import is_path, suggested

    return suggested(get_task(name)) if name not in tasks() and is_path(name) else {"task": name}


def _set(data: dict[str, Any], keys: list[str], value: Any, change: str) -> None:
    for key in keys[:-1]:
        inner = data.setdefault(key, {})
        if not isinstance(inner, dict):
            raise ConfigError(f"--set {change}: {key!r} has no keys below it")
        data[key] = data = dict(inner)
    data[keys[-1]] = value


def _explain(error: ValidationError, source: Path | None, told: Mapping[str, str]) -> str:
    """The first problem as `file, line n: key: what was found, what was expected`."""
    first = error.errors()[0]
    keys = [str(k) for k in first["loc"]]
    where = ".".join(keys)
    asked = (k for k in told if f"{where}.".startswith(f"{k}.") or k.startswith(f"{where}."))
    place = next((f"{told[k]}: " for k in asked), None)
    place = _place(source, keys) if place is None else place
    if first["type"] == "extra_forbidden":
        known = list(_fields(keys[:-1]))
        return f"{place}unknown key {where!r}.{_near(keys[-1], known)} Known: {', '.join(known)}."
    if first["type"] == "missing":
        return f"{place}{where!r} is missing"
    expected = first["msg"].removeprefix("Value error, ")
    said = f"{place}{where}: got {first['input']!r}; {expected[0].lower()}{expected[1:]}"
    if first["type"] == "literal_error":
        hint = _near(str(first["input"]), re.findall("'(.*?)'", first["ctx"]["expected"]))
        return f"{said}.{hint}" if hint else said
    return said


def _near(name: str, known: Sequence[str]) -> str:
    found = difflib.get_close_matches(name, known, n=1)
    return f" Did you mean {found[0]!r}?" if found else ""


def _fields(keys: Sequence[str]) -> Mapping[str, Any]:
    model: Any = SweepConfig
    for key in keys:
        model = model.model_fields[key].annotation
    fields: Mapping[str, Any] = model.model_fields
    return fields


def _place(source: Path | None, keys: Sequence[str]) -> str:
    """`file, line n: ` of a key, as far as it can be found."""
    if source is None:
        return ""
    node = yaml.compose(source.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    line = None
    for key in keys:
        pairs = node.value if isinstance(node, yaml.MappingNode) else []
        for name, value in pairs:
            if name.value == key:
                line, node = name.start_mark.line + 1, value
                break
        else:
            break
    return f"{source}, line {line}: " if line else f"{source}: "
