"""A task: data, a loss, a metric. One file a task in tasks/, found by its presence."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import sys
import traceback
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from .errors import PatternSearchError, TaskError, unknown
from .sizes import Spec

Array = NDArray[np.generic]
IGNORE = -100  # label of positions that do not count

_TASKS: dict[str, type[Task]] = {}


@dataclass(frozen=True)
class Data:
    """x [n, *grid, channels] float32, or [n, *grid] int64 tokens; y [n] or [n, *grid] int64.

    x may be uint8 where `Task.batch` makes floats of it; y is float32 [n, horizon, classes] where
    the spec has a horizon. Arrays may be overlapping views or memory-mapped: neither is copied.
    `test` is seen by no step of a search: only `patternsearch train` and reports read it.
    """

    train: tuple[Array, Array]
    valid: tuple[Array, Array]
    test: tuple[Array, Array]


class Task(ABC):
    """A data set with its loss and metric. Subclasses are final and take no arguments.

    `name` is how it is called: get_task(task.name) gives the task again, in any process. `space`
    names the file in spaces/ searched by default. moves: `shift`, `flip` (left to right), where
    they leave the labels of images.
    """

    name: str = ""
    metric: ClassVar[str] = "accuracy"
    higher_is_better: ClassVar[bool] = True
    space: str = "vision"
    moves: tuple[str, ...] = ()
    note: str = ""  # what was guessed and repaired, said before a sweep

    def __init_subclass__(cls) -> None:
        if name := cls.__dict__.get("name"):
            old = _TASKS.setdefault(name, cls)
            if (old.__module__, old.__qualname__) != (cls.__module__, cls.__qualname__):
                raise TaskError(
                    f"task {name!r} is in {old.__module__} and in {cls.__module__}; rename one"
                )
            _TASKS[name] = cls

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

    def batch(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """What a model is given, and should give, of a batch as it is stored."""
        return x, y

    def loss(self, output: Tensor, y: Tensor) -> Tensor:
        """Scalar to minimise: cross-entropy, the mean over labelled places, 0 without one."""
        return cross_entropy(output, y)

    def score(self, output: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """(sum, count) of the metric over a batch; the metric is their ratio over a split."""
        counted = y != IGNORE
        return ((output.argmax(-1) == y) & counted).sum(), counted.sum()

    def scores(self, output: Tensor, y: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """Name -> (sum, count), of the metric and of what else is reported."""
        return {self.metric: self.score(output, y)}

    def judged(self, output: Tensor, y: Tensor) -> tuple[Tensor, dict[str, tuple[Tensor, Tensor]]]:
        """The loss and the scores of a batch, where one is made of the other."""
        return self.loss(output, y), self.scores(output, y)

    def value(self, mean: float) -> float:
        """A metric of sum / count."""
        return mean


class Generated(Task):
    """A task whose examples are drawn: fresh ones every epoch, fixed ones to evaluate on.

    RandomState is used because numpy keeps its streams the same in every version.
    """

    examples: ClassVar[int] = 1280  # an epoch: 20 batches of 64
    held_out: ClassVar[int] = 1024  # in validation and in test
    salt: ClassVar[int]  # tells the streams of one task from those of another

    @abstractmethod
    def generate(self, n: int, rng: np.random.RandomState) -> tuple[Array, Array]:
        """n examples (x, y)."""

    def load(self) -> Data:
        """The training examples are those of epoch 0 with seed 0."""
        return Data(
            train=self._draw(self.examples, 0, 0, 0, 0),
            valid=self._draw(self.held_out, 1),
            test=self._draw(self.held_out, 2),
        )

    def epoch(self, train: tuple[Tensor, Tensor], number: int, seed: int) -> tuple[Tensor, Tensor]:
        high, low = divmod(seed % 2**64, 2**32)
        return as_tensors(self._draw(self.examples, 0, high, low, number), train[0].device)

    def _draw(self, n: int, *stream: int) -> tuple[Array, Array]:
        return self.generate(n, np.random.RandomState([self.salt, *stream]))


def cross_entropy(output: Tensor, y: Tensor, smoothing: float = 0.0) -> Tensor:
    """Mean over the places of y that count, 0 without one; logits [*, classes], y int64 [*]."""
    rows, y = output.flatten(0, -2), y.flatten()
    loss = partial(F.cross_entropy, ignore_index=IGNORE, label_smoothing=smoothing)
    if y.is_cpu and int(y.max()) != IGNORE:  # on a GPU it would wait for the answer
        return loss(rows, y)
    return loss(rows, y, reduction="sum") / (y != IGNORE).sum().clamp_min(1)


def tasks() -> dict[str, type[Task]]:
    """Task name -> class, for every module in patternsearch/tasks/."""
    from . import tasks as package

    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{package.__name__}.{module.name}")
    return dict(sorted(_TASKS.items()))


def get_task(name: str) -> Task:
    """A task by its name, by the path of the user's own data, or as `module:Class`."""
    from .tasks.own import is_path, own_task

    if (known := tasks()).get(name) is not None:
        return known[name]()
    if is_path(name):
        return own_task(name)
    if ":" in name:
        return _import_task(name)
    raise TaskError(unknown("task", name, known) + " Own data: a path, or module:Class.")


