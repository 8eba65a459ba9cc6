"""Train one assignment on one task: a plain loop over data that is resident on the device."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .assignment import Assignment
from .errors import ConfigError, PatternSearchError
from .measure import LATENCY_BATCH, latency, training_memory
from .model import Model, build_model
from .sizes import model_cost
from .task import Data, Task, as_tensors

Split = tuple[Tensor, Tensor]
_MOST = 2**24  # outputs of one batch of an evaluation


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """How a trial is trained. Part of its identity, exported with it.

    lr: base rate; every core's own follows from its fan-in (layers.rate). warmup: fraction of the
    steps in which the rate rises; it falls as a cosine after. eval_every: epochs between two
    evaluations. stop_at: ends the trial once the validation metric is as good. examples: so many
    an epoch, others each time (all by default). valid_examples: so many of the validation set, the
    same in every trial.
    """

    epochs: int = 40
    batch: int = 64
    lr: float = 5e-3
    weight_decay: float = 0.01
    warmup: float = 0.05
    eval_every: int = 1
    stop_at: float | None = None
    examples: int | None = None
    valid_examples: int | None = None

    def __post_init__(self) -> None:
        for name in ("epochs", "batch", "eval_every", "examples", "valid_examples"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ConfigError(f"train.{name}={value} must be at least 1")
        if not self.lr > 0:
            raise ConfigError(f"train.lr={self.lr} must be above 0")
        if not self.weight_decay >= 0:
            raise ConfigError(f"train.weight_decay={self.weight_decay} must be at least 0")
        if not 0 <= self.warmup < 1:
            raise ConfigError(f"train.warmup={self.warmup} must be in [0, 1)")


class TrialFailed(PatternSearchError):
    """Training could not go on; the message is the reason that is kept with the trial."""


class Splits:
    """A task's data on a device, loaded once and used by every trial of a process."""

    def __init__(self, data: Data, device: torch.device) -> None:
        self.device = device
        self.train, self.valid, self.test = (
            as_tensors(split, device) for split in (data.train, data.valid, data.test)
        )


@dataclass
class TrialResult:
    """What training gave: `metrics` of the last epoch, the `curve` and the costs."""

    metrics: dict[str, float]
    curve: list[dict[str, float]]
    costs: dict[str, float]


class TrialRun:
    """One trial in steps: `advance` trains to the next evaluation, `result` measures at the end.

    The same assignment, settings and seed give the same numbers on the same machine and number of
    threads.
    """

    def __init__(
        self,
        assignment: Assignment,
        task: Task,
        splits: Splits,
        settings: TrainSettings,
        seed: int = 0,
    ) -> None:
        self.task, self.splits, self.settings, self.seed = task, splits, settings, seed
        self.started = time.perf_counter()
        self.model = build_model(assignment, task.spec, seed).to(splits.device)
        self.optimizer = torch.optim.AdamW(parameter_groups(self.model, settings), fused=True)
        self.order = torch.Generator().manual_seed(seed)
        self.valid = some(splits.valid, settings.valid_examples)
        self.steps = self.epochs = 0
        self.curve: list[dict[str, float]] = []
        self.finished = False

    def advance(self) -> dict[str, float]:
        """Train up to the next evaluation; its numbers. Raises TrialFailed if one is not finite."""
        s = self.settings
        losses = []
        for _ in range(min(s.eval_every, s.epochs - self.epochs)):
            losses.append(self._epoch())
        loss = sum(losses) / len(losses)
        scores = evaluate(self.model, self.task, self.valid)
        row = {"epoch": float(self.epochs), "train_loss": loss, **scores}
        if bad := [f"{k} is {v}" for k, v in row.items() if not math.isfinite(v)]:
            raise TrialFailed(f"{bad[0]} after epoch {self.epochs}; a lower lr may help")
        self.curve.append(row)
        good = s.stop_at is not None and _as_good(row[self.task.metric], s.stop_at, self.task)
        self.finished = good or self.epochs == s.epochs
        return row

    def _epoch(self) -> float:
        """One pass over the epoch's examples; the mean training loss."""
        self.model.train()
        x, y = self.task.epoch(self.splits.train, self.epochs, self.seed)
        order = torch.randperm(len(x), generator=self.order)[: self.settings.examples].to(x.device)
        batches = order.split(self.settings.batch)
        total = torch.zeros((), device=x.device)
        for batch in batches:
            self._schedule(self.settings.epochs * len(batches))
            given, wanted = self.task.batch(x[batch], y[batch])
            loss = self.task.loss(self.model(given), wanted)
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            total += loss.detach()
        self.epochs += 1
        return total.item() / len(batches)

    def _schedule(self, steps: int) -> None:
        done, warmup = self.steps / steps, self.settings.warmup
        rise = min(1.0, (self.steps + 1) / max(1.0, warmup * steps))
        fall = 0.5 * (1 + math.cos(math.pi * max(0.0, done - warmup) / (1 - warmup)))
        for group in self.optimizer.param_groups:
            group["lr"] = group["rate"] * self.settings.lr * rise * fall
        self.steps += 1

    def measure(self, batch: int = LATENCY_BATCH) -> dict[str, float]:
        """Latency of `batch` examples and memory: the same before and after training."""
        latency_ms = latency(self.model, self._batch(self.splits.valid, batch)[0], batch)
        return {"latency_ms": latency_ms, "memory_mb": self._memory()}

    def result(self, measured: Mapping[str, float] | None = None) -> TrialResult:
        """Metrics of the last evaluation, and the costs; `measured` where that was done before."""
        seconds = time.perf_counter() - self.started
        cost = model_cost(self.model.assignment, self.task.spec)
        costs = {
            "parameters": cost.parameters,
            "flops": cost.flops,
            **(self.measure() if measured is None else measured),
            "seconds": seconds,
            "epochs": self.curve[-1]["epoch"],
        }
        metrics = {k: v for k, v in self.curve[-1].items() if k != "epoch"}
        return TrialResult(metrics, self.curve, costs)

    def _memory(self) -> float:
        x, y = self._batch(self.splits.train, self.settings.batch)
        return training_memory(self.model, x, lambda output: self.task.loss(output, y))

    def _batch(self, split: Split, size: int) -> Split:
        x, y = split
        return self.task.batch(x[:size], y[:size])


