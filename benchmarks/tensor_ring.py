"""The ring and the ranks of a tensor, found by the structured sampler and by TnALE.

    python benchmarks/tensor_ring.py FILE [--methods structured tnale] [--seeds 5]

FILE is tn_ring_order6.npz: a 3x3x3x3x3x3 tensor made by a tensor ring with 126 parameters (Li et
al. 2023, arXiv 2304.12875). A structure is a ring of the six modes, one of 60, and a rank of 1 to 7
between neighbours; its objective is parameters / 729 + 200 * relative squared error after a fit by
Adam (rate 1e-3, at most 10,000 steps, two restarts, ended at an error of 1e-8): tensor_ring.c,
which needs a C compiler. A run ends when it has found 126 parameters at an error below 1e-4. Fits
are kept in benchmarks/results/tensor_ring.json and shared by the runs; a structure asked for again
counts as an evaluation.

The sampler is told which rank lies between which modes, and that the tensor's rank across a cut is
at most the product of the ranks cut. TnALE is written from the paper's description: in each round
trip every rank is tried within 2 (two trips, three of five values are fitted, the rest
interpolated) and then within 1 of the centre, the ring by all swaps of two modes; a trip that gains
nothing starts again elsewhere.
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import json
import math
import random
import subprocess
import tempfile
from collections.abc import Generator, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from small_tasks import machine

from patternsearch.domains import Choice, IntRange
from patternsearch.search.known import Described, Knowledge
from patternsearch.search.points import Parameter, Points
from patternsearch.search.sampler import StructuredSampler

RESULTS = Path(__file__).parent / "results" / "tensor_ring.json"
ORDER, MODE, MOST = 6, 3, 7
STEPS, RATE, ENDED = 10_000, 1e-3, 1e-8
OWN, ENOUGH = 126, 1e-4  # parameters of the tensor, an error that counts as none
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


def objective(error: Any, count: Any) -> Any:
    """What Li et al. minimise, of numbers or arrays."""
    return count / MODE**ORDER + 200 * error


class Fitter:
    """Fits of one tensor by tensor_ring.c, compiled for this machine."""

    def __init__(self, goal: np.ndarray, folder: Path) -> None:
        library = folder / "tensor_ring.so"
        source = Path(__file__).with_suffix(".c")
        flags = "-O3 -march=native -ffast-math -shared -fPIC".split()
        subprocess.run(["cc", *flags, "-o", library, source, "-lm"], check=True)
        self._fit = ctypes.CDLL(str(library)).fit
        self._fit.restype = ctypes.c_float
        kinds = [ctypes.c_void_p] * 3 + [ctypes.c_int, ctypes.c_float, ctypes.c_float]
        self._fit.argtypes = kinds
        self.goal = (goal / goal.std()).astype(np.float32)
        self.norm = float((self.goal**2).sum())

    def __call__(self, structure: Structure) -> float:
        """Relative squared error, the better of two restarts."""
        return min(self._restart(structure, i) for i in range(2))

    def _restart(self, structure: Structure, restart: int) -> float:
        modes, ranks = structure
        before = np.array([ranks[k - 1] for k in range(ORDER)], np.int32)
        random_ = np.random.default_rng([*modes, *ranks, restart])
        shapes = [(ranks[k - 1], MODE, ranks[k]) for k in range(ORDER)]
        cores = [random_.standard_normal(shape) / math.sqrt(shape[2]) for shape in shapes]
        start = np.concatenate([core.ravel() for core in cores]).astype(np.float32)
        goal = np.ascontiguousarray(self.goal.transpose(modes))
        given = (before.ctypes.data, start.ctypes.data, goal.ctypes.data)
        error: float = self._fit(*given, STEPS, RATE, ENDED * self.norm)
        return error / self.norm


CUTS = [
    frozenset(part)
    for size in range(1, ORDER // 2 + 1)
    for part in itertools.combinations(range(ORDER), size)
    if 2 * size < ORDER or 0 in part
]


class Rings(Knowledge):
    """Ranks between pairs of modes say what a structure is, wherever it is written from.

    Across a cut of the modes in two the tensor's rank is at most the product of the ranks cut.
    """

    local = True
    part = "share"
    points = Points(
        [Parameter("ring", Choice(tuple(range(len(RINGS)))))]
        + [Parameter(f"rank{k}", IntRange(1, MOST)) for k in range(ORDER)]
    )

    def describe(self, params: dict[str, Any]) -> Described | None:
        structure = of_params(params)
        modes, ranks = structure
        bonds = [(modes[k], modes[(k + 1) % ORDER], math.log(ranks[k])) for k in range(ORDER)]
        count = parameters(structure)
        found = {"share": count / MODE**ORDER, "parameters": math.log(count)}
        found |= {f"{a}-{b}": 0.0 for a in range(ORDER) for b in range(a + 1, ORDER)}
        for a, b, rank in bonds:
            found[f"{min(a, b)}-{max(a, b)}"] = rank + 0.5
        for cut in CUTS:
            most = sum(rank for a, b, rank in bonds if (a in cut) != (b in cut))
            found["".join(map(str, sorted(cut)))] = min(most, len(cut) * math.log(MODE))
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
        trial = study.ask()
        for p in knowledge.points.parameters.values():
            p.domain.suggest(trial, p.name)
        structure = of_params(trial.params)
        (error,) = yield [structure]
        study.tell(trial, objective(error, parameters(structure)))


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
                    rings = [canonical(m, ranks) for m in swaps]
                    errors = yield rings
                    values = [
                        objective(e, parameters(s)) for e, s in zip(errors, rings, strict=True)
                    ]
                    modes, best = swaps[int(np.argmin(values))], min(values)
                    continue
                tried = _window(ranks[place], 2 if trip < 2 else 1)
                asked = tried[::2] if trip < 2 else tried
                options = [[*ranks[:place], r, *ranks[place + 1 :]] for r in tried]
                errors = yield [canonical(modes, options[tried.index(r)]) for r in asked]
                counts = [parameters(canonical(modes, o)) for o in options]
                guessed = objective(np.interp(tried, asked, errors), np.array(counts))
                ranks, best = options[int(np.argmin(guessed))], float(guessed.min())
            trip += 1
            if trip > 2 and best >= before - 1e-9:
                break


def _window(centre: int, radius: int) -> list[int]:
    low = min(max(1, centre - radius), MOST - 2 * radius)
    return list(range(low, low + 2 * radius + 1))


METHODS = {"structured": structured, "tnale": tnale}


def solved(values: list[tuple[float, int]]) -> int | None:
    """The evaluations until the tensor's own number of parameters was enough."""
    return next((i + 1 for i, (e, n) in enumerate(values) if n <= OWN and e <= ENOUGH), None)


