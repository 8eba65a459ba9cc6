"""What a task's class does with its data, tried on two examples before anything is trained."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from .errors import PatternSearchError, TaskError
from .kinds import IMAGE_MOVES
from .task import Data, Task, told


def try_out(task: Task, data: Data) -> None:
    """Raise TaskError where batch, loss or the scores of a task cannot be used.

    The output is zeros of the shape that a model's has.
    """
    if wrong := _wrong_moves(task):
        raise TaskError(f"task {task.name!r}: {wrong}; correct the class")
    for split in (data.train, data.valid, data.test):
        x, y = (torch.from_numpy(np.array(array[:2])) for array in split)
        given, wanted = _called(task, "batch", x, y)
        output = torch.zeros(len(given), *task.spec.rows, task.spec.classes, requires_grad=True)
        wrong = _wrong_batch(task, given, wanted, output)
        wrong = wrong or _wrong_loss(_called(task, "loss", output, wanted))
        wrong = wrong or _wrong_scores(task, _called(task, "judged", output.detach(), wanted)[1])
        if wrong:
            raise TaskError(f"task {task.name!r}: {wrong}; correct the class")


def _called(task: Task, name: str, *arguments: Tensor) -> Any:
    try:
        return getattr(task, name)(*arguments)
    except PatternSearchError:
        raise
    except Exception as e:  # whatever a user's class raises
        names = ("x", "y") if name == "batch" else ("output", "y")
        given = (f"{n} {_shown(a)}" for n, a in zip(names, arguments, strict=True))
        said = told(e, type(task).__module__)
        raise TaskError(
            f"task {task.name!r}: {name}() was tried with {' and '.join(given)}: {said}"
        ) from e


def _wrong_moves(task: Task) -> str | None:
    spec, moves = task.spec, task.moves
    if isinstance(moves, str) or not set(moves) <= set(IMAGE_MOVES):
        return f"moves={moves!r} must be a tuple of {' and '.join(map(repr, IMAGE_MOVES))}"
    if moves and (len(spec.grid) != 2 or spec.channels is None):
        found = f"grid={spec.grid}, channels={spec.channels}"
        return f"moves={moves!r} are of images, positions (H, W) with channels; found {found}"
    return None


def _wrong_batch(task: Task, given: Tensor, wanted: Tensor, output: Tensor) -> str | None:
    spec = task.spec
    shape = spec.grid if spec.channels is None else (*spec.grid, spec.channels)
    dtype = torch.int64 if spec.channels is None else torch.float32
    if given.dtype != dtype:
        remedy = (
            "; scale it there, as in `return x.float() / 255, y`" if dtype.is_floating_point else ""
        )
        return f"x must be {_name(dtype)} after batch(), found {_name(given.dtype)}{remedy}"
    if given.shape[1:] != shape:
        return f"x must be {['n', *shape]} after batch(), found {list(given.shape)}"
    if type(task).loss is Task.loss and wanted.shape != output.shape[:-1]:
        return f"y must be {list(output.shape[:-1])} after batch(), found {list(wanted.shape)}"
    return None


def _wrong_loss(loss: Any) -> str | None:
    if not isinstance(loss, Tensor) or loss.dim() or not loss.is_floating_point():
        return f"loss() must give one number, a tensor without axes, found {_shown(loss)}"
    if not loss.requires_grad:
        return "loss() must be a differentiable function of the output, found one that is not"
    return None


def _wrong_scores(task: Task, scores: Any) -> str | None:
    if not isinstance(scores, dict) or task.metric not in scores:
        found = ", ".join(scores) or "nothing" if isinstance(scores, dict) else _shown(scores)
        return f"scores() gives {found} and not the metric {task.metric!r}"
    for name, both in scores.items():
        pair = both if isinstance(both, tuple | list) else ()
        if len(pair) != 2 or not all(map(_is_number, pair)):
            return f"score() must give two numbers (sum, count) as {name!r}, found {_shown(both)}"
    return None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | np.number) or (
        isinstance(value, Tensor) and value.dim() == 0
    )


def _shown(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{_name(value.dtype)} {list(value.shape)}"
    if isinstance(value, tuple | list):
        return f"({', '.join(map(_shown, value))})"
    return repr(value)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
