"""Does a search return what the published grid of two-factor structures shows, in fewer trials?

Potapczynski et al. 2024 (arXiv 2410.02117) compare 23 structures of the space of two-factor
einsums by hand, on regression of a random network (8 inputs, 6 layers of ReLU), and read from their
curves of loss against compute that a structure should share no parameters (omega = 0) and be of
full rank (psi = 1); among those that are, little is left to gain. Here the structured sampler and
random search are given all seven exponents, as continuous numbers, and twice as many trials as the
grid has points; nothing tells them omega or psi but what PatternKnowledge tells of any pattern.

Every structure stands twice between dense maps in and out, at the largest width at which a model
takes no more FLOPs than the dense one of width --width, and trains by the package's rule
(layers.py) at the base rate that was best for that dense model. Examples are new in every step. A
sweep's seed is that of its trainings; the grid is trained at each.

    python benchmarks/einsum_space.py --output benchmarks/results/einsum_space

Writes OUTPUT.json and OUTPUT.md. Takes some minutes on two cores; killed, it goes on.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # runs from a checkout that was never installed

import optuna  # noqa: E402
import torch  # noqa: E402
from measure import machine  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from patternsearch.codec import encode  # noqa: E402
from patternsearch.layers import FeatureMap, Matrix  # noqa: E402
from patternsearch.optimizer import AdamW  # noqa: E402
from patternsearch.pattern import Pattern  # noqa: E402
from patternsearch.patterns.dense import Dense  # noqa: E402
from patternsearch.patterns.einsum import Einsum  # noqa: E402
from patternsearch.search.interval import estimate  # noqa: E402
from patternsearch.search.known import Described, Knowledge  # noqa: E402
from patternsearch.search.points import Parameter, Points  # noqa: E402
from patternsearch.search.sampler import StructuredSampler  # noqa: E402

KEPT = Path(__file__).parent / "results" / ".einsum_space.part.jsonl"  # losses, until the end
INPUTS, LAYERS, TEACHER = 8, 6, 256
HIDDEN = 2  # maps of the structure in a student
LEAST = 0.6  # share of the FLOPs that a structure must use, or no width fits it
WIDTHS = sorted(  # of many divisors
    {2**a * 3**b * 5**c for a in range(3, 11) for b in range(4) for c in range(3)}
)
NAMES = ("alpha", "beta", "gamma", "delta", "epsilon", "phi", "rho")
GRID = (  # of the paper's experiments on regression: alpha, beta, gamma, delta, epsilon, phi, rho
    [(a, 0, 1 - a, 0, 1 - a, a, 0) for a in (0.5, 0.33, 0.25, 0.67, 0.75)]
    + [(a, 0, 1 - a, 0, a, 1 - a, 0) for a in (0.67, 0.33, 0.75, 0.25)]
    + [(0.5, 0, 0.5, 0, 0.5, 0.5, rho) for rho in (0.25, 0.33)]
    + [(a, 0, 1 - a, 0, 1 - a, a, 0.25) for a in (0.33, 0.67)]
    + [(a, 0, 1 - a, 0, a, 1 - a, 0.25) for a in (0.67, 0.33)]
    + [(a, 1 - a, 0, a, 1 - a, 0, rho) for rho in (0, 0.25) for a in (0.5, 0.33)]
    + [(1, 0, 0, 0, 1, 0, rho) for rho in (0.75, 0.5)]
    + [(0.5, 0.25, 0.25, 0.25, 0.5, 0.25, rho) for rho in (0, 0.25)]
)


@dataclass(frozen=True)
class Design:
    """A structure at the width that its FLOPs allow."""

    pattern: Pattern
    width: int

    def exponents(self) -> dict[str, float]:
        """Parameter sharing, rank and compute intensity, at this width."""
        at = (self.width,), (self.width,)
        values = {name: getattr(self.pattern, name)(*at) for name in ("omega", "psi", "nu")}
        return {name: 1.0 if v is None else float(v) for name, v in values.items()}


@dataclass(frozen=True)
class Budget:
    """What every training gets."""

    width: int
    steps: int
    batch: int
    lr: float

    def flops(self) -> int:
        return flops(Dense(), self.width)


def flops(pattern: Pattern, width: int) -> int:
    """Of one example through a whole student."""
    return HIDDEN * pattern.cost((width,), (width,)).flops + 2 * width * (INPUTS + 1)


@lru_cache(maxsize=100_000)
def fitted(theta: tuple[float, ...], cap: int) -> Design | None:
    """The structure at the largest width within the cap; None where all that fit are far below."""
    if max(theta[:3]) <= 0 or max(theta[3:6]) <= 0:
        return None
    wanted = Einsum(**dict(zip(NAMES, theta, strict=True)))
    for width in reversed(WIDTHS):
        pattern = wanted.resolve((width,), (width,))
        if LEAST * cap <= flops(pattern, width) <= cap:
            return Design(pattern, width)
    return None


class Student(nn.Module):
    """[B, INPUTS] -> [B, 1]."""

    def __init__(self, design: Design) -> None:
        super().__init__()
        width = design.width
        maps = [FeatureMap(design.pattern, width, width) for _ in range(HIDDEN)]
        first = FeatureMap(Dense(), INPUTS, width, role="input")
        self.layers = nn.ModuleList([first, *maps, FeatureMap(Dense(), width, 1, role="head")])

    def forward(self, x: Tensor) -> Tensor:
        for i, layer in enumerate(self.layers):
            x = layer(x if i == 0 else torch.relu(x) * math.sqrt(2))
        return x

    def groups(self) -> Iterator[dict[str, Any]]:
        rates = {name: 1.0 for name, _ in self.named_parameters()}
        for prefix, module in self.named_modules():
            if isinstance(module, Matrix):
                rates |= {f"{prefix}.{name}": r for name, r in module.rates().items()}
        for name, parameter in self.named_parameters():
            yield {"params": [parameter], "rate": rates[name], "lr": 0.0, "weight_decay": 0.0}


class Teacher:
    """A random network of ReLU, its outputs of mean 0 and variance 1, the same in every run."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(42)
        sizes = [INPUTS, *[TEACHER] * (LAYERS - 1), 1]
        self.weights = [
            torch.randn(i, o, generator=generator) * math.sqrt(2 / i) for i, o in pairwise(sizes)
        ]
        self.biases = [0.1 * torch.randn(o, generator=generator) for o in sizes[1:]]
        self.mean, self.deviation = 0.0, 1.0
        y = self(torch.randn(20_000, INPUTS, generator=generator))
        self.mean, self.deviation = float(y.mean()), float(y.std())

    def __call__(self, x: Tensor) -> Tensor:
        for i, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            x = (x.relu() if i else x) @ weight + bias
        return (x - self.mean) / self.deviation


