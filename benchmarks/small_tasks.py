"""Does the search beat the designs an expert would start from? On the tasks that ship.

For every sweep seed one `patternsearch sweep TASK` as shipped. The learning rate of every expert
design then gets as many trials as the sweep had. The top of each sweep and every expert are trained
again from fresh seeds, and only now the test metric is read: mean and 95 % confidence interval.

    python benchmarks/small_tasks.py digits digits-permuted mqar selective-copy

Writes benchmarks/results/small_tasks.json and .md. Takes about half an hour on 2 cores.
"""

from __future__ import annotations

import argparse
import concurrent.futures as futures
import json
import math
import multiprocessing
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def sweep(task: str, seed: int, root: Path) -> tuple[Path, float]:
    """One sweep by the command line as shipped; its folder and wall seconds."""
    name = f"{task}-{seed}"
    command = [sys.executable, "-m", "patternsearch", "sweep", task, "--seed", str(seed)]
    started = time.perf_counter()
    subprocess.run(
        [*command, "--name", name, "--dir", str(root)], check=True, stdout=subprocess.DEVNULL
    )
    return root / name, time.perf_counter() - started


def train(job: dict[str, Any]) -> dict[str, Any]:
    """One training in a worker process; validation and test metric."""
    from patternsearch.search.worker import Job, Worker
    from patternsearch.task import get_task

    metric, worker = get_task(job["task"]).metric, Worker()
    work = {k: job[k] for k in ("task", "assignment", "train", "seed")}
    goal = (metric, "maximize")
    worker.start(Job(0, **work, device="cpu", objective=goal, keep_above=math.inf, test=True))
    while not (step := worker.step()).done:
        pass
    if step.error is not None or step.row is None or step.costs is None:  # diverged
        return {**job, "valid": -math.inf, "test": 0.0}
    return {**job, "valid": step.row[metric], "test": step.costs[f"test_{metric}"]}


def candidates(task: str, folders: list[Path], top: int) -> list[dict[str, Any]]:
    """The best of each sweep that are no expert designs."""
    from patternsearch.search.results import read_results

    found = []
    for folder in folders:
        results = read_results(folder)
        best = [t for t in results.complete() if not t.expert][:top]
        found += [
            {
                "task": task,
                "name": f"{folder.name} trial {t.number}",
                "pattern": t.pattern,
                "assignment": t.assignment.to_dict(),
                "train": t.train,
                "parameters": t.values["parameters"],
                "flops": t.values["flops"],
                "order": max((b.mixer.order for b in t.assignment.blocks if b.mixer), default=1),
            }
            for t in best
        ]
    return found


def experts(task: str, trials: int) -> list[list[dict[str, Any]]]:
    """For every expert design of the task's space, its trials of the learning rate."""
    from patternsearch import describe
    from patternsearch.config import load_config
    from patternsearch.sizes import model_cost, resolve
    from patternsearch.space import load_space
    from patternsearch.task import get_task

    config, spec = load_config(task), get_task(task).spec
    space = load_space(config.space or get_task(task).space)
    domain: Any = space.parameters()["train.lr"]
    step = (domain.high / domain.low) ** (1 / max(trials - 1, 1))
    designs = []
    for name, params in space.experts.items():
        assignment = resolve(space.point(params)[1], spec)
        cost = model_cost(assignment, spec)
        base = {
            "task": task,
            "name": name,
            "pattern": describe.short(assignment),
            "assignment": assignment.to_dict(),
            "parameters": cost.parameters,
            "flops": cost.flops,
        }
        settings = config.train.model_dump()
        rates = [domain.low * step**i for i in range(trials)]
        designs.append([{**base, "train": {**settings, "lr": lr}, "seed": 0} for lr in rates])
    return designs


