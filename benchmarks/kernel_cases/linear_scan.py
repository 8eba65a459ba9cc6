"""Linear recurrences beside associative_scan, loops of torch operations, and fla's HGRN."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch._higher_order_ops.associative_scan import associative_scan

from kernel_cases import PLAIN, SMALL, Case, Overhead, Tensors, Way, no_compiler
from patternsearch.kernels import _linear_scan_cpu as plain_torch
from patternsearch.kernels.linear_scan import linear_scan


class Shape(NamedTuple):
    batch: int
    length: int
    width: int
    order: int = 1

    @property
    def elements(self) -> int:
        return self.batch * self.length * self.width

    def make(self, device: torch.device, dtype: torch.dtype) -> Tensors:
        b = torch.randn(self.batch, self.length, self.width, device=device)
        if self.order == 1:
            return (0.5 + 0.5 * torch.rand_like(b)).to(dtype), b.to(dtype)
        a = torch.rand(self.batch, self.length, self.order, self.width, device=device) - 0.5
        return (a / self.order).to(dtype), b.to(dtype)


def loop(a: Tensor, b: Tensor) -> Tensor:
    """One operation a position and lag."""
    if a.dim() == 3:
        a = a.unsqueeze(2)
    past = [torch.zeros_like(b[:, 0])] * a.shape[2]
    rows = []
    for decays, row in zip(a.unbind(1), b.unbind(1), strict=True):
        for decay, before in zip(decays.unbind(1), past, strict=True):
            row = torch.addcmul(row, decay, before)
        rows.append(row)
        past = [row, *past[:-1]]
    return torch.stack(rows, 1)


def two_level(a: Tensor, b: Tensor) -> Tensor:
    """Chunks of about sqrt(T) positions side by side, then the states between them, then both."""
    length = a.shape[1]
    rows = 2 ** round(math.log2(length) / 2)
    decays, inputs = (x.unflatten(1, (length // rows, rows)).unbind(2) for x in (a, b))
    local, product = [inputs[0]], [decays[0]]
    for decay, given in zip(decays[1:], inputs[1:], strict=True):
        local.append(torch.addcmul(given, decay, local[-1]))
        product.append(product[-1] * decay)
    state = torch.zeros_like(b[:, 0])
    starts = []
    for whole, end in zip(product[-1].unbind(1), local[-1].unbind(1), strict=True):
        starts.append(state)
        state = torch.addcmul(end, whole, state)
    before = torch.stack(starts, 1).unsqueeze(2)
    h = torch.addcmul(torch.stack(local, 2), torch.stack(product, 2), before)
    return h.flatten(1, 2)


def combine(left: Tensors, right: Tensors) -> Tensors:
    return left[0] * right[0], right[0] * left[1] + right[1]


def associative(mode: str) -> Callable[[Tensor, Tensor], Tensor]:
    def run(a: Tensor, b: Tensor) -> Tensor:
        h: Tensor = associative_scan(combine, (a, b), 1, combine_mode=mode)[1]
        return h

    return run


def compiled(fn: Callable[..., Tensor], device: torch.device, one_way: str | None = None) -> Way:
    run = torch.compile(fn, dynamic=False)
    return Way(run, missing=no_compiler(device), forward_only=one_way, compiled=True)


def hgrn(device: torch.device) -> Way:
    """It takes the logarithm of the decays, made untimed."""
    if device.type != "cuda" or not importlib.util.find_spec("fla"):
        return Way(loop, missing="needs CUDA and fla")
    from fla.ops.hgrn import chunk_hgrn

    def run(g: Tensor, b: Tensor) -> Tensor:
        h: Tensor = chunk_hgrn(b, g)[0]
        return h

    return Way(run, prepare=lambda a, b: (a.log(), b))


def others(shape: Shape, device: torch.device) -> dict[str, Way]:
    if shape.order > 1:
        return {"loop": Way(loop), "scaled companion scan": Way(companion)}
    ways = {"loop": Way(loop), "two-level loop": Way(two_level)}
    if shape.length <= 64:
        ways[PLAIN] = Way(partial(linear_scan, impl="torch"))
    ways["two-level loop compiled"] = compiled(two_level, device)
    if shape.length > 1024:
        reason = "every step of a chunk is unrolled, minutes to compile"
        ways["two-level loop compiled"] = Way(two_level, missing=reason)
    if device.type == "cuda":
        one_way = "associative_scan documents no gradients"
        ways["associative_scan compiled"] = compiled(associative("pointwise"), device, one_way)
    else:
        ways["associative_scan compiled"] = compiled(associative("generic"), device)
        ways["associative_scan"] = Way(associative("generic"))
    return ways | {"fla chunk_hgrn": hgrn(device)}


def companion(a: Tensor, b: Tensor) -> Tensor:
    """Order p as a first-order recurrence of p x p matrices, by an associative scan."""
    order = a.shape[2]
    shift = torch.eye(order, dtype=a.dtype, device=a.device)[:-1]
    top = a.transpose(2, 3).unsqueeze(3)
    rest = shift.expand(*top.shape[:3], order - 1, order)
    states = torch.nn.functional.pad(b.unsqueeze(-1), (0, order - 1)).unsqueeze(-1)

    def step(left: Tensors, right: Tensors) -> Tensors:
        return right[0] @ left[0], right[0] @ left[1] + right[1]

    found: Tensor = associative_scan(
        step, (torch.cat((top, rest), 3), states), 1, combine_mode="generic"
    )[1]
    return found[..., 0, 0]


def case(shape: Shape, device: torch.device, goals: dict[str, float] | None = None) -> Case:
    n, p = shape.elements, shape.order
    sizes = f"B{shape.batch} T{shape.length} D{shape.width}" + (f" order {p}" if p > 1 else "")
    return Case(
        sizes,
        shape.make,
        Way(linear_scan),
        others(shape, device),
        loop,
        ((2.0 + p) * n, (5.0 + 3 * p) * n),
        (2.0 * p * n, 5.0 * p * n),
        goals or {},
    )


def cases(device: torch.device) -> list[Case]:
    if device.type == "cuda":
        large = [
            (64, 64, 64),
            (16, 2048, 1024),
            (16, 16_384, 128),
            (4, 8192, 4096),
            (1, 65_536, 256),
        ]
        return [case(Shape(*s), device) for s in large] + [case(Shape(8, 4096, 512, 2), device)]
    goals = {"associative_scan compiled": 1.5, "two-level loop": 1.5}
    return [
        case(Shape(64, 64, 64), device, SMALL),
        case(Shape(16, 256, 128), device),
        case(Shape(4, 2048, 256), device, goals),
        case(Shape(2, 8192, 256), device),
        case(Shape(1, 65_536, 64), device),
        case(Shape(4, 1024, 128, 2), device),
    ]


def growth(device: torch.device, length: int) -> Case:
    return case(Shape(1, length, 128), device)


def overhead() -> Overhead:
    shape = Shape(2, 8, 16)

    def forward(a: Tensor, b: Tensor) -> Tensor:
        return plain_torch.forward(a.unsqueeze(2), b, None, False)

    def backward(dh: Tensor, a: Tensor, h: Tensor) -> object:
        return plain_torch.backward(dh, a.unsqueeze(2), h, None, False)

    return Overhead(
        lambda: shape.make(torch.device("cpu"), torch.float32), linear_scan, forward, backward
    )