def open_task(name: str) -> tuple[Task, Data]:
    """A task and its data, both checked.

    Raises TaskError where a class of the user's raises anything, naming its line.
    """
    module = name.partition(":")[0]
    try:
        task = get_task(name)
        module = type(task).__module__
        return task, checked(task)
    except PatternSearchError:
        raise
    except Exception as e:  # whatever a user's class raises
        raise TaskError(f"task {name!r}: {told(e, module)}") from e


def told(error: Exception, module: str) -> str:
    """An error of a class with the last line of its module that it came through, if it did."""
    frames, path = traceback.extract_tb(error.__traceback__), module.split(".")
    files = [Path(frame.filename.removesuffix("/__init__.py")).with_suffix("") for frame in frames]
    own = [f for f, at in zip(frames, files, strict=True) if list(at.parts[-len(path) :]) == path]
    last, said = (own or frames)[-1], f"{type(error).__name__}: {error}"
    if not isinstance(error, SyntaxError):  # which says itself where it is
        said += f" ({last.filename}, line {last.lineno})"
    return f"{said}; correct the class"


def _import_task(name: str) -> Task:
    module_name, _, class_name = name.partition(":")
    if not all(part.isidentifier() for part in (*module_name.split("."), class_name)):
        raise TaskError(f"task {name!r} must be module:Class, such as my_tasks:MyTask")
    if (here := str(Path.cwd())) not in sys.path:  # the folder of a script, not that of a command
        sys.path.insert(0, here)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as e:
        if not f"{module_name}.".startswith(f"{e.name}."):
            raise
        raise TaskError(
            f"task {name!r}: no module {e.name!r} can be imported; start in its folder or "
            "put that on PYTHONPATH"
        ) from None
    cls = getattr(module, class_name, None)
    if cls is None:
        classes = (k for k, v in vars(module).items() if inspect.isclass(v) and k != "Task")
        raise TaskError(f"task {name!r}: {unknown(f'class in {module_name}', class_name, classes)}")
    if not (isinstance(cls, type) and issubclass(cls, Task)):
        raise TaskError(f"task {name!r}: {class_name} must be a subclass of patternsearch.Task")
    if inspect.isabstract(cls):
        missing = ", ".join(sorted(cls.__abstractmethods__))
        raise TaskError(f"task {name!r}: {class_name} must define {missing}")
    if any(p.default is p.empty for p in inspect.signature(cls).parameters.values()):
        raise TaskError(f"task {name!r}: {class_name} must be made without arguments")
    task = cls()
    task.name = name
    return task


def checked(task: Task) -> Data:
    """The data of a task, which must be what its spec says.

    Raises TaskError, naming the array, where sizes, types or values do not fit. A wrong label would
    otherwise stop a GPU, a wrong shape a model far from its cause. What the class does with them is
    tried on two examples.
    """
    from .task_check import try_out

    data = task.load()
    if not isinstance(data, Data):
        found = type(data).__name__
        raise TaskError(
            f"task {task.name!r}: load() must give Data, found {found}; correct the class"
        )
    for split in ("train", "valid", "test"):
        problem = _wrong_pair(getattr(data, split), task)
        if problem:
            raise TaskError(f"task {task.name!r}, {split}: {problem}; correct its load() or spec")
    try_out(task, data)
    return data


