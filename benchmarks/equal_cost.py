"""NdLinear beside other maps at equal parameters and at equal FLOPs.

NdLinear (Reneau et al. 2025, arXiv 2503.17353) is a Kronecker product of one small map an axis.
Where its authors compare it with a dense layer of many more parameters, here every other family is
given exactly what NdLinear takes, once of parameters and once of FLOPs: dense maps of a smaller
hidden width, low rank, Monarch and block tensor trains at the widest hidden width that fits. All
start by the package's rule (layers.py), but for `published`: NdLinear as its authors' code starts
and trains it, with torch's own layers and one rate for all.

forecast  ETTh1, 336 hours of 7 series -> hidden -> 96 hours of 7 series; both maps of the family
cnn-head  CIFAR-10, two convolutions, then 32x8x8 -> hidden -> 10; the first map of the family

The rate of every row is the best of six on the validation set; then fresh seeds, and the test set.

    PATTERNSEARCH_DATA=DIR python benchmarks/equal_cost.py --output benchmarks/results/equal_cost

Writes OUTPUT.json and OUTPUT.md.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # runs from a checkout that was never installed

import torch  # noqa: E402
from measure import machine  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from patternsearch.evaluation import evaluate, some  # noqa: E402
from patternsearch.layers import FeatureMap, Matrix  # noqa: E402
from patternsearch.optimizer import AdamW  # noqa: E402
from patternsearch.pattern import Dims, Pattern  # noqa: E402
from patternsearch.patterns.btt import BlockTensorTrain  # noqa: E402
from patternsearch.patterns.dense import Dense  # noqa: E402
from patternsearch.patterns.kronecker import Kronecker  # noqa: E402
from patternsearch.patterns.low_rank import LowRank  # noqa: E402
from patternsearch.patterns.monarch import Monarch  # noqa: E402
from patternsearch.search.interval import estimate  # noqa: E402
from patternsearch.task import Task, open_task  # noqa: E402
from patternsearch.train import Splits, TrainSettings, parameter_groups  # noqa: E402

RATES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)  # base rates; a tenth where all share one
FAMILIES = ("dense", "low_rank", "monarch", "btt")


@dataclass(frozen=True)
class Setup:
    """Axes before, in and after the hidden layer; after that a dense map, where `after` is None."""

    task: str
    before: Dims
    hidden: Dims
    after: Dims | None
    train: TrainSettings

    def maps(self) -> list[tuple[Dims, Dims]]:
        """(in, out) of what is compared, by axes."""
        dims = [self.before, self.hidden, *([self.after] if self.after else [])]
        return list(itertools.pairwise(dims))


SETUPS = {
    "forecast": Setup(
        "etth1", (336, 7), (128, 8), (96, 7), TrainSettings(epochs=3, batch=64, examples=6000)
    ),
    "cnn-head": Setup(
        "cifar10",
        (32, 8, 8),
        (16, 6, 6),
        None,
        TrainSettings(epochs=2, batch=64, examples=4000, valid_examples=2000),
    ),
}


@dataclass(frozen=True)
class Design:
    """One row: the maps' pattern and hidden width; published: NdLinear with torch's layers."""

    family: str
    hidden: int
    patterns: tuple[Pattern, ...]
    published: bool = False


class PublishedNdLinear(nn.Module):
    """One nn.Linear an axis, from the first to the last."""

    def __init__(self, inp: Dims, out: Dims) -> None:
        super().__init__()
        self.inp = inp
        self.maps = nn.ModuleList(nn.Linear(i, o) for i, o in zip(inp, out, strict=True))

    def forward(self, x: Tensor) -> Tensor:
        x = x.unflatten(-1, self.inp)
        for axis, layer in enumerate(self.maps, start=1):
            x = layer(x.transpose(axis, -1)).transpose(axis, -1)
        return x.flatten(1)


class Net(nn.Module):
    """What the task gives -> forecasts or classes, through the maps that are compared."""

    def __init__(self, setup: Setup, design: Design, channels: int, classes: int) -> None:
        super().__init__()
        self.setup, self.published = setup, design.published
        self.trunk: nn.Module = nn.Identity()
        if setup.after is None:
            self.trunk = nn.Sequential(
                nn.Conv2d(channels, 16, 3, 2, 1, bias=False),
                nn.BatchNorm2d(16),
                nn.ReLU(),
                nn.Conv2d(16, 32, 3, 2, 1, bias=False),
                nn.BatchNorm2d(32),
                nn.ReLU(),
            )
        sizes = widths(setup, design.hidden)
        if design.published:
            self.maps = nn.ModuleList(PublishedNdLinear(i, o) for i, o in setup.maps())
        else:
            self.maps = nn.ModuleList(
                FeatureMap(p, i, o, role="head" if setup.after and n else "hidden")
                for n, (p, (i, o)) in enumerate(zip(design.patterns, sizes, strict=True))
            )
        self.last: nn.Module = nn.Identity()
        if setup.after is None:
            self.last = FeatureMap(Dense(), design.hidden, classes, role="head")

    def forward(self, x: Tensor) -> Tensor:
        x = self.trunk(x.movedim(-1, 1)) if self.setup.after is None else x
        x = x.flatten(1)
        for i, layer in enumerate(self.maps):
            x = layer(torch.relu(x) if i else x)
        if self.setup.after is not None:
            return x.unflatten(-1, self.setup.after)
        y: Tensor = self.last(torch.relu(x))
        return y

    def rates(self) -> dict[str, float]:
        rates = {name: 1.0 for name, _ in self.named_parameters()}
        for prefix, module in self.named_modules():
            if isinstance(module, Matrix):
                rates |= {f"{prefix}.{name}": r for name, r in module.rates().items()}
        for name in rates:
            if name.startswith("trunk") or self.published:
                rates[name] = 0.1
        return rates

    def decayed(self) -> set[str]:
        return {name for name, p in self.named_parameters() if p.dim() > 1}


def widths(setup: Setup, hidden: int) -> list[tuple[int, int]]:
    """(in, out) of the maps that are compared."""
    sizes = [(math.prod(setup.before), hidden)]
    return sizes + ([(hidden, math.prod(setup.after))] if setup.after else [])


def cost(setup: Setup, design: Design, classes: int) -> dict[str, int]:
    """Parameters and FLOPs of the maps that are compared, and of the dense map after them."""
    found = {"parameters": 0, "flops": 0}
    maps = list(zip(design.patterns, widths(setup, design.hidden), strict=True))
    if setup.after is None:
        maps.append((Dense(), (design.hidden, classes)))
    for pattern, (i, o) in maps:
        own = pattern.cost((o,), (i,))
        found["parameters"] += own.parameters + o
        found["flops"] += own.flops
    return found


def ndlinear(setup: Setup, published: bool) -> Design:
    patterns = tuple(Kronecker(in_modes=i, out_modes=o) for i, o in setup.maps())
    name = "NdLinear, as published" if published else "NdLinear"
    return Design(name, math.prod(setup.hidden), patterns, published)


def candidates(family: str, setup: Setup) -> Iterator[Design]:
    """Every hidden width up to NdLinear's, with every rank or number of blocks."""
    most = math.prod(setup.hidden)
    for hidden in range(1, most + 1):
        sizes = widths(setup, hidden)
        if family == "dense":
            wanted: list[Pattern] = [Dense()]
        elif family == "low_rank":
            wanted = [LowRank(rank=r) for r in range(1, 257)] if most % hidden == 0 else []
        elif family == "btt":
            square = math.isqrt(hidden) ** 2 == hidden
            wanted = [BlockTensorTrain(rank=r) for r in range(1, 17)] if square else []
        else:
            shared = math.gcd(hidden, *(n for pair in sizes for n in pair))
            wanted = [Monarch(blocks=b) for b in range(2, 65) if shared % b == 0]
        for pattern in wanted:
            if all(pattern.unavailable((o,), (i,)) is None for i, o in sizes):
                yield Design(family, hidden, (pattern,) * len(sizes))


