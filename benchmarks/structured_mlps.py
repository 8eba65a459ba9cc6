"""Structured MLPs on CIFAR-10 at matched FLOPs, with and without the rule for learning rates.

The setting of Qiu et al. 2024 (Compute better spent, arXiv 2406.06248, section 4 and its code): a
residual MLP on shuffled pixels, every map but the last of one family: dense, BTT of rank 1, Monarch
of 4 blocks, low rank of the root of the width, tensor trains of two cores and rank 16, Kronecker.
Each family is as wide as the FLOPs of the dense MLP allow. Rates:

rule      each core's by the package's rule (patternsearch/layers.py), which is that paper's
one rate  the same for all parameters

Both are tuned over as many rates for every family, by validation; then fresh seeds, and the test
set.

    PATTERNSEARCH_DATA=DIR python benchmarks/structured_mlps.py --output \
        benchmarks/results/structured_mlps

Writes OUTPUT.json and OUTPUT.md. Subsampled, for two cores; `--full` is for a GPU.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # runs from a checkout that was never installed

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from measure import machine  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from patternsearch.layers import FeatureMap  # noqa: E402
from patternsearch.optimizer import AdamW  # noqa: E402
from patternsearch.pattern import Pattern, balanced  # noqa: E402
from patternsearch.patterns.btt import BlockTensorTrain  # noqa: E402
from patternsearch.patterns.dense import Dense  # noqa: E402
from patternsearch.patterns.einsum import Einsum  # noqa: E402
from patternsearch.patterns.kronecker import Kronecker  # noqa: E402
from patternsearch.patterns.low_rank import LowRank  # noqa: E402
from patternsearch.patterns.tt import TensorTrain  # noqa: E402
from patternsearch.search.interval import estimate  # noqa: E402
from patternsearch.task import open_task  # noqa: E402

INPUTS, CLASSES, EXPANSION = 3072, 10, 4
RULES = ("rule", "one rate")
PUBLISHED = (
    "Published (500 epochs with mixup, exponents of the training error over FLOPs, read off their "
    "figure): BTT 0.119, dense 0.104, Monarch 0.095, low rank 0.095, TT 0.050, Kronecker 0.037."
)


def monarch(out: int, inp: int) -> Pattern:
    """4 blocks a factor, as many numbers between them as the narrower side has."""
    middle = min(out, inp)
    o, i, m = (math.log(4, n) for n in (out, inp, middle))
    return Einsum(alpha=1 - i, beta=0, gamma=i, delta=0, epsilon=1 - o, phi=o, rho=1 - 2 * m)


FAMILIES: dict[str, Callable[[int, int], Pattern]] = {
    "btt": lambda out, inp: BlockTensorTrain(rank=1),
    "dense": lambda out, inp: Dense(),
    "monarch": monarch,
    "low rank": lambda out, inp: LowRank(rank=round(math.sqrt(min(out, inp)))),
    "tt": lambda out, inp: TensorTrain(rank=16, modes=2),
    "kronecker": lambda out, inp: Kronecker(modes=2),
}  # in the order of the published exponents


@dataclass(frozen=True)
class Scale:
    """What is trained on, how long, and the widths of the dense MLP that give the FLOPs.

    rates: exponents of 2, of the base rate, by rule.
    """

    examples: int
    epochs: int
    batch: int
    depth: int
    widths: tuple[int, ...]
    rates: dict[str, tuple[int, ...]]


_RATES = {"rule": (-8, -7, -6, -5, -4, -3), "one rate": (-11, -10, -9, -8, -7, -6)}
SMALL = Scale(10_000, 6, 128, 3, (64,), _RATES)
FULL = Scale(45_000, 100, 1024, 3, (64, 128, 256, 512), _RATES)


@dataclass(frozen=True)
class Run:
    family: str
    width: int
    rule: str
    rate: int
    seed: int


class Mlp(nn.Module):
    """[B, INPUTS] -> logits: a map in, residual blocks w -> 4 w -> w, a dense head."""

    def __init__(self, family: str, width: int, depth: int) -> None:
        super().__init__()
        self.maps = nn.ModuleList(
            FeatureMap(pattern, inp, out, role="hidden" if n else "input")
            for n, (pattern, inp, out) in enumerate(maps(family, width, depth))
        )
        for last in self.maps[2::2]:  # a block begins as the identity
            next(reversed(list(last.numbers.values()))).data.zero_()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(depth))
        self.head = FeatureMap(Dense(), width, CLASSES, role="head")

    def forward(self, x: Tensor) -> Tensor:
        h = F.gelu(self.maps[0](x))
        for norm, up, down in zip(self.norms, self.maps[1::2], self.maps[2::2], strict=True):
            h = h + down(F.gelu(up(norm(h))))
        logits: Tensor = self.head(h)
        return logits

    def groups(self, rule: str) -> list[dict[str, Any]]:
        """The optimiser's, each with its rate over the base rate."""
        found = []
        layers = [m for m in self.modules() if isinstance(m, FeatureMap)]
        rates = {
            id(layer.get_parameter(n)): r for layer in layers for n, r in layer.rates().items()
        }
        for parameter in self.parameters():
            rate = rates.get(id(parameter), 1.0) if rule == "rule" else 1.0
            found.append({"params": [parameter], "lr": 0.0, "rate": rate, "weight_decay": 0.0})
        return found


