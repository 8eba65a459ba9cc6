"""Trials an hour of several workers on one device, and what a captured step and bfloat16 give.

    python benchmarks/gpu_workers.py [--device cuda] [--workers 1 2 4 8] [--seconds 15] [--json F]

Every worker is a process that trains one model after another (attention, convolution and gated
recurrence on mqar, two epochs of 4,096 examples each), as the workers of a sweep do. Counted are
the epochs that end within the time, once all workers are warm. Needs torch and triton only.
"""

from __future__ import annotations

import argparse
import itertools
import json
import queue
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as processes

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a checkout never installed

from patternsearch import Assignment, Block, Mixer
from patternsearch.patterns.banded import Banded
from patternsearch.patterns.dense import Dense
from patternsearch.patterns.diagonal import Diagonal
from patternsearch.patterns.semiseparable import Semiseparable
from patternsearch.task import get_task
from patternsearch.train import Splits, TrainSettings, TrialRun

EPOCHS = 2
STEPS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "captured": {"cuda_graph": True},
    "captured, bfloat16": {"cuda_graph": True, "precision": "bfloat16"},
}


def designs() -> list[Assignment]:
    """One of each order, as an expert would begin."""
    maps = {name: Dense() for name in ("query", "key", "value", "output")}
    mixers = (
        Mixer(order=3, positions=Banded(lower=31, upper=0), heads=4, maps=maps),
        Mixer(positions=Banded(lower=3, upper=0, entry=Diagonal())),
        Mixer(order=2, positions=Semiseparable(), maps={"decay": Dense(), "value": Dense()}),
    )
    block = {"channel": (Dense(), Dense()), "expansion": 2.0}
    return [Assignment(width=64, blocks=(Block(mixer=m, **block),) * 2) for m in mixers]


def work(
    rank: int, device: str, share: float, train: dict[str, Any], said: Any, begin: Any, over: Any
) -> None:
    """Trials until the time is over; says when it is warm, then how many epochs ended in time."""
    torch.set_num_threads(1)
    if device == "cuda":
        torch.cuda.set_per_process_memory_fraction(share)
    task = get_task("mqar")
    splits = Splits(task.load(), torch.device(device))
    sizes = {"batch": 256, "examples": 4096, "valid_examples": 1024}
    settings = TrainSettings(epochs=EPOCHS, lr=2e-3, **sizes, **train)
    known, epochs = designs(), 0
    for number in itertools.count(rank):
        design = known[number % len(known)]
        trial = TrialRun(design, task, splits, settings, number)
        timed = number - rank >= len(known)  # after one of each, whose kernels were compiled
        while not trial.finished:
            trial.advance()  # ends with a number read from the device
            if over.is_set():
                said.put(epochs)
                return
            epochs += timed
        if number - rank == len(known) - 1:
            said.put(0)
            begin.wait()


def measured(device: str, workers: int, seconds: float, train: dict[str, Any]) -> float:
    """Trials an hour of so many workers."""
    context = processes.get_context("spawn")
    said, begin, over = context.Queue(), context.Event(), context.Event()
    arguments = (device, 1 / workers, train, said, begin, over)
    running = processes.spawn(work, arguments, workers, join=False)

    def heard() -> int:
        """What all of them said, once each."""
        total, left = 0, workers
        while left:
            try:
                total += said.get(timeout=1)
                left -= 1
            except queue.Empty:
                running.join(timeout=0)  # raises what ended a worker
        return total

    heard()
    begin.set()
    began = time.perf_counter()
    time.sleep(seconds)
    over.set()
    spent = time.perf_counter() - began
    epochs = heard()
    running.join()
    return 3600 * epochs / EPOCHS / spent


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--device", default="cuda")
    p.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4, 8])
    p.add_argument("--seconds", type=float, default=15, help="of each measurement")
    p.add_argument("--json", type=Path)
    options = p.parse_args()
    steps = STEPS if options.device == "cuda" else {"as it is": STEPS["as it is"]}
    first, *more = options.workers
    cases = [*((first, name) for name in steps), *((workers, "as it is") for workers in more)]
    rows = []
    for workers, name in cases:
        rate = measured(options.device, workers, options.seconds, STEPS[name])
        rows.append({"workers": workers, "step": name, "trials_an_hour": round(rate)})
        print(rows[-1], flush=True)
        if options.json is not None:  # a run that is cut off keeps what it has
            options.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
