"""GPU tests and all benchmarks in one command, in ten minutes: `python benchmarks/gpu.py`.

Needs torch, triton, numpy and pytest; what else a user could run (fla, causal-conv1d, ...) is
compared where it is installed. Writes one JSON and one table under benchmarks/results/, named after
the device, anew after each part: a run that is cut off keeps what it has. Without a CUDA device the
table says "not measured" and nothing else is written.

First the tests, and then every benchmark once, run side by side on all cores: what they compile is
kept on disk. Then trials an hour, and last the operators one after the other, alone on the device.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from kernel_cases import operators
from measure import machine

from kernels import report as tables  # the script beside this one, which finds the package

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
DTYPE = "bfloat16"
LAST = 200  # lines of a failed run that are kept
SHARES = {"tests": 0.27, "once": 0.13, "workers": 0.18}  # of the time, at most


def run(commands: Sequence[Sequence[str]], seconds: float) -> list[tuple[int | None, str]]:
    """Exit status (None: ended for want of time) and output of commands run side by side."""
    end = time.monotonic() + seconds
    with contextlib.ExitStack() as stack:
        outputs = [stack.enter_context(tempfile.TemporaryFile("w+")) for _ in commands]
        running = [
            subprocess.Popen(
                command, cwd=HERE.parent, stdout=out, stderr=out, text=True, start_new_session=True
            )
            for command, out in zip(commands, outputs, strict=True)
        ]
        found: list[tuple[int | None, str]] = []
        for process, out in zip(running, outputs, strict=True):
            status: int | None = None
            with contextlib.suppress(subprocess.TimeoutExpired):
                status = process.wait(max(0.0, end - time.monotonic()))
            with contextlib.suppress(ProcessLookupError):  # and its own workers
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            out.seek(0)
            found.append((status, out.read()))
    return found


def pytest(*arguments: str) -> list[str]:
    """pytest without the settings of the repository, which want plugins."""
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-c", os.devnull, "--rootdir", "."]
    command += ["--confcutdir", "tests/kernels", "-p", "no:cacheprovider", "-W", "ignore"]
    return [*command, *arguments]


def gpu_tests(seconds: float) -> dict[str, Any]:
    """The tests marked gpu, compiled and on the device; several processes, since they compile."""
    start = time.monotonic()
    where = ("tests/kernels", "tests/test_gpu.py")
    [(_, text)] = run([pytest("-q", "--collect-only", *where)], seconds)
    names = [line for line in text.splitlines() if "::" in line]
    count = max(1, (os.cpu_count() or 2) - 2)
    parts = [names[i::count] for i in range(min(count, len(names)))]
    left = seconds - (time.monotonic() - start)
    outputs = run([pytest("-v", "--tb=short", *part) for part in parts], left)
    ended: Counter[str] = Counter()
    failures = []
    for _, out in outputs:
        ended.update(re.findall(r"^tests/.*::.* (PASSED|FAILED|ERROR|SKIPPED)\b", out, re.M))
        failures += [line for line in out.splitlines() if line.startswith(("FAILED", "ERROR"))]
    lost = len(names) - sum(ended.values())
    bad = ended["FAILED"] + ended["ERROR"]
    counts = ", ".join(f"{n} {word.lower()}" for word, n in sorted(ended.items()))
    return {
        "passed": ended["PASSED"] > 0 and not bad and not lost,
        "summary": f"{counts or 'none ran'}" + (f", {lost} not reached" if lost else ""),
        "failures": failures,
        "output": [out.splitlines()[-LAST:] for status, out in outputs if status not in (0, None)]
        or ([] if names else text.splitlines()[-LAST:]),
        "seconds": time.monotonic() - start,
    }


def benchmark(name: str, path: Path, *arguments: str) -> list[str]:
    command = [sys.executable, str(HERE / "kernels.py"), "--device", "cuda", "--dtype", DTYPE]
    return [*command, "--op", name, "--json", str(path), *arguments]


def once(names: Sequence[str], seconds: float) -> None:
    """Every way of every case once, for what it leaves in the caches of Triton and Inductor."""
    with tempfile.TemporaryDirectory() as folder:
        paths = {name: Path(folder) / f"{name}.json" for name in names}
        run([benchmark(name, path, "--rounds", "0") for name, path in paths.items()], seconds)


def workers(seconds: float) -> dict[str, Any]:
    """Trials an hour by the number of workers, as far as it came; what it said where it failed."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "workers.json"
        command = [sys.executable, str(HERE / "gpu_workers.py"), "--json", str(path)]
        [(status, out)] = run([[*command, "--seconds", "8"]], seconds)
        rows = json.loads(path.read_text()) if path.exists() else []
    return {"rows": rows, **ending(status, out)}