def maps(family: str, width: int, depth: int) -> list[tuple[Pattern, int, int]]:
    """(pattern, in, out) of every map but the head."""
    wide = EXPANSION * width
    sizes = [(INPUTS, width), *[(width, wide), (wide, width)] * depth]
    return [(FAMILIES[family](o, i).resolve((o,), (i,)), i, o) for i, o in sizes]


def cost(family: str, width: int, depth: int) -> dict[str, int]:
    """Parameters and FLOPs of one example, biases, norms and head included."""
    found = {"parameters": (width + 1) * CLASSES + 2 * width * depth, "flops": 2 * width * CLASSES}
    for pattern, i, o in maps(family, width, depth):
        own = pattern.cost((o,), (i,))
        found["parameters"] += own.parameters + o
        found["flops"] += own.flops
    return found


def fitting(family: str, dense: int, depth: int) -> int:
    """The largest width, of factors that differ by 2 at most, with no more FLOPs than dense."""
    cap, best = cost("dense", dense, depth)["flops"], 0
    for width in range(16, 64 * dense, 4):
        few, many = sorted(balanced(width, 2))
        if many <= 2 * few and cost(family, width, depth)["flops"] <= cap:
            best = width
    return best


@lru_cache(maxsize=1)
def splits(examples: int, device: str) -> list[tuple[Tensor, Tensor]]:
    """Train, validation and test part as [n, INPUTS], pixels shuffled alike everywhere."""
    task, data = open_task("cifar10")
    order = torch.randperm(INPUTS, generator=torch.Generator().manual_seed(42))
    found = []
    for n, (x, y) in zip((examples, None, None), (data.train, data.valid, data.test), strict=True):
        given, wanted = task.batch(torch.as_tensor(x[:n]), torch.as_tensor(y[:n]))
        found.append((given.flatten(1)[:, order].to(device), wanted.to(device)))
    return found


