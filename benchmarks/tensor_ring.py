"""The ring and the ranks of a tensor, found by the structured sampler and by TnALE.

    python benchmarks/tensor_ring.py FILE [--methods structured tnale] [--seeds 5]

FILE is tn_ring_order6.npz: a 3x3x3x3x3x3 tensor made by a tensor ring with 126 parameters (Li et
al. 2023, arXiv 2304.12875). A structure is a ring of the six modes, one of 60, and a rank of 1 to 7
between neighbours; its objective is parameters / 729 + 200 * relative squared error after a fit by
Adam (rate 1e-3, at most 10,000 steps, two restarts, ended at an error of 1e-8). All that the seeds
and methods want next is fitted as one batch. Fits are kept in benchmarks/results/tensor_ring.json
and shared; a structure asked for again counts as an evaluation. TnALE is written from the paper's
description: in each round trip every rank is tried within 2 (two trips, three of five values are
fitted, the rest interpolated) and then within 1 of the centre, the ring by all swaps of two modes;
a trip that gains nothing starts again elsewhere.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import random
from collections.abc import Generator, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import torch
from small_tasks import machine

from patternsearch.domains import Choice, IntRange
from patternsearch.search.points import Parameter, Points
from patternsearch.search.proposal import Described, Knowledge
from patternsearch.search.sampler import StructuredSampler

RESULTS = Path(__file__).parent / "results" / "tensor_ring.json"
ORDER, MODE, MOST = 6, 3, 7
BATCH = 4  # structures a seed of ours wants at a time
Structure = tuple[tuple[int, ...], tuple[int, ...]]  # modes around the ring, rank after each
Wanted = Generator[list[Structure], list[float], None]
RINGS = [(0, *p) for p in itertools.permutations(range(1, ORDER)) if p[0] < p[-1]]


def canonical(modes: Iterable[int], ranks: Iterable[int]) -> Structure:
    """The same ring from mode 0 on, in the direction of RINGS."""
    modes, ranks = tuple(modes), tuple(ranks)
    at = modes.index(0)
    modes, ranks = modes[at:] + modes[:at], ranks[at:] + ranks[:at]
    if modes[1] > modes[-1]:
        modes, ranks = (0, *modes[:0:-1]), ranks[::-1]
    return modes, ranks


def parameters(structure: Structure) -> int:
    ranks = structure[1]
    return sum(MODE * ranks[i - 1] * ranks[i] for i in range(ORDER))


def fit(goal: torch.Tensor, structures: list[Structure]) -> list[float]:
    """Relative squared errors, the better of two restarts."""
    count, most = 2 * len(structures), max(max(ranks) for _, ranks in structures)
    twice = [s for s in structures for _ in range(2)]
    generators = [random.Random(f"{s}/{i % 2}").randrange(2**31) for i, s in enumerate(twice)]
    target = torch.stack([goal.permute(modes).reshape(27, 27) for modes, _ in twice])
    mask, start = torch.zeros(2, count, ORDER, most, MODE, most)
    for n, (_, ranks) in enumerate(twice):
        noise = torch.Generator().manual_seed(generators[n])
        for k in range(ORDER):
            a, b = ranks[k - 1], ranks[k]
            mask[n, k, :a, :, :b] = 1
            start[n, k, :a, :, :b] = torch.randn(a, MODE, b, generator=noise) / math.sqrt(b)
    cores = start.requires_grad_()
    adam = torch.optim.Adam([cores], lr=1e-3, fused=True)
    best = torch.full((count,), math.inf)
    for step in range(10_000):
        error = ((_contract(cores * mask) - target) ** 2).sum((1, 2)) / (target**2).sum((1, 2))
        if step % 100 == 0:
            best = torch.minimum(best, error.detach())
            if bool((best < 1e-8).view(-1, 2).any(1).all()):
                break
        adam.zero_grad()
        error.sum().backward()
        adam.step()
    best = torch.minimum(best, error.detach())
    return best.view(-1, 2).amin(1).tolist()


def _contract(cores: torch.Tensor) -> torch.Tensor:
    """[n, 27, 27]: the tensors of rings [n, core, left, mode, right]."""
    n, _, r, _, _ = cores.shape
    halves = []
    for first in (0, 3):
        part = cores[:, first].reshape(n, -1, r)
        for k in (1, 2):
            part = (part @ cores[:, first + k].reshape(n, r, -1)).reshape(n, -1, r)
        halves.append(part.reshape(n, r, 27, r))
    left = halves[0].permute(0, 2, 1, 3).reshape(n, 27, r * r)
    right = halves[1].permute(0, 3, 1, 2).reshape(n, r * r, 27)
    return left @ right


class Rings(Knowledge):
    """Ranks between pairs of modes say what a structure is, wherever it is written from."""

    points = Points(
        [Parameter("ring", Choice(tuple(range(len(RINGS)))))]
        + [Parameter(f"rank{k}", IntRange(1, MOST)) for k in range(ORDER)]
    )

    def describe(self, params: dict[str, Any]) -> Described | None:
        structure = of_params(params)
        found = {"parameters": math.log(parameters(structure))}
        found |= {f"{a}-{b}": 0.0 for a in range(ORDER) for b in range(a + 1, ORDER)}
        modes, ranks = structure
        for k in range(ORDER):
            a, b = sorted((modes[k], modes[(k + 1) % ORDER]))
            found[f"{a}-{b}"] = math.log(ranks[k]) + 0.5
        return Described(structure, found)

    def moves(self, params: dict[str, Any], rng: random.Random) -> Iterator[dict[str, Any]]:
        """Two modes swapped, the ranks where they are or with their modes."""
        modes, ranks = of_params(params)
        bonds = {frozenset((modes[k], modes[(k + 1) % ORDER])): ranks[k] for k in range(ORDER)}
        for i, j in itertools.combinations(range(ORDER), 2):
            swapped = list(modes)
            swapped[i], swapped[j] = swapped[j], swapped[i]
            yield to_params(canonical(swapped, ranks))
            pairs = [frozenset((swapped[k], swapped[(k + 1) % ORDER])) for k in range(ORDER)]
            left = sorted((bonds[p] for p in bonds.keys() - set(pairs)), reverse=True)
            kept = [bonds[p] if p in bonds else left.pop() for p in pairs]
            yield to_params(canonical(swapped, kept))


def of_params(params: dict[str, Any]) -> Structure:
    return canonical(RINGS[params["ring"]], [params[f"rank{k}"] for k in range(ORDER)])


def to_params(structure: Structure) -> dict[str, Any]:
    ranks = {f"rank{k}": rank for k, rank in enumerate(structure[1])}
    return {"ring": RINGS.index(structure[0]), **ranks}


def structured(seed: int) -> Wanted:
    knowledge = Rings()
    study = optuna.create_study(sampler=StructuredSampler(seed, knowledge=knowledge))
    while True:
        trials = [study.ask() for _ in range(BATCH)]
        for trial in trials:
            for p in knowledge.points.parameters.values():
                p.domain.suggest(trial, p.name)
        values = yield [of_params(trial.params) for trial in trials]
        for trial, value in zip(trials, values, strict=True):
            study.tell(trial, math.log(value))


def tnale(seed: int) -> Wanted:
    rng = random.Random(seed)
    places = [*range(ORDER), ORDER, *range(ORDER - 1, -1, -1)]
    while True:
        ranks, modes = [rng.randint(1, MOST) for _ in range(ORDER)], list(range(ORDER))
        rng.shuffle(modes)
        best, trip = math.inf, 0
        while True:
            before = best
            for place in places:
                if place == ORDER:
                    swaps = [list(modes)]
                    for i, j in itertools.combinations(range(ORDER), 2):
                        swaps.append(list(modes))
                        swaps[-1][i], swaps[-1][j] = modes[j], modes[i]
                    values = yield [canonical(m, ranks) for m in swaps]
                    modes, best = swaps[int(np.argmin(values))], min(values)
                    continue
                tried = _window(ranks[place], 2 if trip < 2 else 1)
                asked = tried[::2] if trip < 2 else tried
                options = [[*ranks[:place], r, *ranks[place + 1 :]] for r in tried]
                shares = [parameters(canonical(modes, o)) / MODE**ORDER for o in options]
                values = yield [canonical(modes, options[tried.index(r)]) for r in asked]
                errors = np.array(values) - [shares[tried.index(r)] for r in asked]
                guessed = np.interp(tried, asked, errors) + shares
                ranks, best = options[int(np.argmin(guessed))], float(guessed.min())
            trip += 1
            if trip > 2 and best >= before - 1e-9:
                break


def _window(centre: int, radius: int) -> list[int]:
    low = min(max(1, centre - radius), MOST - 2 * radius)
    return list(range(low, low + 2 * radius + 1))


METHODS = {"structured": structured, "tnale": tnale}


def summary(found: dict[str, list[tuple[float, int]]]) -> str:
    """For each method and seed: evaluations until 126 parameters at an error below 1e-4."""
    lines = ["# The ring of a tensor", ""]
    lines += [
        "What the structured sampler and TnALE found. 126 parameters at an error below 1e-4 are",
        "the tensor's own; all runs were ended after the evaluations given.",
        f"Written by benchmarks/tensor_ring.py on {machine()}.",
        "",
    ]
    lines.append("| run | evaluations | best objective | its parameters | 126 parameters after |")
    lines.append("|---|---|---|---|---|")
    for name, values in found.items():
        best = min(values)
        hit = next((i + 1 for i, (v, n) in enumerate(values) if n <= 126 and v < 0.193), None)
        lines.append(
            f"| {name} | {len(values)} | {best[0]:.4f} | {best[1]} | {hit or 'not found'} |"
        )
    return "\n".join(lines) + "\n"


def save(fits: dict[str, float], found: dict[str, list[tuple[float, int]]]) -> None:
    for path, text in (
        (RESULTS, json.dumps(fits) + "\n"),
        (RESULTS.with_suffix(".md"), summary(found)),
    ):
        part = path.with_name(f".{path.name}.part")
        part.write_text(text)
        part.replace(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--evaluations", type=int, default=208)
    options = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    goal = torch.from_numpy(np.load(options.file)["goal"])
    goal = goal / goal.std()
    fits: dict[str, float] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    runs = {
        f"{m} {seed}": METHODS[m](seed) for seed in range(options.seeds) for m in options.methods
    }
    wanted = {name: next(run) for name, run in runs.items()}
    found: dict[str, list[tuple[float, int]]] = {name: [] for name in runs}
    while wanted:
        missing = sorted({s for ask in wanted.values() for s in ask if str(s) not in fits})
        if missing:
            fits |= dict(zip(map(str, missing), fit(goal, missing), strict=True))
        for name, ask in list(wanted.items()):
            values = [parameters(s) / MODE**ORDER + 200 * fits[str(s)] for s in ask]
            found[name] += zip(values, map(parameters, ask), strict=True)
            if len(found[name]) >= options.evaluations:
                del wanted[name]
            else:
                wanted[name] = runs[name].send(values)
        if missing:
            save(fits, found)
    save(fits, found)
    print(summary(found))


if __name__ == "__main__":
    main()