def again(pool: futures.Executor, jobs: list[dict[str, Any]], seeds: range) -> list[dict[str, Any]]:
    """Each job from fresh seeds: mean test metric and the half width of its interval."""
    from patternsearch.search.interval import estimate

    runs = list(pool.map(train, [{**job, "seed": seed} for job in jobs for seed in seeds]))
    rows = []
    for i, job in enumerate(jobs):
        tests = [r["test"] for r in runs[i * len(seeds) : (i + 1) * len(seeds)]]
        found = estimate(tests)
        rows.append({**job, "tests": tests, "mean": found.mean, "half": found.half})
    return sorted(rows, key=lambda row: -row["mean"])


def compare(
    task: str,
    seeds: int,
    top: int,
    fresh: int,
    pool: futures.Executor,
    root: Path,
    known: list[dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """The result of a task; `known` are its experts' rows where they are not trained again."""
    done = [sweep(task, seed, root) for seed in range(seeds)]
    found = candidates(task, [folder for folder, _ in done], top)
    from patternsearch.config import load_config

    trials = load_config(task).trials
    fresh_seeds = range(100, 100 + fresh)
    if known is None:
        designs = experts(task, trials)
        tuned = [max(pool.map(train, design), key=lambda r: r["valid"]) for design in designs]
        known = again(pool, tuned, fresh_seeds)
    return {
        "task": task,
        "sweep_seconds": [round(s, 1) for _, s in done],
        "trials": trials,
        "found": again(pool, found, fresh_seeds),
        "experts": known,
    }


def table(rows: list[dict[str, Any]], machine: str) -> str:
    lines = [
        f"Measured on {machine}. Test accuracy: mean of fresh seeds and 95 % interval.",
        "",
        "| task | what | pattern | test | parameters | FLOPs |",
        "|---|---|---|---|---|---|",
    ]
    for result in rows:
        best = [("found", r) for r in result["found"][:3]]
        for kind, r in [*best, *((f"expert: {e['name']}", e) for e in result["experts"])]:
            pattern = r["pattern"].replace("|", "/")
            lines.append(
                f"| {result['task']} | {kind} | {pattern} | {r['mean']:.4f} ± {r['half']:.4f} | "
                f"{r['parameters']:,.0f} | {r['flops']:,.0f} |"
            )
    seconds = "; ".join(f"{r['task']} {r['sweep_seconds']}" for r in rows if r["sweep_seconds"])
    return "\n".join([*lines, "", f"Seconds of the sweeps, command to prompt: {seconds}"])


def machine() -> str:
    """Nothing that identifies the host."""
    import platform

    from patternsearch.search.provenance import device

    here = device()
    gpus = ", ".join(here["gpus"]) or "no GPU"
    return f"{here['cores']} cores of {here['cpu']}, {platform.system()}, {gpus}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tasks", nargs="+")
    parser.add_argument("--seeds", type=int, default=3, help="sweeps a task")
    parser.add_argument("--top", type=int, default=3, help="trials of each sweep trained again")
    parser.add_argument("--fresh", type=int, default=5, help="seeds they are trained from")
    parser.add_argument("--keep-experts", action="store_true", help="as the output has them")
    parser.add_argument("--output", type=Path, default=RESULTS / "small_tasks.json")
    options = parser.parse_args()
    spawn = multiprocessing.get_context("spawn")
    done: list[dict[str, Any]] = []
    if options.output.exists():
        done = json.loads(options.output.read_text())["results"]
    with (
        tempfile.TemporaryDirectory() as folder,
        futures.ProcessPoolExecutor(mp_context=spawn) as pool,
    ):
        for task in options.tasks:
            known = next((r["experts"] for r in done if r["task"] == task), None)
            sizes = (options.seeds, options.top, options.fresh, pool, Path(folder))
            result = compare(task, *sizes, known if options.keep_experts else None)
            done = [r for r in done if r["task"] != task] + [result]
            text = json.dumps({"machine": machine(), "results": done}, indent=1)
            options.output.write_text(text)
            print(table([result], machine()), flush=True)
    options.output.with_suffix(".md").write_text(table(done, machine()) + "\n")


if __name__ == "__main__":
    main()
