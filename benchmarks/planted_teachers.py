"""Teachers of planted.py, their data, and what training gives on it."""

from __future__ import annotations

import functools
import json
import math
import random
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from patternsearch.assignment import Assignment
from patternsearch.config import TrainConfig
from patternsearch.describe import mixer_words, pattern_words
from patternsearch.model import Model, build_model
from patternsearch.sizes import Spec, model_cost, resolve
from patternsearch.space import Space, load_space
from patternsearch.task import Data, Task
from patternsearch.train import Splits, TrainSettings, TrialFailed, TrialRun

SPEC = Spec(grid=(16,), channels=4, classes=4, per_position=True)
EXAMPLES, HELD_OUT = 1024, 256
NOISE = 0.01
TARGET = math.log10(2 * NOISE)
SECONDS = 15.0  # of one core that a teacher's own assignment may take
TRAIN = TrainConfig(epochs=50, lr=0.08, weight_decay=0.0, stop_at=TARGET)
PATIENCE, GAIN = 6, 0.02  # a fit ends that gained no such part of a decade in so many epochs


class Planted(Task):
    """Outputs of a teacher of its own at every position; the metric is log10 of the error."""

    metric = "error"
    higher_is_better = False
    spec = SPEC

    def __init__(self, number: int) -> None:
        self.number = number
        drawn = space().point({}, random.Random(f"teacher {number}"))[1]
        self.assignment = resolve(drawn, SPEC)
        self.parameters = model_cost(self.assignment, SPEC).parameters

    def words(self) -> str:
        mixer, head = self.assignment.blocks[0].mixer, self.assignment.head.map
        assert mixer is not None
        gate = f", gate {mixer.maps['gate'].family}" if "gate" in mixer.maps else ""
        return f"{mixer_words(mixer)}{gate}, width {self.assignment.width}, {pattern_words(head)}"

    def load(self) -> Data:
        random_ = torch.Generator().manual_seed(self.number)
        teacher = awake(build_model(self.assignment, SPEC, self.number), random_)
        parts = []
        for n in (EXAMPLES, HELD_OUT, HELD_OUT):
            x = torch.randn(n, *SPEC.grid, 4, generator=random_)
            with torch.no_grad():
                parts.append((x, teacher(x)))
        mean, deviation = parts[0][1].mean(), parts[0][1].std()
        splits = (
            (x, (y - mean) / deviation + NOISE * torch.randn(y.shape, generator=random_))
            for x, y in parts
        )
        return Data(*((x.numpy(), y.numpy()) for x, y in splits))

    def loss(self, output: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return F.mse_loss(output, y)

    def score(self, output: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return (output - y).square().sum(), output.new_tensor(y.numel())

    def value(self, mean: float) -> float:
        return 0.5 * math.log10(mean)


def awake(model: Model, random_: torch.Generator) -> Model:
    """Random numbers where a fresh model has zeros, as it has in its head."""
    for p in model.parameters():
        if not p.any():
            scale = p.shape[-1] ** -0.5 if p.dim() > 1 else 0.5
            p.data.copy_(scale * torch.randn(p.shape, generator=random_))
    return model


@functools.cache
def space() -> Space:
    return load_space(Path(__file__).with_name("planted.yaml"))


class Kept:
    """Key -> value in a file of lines, of which a kill can spoil but the last."""

    def __init__(self, path: Path) -> None:
        self.path, self.known = path, dict[str, Any]()
        text = path.read_text() if path.exists() else ""
        for line in text.splitlines():
            try:
                key, value = json.loads(line)
            except ValueError:
                continue
            self.known[key] = value
        self.start = "\n" if text and not text.endswith("\n") else ""

    def add(self, key: str, value: Any) -> None:
        self.known[key] = value
        with self.path.open("a") as file:
            file.write(f"{self.start}{json.dumps([key, value])}\n")
        self.start = ""


class Fits:
    """What training gives on one teacher's data."""

    def __init__(self, number: int, folder: Path) -> None:
        self.task = Planted(number)
        self.kept = Kept(folder / f"fits-{number}.jsonl")

    @functools.cached_property
    def splits(self) -> Splits:
        return Splits(self.task.load(), torch.device("cpu"))

    def __call__(self, assignment: Assignment, seed: int = 0) -> tuple[float, float]:
        """(log10 of the error, seconds of a core); an error of 9 where training broke."""
        key = f"{assignment.digest()}/{seed}"
        if key not in self.kept.known:
            splits, started = self.splits, time.process_time()
            error = self._train(assignment, splits, seed)
            self.kept.add(key, (round(error, 5), round(time.process_time() - started, 3)))
        error, seconds = self.kept.known[key]
        return error, seconds

    def _train(self, assignment: Assignment, splits: Splits, seed: int) -> float:
        settings = TrainSettings(**TRAIN.model_dump())
        run = TrialRun(assignment, self.task, splits, settings, seed)
        best = [math.inf]  # after every epoch
        while not run.finished:
            try:
                best.append(min(best[-1], run.advance()["error"]))
            except TrialFailed:
                return 9.0
            if len(best) > 2 * PATIENCE and best[-1] > best[-PATIENCE] - GAIN:
                break
        return best[-1]


def counts(number: int, folder: Path) -> bool:
    """Whether a teacher's own assignment reaches the target from three fresh seeds."""
    torch.set_num_threads(1)
    fits = Fits(number, folder)
    found = (fits(fits.task.assignment, seed) for seed in (1, 2, 3))
    return all(error <= TARGET and seconds <= SECONDS for error, seconds in found)