@lru_cache(maxsize=1)
def teacher() -> Teacher:
    return Teacher()


@lru_cache(maxsize=4)
def examples(count: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, INPUTS, generator=generator)
    return x, torch.cat([teacher()(part) for part in x.split(8192)])


def train(design: Design, budget: Budget, seed: int) -> float:
    """`trained`, once: losses are kept in a file, so that a run that was killed goes on."""
    key = f"{design} {budget} {seed}"
    lines = KEPT.read_text().splitlines() if KEPT.exists() else []
    known: dict[str, float] = dict(json.loads(line) for line in lines)
    if key not in known:
        known[key] = trained(design, budget, seed)
        with KEPT.open("a") as file:  # a line at once, whoever writes besides
            file.write(json.dumps([key, known[key]]) + "\n")
    return known[key]


def trained(design: Design, budget: Budget, seed: int) -> float:
    """Mean squared error on held-out examples, of targets of variance 1; 1e3 where it diverges."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    student = Student(design)
    optimizer = AdamW(student.groups())
    x, y = examples(budget.steps * budget.batch, 1000 + seed)
    batches = zip(x.split(budget.batch), y.split(budget.batch), strict=True)
    for step, (given, wanted) in enumerate(batches):
        done = step / budget.steps
        now = budget.lr * min(1.0, 20 * done + 0.01) * 0.5 * (1 + math.cos(math.pi * done))
        for group in optimizer.param_groups:
            group["lr"] = group["rate"] * now
        loss = (student(given) - wanted).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        x, y = examples(8192, 1)
        error = float((student(x) - y).square().mean())
    return error if math.isfinite(error) else 1e3


class Exponents(Knowledge):
    """Of a design what PatternKnowledge tells of the patterns of a model."""

    points = Points([Parameter(name, domain) for name, domain in Einsum.domains().items()])

    def __init__(self, cap: int) -> None:
        self.cap = cap

    def design(self, params: dict[str, Any]) -> Design | None:
        return fitted(tuple(round(float(params[name]), 3) for name in NAMES), self.cap)

    def describe(self, params: dict[str, Any]) -> Described | None:
        design = self.design(params)
        if design is None:
            return None
        at = (design.width,), (design.width,)
        found = {f"map.{name}": value for name, value in design.exponents().items()}
        found["parameters"] = math.log(design.pattern.parameters(*at))
        found["flops"] = math.log(flops(design.pattern, design.width))
        return Described(design, found)


def proposals(method: str, seed: int, budget: Budget) -> Iterator[Design]:
    """Designs one after another; the sampler is told what each came to."""
    if method == "grid":
        for theta in GRID:
            design = fitted(tuple(round(x, 3) for x in theta), budget.flops())
            assert design is not None, theta
            yield design
        return
    knowledge = Exponents(budget.flops())
    sampler = (
        StructuredSampler(seed, knowledge=knowledge)
        if method == "structured"
        else optuna.samplers.RandomSampler(seed=seed)
    )
    study = optuna.create_study(sampler=sampler)
    while True:
        trial = study.ask()
        params = {
            p.name: p.domain.suggest(trial, p.name) for p in knowledge.points.parameters.values()
        }
        if (design := knowledge.design(params)) is None:  # no trial: nothing is trained
            study.tell(trial, state=optuna.trial.TrialState.FAIL)
            continue
        yield design
        study.tell(trial, math.log(train(design, budget, seed)))


def sweep(method: str, seed: int, budget: Budget, trials: int) -> list[dict[str, Any]]:
    """A row a trial."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return [
        {
            "loss": train(design, budget, seed),
            "width": design.width,
            "parameters": design.pattern.parameters((design.width,), (design.width,)),
            "flops": flops(design.pattern, design.width),
            "pattern": encode(design.pattern),
            **design.exponents(),
        }
        for design in islice(proposals(method, seed, budget), None if method == "grid" else trials)
    ]


