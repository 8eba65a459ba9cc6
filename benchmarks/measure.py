"""Clock, ceilings, memory and error of a differentiable function, on CPU or CUDA."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from kernel_cases import Case, Way

ROUNDS = 7
SAMPLE = 0.02  # seconds a sample lasts at least
MOST = 1.5  # seconds that the samples of one way take at most; a slower call is measured once

Call = Callable[[], Any]


def machine(device: torch.device) -> dict[str, str]:
    """Name of the device and versions; nothing that identifies the host."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        info = Path("/proc/cpuinfo")
        lines = info.read_text().splitlines() if info.exists() else []
        model = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
        name = f"{os.cpu_count()} cores of {model[0] if model else platform.machine()}"
        name += f", {torch.get_num_threads()} threads"
    found = {
        "kind": device.type,
        "device": name,
        "system": platform.system(),
        "torch": f"torch {torch.__version__}",
        "python": f"Python {platform.python_version()}",
    }
    if device.type == "cuda":
        import triton

        found["triton"] = f"triton {triton.__version__}"
    return found


class Clock:
    """Seconds of `n` calls in a row; on CUDA by events, with a cold L2 cache before each call."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        if self.cuda:
            self.flush = torch.empty(2**28, dtype=torch.int8, device=device)

    def __call__(self, call: Call, n: int) -> float:
        if not self.cuda:
            start = time.perf_counter()
            for _ in range(n):
                call()
            return (time.perf_counter() - start) / n
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(n)]
        for start, end in events:
            self.flush.zero_()
            start.record()
            call()
            end.record()
        torch.cuda.synchronize()
        return statistics.median(start.elapsed_time(end) for start, end in events) / 1000


def interleaved(
    calls: Sequence[Call], device: torch.device, rounds: int = ROUNDS
) -> list[list[float]]:
    """Seconds a call, `rounds` samples each, taken in turn so that noise hits all alike.

    A way that takes more than MOST seconds for them gets fewer samples, at least one.
    """
    clock = Clock(device)
    counts, most = [], []
    samples: list[list[float]] = []
    for call in calls:
        call()  # compiles, builds caches: seconds that are no part of a call
        once = clock(call, 1)
        counts.append(max(1, min(500, int(SAMPLE / once))))
        most.append(min(rounds, int(MOST / once)))
        samples.append([] if most[-1] else [once])
    for i in range(rounds):
        for call, n, last, taken in zip(calls, counts, most, samples, strict=True):
            if i < last:
                taken.append(clock(call, n))
    return samples


def given(way: Way, inputs: Sequence[torch.Tensor], train: bool) -> list[torch.Tensor]:
    """Inputs in the layout of the way; leaves with gradients in training, or for its one graph."""
    leaf = train or (way.compiled and way.forward_only is None)
    return [x.detach().requires_grad_(leaf) for x in way.prepare(*(x.detach() for x in inputs))]


def forward_call(way: Way, inputs: Sequence[torch.Tensor]) -> Call:
    plain = given(way, inputs, False)

    def call() -> torch.Tensor:
        with torch.set_grad_enabled(plain[0].requires_grad):
            return way.run(*plain)

    return call


def both_call(way: Way, inputs: Sequence[torch.Tensor], seed: int = 1) -> Call:
    leaves = given(way, inputs, True)
    y = forward_call(way, inputs)()
    dy = torch.empty_like(y).normal_(generator=torch.Generator(y.device).manual_seed(seed))

    def call() -> None:
        torch.autograd.grad(way.run(*leaves), leaves, dy)

    return call


def peak_bytes(call: Call, device: torch.device) -> int:
    """Largest sum of what `call`, run before, holds beyond what was held before it."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(profile_memory=True, acc_events=True) as profile:
        call()
    events = profile.profiler.kineto_results.events()  # type: ignore[union-attr]
    sizes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    held = peak = 0
    for _, size in sizes:
        held += size
        peak = max(peak, held)
    return peak


def error(way: Way, case: Case, inputs: Sequence[torch.Tensor]) -> float:
    """Largest error of the output, relative to its largest exact entry."""
    with torch.no_grad():
        exact = case.exact(*(x.double() for x in inputs))
    got = forward_call(way, inputs)().detach()
    got = way.restore(got) if way.restore else got
    return ((got.double() - exact).abs().max() / exact.abs().max()).item()


def ceilings(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """Measured bytes/s of a large copy (read and written) and FLOP/s of a large product."""
    cuda = device.type == "cuda"
    x = torch.randn(2**30 if cuda else 2**26, device=device, dtype=torch.float32)
    y = torch.empty_like(x)
    n = 8192 if cuda else 2048
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)
    copy, product = interleaved([lambda: y.copy_(x), lambda: torch.mm(a, b, out=out)], device)
    return {
        "copy_bytes_per_s": 2 * x.nbytes / statistics.median(copy),
        "matmul_flops_per_s": 2 * n**3 / statistics.median(product),
    }
