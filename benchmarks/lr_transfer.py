"""Does the best learning rate stay where it is when a model grows? For every pattern family.

A multilayer perceptron learns a random teacher: two hidden maps of one family at widths 64, 256 and
1024, between a dense map in and a dense head. Every example is new, so that the loss is that of the
training. Rates are scanned in factors of 2 around the best one, Adam, twice:

rule     as the package trains: base * kappa * base_width / width (patternsearch/layers.py)
kappa    the same without its factor of the width: base * kappa

    python benchmarks/lr_transfer.py --output benchmarks/results/lr_transfer

Writes OUTPUT.json and OUTPUT.md. Takes a few minutes on one core.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # runs from a checkout that was never installed

import torch  # noqa: E402
from measure import machine  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from patternsearch.layers import BASE_WIDTH, FeatureMap  # noqa: E402
from patternsearch.pattern import Pattern  # noqa: E402
from patternsearch.patterns.btt import BlockTensorTrain  # noqa: E402
from patternsearch.patterns.dense import Dense  # noqa: E402
from patternsearch.patterns.kronecker import Kronecker  # noqa: E402
from patternsearch.patterns.low_rank import LowRank  # noqa: E402
from patternsearch.patterns.monarch import Monarch  # noqa: E402
from patternsearch.patterns.tt import TensorTrain  # noqa: E402

FAMILIES: dict[str, Pattern] = {
    "dense": Dense(),
    "kronecker": Kronecker(),
    "monarch": Monarch(blocks=8),
    "btt": BlockTensorTrain(rank=2),
    "tt": TensorTrain(rank=4),
    "low_rank": LowRank(rank=0.25),
}
INPUTS, OUTPUTS, HIDDEN = 32, 8, 128  # of the teacher


class Student(nn.Module):
    """[B, INPUTS] -> [B, OUTPUTS]."""

    def __init__(self, pattern: Pattern, width: int) -> None:
        super().__init__()
        at = pattern.resolve((width,), (width,))
        self.layers = nn.ModuleList(
            [
                FeatureMap(Dense(), INPUTS, width, role="input"),
                FeatureMap(at, width, width),
                FeatureMap(at, width, width),
                FeatureMap(Dense(), width, OUTPUTS, role="head"),
            ]
        )

    def forward(self, x: Tensor) -> Tensor:
        for i, layer in enumerate(self.layers):
            x = layer(x if i == 0 else torch.relu(x) * math.sqrt(2))
        return x

    def groups(self, base: float, rule: str) -> Iterator[dict[str, Any]]:
        """Adam's parameters, each core at its rate."""
        for layer in self.layers:
            rates = layer.rates()
            for name, parameter in layer.named_parameters():
                rate = rates.get(name, 1.0)
                if rule == "kappa" and name in rates and layer.role != "input":
                    rate *= layer.inp[0] / BASE_WIDTH
                yield {"params": [parameter], "lr": base * rate}


def teacher(x: Tensor) -> Tensor:
    """A random network of unit output, the same in every run."""
    generator = torch.Generator().manual_seed(1)
    first = torch.randn(INPUTS, HIDDEN, generator=generator) / math.sqrt(INPUTS)
    second = torch.randn(HIDDEN, HIDDEN, generator=generator) * math.sqrt(2 / HIDDEN)
    last = torch.randn(HIDDEN, OUTPUTS, generator=generator) * math.sqrt(2 / HIDDEN)
    return ((x @ first).relu() @ second).relu() @ last