def ideal(row: dict[str, Any]) -> bool:
    """No parameter shared and full rank, to what divisors leave of the exponents."""
    return bool(row["omega"] <= 0.05 and row["psi"] >= 0.95)


def told(rows: list[dict[str, Any]], goal: float) -> dict[str, Any]:
    """What a sweep returns, and the trials until it is as good as `goal`."""
    best = min(rows, key=lambda row: row["loss"])
    return {
        "best": best,
        "ideal": ideal(best),
        "first_ideal": next((i for i, row in enumerate(rows, 1) if ideal(row)), None),
        "as_good": next((i for i, row in enumerate(rows, 1) if row["loss"] <= goal), None),
    }


def table(found: dict[str, Any], budget: Budget, device: dict[str, str]) -> str:
    sweeps = found["sweeps"]
    goals = {s["seed"]: min(r["loss"] for r in s["rows"]) for s in sweeps if s["method"] == "grid"}
    dense = str(estimate(found["dense"]))
    said = (
        f"{device['device']}, {device['torch']}. Regression of a random network, {HIDDEN} maps of "
        f"one structure, each model at most {budget.flops():,} FLOPs an example, {budget.steps:,} "
        f"steps of {budget.batch} new examples, base rate {budget.lr:g}. Loss: mean squared error, "
        f"of targets of variance 1. The dense model, of width {budget.width}: {dense}."
    )
    columns = "way, seed, trials, best loss, its omega, psi, nu, width, no sharing and full rank"
    columns += ", as good as the grid's best after"
    head = f"| {columns.replace(', ', ' | ')} |"
    lines = [
        "# The space of two-factor structures",
        "",
        said,
        "",
        head,
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for s in sweeps:
        came = told(s["rows"], goals[s["seed"]])
        best = came["best"]
        lines.append(
            f"| {s['method']} | {s['seed']} | {len(s['rows'])} | {best['loss']:.4f} "
            f"| {best['omega']:.2f} | {best['psi']:.2f} | {best['nu']:.2f} | {best['width']} "
            f"| {'yes' if came['ideal'] else 'no'} | {came['as_good'] or 'not reached'} |"
        )
    return "\n".join([*lines, "", *by_kind(sweeps)]) + "\n"


def by_kind(sweeps: list[dict[str, Any]]) -> list[str]:
    """The grid's structures over the seeds, best first; and what the exponents tell of a loss."""
    rows = [s["rows"] for s in sweeps if s["method"] == "grid"]
    names = [", ".join(f"{x:g}" for x in theta) for theta in GRID]
    lines = [
        "| alpha to rho, of the grid | mean loss | omega | psi | nu | width | parameters |",
        "|---|---|---|---|---|---|---|",
    ]
    means = [statistics.fmean(row["loss"] for row in same) for same in zip(*rows, strict=True)]
    for i in sorted(range(len(names)), key=lambda i: means[i]):
        row = rows[0][i]
        lines.append(
            f"| {names[i]} | {means[i]:.4f} | {row['omega']:.2f} | {row['psi']:.2f} "
            f"| {row['nu']:.2f} | {row['width']} | {row['parameters']:,} |"
        )
    kept = [(ideal(row), mean) for row, mean in zip(rows[0], means, strict=True)]
    for wanted, words in ((True, "Without sharing and of full rank"), (False, "Others")):
        values = sorted(mean for one, mean in kept if one is wanted)
        lines += [""] * wanted
        lines.append(
            f"{words}: {len(values)} of the grid, losses {values[0]:.4f} to {values[-1]:.4f}, "
            f"median {statistics.median(values):.4f}."
        )
    return lines


def scanned(budget: Budget) -> float:
    """The base rate, in factors of 2, that is best for the dense model."""
    dense = Design(Dense(), budget.width)
    rates = [2.0**e for e in range(-9, -2)]
    return min(rates, key=lambda lr: train(dense, replace(budget, lr=lr), 0))


def measure(args: argparse.Namespace) -> tuple[dict[str, Any], Budget]:
    budget = Budget(args.width, args.steps, args.batch, args.lr)
    if not args.lr:
        budget = replace(budget, lr=scanned(budget))
        print(f"base rate {budget.lr:g}", file=sys.stderr)
    wanted = [(m, s) for m in ("grid", "structured", "random") for s in range(args.seeds)]
    with ProcessPoolExecutor(args.workers) as pool:
        runs = [pool.submit(sweep, m, s, budget, args.trials) for m, s in wanted]
        dense = [pool.submit(train, Design(Dense(), args.width), budget, s) for s in range(3)]
        sweeps = [
            {"method": m, "seed": s, "rows": run.result()}
            for (m, s), run in zip(wanted, runs, strict=True)
        ]
        found = {"sweeps": sweeps, "dense": [d.result() for d in dense]}
    return {**found, "budget": asdict(budget)}, budget


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--width", type=int, default=128, help="of the dense model that sets the FLOPs")
    p.add_argument("--steps", type=int, default=1000)
    p.add_argument("--batch", type=int, default=256)
    p.add_argument("--lr", type=float, default=0.0, help="base rate; scanned by default")
    p.add_argument("--trials", type=int, default=46)
    p.add_argument("--seeds", type=int, default=3)
    p.add_argument("--workers", type=int, default=min(2, os.cpu_count() or 1))
    p.add_argument("--output", type=Path, help="write OUTPUT.json and OUTPUT.md")
    args = p.parse_args()
    torch.set_num_threads(1)
    device, began = machine(torch.device("cpu")), time.perf_counter()
    found, budget = measure(args)
    text = table(found, budget, device)
    print(text, f"{time.perf_counter() - began:.0f} s", sep="\n")
    KEPT.unlink(missing_ok=True)
    if args.output is not None:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.with_suffix(".json").write_text(json.dumps({"device": device, **found}) + "\n")
        args.output.with_suffix(".md").write_text(text)


if __name__ == "__main__":
    main()
