"""Train one design on one task: a plain loop over data that is resident on the device."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from .assignment import Assignment
from .augment import Moves, moved
from .averaging import MovingAverage
from .codec import decode
from .cuda_graph import GraphedBackward
from .errors import ConfigError, PatternSearchError, unknown
from .evaluation import Split, evaluate, some
from .measure import LATENCY_BATCH, latency, training_memory
from .model import Model, build_model
from .native import KEY, Native, NativeModel
from .optimizer import AdamW
from .pattern import Cost
from .sizes import Spec, model_cost, resolve
from .task import Data, Task, as_tensors, cross_entropy
from .vocabulary import LARGE, linear_cross_entropy

Precision = Literal["float32", "bfloat16"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
Design = Assignment | Native
Loss = Callable[[Tensor, Tensor], Tensor]
_CHUNK = 2**20  # bytes of examples that are gathered at once


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """How a trial is trained. Part of its identity, exported with it.

    lr: base rate; every core's own follows from its fan-in (layers.rate). warmup: fraction of the
    steps in which the rate rises; it falls as a cosine after. eval_every: epochs between two
    evaluations. stop_at: ends the trial once the validation metric is as good. batch: a last one of
    a single example is left out where a batch norm needs two. examples: so many an epoch, others
    each time (all by default). valid_examples, test_examples: so many of the validation and of the
    test set, the same in every trial.

    weight_decay: of matrices; biases, norms, tables, decays and diagonals go without.
    label_smoothing: share of the target spread over all classes, in training. ema: largest decay of
    the moving average of the weights, which then is what is judged and kept. clip: largest norm of
    the gradient. shift, flip: images are moved by up to so many pixels, and mirrored half of the
    time, where the task says that this leaves the label.

    precision: of the products of a training step; weights, their updates and evaluations keep
    float32. cuda_graph: a step's passes are captured once and replayed, on CUDA.
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
    test_examples: int | None = None
    label_smoothing: float = 0.0
    ema: float | None = None
    clip: float | None = None
    shift: int = 0
    flip: bool = False
    precision: Precision = "float32"
    cuda_graph: bool = False

    def __post_init__(self) -> None:
        counts = ("epochs", "batch", "eval_every", "examples", "valid_examples", "test_examples")
        for name in counts:
            if (value := getattr(self, name)) is not None and value < 1:
                raise ConfigError(f"train.{name}={value} must be at least 1")
        if not self.lr > 0:
            raise ConfigError(f"train.lr={self.lr} must be above 0")
        if not self.weight_decay >= 0:
            raise ConfigError(f"train.weight_decay={self.weight_decay} must be at least 0")
        if not 0 <= self.warmup < 1:
            raise ConfigError(f"train.warmup={self.warmup} must be in [0, 1)")
        if not 0 <= self.label_smoothing < 1:
            raise ConfigError(f"train.label_smoothing={self.label_smoothing} must be in [0, 1)")
        if self.ema is not None and not 0 < self.ema < 1:
            raise ConfigError(f"train.ema={self.ema} must be in (0, 1)")
        if self.clip is not None and not self.clip > 0:
            raise ConfigError(f"train.clip={self.clip} must be above 0")
        if self.shift < 0:
            raise ConfigError(f"train.shift={self.shift} must be at least 0")
        if self.precision not in PRECISIONS:
            raise ConfigError(unknown("train.precision", self.precision, PRECISIONS))

    def check(self, task: Task) -> None:
        """Raise ConfigError where the task has no use for a setting."""
        for name in ("shift", "flip"):
            if (value := getattr(self, name)) and name not in task.moves:
                raise ConfigError(
                    f"train.{name}={value}: {task.name} does not say that a {name} leaves its "
                    f"labels (moves={task.moves}); leave it out, or name it there"
                )
        if self.label_smoothing and type(task).loss is not Task.loss:
            raise ConfigError(
                f"train.label_smoothing={self.label_smoothing}: {task.name} is not trained by "
                "cross-entropy; leave it out"
            )


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
    """One trial, of a pattern or a native baseline, in steps.

    `advance` trains to the next evaluation, `result` measures at the end.

    The same assignment, settings and seed give the same numbers on the same machine and number of
    threads.
    """

    def __init__(
        self,
        design: Design,
        task: Task,
        splits: Splits,
        settings: TrainSettings,
        seed: int = 0,
    ) -> None:
        settings.check(task)
        self.task, self.splits, self.settings, self.seed = task, splits, settings, seed
        self.started = time.perf_counter()
        self.design = design
        self.model = _built(design, task, seed).to(splits.device)
        self.optimizer = AdamW(parameter_groups(self.model, settings))
        self.average = MovingAverage(self.model, settings.ema) if settings.ema else None
        self.loss = training_loss(task, settings.label_smoothing)
        plain = self.loss == task.loss and type(task).loss is Task.loss
        plain = plain and settings.precision == "float32" and splits.device.type == "cpu"
        self.large = plain and task.spec.classes >= LARGE
        norms = nn.BatchNorm1d | nn.BatchNorm2d
        self.normed = any(isinstance(module, norms) for module in self.model.modules())
        graphed = settings.cuda_graph and splits.device.type == "cuda"
        self.graphed = None
        if graphed and isinstance(self.model, Model):  # torch's own layers may draw numbers
            self.graphed = GraphedBackward(self.model.parameters(), self.model.buffers())
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
        if self.average is not None:
            self.average.swap()
        scores = evaluate(self.model, self.task, self.valid)
        row = {"epoch": float(self.epochs), "train_loss": loss, **scores}
        if bad := [f"{k} is {v}" for k, v in row.items() if not math.isfinite(v)]:
            raise TrialFailed(f"{bad[0]} after epoch {self.epochs}; a lower lr may help")
        self.curve.append(row)
        good = s.stop_at is not None and _as_good(row[self.task.metric], s.stop_at, self.task)
        self.finished = good or self.epochs == s.epochs
        if self.average is not None and not self.finished:
            self.average.swap()
        return row

    def _epoch(self) -> float:
        """One pass over the epoch's examples; the mean training loss."""
        if not self.model.training:  # it walks all modules
            self.model.train()
        x, y = self.task.epoch(self.splits.train, self.epochs, self.seed)
        order = torch.randperm(len(x), generator=self.order)[: self.settings.examples]
        if self.normed and len(order) % self.settings.batch == 1 < len(order):
            order = order[:-1]  # one example has no variance over the batch
        steps = -(-len(order) // self.settings.batch)
        losses = []
        with self._dropout():
            for stored in self._batches(x, y, order):
                self._schedule(self.settings.epochs * steps)
                losses.append(self._step(*self.task.batch(*stored)))
        self.epochs += 1
        return torch.stack(losses).mean().item()

    def _step(self, given: Tensor, wanted: Tensor) -> Tensor:
        if self.graphed is None:
            loss = self._backward(given, wanted)
        else:
            loss = self.graphed(self._backward, given, wanted)
        if self.settings.clip is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.average is not None:
            self.average.update()
        return loss

    def _backward(self, given: Tensor, wanted: Tensor) -> Tensor:
        """The loss of a batch, with its gradients in the parameters."""
        loss = self._forward(given, wanted)
        loss.backward()
        return loss.detach()

    def _forward(self, given: Tensor, wanted: Tensor) -> Tensor:
        if self.large and (last := self.model.last(given)) is not None:
            return linear_cross_entropy(*last, wanted)
        if self.settings.precision == "float32":
            return self.loss(self.model(given), wanted)
        with torch.autocast(given.device.type, torch.bfloat16, cache_enabled=False):
            output = self.model(given).float()
        return self.loss(output, wanted)

    @contextmanager
    def _dropout(self) -> Iterator[None]:
        """Numbers of their own for what torch's layers draw; patterns draw none."""
        if isinstance(self.model, Model):
            yield
            return
        device = self.splits.device
        with torch.random.fork_rng(devices=[] if device.type == "cpu" else [device]):
            torch.manual_seed(hash((self.seed, self.epochs)))
            yield

    def _batches(self, x: Tensor, y: Tensor, order: Tensor) -> Iterator[Split]:
        """The examples in that order, moved about, gathered a megabyte at a time."""
        batch = self.settings.batch
        size = batch * max(1, _CHUNK // (batch * x[0].numel() * x.element_size()))
        shift, flip = self.settings.shift, self.settings.flip
        for rows in order.to(x.device).split(size):
            chunk = x.index_select(0, rows)
            if shift or flip:
                chunk = moved(chunk, Moves.draw(len(rows), shift, flip, self.order))
            yield from zip(chunk.split(batch), y.index_select(0, rows).split(batch), strict=True)

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
        cost = design_cost(self.design, self.task.spec)
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
        with self._dropout():
            return training_memory(self.model, lambda: self._forward(x, y))

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
    assert isinstance(trial.model, Model)
    return trial.model, trial.result()


def design_of(data: Mapping[str, Any]) -> Design:
    """A pattern or a native baseline from plain data."""
    return decode(Native, dict(data), KEY) if KEY in data else Assignment.from_dict(data)


def design_cost(design: Design, spec: Spec) -> Cost:
    """Cost of one example through the whole model."""
    if isinstance(design, Native):
        return design.cost(spec)
    return model_cost(resolve(design, spec), spec)


def _built(design: Design, task: Task, seed: int) -> Model | NativeModel:
    if isinstance(design, Native):
        return design.build(task.spec, seed)
    return build_model(design, task.spec, seed)


def _as_good(value: float, target: float, task: Task) -> bool:
    return value >= target if task.higher_is_better else value <= target


def training_loss(task: Task, smoothing: float) -> Loss:
    """The task's loss, with smoothed labels where asked for (Szegedy et al. 2016)."""
    if not smoothing:
        return task.loss
    return partial(cross_entropy, smoothing=smoothing)


def parameter_groups(model: Model | NativeModel, settings: TrainSettings) -> list[dict[str, Any]]:
    """One optimiser group for each learning rate and weight decay."""
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    rates, decayed = model.rates(), model.decayed()
    for name, parameter in model.named_parameters():
        key = (rates[name], settings.weight_decay if name in decayed else 0.0)
        groups.setdefault(key, []).append(parameter)
    return [
        {"params": parameters, "rate": rate, "lr": settings.lr * rate, "weight_decay": decay}
        for (rate, decay), parameters in groups.items()
    ]