def fitting(family: str, setup: Setup, name: str, cap: int, classes: int) -> Design:
    """The widest that uses at least four fifths of the cap; else what comes nearest to it."""
    within = [
        (used, design)
        for design in candidates(family, setup)
        if (used := cost(setup, design, classes)[name]) <= cap
    ]
    near = [pair for pair in within if pair[0] >= 0.8 * cap]
    if near:
        return max(near, key=lambda pair: (pair[1].hidden, pair[0]))[1]
    return max(within, key=lambda pair: pair[0])[1]


def train(
    setup: Setup, design: Design, task: Task, splits: Splits, lr: float, seed: int
) -> tuple[float, float]:
    """The task's metric at the end, validation and test."""
    torch.manual_seed(seed)
    net = Net(setup, design, task.spec.channels or 1, task.spec.classes)
    s = setup.train
    optimizer = AdamW(parameter_groups(net, s))
    x, y = splits.train
    steps, done = s.epochs * -(-min(s.examples or len(x), len(x)) // s.batch), 0
    for _ in range(s.epochs):
        net.train()
        for rows in torch.randperm(len(x))[: s.examples].split(s.batch):
            rise, fall = min(1.0, (done + 1) / (0.05 * steps)), math.cos(math.pi * done / steps)
            for group in optimizer.param_groups:
                group["lr"] = lr * group["rate"] * rise * 0.5 * (1 + fall)
            given, wanted = task.batch(x[rows], y[rows])
            task.loss(net(given), wanted).backward()
            optimizer.step()
            optimizer.zero_grad()
            done += 1
    name = task.metric
    valid = evaluate(net, task, some(splits.valid, s.valid_examples))[name]
    test = evaluate(net, task, splits.test)[name]
    return valid, test


def rows(kind: str, seeds: int) -> Iterator[dict[str, Any]]:
    setup = SETUPS[kind]
    task, data = open_task(setup.task)
    splits, classes = Splits(data, torch.device("cpu")), task.spec.classes
    sign = 1 if task.higher_is_better else -1
    own = cost(setup, ndlinear(setup, False), classes)
    designs = [("both", ndlinear(setup, False)), ("both", ndlinear(setup, True))]
    for name in ("parameters", "flops"):
        designs += [(name, fitting(f, setup, name, own[name], classes)) for f in FAMILIES]
    for equal, design in designs:
        began = time.perf_counter()
        tried = {lr: sign * train(setup, design, task, splits, lr, 0)[0] for lr in RATES}
        best = max(tried, key=tried.__getitem__)
        again = [train(setup, design, task, splits, best, 1 + i) for i in range(seeds)]
        yield {
            "setup": kind,
            "equal": equal,
            "family": design.family,
            "pattern": str(design.patterns[0]),
            "hidden": design.hidden,
            **cost(setup, design, classes),
            "rates": {lr: sign * value for lr, value in tried.items()},
            "lr": best,
            "metric": task.metric,
            "test": [value for _, value in again],
            "seconds": round(time.perf_counter() - began, 1),
        }


def table(found: Sequence[dict[str, Any]], device: dict[str, str], seeds: int) -> str:
    words = {"both": "", "parameters": "equal parameters", "flops": "equal FLOPs"}
    said = (
        f"{device['device']}, {device['torch']}. Test metric, mean and 95 % interval of {seeds} "
        "fresh seeds, at the best of six rates by validation."
    )
    lines = ["# NdLinear at equal cost", "", said]
    for kind, setup in SETUPS.items():
        own = [row for row in found if row["setup"] == kind]
        if not own:
            continue
        s = setup.train
        trained = f"{s.epochs} epochs of {s.examples:,} examples, batches of {s.batch}"
        lines += [
            "",
            f"{kind}: {setup.task}, {trained}.",
            "",
            f"| at | map | hidden | test {own[0]['metric']} | parameters | FLOPs | rate |",
            "|---|---|---|---|---|---|---|",
        ]
        for row in own:
            name = row["family"] if row["equal"] == "both" else row["pattern"]
            cells = [words[row["equal"]], name, str(row["hidden"]), str(estimate(row["test"]))]
            cells += [f"{row['parameters']:,}", f"{row['flops']:,}", f"{row['lr']:g}"]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--setups", nargs="+", default=list(SETUPS), choices=list(SETUPS))
    p.add_argument("--seeds", type=int, default=3)
    p.add_argument("--output", type=Path, help="write OUTPUT.json and OUTPUT.md")
    args = p.parse_args()
    torch.set_num_threads(1)
    device, found = machine(torch.device("cpu")), []
    for kind in args.setups:
        for row in rows(kind, args.seeds):
            found.append(row)
            print(json.dumps(row), file=sys.stderr)
    text = table(found, device, args.seeds)
    print(text)
    if args.output is not None:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        data = {"device": device, "seeds": args.seeds, "rows": found}
        args.output.with_suffix(".json").write_text(json.dumps(data, indent=1) + "\n")
        args.output.with_suffix(".md").write_text(text)


if __name__ == "__main__":
    main()
