"""GPU tests and all benchmarks in one command: `python benchmarks/gpu.py`.

Needs torch, triton, numpy and pytest; what else a user could run (fla, causal-conv1d, ...) is
compared where it is installed. Writes one JSON and one table under benchmarks/results/, named after
the device; without a CUDA device the table says "not measured" and nothing else is written.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"


def gpu_tests(seconds: float) -> dict[str, object]:
    """The tests marked gpu, compiled and on the device; the settings of the rest want plugins."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-c", os.devnull]
    command += ["--rootdir", ".", "--confcutdir", "tests/kernels", "-p", "no:cacheprovider"]
    command += ["tests/kernels", "tests/test_gpu.py"]
    start = time.perf_counter()
    try:
        run = subprocess.run(
            command, cwd=HERE.parent, capture_output=True, text=True, timeout=seconds
        )
    except subprocess.TimeoutExpired:
        return {"passed": False, "summary": f"not finished after {seconds:.0f} s"}
    lines = run.stdout.strip().splitlines() or run.stderr.strip().splitlines()
    return {
        "passed": run.returncode == 0,
        "summary": lines[-1] if lines else "no output",
        "failures": [line for line in lines if line.startswith(("FAILED", "ERROR"))],
        "seconds": time.perf_counter() - start,
    }


def benchmark(stem: Path, seconds: float) -> str | None:
    """All of kernels.py on the device, to STEM.json and STEM.md; the reason where it failed."""
    command = [sys.executable, str(HERE / "kernels.py"), "--device", "cuda"]
    command += ["--json", f"{stem}.json", "--markdown", f"{stem}.md"]
    Path(f"{stem}.json").unlink(missing_ok=True)  # kernels.py would add to it
    try:
        run = subprocess.run(command, stderr=subprocess.PIPE, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return f"not finished after {seconds:.0f} s"
    return None if run.returncode == 0 else run.stderr[-2000:]


def workers(stem: Path, seconds: float) -> list[dict[str, object]] | str:
    """Trials an hour by the number of workers; the reason where it failed."""
    path = Path(f"{stem}-workers.json")
    command = [sys.executable, str(HERE / "gpu_workers.py"), "--json", str(path)]
    try:
        run = subprocess.run(command, stderr=subprocess.PIPE, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return f"not finished after {seconds:.0f} s"
    if run.returncode:
        return run.stderr[-2000:]
    rows: list[dict[str, object]] = json.loads(path.read_text())
    path.unlink()
    return rows


def trials(rates: list[dict[str, object]] | str) -> str:
    if isinstance(rates, str):
        return f"Trials an hour: not measured: {rates}\n"
    lines = ["| workers | step | trials an hour |", "|---|---|---|"]
    lines += [f"| {r['workers']} | {r['step']} | {r['trials_an_hour']} |" for r in rates]
    return "\n".join([*lines, ""])


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--seconds", type=float, default=590, help="time for all of it")
    args = p.parse_args()
    RESULTS.mkdir(exist_ok=True)
    if not torch.cuda.is_available():
        (RESULTS / "gpu.md").write_text(
            "# Kernels on CUDA\n\nnot measured: no CUDA device was at hand\n"
        )
        print("not measured: torch sees no CUDA device")
        return 0
    start = time.perf_counter()
    device = re.sub(r"\W+", "-", torch.cuda.get_device_name()).lower()
    stem = RESULTS / f"kernels-{device}"
    tests = gpu_tests(args.seconds / 3)
    rates = workers(stem, args.seconds / 3)
    failed = benchmark(stem, args.seconds - (time.perf_counter() - start))
    if failed is not None:
        print(f"benchmarks: {failed}", file=sys.stderr)
        return 1
    path = stem.with_suffix(".json")
    whole = json.loads(path.read_text()) | {"gpu_tests": tests, "workers": rates}
    path.write_text(json.dumps(whole, indent=1) + "\n")
    table = stem.with_suffix(".md")
    table.write_text(f"GPU tests: {tests['summary']}\n\n{trials(rates)}\n{table.read_text()}")
    print(f"GPU tests: {tests['summary']}; {path.name} and {table.name} written")
    return 0 if tests["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