def train(scale: Scale, run: Run, device: str) -> dict[str, Any]:
    """Loss of the last epoch, validation and test accuracy; nothing where it diverges."""
    torch.set_num_threads(1)
    (x, y), *judged = splits(scale.examples, device)
    torch.manual_seed(run.seed)
    model = Mlp(run.family, run.width, scale.depth).to(device)
    optimizer = AdamW(model.groups(run.rule))
    steps, done, loss = scale.epochs * -(-len(x) // scale.batch), 0, math.nan
    began = time.perf_counter()
    for _ in range(scale.epochs):
        losses = []
        for rows in torch.randperm(len(x)).to(device).split(scale.batch):
            rise, fall = min(1.0, (done + 1) / (0.05 * steps)), math.cos(math.pi * done / steps)
            for group in optimizer.param_groups:
                group["lr"] = 2.0**run.rate * group["rate"] * rise * 0.5 * (1 + fall)
            batch = F.cross_entropy(model(x[rows]), y[rows])
            batch.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(batch.detach())
            done += 1
        loss = torch.stack(losses).mean().item()
    valid, test = (accuracy(model, *part) if math.isfinite(loss) else 0.0 for part in judged)
    seconds = round(time.perf_counter() - began, 1)
    return {**asdict(run), "loss": loss, "valid": valid, "test": test, "seconds": seconds}


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    right = [
        (model(a).argmax(-1) == b).sum() for a, b in zip(x.split(1000), y.split(1000), strict=True)
    ]
    return float(torch.stack(right).sum()) / len(x)


Key = tuple[int, str, str]  # width of the dense MLP, family, rule
Trained = Callable[[dict[Key, list[Run]]], dict[Key, list[dict[str, Any]]]]


def measure(scale: Scale, seeds: int, workers: int, device: str) -> list[dict[str, Any]]:
    """A row for every width of the dense MLP, family and rule."""
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:

        def trained(runs: dict[Key, list[Run]]) -> dict[Key, list[dict[str, Any]]]:
            submitted = {
                key: [pool.submit(train, scale, run, device) for run in own]
                for key, own in runs.items()
            }
            return {key: [future.result() for future in own] for key, own in submitted.items()}

        return compared(scale, seeds, trained)


def compared(scale: Scale, seeds: int, trained: Trained) -> list[dict[str, Any]]:
    """Every rate once, then the best from fresh seeds."""
    wanted = {}
    for dense in scale.widths:
        for family in FAMILIES:
            width = fitting(family, dense, scale.depth)
            for rule in RULES:
                runs = [Run(family, width, rule, rate, 0) for rate in scale.rates[rule]]
                wanted[dense, family, rule] = runs
    tried = trained(wanted)
    best = {key: max(found, key=lambda r: r["valid"])["rate"] for key, found in tried.items()}
    fresh = {
        key: [replace(runs[0], rate=best[key], seed=1 + s) for s in range(seeds)]
        for key, runs in wanted.items()
    }
    rows = []
    for (dense, family, rule), again in trained(fresh).items():
        by_rate = {run["rate"]: run["valid"] for run in tried[dense, family, rule]}
        width = wanted[dense, family, rule][0].width
        row = {"dense": dense, "family": family, "rule": rule, "width": width}
        row |= {**cost(family, width, scale.depth), "rate": best[dense, family, rule]}
        row |= {"valid_by_rate": by_rate, "at_dense": by_rate[best[dense, "dense", rule]]}
        rows.append(
            row | {name: [run[name] for run in again] for name in ("test", "loss", "seconds")}
        )
    return rows


def table(rows: Sequence[dict[str, Any]], scale: Scale, seeds: int, device: dict[str, str]) -> str:
    said = (
        f"{device['device']}, {device['torch']}. Residual MLPs of depth {scale.depth} on shuffled "
        f"pixels, {scale.examples:,} of 45,000 training images, {scale.epochs} epochs of batches "
        f"of {scale.batch}. Test accuracy: mean and 95 % interval over {seeds} fresh seeds, at the "
        f"best of {len(scale.rates['rule'])} rates by validation (one seed). Train loss: of the "
        "last epoch. At dense's: validation accuracy of one seed at the rate best for dense."
    )
    columns = "family | width | parameters | FLOPs | rates | test accuracy | train loss | best rate"
    lines = ["# Structured MLPs on CIFAR-10 at matched FLOPs", "", said, "", PUBLISHED]
    for dense in scale.widths:
        lines += ["", f"As many FLOPs as a dense MLP of width {dense}:", ""]
        lines += [f"| {columns} | at dense's |", "|---|---|---|---|---|---|---|---|---|"]
        orders = []
        for rule in RULES:
            own = [row for row in rows if row["dense"] == dense and row["rule"] == rule]
            own.sort(key=lambda row: -sum(row["test"]))
            lines += [f"| {' | '.join(cells(row))} |" for row in own]
            orders.append(f"{rule}: {', '.join(row['family'] for row in own)}.")
        lines += ["", f"Order by the mean, {' '.join(orders)}"]
    return "\n".join([*lines, ""])


def cells(row: dict[str, Any]) -> list[str]:
    costs = [str(row["width"]), f"{row['parameters']:,}", f"{row['flops']:,}"]
    ends = [str(estimate(row["test"])), f"{estimate(row['loss']).mean:.3f}", f"2^{row['rate']}"]
    return [row["family"], *costs, row["rule"], *ends, f"{row['at_dense']:.3f}"]


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--full", action="store_true", help="all images and four widths, for a GPU")
    p.add_argument("--seeds", type=int, default=3)
    p.add_argument("--workers", type=int, default=min(2, os.cpu_count() or 1))
    p.add_argument("--epochs", type=int)
    p.add_argument("--widths", type=int, nargs="+", help="of the dense MLP, for a part of --full")
    p.add_argument("--output", type=Path, help="write OUTPUT.json and OUTPUT.md")
    args = p.parse_args()
    torch.set_num_threads(1)
    scale = FULL if args.full else SMALL
    widths = tuple(args.widths or scale.widths)
    scale = replace(scale, epochs=args.epochs or scale.epochs, widths=widths)
    kind = "cuda" if args.full and torch.cuda.is_available() else "cpu"
    device, began = machine(torch.device(kind)), time.perf_counter()
    rows = measure(scale, args.seeds, args.workers, kind)
    text = table(rows, scale, args.seeds, device)
    print(text)
    if args.output is not None:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        data = {"device": device, "scale": asdict(scale), "seeds": args.seeds, "rows": rows}
        data["seconds"] = round(time.perf_counter() - began, 1)
        args.output.with_suffix(".json").write_text(json.dumps(data, indent=1) + "\n")
        args.output.with_suffix(".md").write_text(text)


if __name__ == "__main__":
    main()
