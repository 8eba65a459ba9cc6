"""Chains of mode products beside the NdLinear package, einsum and F.linear."""

from __future__ import annotations

import importlib.util
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kernel_cases import Case, Overhead, Tensors, Way
from patternsearch.kernels import _mode_product_cpu as plain_torch
from patternsearch.kernels.mode_product import mode_product

INSTALLED = importlib.util.find_spec("ndlinear") is not None


class Shape(NamedTuple):
    rows: int
    modes: tuple[int, ...]

    @property
    def width(self) -> int:
        return math.prod(self.modes)

    @property
    def trailing(self) -> list[int]:
        return [math.prod(self.modes[k + 1 :]) for k in range(len(self.modes))]

    def make(self, device: torch.device, dtype: torch.dtype) -> Tensors:
        x = torch.randn(self.rows, self.width, device=device).to(dtype)
        weights = [torch.randn(m, m, device=device) / m**0.5 for m in self.modes]
        biases = [torch.randn(m, device=device) for m in self.modes]
        return x, *(t.to(dtype) for t in (*weights, *biases))

    def ours(self, x: Tensor, *cores: Tensor) -> Tensor:
        n = len(self.modes)
        return mode_product(x, cores[:n], trailing=self.trailing, biases=cores[n:])

    def einsum(self, x: Tensor, *cores: Tensor) -> Tensor:
        n, z = len(self.modes), x.unflatten(-1, self.modes)
        for m in range(n):
            y = torch.einsum("oi,...i->...o", cores[m], z.movedim(m - n, -1)) + cores[n + m]
            z = y.movedim(-1, m - n)
        return z.flatten(1)

    def package(self) -> Way:
        """The layer of the package itself, called on our parameters."""
        if not INSTALLED:
            return Way(self.einsum, missing="ndlinear is not installed (pip install ndlinear)")
        from ndlinear import NdLinear

        layer = NdLinear(self.modes, self.modes)

        def run(x: Tensor, *cores: Tensor) -> Tensor:
            n = len(self.modes)
            for m, linear in enumerate(layer.align_layers):  # at no cost, as if it owned them
                linear._parameters.update(weight=cores[m], bias=cores[n + m])
            y: Tensor = layer(x.unflatten(-1, self.modes))
            return y.flatten(1)

        return Way(run)

    def dense(self, x: Tensor, *cores: Tensor) -> Tensors:
        kron = cores[0]
        for factor in cores[1 : len(self.modes)]:
            kron = torch.kron(kron, factor)
        return x, kron, self.einsum(torch.zeros_like(x[:1]), *cores)[0]


def case(name: str, shape: Shape, goal: bool = False) -> Case:
    others = {
        "NdLinear": shape.package(),
        "einsum": Way(shape.einsum),
        "dense": Way(F.linear, shape.dense),
    }
    numbers, work = shape.rows * shape.width, 2 * shape.rows * shape.width * sum(shape.modes)
    return Case(
        name,
        shape.make,
        Way(shape.ours),
        others,
        shape.einsum,
        moved=(2 * numbers, 5 * numbers),
        flops=(work, 3 * work),
        goals={"NdLinear": 1.5} if goal else {},
        scale=(f"{len(shape.modes)} modes", shape.width),
    )


def cases(device: torch.device) -> list[Case]:
    cuda = device.type == "cuda"
    rows = 16384 if cuda else 2048
    shapes = ((8, 8), (16, 16), (8, 8, 8), (32, 32), (16, 16, 16), (64, 64))
    judged = () if cuda else ((32, 32), (16, 16, 16))
    return [case(f"{m} -> {m}", Shape(rows, m), m in judged) for m in shapes]


def growth(device: torch.device, length: int) -> Case:
    return case(f"{length} rows", Shape(length, (16, 16)))


def overhead() -> Overhead:
    shape = Shape(2, (2, 2))
    return Overhead(
        lambda: shape.make(torch.device("cpu"), torch.float32),
        lambda x, *c: mode_product(x, c[:2], trailing=[2, 1], biases=c[2:], impl="kernel"),
        lambda x, *c: plain_torch.forward(x, c[:2], c[2:], [2, 1]),
        lambda dy, x, *c: plain_torch.backward(dy, x, c[:2], c[2:], [2, 1], True),
    )