def ending(status: int | None, out: str) -> dict[str, Any]:
    if status is None:
        return {"failed": "the time was over"}
    return {"failed": "\n".join(out.splitlines()[-LAST:])} if status else {}


def report(whole: dict[str, Any]) -> str:
    """The table of all that is there."""
    tests, rates = whole.get("gpu_tests"), whole.get("workers")
    lines = [f"GPU tests: {tests['summary'] if tests else 'not reached'}", ""]
    lines += [f"- {line}" for line in (tests or {}).get("failures", [])]
    lines += ["", "| workers | step | trials an hour |", "|---|---|---|"]
    lines += [
        f"| {r['workers']} | {r['step']} | {r['trials_an_hour']} |"
        for r in (rates or {}).get("rows", [])
    ]
    lines += [
        f"\n{name}: not to its end: {said.splitlines()[-1]}"
        for name, said in whole.get("failed", {}).items()
    ]
    return "\n".join([*lines, "", tables(whole), ""])


def write(path: Path, text: str) -> None:
    part = path.with_name(f"{path.name}.part")
    part.write_text(text)
    part.replace(path)


def measure(stem: Path, seconds: float) -> dict[str, Any]:
    """All parts, the files written after each."""
    end, names = time.monotonic() + seconds, list(operators())
    file, table = Path(f"{stem}.json"), Path(f"{stem}.md")
    found = machine(torch.device("cuda")) | {"dtype": DTYPE}
    whole: dict[str, Any] = {"machine": found, "operators": {}, "failed": {}}

    def keep() -> None:
        write(file, json.dumps(whole, indent=1) + "\n")
        write(table, report(whole))

    whole["gpu_tests"] = gpu_tests(SHARES["tests"] * seconds)
    keep()
    print(f"GPU tests: {whole['gpu_tests']['summary']}", flush=True)
    whole["workers"] = workers(SHARES["workers"] * seconds)
    if "failed" in whole["workers"]:
        whole["failed"]["workers"] = whole["workers"]["failed"]
    keep()
    once(names, SHARES["once"] * seconds)
    for i, name in enumerate(names):
        share = (end - time.monotonic()) / (len(names) - i)
        [(status, out)] = run([benchmark(name, file)], share)
        whole = json.loads(file.read_text())  # with what the benchmark added
        if "failed" in (said := ending(status, out)):
            whole["failed"][name] = said["failed"]
        keep()
        print(f"{name}: {said.get('failed', 'measured').splitlines()[-1]}", flush=True)
    return whole


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--seconds", type=float, default=580, help="time for all of it")
    args = p.parse_args()
    RESULTS.mkdir(exist_ok=True)
    if not torch.cuda.is_available():
        (RESULTS / "gpu.md").write_text(
            "# Kernels on CUDA\n\nnot measured: no CUDA device was at hand\n"
        )
        print("not measured: torch sees no CUDA device")
        return 0
    device = re.sub(r"\W+", "-", torch.cuda.get_device_name()).lower()
    stem = RESULTS / f"kernels-{device}"
    whole = measure(stem, args.seconds)
    print(f"{stem.name}.json and {stem.name}.md written")
    return 0 if whole["gpu_tests"]["passed"] and not whole["failed"] else 1


if __name__ == "__main__":
    sys.exit(main())