def run(
    assignment: Assignment,
    task: Task,
    splits: Splits,
    settings: TrainSettings,
    seed: int = 0,
) -> tuple[Model, TrialResult]:
    """Train to the end and measure."""
    trial = TrialRun(assignment, task, splits, settings, seed)
    while not trial.finished:
        trial.advance()
    return trial.model, trial.result()


def some(split: Split, count: int | None) -> Split:
    """`count` examples of a split, drawn once and for all; all of them where it is no smaller."""
    x, y = split
    if count is None or count >= len(x):
        return split
    chosen = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[:count]
    chosen = chosen.to(x.device)
    return x[chosen], y[chosen]


def _as_good(value: float, target: float, task: Task) -> bool:
    return value >= target if task.higher_is_better else value <= target


def parameter_groups(model: Model, settings: TrainSettings) -> list[dict[str, Any]]:
    """One optimiser group for each learning rate; weight decay on cores only, not on vectors."""
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    rates = model.rates()
    for name, parameter in model.named_parameters():
        decayed = parameter.dim() > 1 and "numbers." in name
        key = (rates[name], settings.weight_decay if decayed else 0.0)
        groups.setdefault(key, []).append(parameter)
    return [
        {"params": parameters, "rate": rate, "lr": settings.lr * rate, "weight_decay": decay}
        for (rate, decay), parameters in groups.items()
    ]


@torch.no_grad()
def evaluate(model: nn.Module, task: Task, split: Split, batch: int = 1024) -> dict[str, float]:
    """Loss and metrics over a split, as `valid_loss` and by the task's names."""
    model.eval()
    x, y = split
    spec = task.spec
    batch = max(1, min(batch, _MOST // (spec.classes * math.prod(spec.rows))))
    loss = torch.zeros((), dtype=torch.float64, device=x.device)
    sums: dict[str, Tensor] = {}
    for stored in zip(x.split(batch), y.split(batch), strict=True):
        a, b = task.batch(*stored)
        output = model(a)
        loss += task.loss(output, b) * len(a)
        for name, both in task.scores(output, b).items():
            sums[name] = sums.get(name, 0) + torch.stack(both).double()
    values = {name: task.value((pair[0] / pair[1]).item()) for name, pair in sums.items()}
    return {"valid_loss": loss.item() / len(x), **values}