def _wrong_pair(pair: tuple[Array, Array], task: Task) -> str | None:
    if not isinstance(pair, tuple | list) or len(pair) != 2:
        return f"it must be a pair (x, y), found {type(pair).__name__}"
    for name, array in zip("xy", pair, strict=True):
        if not isinstance(array, np.ndarray):
            kind = f"{type(array).__module__}.{type(array).__name__}".removeprefix("builtins.")
            return f"{name} must be a numpy array, found {kind}"
    x, y = pair
    return _wrong_x(x, task.spec) or _wrong_y(y, len(x), task)


def _wrong_x(x: Array, spec: Spec) -> str | None:
    tokens = spec.channels is None
    dtype, shape = ("int64", spec.grid) if tokens else ("float32", (*spec.grid, spec.channels))
    if x.dtype not in (dtype, dtype if tokens else "uint8"):
        return f"x must be {dtype}, found {x.dtype}"
    if x.shape[1:] != shape or len(x) == 0:
        return f"x must be {['n', *shape]}, found {list(x.shape)}"
    if not tokens:
        return None if np.isfinite(memory(x)).all() else "x has NaN or infinite values"
    if x.min() < 0 or x.max() >= (spec.vocabulary or 0):
        return f"tokens must be in [0, {spec.vocabulary}), found {x.min()} to {x.max()}"
    return None


def _wrong_y(y: Array, n: int, task: Task) -> str | None:
    spec = task.spec
    shape = (n, *spec.rows) if spec.horizon is None else (n, *spec.rows, spec.classes)
    if y.shape != shape:
        return f"y must be {list(shape)}, found {list(y.shape)}"
    if spec.horizon is not None:
        wrong = y.dtype != "float32" or not np.isfinite(memory(y)).all()
        return "y must be float32 without NaN or infinite values" if wrong else None
    if type(task).loss is not Task.loss:  # its own meaning of y
        return None
    if y.dtype != "int64":
        return f"y must be int64, found {y.dtype}"
    labels = y[y != IGNORE]
    if labels.size == 0:
        return f"y has no label besides {IGNORE}, which does not count"
    if labels.min() < 0 or labels.max() >= spec.classes:
        return f"labels must be in [0, {spec.classes}), found {labels.min()} to {labels.max()}"
    return None


def stratified(y: Array, valid: int, test: int, seed: int = 0) -> tuple[Array, Array, Array]:
    """Indices of a training, a validation and a test set with equal shares of every class.

    Exactly `valid` and `test` indices; in each set every class has its share, to within two. The
    same in every process and with every numpy version.
    """
    order: Array = np.random.RandomState(seed).permutation(len(y))
    order = order[np.argsort(y[order], kind="stable")]  # by class, at random within
    order, tested = _every(order, test)
    order, validated = _every(order, valid)
    return np.sort(order), np.sort(validated), np.sort(tested)


def _every(order: Array, count: int) -> tuple[Array, Array]:
    """(the others, `count` of them evenly spaced)."""
    steps = np.arange(len(order) + 1) * count // max(1, len(order))
    taken = np.diff(steps).astype(bool)
    return order[~taken], order[taken]


def memory(array: Array) -> Array:
    """The numbers behind a view whose rows overlap, in one row; any other array as it is."""
    if min(array.strides, default=0) < 0:
        return array
    steps = (s * (n - 1) for s, n in zip(array.strides, array.shape, strict=True))
    extent = 1 + sum(steps) // array.itemsize
    if extent >= array.size:
        return array
    return np.lib.stride_tricks.as_strided(array, (extent,), (array.itemsize,))


def as_tensors(split: tuple[Array, Array], device: torch.device) -> tuple[Tensor, Tensor]:
    """A split on the device. Overlapping views stay views, of their numbers moved once."""
    x, y = (_as_tensor(a, device) for a in split)
    return x, y


def _as_tensor(array: Array, device: torch.device) -> Tensor:
    numbers = memory(array)
    tensor = torch.from_numpy(np.ascontiguousarray(numbers)).to(device)
    if numbers is array:
        return tensor
    return tensor.as_strided(array.shape, [s // array.itemsize for s in array.strides])
