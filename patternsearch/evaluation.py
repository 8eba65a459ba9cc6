"""Loss and metrics of a model over a split."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .errors import TaskError
from .sizes import Spec
from .task import IGNORE, Task

Split = tuple[Tensor, Tensor]
_MOST = 2**21  # outputs of a batch
_CPU = 2**16, 512  # positions and examples of a batch: with more it is slower
_CUDA = 2**20, 1024
_LEAST = 64  # examples: with fewer the calls take longer than the work


def some(split: Split, count: int | None) -> Split:
    """`count` examples of a split, drawn once and for all; all of them where it is no smaller."""
    x, y = split
    if count is None or count >= len(x):
        return split
    chosen = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[:count]
    chosen = chosen.to(x.device)
    return x[chosen], y[chosen]


@torch.no_grad()
def evaluate(model: nn.Module, task: Task, split: Split, batch: int = 1024) -> dict[str, float]:
    """Loss and metrics over a split, as `valid_loss` and by the task's names.

    A cross-entropy is the mean over the labels that count, another loss that over the examples.
    Raises TaskError where there is no such label.
    """
    model.eval()
    x, y = split
    batch = min(batch, largest_batch(task.spec, x.device))
    labelled = type(task).loss is Task.loss
    sums: dict[str, Tensor] = {}
    for stored in zip(x.split(batch), y.split(batch), strict=True):
        a, b = task.batch(*stored)
        part, scores = task.judged(model(a), b)
        count = (b != IGNORE).sum() if labelled else len(a)
        for name, both in {**scores, "valid_loss": (part * count, count)}.items():
            pair = [torch.as_tensor(v, dtype=torch.float64, device=x.device) for v in both]
            sums[name] = sums.get(name, 0) + torch.stack(pair)
    loss, labels = sums.pop("valid_loss").tolist()
    if not labels:
        raise TaskError(
            f"task {task.name!r}: none of the {len(x)} examples to evaluate on has a label that "
            "counts; raise train.valid_examples or train.test_examples"
        )
    values = {name: task.value((pair[0] / pair[1]).item()) for name, pair in sums.items()}
    return {"valid_loss": loss / labels, **values}


def largest_batch(spec: Spec, device: torch.device) -> int:
    """Examples that are evaluated at once: 64 at least, of however many positions."""
    positions, examples = _CUDA if device.type == "cuda" else _CPU
    few = max(_LEAST, positions // math.prod(spec.grid))
    return max(1, min(few, examples, _MOST // (spec.classes * math.prod(spec.rows))))
