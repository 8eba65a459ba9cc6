"""Two-factor products beside a dense matrix, the einsums of the definition and two `bmm`."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kernel_cases import Case, Overhead, Tensors, Way
from patternsearch.kernels import _two_factor_cpu as plain_torch
from patternsearch.kernels.two_factor import two_factor

MOST = 1 << 32  # numbers between the factors
HELD = 1 << 26  # those that einsum and bmm are given on CPU: at more, one call takes minutes


class Shape(NamedTuple):
    rows: int
    f: int
    d: int
    r: int
    g: int
    a: int
    e: int
    b: int

    @property
    def sizes(self) -> plain_torch.Sizes:
        return plain_torch.Sizes(*self[1:])

    def make(self, device: torch.device, dtype: torch.dtype) -> Tensors:
        n = self.sizes
        x = torch.randn(self.rows, n.inputs, device=device)
        left = torch.randn(n.f, n.d, n.r, n.g, n.a, device=device) / n.a**0.5
        right = torch.randn(n.f, n.e, n.r, n.b, n.g, device=device) / (n.r * n.b * n.g) ** 0.5
        return x.to(dtype), left.to(dtype), right.to(dtype)


def exact(x: Tensor, left: Tensor, right: Tensor) -> Tensor:
    return F.linear(x, plain_torch.dense(left, right))


def einsums(x: Tensor, left: Tensor, right: Tensor) -> Tensor:
    n = plain_torch.Sizes.of(left, right)
    z = torch.einsum("fdrga,ngba->nfdrbg", left, x.view(-1, n.g, n.b, n.a))
    return torch.einsum("ferbg,nfdrbg->nefd", right, z).flatten(1)


def two_bmm(x: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """As HazyResearch/fly and compute-better-spent write it: bmm, permute, bmm, permute."""
    n = plain_torch.Sizes.of(left, right)
    seen = x.view(-1, n.g, n.b, n.a).transpose(0, 1).reshape(n.g, -1, n.a)
    z = torch.bmm(seen, left.permute(3, 4, 0, 1, 2).reshape(n.g, n.a, -1))
    z = z.view(n.g, -1, n.b, n.f, n.d, n.r).permute(3, 1, 4, 5, 2, 0)
    y = torch.bmm(z.reshape(n.f, -1, n.r * n.b * n.g), right.reshape(n.f, n.e, -1).transpose(1, 2))
    return y.view(n.f, -1, n.d, n.e).permute(1, 3, 0, 2).reshape(len(x), -1)


def dense() -> Way:
    def prepare(x: Tensor, left: Tensor, right: Tensor) -> Tensors:
        return x, plain_torch.dense(left, right).contiguous()

    return Way(F.linear, prepare)


def case(
    structure: str, width: int, shape: Shape, goals: dict[str, float], held: int = MOST
) -> Case:
    n = shape.sizes
    missing = None
    if shape.rows * n.between > held:
        missing = f"it holds {shape.rows * n.between:,} numbers several times"
    weights = n.f * n.d * n.r * n.g * n.a + n.f * n.e * n.r * n.b * n.g
    flops = 2 * shape.rows * sum(n.products)
    if 4 * sum(n.products) > width * width:
        goals = {}
    return Case(
        f"{structure}, width {width}",
        shape.make,
        Way(two_factor),
        {
            "dense": dense(),
            "einsum": Way(einsums, missing=missing),
            "bmm": Way(two_bmm, missing=missing),
        },
        exact,
        moved=(2 * shape.rows * width + weights, 5 * shape.rows * width + 3 * weights),
        flops=(flops, 3 * flops),
        goals=goals,
        scale=(structure, width),
    )


def shapes(width: int, rows: int) -> dict[str, Shape]:
    """Structure -> its sizes: square ones have blocks as many as they are wide, or nearly."""
    p = 2 ** (int(math.log2(width)) // 2)
    q, eighth = width // p, width // 8
    return {
        "monarch": Shape(rows, p, 1, 1, p, q, q, 1),
        "monarch, 8 blocks": Shape(rows, 8, 1, 1, 8, eighth, eighth, 1),
        "monarch, a quarter": Shape(rows, eighth, 1, 1, eighth, 8, 8, 1),
        "btt, rank 2": Shape(rows, p, 1, 2, p, q, q, 1),
        "kronecker": Shape(rows, 1, q, 1, 1, q, p, p),
        "einsum, 4 blocks": Shape(rows, 4, q // 4, 2, 4, q // 4, p, p),
    }


def cases(device: torch.device) -> list[Case]:
    cuda = device.type == "cuda"
    widths, rows = (
        ([2**k for k in range(10, 15)], 16384) if cuda else ([256, 512, 1024, 2048], 2048)
    )
    found = []
    for width in widths:
        goals = {"bmm": 2.0} if cuda else {"einsum": 1 / 1.1, "bmm": 1 / 1.1}
        if width >= (2048 if cuda else 512):
            goals["dense"] = 1.0
        for name, shape in shapes(width, rows).items():
            if rows * shape.sizes.between <= MOST:  # einsum and bmm hold it several times
                found.append(case(name, width, shape, goals, MOST if cuda else HELD))
    return found


def growth(device: torch.device, length: int) -> Case:
    return case("monarch", 256, Shape(length, 16, 1, 1, 16, 16, 16, 1), {})


def overhead() -> Overhead:
    shape = Shape(32, 8, 1, 1, 8, 16, 32, 1)  # as many multiplications as the kernel needs

    def forward(x: Tensor, left: Tensor, right: Tensor) -> Tensor:
        return plain_torch.apply(x, left, right, None, None, "none", False)[0]

    return Overhead(
        lambda: shape.make(torch.device("cpu"), torch.float32),
        lambda *t: two_factor(*t, impl="kernel"),
        forward,
        lambda dy, *t: plain_torch.backward(dy, *t, True, True),
    )