def train(pattern: Pattern, width: int, rule: str, lr: float, steps: int, seed: int) -> float:
    """Mean loss of the last quarter of the steps; infinity where it diverges."""
    torch.manual_seed(seed)
    student = Student(pattern, width)
    optimizer = torch.optim.Adam(student.groups(lr, rule), fused=True)
    generator = torch.Generator().manual_seed(100 + seed)
    losses = []
    for step in range(steps):
        for group in optimizer.param_groups:  # linear to zero, so that the end is not noise
            group.setdefault("first", group["lr"])
            group["lr"] = group["first"] * (1 - step / steps)
        x = torch.randn(64, INPUTS, generator=generator)
        loss = (student(x) - teacher(x)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
        if not math.isfinite(losses[-1]):
            return math.inf
    last = losses[-(steps // 4) :]
    return sum(last) / len(last)


def scan(
    pattern: Pattern, width: int, rule: str, start: int, steps: int, seeds: int
) -> dict[int, float]:
    """Exponent of 2 -> loss, walking downhill from `start` until two in a row are worse."""
    losses: dict[int, float] = {}

    def loss(exponent: int) -> float:
        if exponent not in losses:
            runs = [train(pattern, width, rule, 2.0**exponent, steps, s) for s in range(seeds)]
            losses[exponent] = sum(runs) / len(runs)
        return losses[exponent]

    loss(start)
    while True:
        best = min(losses, key=losses.__getitem__)
        wanted = [e for e in (best - 1, best + 1, best - 2, best + 2) if e not in losses]
        if not wanted:
            return dict(sorted(losses.items()))
        loss(wanted[0])


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    rows = []
    for family in args.families:
        for rule in ("rule", "kappa"):
            start = args.start
            for width in args.widths:
                began = time.perf_counter()
                losses = scan(FAMILIES[family], width, rule, start, args.steps, args.seeds)
                start = min(losses, key=losses.__getitem__)  # the next width begins here
                row = {
                    "family": family,
                    "pattern": str(FAMILIES[family]),
                    "rates": rule,
                    "width": width,
                    "best": start,
                    "losses": losses,
                    "seconds": round(time.perf_counter() - began, 2),
                }
                rows.append(row)
                print(f"{family} {rule} {width}: 2^{start}, {row['seconds']} s", file=sys.stderr)
    return rows


def table(rows: list[dict[str, Any]], args: argparse.Namespace, device: dict[str, str]) -> str:
    """Best rate a width, and by how many factors of 2 it moves between the ends."""
    widths = " | ".join(f"width {w}" for w in args.widths)
    said = (
        f"Random teacher, Adam, {args.steps} steps of 64 new examples, mean of {args.seeds} seeds, "
        f"rates in factors of 2. {device['device']}, torch {device['torch']}."
    )
    lines = [
        "# Best learning rate as the width grows",
        "",
        said,
        "",
        f"| family | rates | {widths} | moved by |",
        "|---|---|" + "---|" * len(args.widths) + "---|",
    ]
    for family in args.families:
        for rule, words in (("rule", "our rule"), ("kappa", "without its width factor")):
            best = [r["best"] for r in rows if (r["family"], r["rates"]) == (family, rule)]
            cells = " | ".join(f"2^{e}" for e in best)
            moved = max(best) - min(best)
            lines.append(f"| {family} | {words} | {cells} | {f'2^{moved}' if moved else 'none'} |")
    lines += ["", "Losses at every rate tried are in the JSON of the same name.", ""]
    return "\n".join(lines)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--families", nargs="+", default=list(FAMILIES), choices=list(FAMILIES))
    p.add_argument("--widths", nargs="+", type=int, default=[64, 256, 1024])
    p.add_argument("--steps", type=int, default=120)
    p.add_argument("--seeds", type=int, default=3)
    p.add_argument("--start", type=int, default=-6, help="exponent of 2 at which a scan begins")
    p.add_argument("--output", type=Path, help="write OUTPUT.json and OUTPUT.md")
    args = p.parse_args()
    torch.set_num_threads(1)
    began = time.perf_counter()
    device = machine(torch.device("cpu"))
    rows = measure(args)
    text = table(rows, args, device)
    print(text)
    if args.output is None:
        return
    args.output.parent.mkdir(parents=True, exist_ok=True)
    settings = {name: getattr(args, name) for name in ("widths", "steps", "seeds")}
    data = {"device": device, "settings": settings, "rows": rows}
    data["seconds"] = round(time.perf_counter() - began, 1)
    args.output.with_suffix(".json").write_text(json.dumps(data, indent=1) + "\n")
    args.output.with_suffix(".md").write_text(text)


if __name__ == "__main__":
    main()
