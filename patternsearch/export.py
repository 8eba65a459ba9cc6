"""A pattern taken away: a readable YAML, and its weights in safetensors beside it."""

from __future__ import annotations

import platform
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as as_bytes

from .assignment import Assignment
from .codec import decode, encode
from .errors import ConfigError, PatternError
from .measure import out_of_memory
from .model import Model, build_model
from .sizes import Spec, model_cost, verify
from .task import Task
from .train import TrainSettings
from .yamlfile import read_yaml, write_yaml

SCHEMA = 1


@dataclass(frozen=True, kw_only=True)
class Export:
    """What best.yaml holds.

    spec: the task's sizes, so that the model can be built without the task. metrics: validation
    metric, costs and such, as logged. provenance: where it comes from.
    """

    schema: int
    task: str
    spec: Spec
    assignment: Assignment
    train: TrainSettings
    seed: int = 0
    metrics: Mapping[str, float] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**63:
            raise ConfigError(f"seed={self.seed} must be at least 0 and below 2**63")


def versions() -> dict[str, str]:
    """What the numbers depend on besides the seed."""
    from . import __version__

    return {
        "patternsearch": __version__,
        "torch": str(torch.__version__),
        "numpy": numpy.__version__,
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
    }


def environment() -> str:
    """Every installed distribution with its version, a line each."""
    found = {f"{d.metadata['Name']}=={d.version}" for d in metadata.distributions()}
    return "\n".join(sorted(found, key=str.lower)) + "\n"


def make_export(
    task: Task,
    name: str,
    assignment: Any,
    train: Mapping[str, Any],
    seed: int,
    metrics: Mapping[str, float],
    provenance: Mapping[str, Any],
) -> Export:
    """A trial on the task called `name`, from plain data."""
    data = {
        "schema": SCHEMA,
        "task": name,
        "spec": encode(task.spec),
        "assignment": assignment,
        "train": train,
        "seed": seed,
        "metrics": dict(metrics),
        "provenance": {**provenance, **versions()},
    }
    export: Export = decode(Export, data, "export")
    return export


def save(export: Export, path: Path, header: str = "") -> None:
    """Write the YAML; through a temporary file, so that it is whole or not there."""
    write_yaml(path, encode(export), header)


def load(path: Path) -> Export:
    """Read an exported YAML, or one written by hand. Runs no code of the file."""
    data = read_yaml(path)
    if not isinstance(data, Mapping):
        raise ConfigError(f"{path}: expected an exported pattern, got {type(data).__name__}")
    if "schema" not in data:
        raise ConfigError(f"{path}: 'schema' is missing; is it a file of `patternsearch export`?")
    if data["schema"] != SCHEMA:
        raise ConfigError(
            f"{path}: schema {data['schema']!r} is not {SCHEMA}, which this version reads"
        )
    export: Export = decode(Export, data, str(path))
    try:
        verify(export.assignment, export.spec)
    except PatternError as e:
        raise PatternError(f"{path}: {e}") from None
    return export


def weights_path(path: Path) -> Path:
    return path.with_suffix(".safetensors")


def save_weights(model: Model, path: Path) -> None:
    """All parameters, written through a temporary file."""
    temporary = path.with_name(f".{path.name}.part")
    tensors = {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}
    try:
        temporary.write_bytes(as_bytes(tensors))  # save_file's would be for its owner's eyes alone
        temporary.replace(path)
    except OSError as e:
        temporary.unlink(missing_ok=True)
        raise ConfigError(f"cannot write {path}: {e}; choose another place") from None


def load_weights(model: Model, path: Path) -> None:
    """Parameters from a safetensors file into a model of the same assignment."""
    try:
        tensors = load_file(str(path))
    except (OSError, SafetensorError) as e:
        raise ConfigError(
            f"cannot read the weights {path}: {e}; export or train the pattern again"
        ) from None
    own = model.state_dict()
    for name, tensor in own.items():
        if name not in tensors:
            raise ConfigError(f"{path}: {name!r} is missing; the weights are of another pattern")
        if tensors[name].shape != tensor.shape:
            raise ConfigError(
                f"{path}: {name} is {list(tensors[name].shape)}, the pattern wants "
                f"{list(tensor.shape)}; the weights are of another pattern"
            )
    if extra := sorted(tensors.keys() - own.keys()):
        raise ConfigError(f"{path}: no use for {extra[0]!r}; the weights are of another pattern")
    model.load_state_dict(tensors)


@contextmanager
def enough_memory(export: Export, path: Path) -> Iterator[None]:
    """Raise ConfigError where the model of an export is too large for this machine."""
    try:
        yield
    except Exception as e:  # torch has no one kind for it
        if not out_of_memory(e):
            raise
        count = model_cost(export.assignment, export.spec).parameters
        raise ConfigError(
            f"{path}: not enough memory for a model of {count:,} parameters; make it smaller"
        ) from None


def build(path: str | Path, weights: bool | str | Path = True) -> Model:
    """The model of an exported YAML, with the weights that lie beside it where there are any.

    With weights it is in evaluation mode, which a batch norm asks for; call train() to go on.
    weights: False for a fresh model, a path for other weights. Needs torch, numpy, pyyaml and
    safetensors only. Raises ConfigError or PatternError on a file that cannot be used.
    """
    path = Path(path)
    export = load(path)
    with enough_memory(export, path):
        model = build_model(export.assignment, export.spec, export.seed)
    beside = weights_path(path) if isinstance(weights, bool) else Path(weights)
    if weights and (beside.exists() or not isinstance(weights, bool)):
        load_weights(model, beside)
        model.eval()
    return model