def summary(found: dict[str, list[tuple[float, int]]]) -> str:
    lines = ["# The ring of a tensor", ""]
    lines += [
        f"Evaluations until a ring of {OWN} parameters, the tensor's own number, had an error of",
        f"at most {ENOUGH:g}; a run ended there.",
        f"Written by benchmarks/tensor_ring.py on {machine()}.",
        "",
    ]
    lines.append(
        f"| run | evaluations | best objective | its parameters | {OWN} parameters after |"
    )
    lines.append("|---|---|---|---|---|")
    for name, values in found.items():
        best = min((objective(e, n), n) for e, n in values)
        shown = solved(values) or "not found"
        lines.append(f"| {name} | {len(values)} | {best[0]:.4f} | {best[1]} | {shown} |")
    return "\n".join(lines) + "\n"


def save(fits: dict[str, float], found: dict[str, list[tuple[float, int]]], results: Path) -> None:
    for path, text in (
        (results, json.dumps(fits) + "\n"),
        (results.with_suffix(".md"), summary(found)),
    ):
        part = path.with_name(f".{path.name}.part")
        part.write_text(text)
        part.replace(path)


def run(wanted: Wanted, fits: dict[str, float], fit: Fitter, most: int) -> list[tuple[float, int]]:
    """(error, parameters) of every evaluation, up to the one that finds the tensor's own number."""
    found: list[tuple[float, int]] = []
    asked = next(wanted)
    while True:
        for structure in asked:
            if str(structure) not in fits:
                fits[str(structure)] = float(f"{fit(structure):.4g}")
            found.append((fits[str(structure)], parameters(structure)))
        if solved(found) or len(found) >= most:
            return found
        asked = wanted.send([error for error, _ in found[-len(asked) :]])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--evaluations", type=int, default=1000)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    kept = options.results
    fits: dict[str, float] = json.loads(kept.read_text()) if kept.exists() else {}
    found: dict[str, list[tuple[float, int]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        fit = Fitter(np.load(options.file)["goal"], Path(folder))
        for seed in range(options.seeds):
            for name in options.methods:
                wanted = METHODS[name](seed)
                found[f"{name} {seed}"] = run(wanted, fits, fit, options.evaluations)
                save(fits, found, kept)
                print(name, seed, solved(found[f"{name} {seed}"]), flush=True)
    print(summary(found))


if __name__ == "__main__":
    main()
