"""A chain of mode products in plain torch: rows in slabs whose intermediates stay in the cache.

Each product is a matrix product of the factor with the array as it lies, so nothing is transposed
and nothing between the factors reaches main memory. The backward computes the intermediates of a
slab again: that takes less time than the page faults of keeping them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ._windows import working_dtype

SLAB = 1 << 18  # numbers of an intermediate at a time
FEW = 8  # entries after a mode below which a transposed copy beats products of so few columns
MANY = 16  # entries after a mode from which the factor's gradient is summed over products of them


def sizes_of(size: int, factors: Sequence[Tensor]) -> list[int]:
    """Numbers of a row before, between and after the factors."""
    found = [size]
    for factor in factors:
        found.append(found[-1] // factor.shape[1] * factor.shape[0])
    return found


def product(z: Tensor, factor: Tensor, after: int, out: Tensor, bias: Tensor | None = None) -> None:
    """out[a, o, b] = sum_i factor[o, i] z[a, i, b] + bias[o]; both contiguous, b < after."""
    o, i = factor.shape
    if after == 1:
        rows, y = z.view(-1, i), out.view(-1, o)
        if bias is None:
            torch.mm(rows, factor.t(), out=y)
        else:
            torch.addmm(bias, rows, factor.t(), out=y)
        return
    cube, y = z.view(-1, i, after), out.view(-1, o, after)
    if after < FEW:
        moved = cube.transpose(1, 2).reshape(-1, i) @ factor.t()
        y.copy_(moved.view(-1, after, o).transpose(1, 2))
    else:
        torch.bmm(factor.expand(cube.shape[0], o, i), cube, out=y)
    if bias is not None:
        y += bias[:, None]


def add_outer(total: Tensor, g: Tensor, z: Tensor, after: int) -> None:
    """total[o, i] += sum_ab g[a, o, b] z[a, i, b]."""
    o, i = total.shape
    if after == 1:
        total.addmm_(g.view(-1, o).t(), z.view(-1, i))
        return
    left, right = g.view(-1, o, after), z.view(-1, i, after)
    if after < MANY:
        left, right = (t.transpose(0, 1).reshape(t.shape[1], -1) for t in (left, right))
        total.addmm_(left, right.t())
    else:
        total += torch.bmm(left, right.transpose(1, 2)).sum(0)


class Chain:
    """The factors in their working dtype, and room for the intermediates of one slab."""

    def __init__(
        self,
        x: Tensor,
        factors: Sequence[Tensor],
        biases: Sequence[Tensor],
        trailing: Sequence[int],
    ) -> None:
        self.dtype, self.trailing = working_dtype(x), trailing
        self.factors = [f.to(self.dtype) for f in factors]
        offsets: list[Tensor | None] = [b.to(self.dtype) for b in biases]
        self.biases = offsets or [None] * len(factors)
        self.sizes = sizes_of(x.shape[1], factors)
        self.rows = max(1, min(x.shape[0], SLAB // max(self.sizes)))
        self.half = self.dtype != x.dtype
        self.like = x

    def room(self, size: int) -> Tensor:
        return self.like.new_empty(self.rows * size, dtype=self.dtype)

    def slabs(self) -> range:
        return range(0, self.like.shape[0], self.rows)

    def read(self, x: Tensor, first: int) -> Tensor:
        return x[first : first + self.rows].to(self.dtype).contiguous()

    def run(self, z: Tensor, rooms: Sequence[Tensor]) -> list[Tensor]:
        """z and what follows each factor, one room for each."""
        found = [z]
        steps = zip(self.factors, self.biases, self.trailing, self.sizes[1:], rooms, strict=False)
        for factor, bias, after, size, room in steps:
            y = room[: z.shape[0] * size].view(-1, size)
            product(found[-1], factor, after, y, bias)
            found.append(y)
        return found


def forward(
    x: Tensor, factors: Sequence[Tensor], biases: Sequence[Tensor], trailing: Sequence[int]
) -> Tensor:
    """x [N, n] -> [N, m], contiguous."""
    chain = Chain(x, factors, biases, trailing)
    y = x.new_empty(x.shape[0], chain.sizes[-1])
    if y.numel() == 0:
        return y
    between = [chain.room(size) for size in chain.sizes[1 : None if chain.half else -1]]
    for first in chain.slabs():
        out = y[first : first + chain.rows]
        if chain.half:
            out.copy_(chain.run(chain.read(x, first), between)[-1])
        else:
            chain.run(chain.read(x, first), [*between, out.view(-1)])
    return y


def backward(
    grad: Tensor,
    x: Tensor,
    factors: Sequence[Tensor],
    biases: Sequence[Tensor],
    trailing: Sequence[int],
    need_x: bool,
) -> list[Tensor]:
    """Gradients of x (empty without `need_x`), of every factor, of every bias."""
    chain = Chain(x, factors, biases, trailing)
    dx = x.new_empty(x.shape if need_x else 0)
    dfactors = [torch.zeros_like(f, memory_format=torch.contiguous_format) for f in chain.factors]
    dbiases = [torch.zeros_like(b) for b in chain.biases if b is not None]
    if x.numel():
        between = [chain.room(size) for size in chain.sizes[1:-1]]
        spare = [chain.room(max(chain.sizes)) for _ in range(2)]
        for first in chain.slabs():
            zs = chain.run(chain.read(x, first), between)
            out = dx[first : first + chain.rows] if need_x else None
            _walk_back(chain, chain.read(grad, first), zs, spare, dfactors, dbiases, out)
    return [dx, *(d.to(x.dtype) for d in (*dfactors, *dbiases))]


def _walk_back(
    chain: Chain,
    g: Tensor,
    zs: Sequence[Tensor],
    spare: Sequence[Tensor],
    dfactors: Sequence[Tensor],
    dbiases: Sequence[Tensor],
    dx: Tensor | None,
) -> None:
    """One slab: add to the gradients of the factors and biases, write that of x."""
    for k in reversed(range(len(chain.factors))):
        factor, after = chain.factors[k], chain.trailing[k]
        add_outer(dfactors[k], g, zs[k], after)
        if dbiases:
            dbiases[k] += g.view(-1, factor.shape[0], after).sum((0, 2))
        if k == 0 and dx is None:
            return
        y = spare[k % 2][: g.shape[0] * chain.sizes[k]].view(-1, chain.sizes[k])
        if k == 0 and dx is not None and not chain.half:
            y = dx
        product(g, factor.t(), after, y)
        g = y
    if dx is not None and chain.half:
        dx.copy_(g)
