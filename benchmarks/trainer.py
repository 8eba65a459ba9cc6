"""How much of a training step is neither forward, backward nor optimiser; the usual loop beside it.

Three loops over the same model and batches, an epoch of each in turn and timed by the seconds that
the CPU worked, so that a busy machine is no part of it:

    ours     patternsearch's trainer, as a sweep runs it
    bare     forward, loss, backward and optimiser on one batch that is ready: nothing can be faster
    loader   the usual loop: a DataLoader over a data set that normalises an example at a time

    python benchmarks/trainer.py                  # digits, and images of MNIST's size
    python benchmarks/trainer.py --device cuda

No data set is needed: where MNIST's files are not found, random images of its size are trained on.
Writes benchmarks/results/trainer.md. Takes three minutes on one core.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from measure import machine
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from patternsearch.errors import TaskError
from patternsearch.sizes import resolve
from patternsearch.space import load_space
from patternsearch.task import Data, Task, get_task
from patternsearch.train import Splits, TrainSettings, TrialRun

RESULTS = Path(__file__).parent / "results"
COUNTS = {"digits": 200, "digits-full": 1000, "mnist": 500}  # examples an epoch
HEAD = """# The trainer beside a bare loop and the usual one

{device}, {torch}; batches of 50, an epoch of each in turn, {rounds} times, seconds of CPU work.
Beyond: the share of a step of ours that is neither forward, backward nor optimiser, from the median
of the pairs and from the fastest epochs.

| model | bare ms a step | ours | beyond, median | fastest | epochs/s | DataLoader's | ratio |
|---|---|---|---|---|---|---|---|
"""
CASES = {
    "digits": ("mlp", "cnn", "transformer"),
    "digits-full": ("mlp",),
    "mnist": ("cnn", "gated-rnn", "transformer"),
}


class Examples(Dataset[tuple[Tensor, Tensor]]):
    """Examples one at a time, as a data set is usually written."""

    def __init__(self, task: Task, data: Data, count: int) -> None:
        self.task, (self.x, self.y), self.count = task, data.train, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        x, y = self.task.batch(torch.as_tensor(self.x[i])[None], torch.as_tensor(self.y[i])[None])
        return x[0], y[0]


def data_of(task: Task, count: int) -> Data:
    try:
        return task.load()
    except TaskError:
        rng, spec = np.random.RandomState(0), task.spec
        x = rng.randint(256, size=(count, *spec.grid, spec.channels)).astype(np.uint8)
        split = x, rng.randint(spec.classes, size=count)
        return Data(split, split, split)


def loops(trial: TrialRun, data: Data, count: int) -> dict[str, Callable[[], None]]:
    """An epoch of each, over the same model and number of steps."""
    task, batch = trial.task, trial.settings.batch
    steps, device = -(-count // batch), trial.splits.device
    x, y = (t[:batch] for t in trial.splits.train)
    loader = DataLoader(Examples(task, data, count), batch_size=batch, shuffle=True)

    def step(given: Tensor, wanted: Tensor) -> None:
        task.loss(trial.model(given), wanted).backward()
        trial.optimizer.step()
        trial.optimizer.zero_grad()

    def bare() -> None:
        given, wanted = task.batch(x, y)
        for _ in range(steps):
            step(given, wanted)

    def usual() -> None:
        for given, wanted in loader:
            step(given.to(device), wanted.to(device))

    def ours() -> None:
        trial._epoch()

    return {"ours": ours, "bare": bare, "loader": usual}


def timed(loop: Callable[[], None], device: torch.device) -> float:
    """Seconds: of the CPU's work, or on a GPU those that pass."""
    if device.type == "cpu":
        started = time.process_time()
        loop()
        return time.process_time() - started
    torch.cuda.synchronize(device)
    started = time.perf_counter()
    loop()
    torch.cuda.synchronize(device)
    return time.perf_counter() - started


def measure(name: str, design: str, count: int, rounds: int, device: torch.device) -> list[str]:
    """A row of the table: median over the rounds, shares from the difference within each."""
    task = get_task(name)
    data = data_of(task, count)
    space = load_space(task.space)
    assignment = resolve(space.point(space.experts[design])[1], task.spec)
    settings = TrainSettings(epochs=10 * rounds, batch=50, lr=1e-4, examples=count)
    trial = TrialRun(assignment, task, Splits(data, device), settings)
    taken: dict[str, list[float]] = {}
    for number in range(rounds + 1):
        for way, loop in loops(trial, data, count).items():
            loop()  # what ran before it has had the caches
            seconds = timed(loop, device)
            if number:  # the first warms up
                taken.setdefault(way, []).append(seconds)
    steps = -(-count // settings.batch)
    share = statistics.median(a / b - 1 for a, b in zip(taken["ours"], taken["bare"], strict=True))
    least = {way: min(times) for way, times in taken.items()}
    return [
        f"{name} {design}",
        f"{1e3 * least['bare'] / steps:.3f}",
        f"{1e3 * least['ours'] / steps:.3f}",
        f"{share / (1 + share):+.1%}",
        f"{1 - least['bare'] / least['ours']:+.1%}",
        f"{1 / least['ours']:.2f}",
        f"{1 / least['loader']:.2f}",
        f"{least['loader'] / least['ours']:.2f}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tasks", nargs="*", default=list(CASES))
    parser.add_argument("--rounds", type=int, default=61)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(1)
    device = torch.device(options.device)
    lines = HEAD.format(**machine(device), rounds=options.rounds).splitlines()
    for name in options.tasks:
        for design in CASES[name]:
            row = measure(name, design, COUNTS[name], options.rounds, device)
            lines.append(f"| {' | '.join(row)} |")
            print(lines[-1], flush=True)
    (RESULTS / "trainer.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
