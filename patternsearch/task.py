"""A task: data, a loss, a metric. One file a task in tasks/, found by its presence."""

from __future__ import annotations

import importlib
import pkgutil
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from .errors import TaskError, unknown
from .sizes import Spec

Array = NDArray[np.generic]
IGNORE = -100  # label of positions that do not count

_TASKS: dict[str, type[Task]] = {}


@dataclass(frozen=True)
class Data:
    """x [n, *grid, channels] float32, or [n, *grid] int64 tokens; y [n] or [n, *grid] int64.

    `test` is seen by no step of a search: only `patternsearch train` and reports read it.
    """

    train: tuple[Array, Array]
    valid: tuple[Array, Array]
    test: tuple[Array, Array]


class Task(ABC):
    """A data set with its loss and metric. Subclasses are final and take no arguments.

    `name` is how it is called (a class attribute); `space` names the file in spaces/ searched by
    default. A task whose training examples are generated overrides `epoch`.
    """

    name: ClassVar[str] = ""
    metric: ClassVar[str] = "accuracy"
    higher_is_better: ClassVar[bool] = True
    space: ClassVar[str] = "vision"

    def __init_subclass__(cls) -> None:
        if cls.name:
            if (old := _TASKS.get(cls.name)) is not None and old.__qualname__ != cls.__qualname__:
                raise TypeError(f"task {cls.name!r} is in {old.__module__} and in {cls.__module__}")
            _TASKS[cls.name] = cls

    @property
    @abstractmethod
    def spec(self) -> Spec:
        """Sizes and causality, all a model must know."""

    @abstractmethod
    def load(self) -> Data:
        """The arrays; the same in every process. Raises TaskError on missing or broken data."""

    def epoch(self, train: tuple[Tensor, Tensor], number: int, seed: int) -> tuple[Tensor, Tensor]:
        """Training examples of epoch `number` (from 0), on the device of `train`."""
        return train

    def loss(self, output: Tensor, y: Tensor) -> Tensor:
        """Scalar to minimise: cross-entropy over labelled places."""
        return F.cross_entropy(output.flatten(0, -2), y.flatten(), ignore_index=IGNORE)

    def score(self, output: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """(sum, count) of the metric over a batch; the metric is their ratio over a split."""
        counted = y != IGNORE
        return ((output.argmax(-1) == y) & counted).sum(), counted.sum()


def tasks() -> dict[str, type[Task]]:
    """Task name -> class, for every module in patternsearch/tasks/."""
    from . import tasks as package

    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{package.__name__}.{module.name}")
    return dict(sorted(_TASKS.items()))


def get_task(name: str) -> Task:
    """A task by its name, by the path of an .npz file, or as `module:Class`."""
    if name.endswith(".npz"):
        from .tasks.arrays import ArrayTask

        return ArrayTask(Path(name))
    if ":" in name:
        return _import_task(name)
    if (known := tasks()).get(name) is None:
        raise TaskError(
            unknown("task", name, known) + " Own data: a path to an .npz file, or module:Class."
        )
    return known[name]()


def _import_task(name: str) -> Task:
    module_name, _, class_name = name.partition(":")
    try:
        cls = getattr(importlib.import_module(module_name), class_name)
    except ModuleNotFoundError as e:
        if e.name != module_name.partition(".")[0] and e.name != module_name:
            raise
        raise TaskError(
            f"task {name!r}: no module {module_name!r} can be imported; start in its folder or "
            "put that on PYTHONPATH"
        ) from None
    except AttributeError:
        raise TaskError(f"task {name!r}: {module_name} has no {class_name!r}") from None
    if not (isinstance(cls, type) and issubclass(cls, Task)):
        raise TaskError(f"task {name!r}: {class_name} must be a subclass of patternsearch.Task")
    return cls()


def as_tensors(split: tuple[Array, Array], device: torch.device) -> tuple[Tensor, Tensor]:
    """A split on the device."""
    x, y = (torch.from_numpy(np.ascontiguousarray(a)).to(device) for a in split)
    return x, y
