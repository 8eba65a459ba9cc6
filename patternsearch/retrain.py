"""Train an exported pattern again, to the logged numbers and to the test metric."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from .errors import ConfigError
from .evaluation import evaluate, some
from .export import Export, enough_memory, load, save_weights, weights_path
from .model import Model
from .task import get_task, open_task
from .train import Splits, TrialResult, run


def train(path: Path, seed: int | None = None, output: Path | None = None) -> str:
    """Train, write the weights and say what came out."""
    kept = load(path)
    export = kept if seed is None else replace(kept, seed=seed)
    beside = output or weights_path(path)
    if export.seed != kept.seed and output is None and beside.exists():
        raise ConfigError(
            f"--seed {seed}: {beside} holds the weights of seed {kept.seed}, which {path} names; "
            "give --output for these"
        )
    if not beside.parent.is_dir():
        raise ConfigError(f"--output {beside}: no folder {beside.parent}; make it first")
    spec = get_task(export.task).spec
    if export.spec != spec:
        raise ConfigError(
            f"{path}: its sizes are {export.spec}, those of the task {export.task} {spec}; they "
            "must be equal: restore the file, or search the task as it is now"
        )
    with enough_memory(export, path):
        model, result, test = again(export)
    save_weights(model, beside)
    name = get_task(export.task).metric
    lines = [f"validation {name}: {result.metrics[name]!r}"]
    if seed is None and name in export.metrics:
        logged = export.metrics[name]
        same = "equal to" if logged == result.metrics[name] else "differs from"
        lines[0] += f" ({same} the logged {logged!r})"
    lines += [f"test {key}: {value!r}" for key, value in test.items()]
    lines.append(f"weights: {beside}")
    return "\n".join(lines)


def again(export: Export) -> tuple[Model, TrialResult, dict[str, float]]:
    """A model trained as exported, its result and its test metrics."""
    torch.set_num_threads(1)  # as in a worker: the order of additions depends on it
    task, data = open_task(export.task)
    splits = Splits(data, _device(export))
    model, result = run(export.assignment, task, splits, export.train, export.seed)
    test = evaluate(model, task, some(splits.test, export.train.test_examples))
    return model, result, {k: v for k, v in test.items() if k != "valid_loss"}


def _device(export: Export) -> torch.device:
    """Where it was trained, if that is here: the numbers depend on it, and the time."""
    cuda = export.provenance.get("device") == "cuda" and torch.cuda.is_available()
    return torch.device("cuda" if cuda else "cpu")
