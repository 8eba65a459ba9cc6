"""A chain of mode products in plain torch: rows in slabs whose intermediates stay in the cache.

Each product is one matrix product of the factor with the array, its axis brought to the front where
it is not last; nothing between the factors reaches main memory. The backward computes the
intermediates of a slab again: that takes less time than the page faults of keeping them. A chain of
few numbers is multiplied to one matrix, whose gradient then goes through it in place of the rows'.
Biases of a Kronecker product add the same to every row, so they take one pass at its end.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from . import _kronecker_cpu as kronecker
from . import _matmul_cpu as matmul
from ._mode_plan import Move, plan
from ._windows import working_dtype

SLAB = 1 << 18  # numbers of an intermediate at a time
NEAR = 1 << 20  # numbers of an array that may still lie in the cache: 4 MB of float32
NARROW = 32  # multiplications of one matrix that take as long as a number's way through one factor
Grads = tuple[Tensor | None, list[Tensor]]
ONEDNN = 2  # times as many where products go through oneDNN


def sizes_of(size: int, factors: Sequence[Tensor]) -> list[int]:
    """Numbers of a row before, between and after the factors."""
    found = [size]
    for factor in factors:
        found.append(found[-1] // factor.shape[1] * factor.shape[0])
    return found


def narrow(x: Tensor, rows: int, sizes: Sequence[int]) -> bool:
    """Whether one matrix is cheaper than the chain."""
    n, *others = sizes
    times = NARROW * (ONEDNN if matmul.fast(working_dtype(x)) else 1)
    return n * others[-1] <= times * sum(others) and rows >= 2 * n


def turn(z: Tensor, moves: Sequence[Move]) -> Tensor:
    for shape, order in moves:
        z = z.view(shape).permute(order).contiguous()
    return z


def turn_into(out: Tensor, z: Tensor, move: Move, offset: Tensor | None = None) -> None:
    """out = z turned, plus `offset`, a row of numbers."""
    out, z = out.view(move.turned), z.view(move.shape).permute(move.order)
    if offset is None:
        out.copy_(z)
    else:
        torch.add(z, offset.view(move.turned[1:]), out=out)


class Chain:
    """The factors in a working dtype, and the way of the array through them."""

    def __init__(
        self,
        size: int,
        factors: Sequence[Tensor],
        biases: Sequence[Tensor],
        trailing: Sequence[int],
        dtype: torch.dtype,
    ) -> None:
        self.dtype = dtype
        self.factors = [f.to(dtype) for f in factors]
        self.biases = [b.to(dtype) for b in biases]
        self.offsets = list[Tensor]()
        if self.biases and kronecker.holds(size, factors, trailing):
            self.offsets = kronecker.offsets(self.factors, self.biases)
        self.sizes = sizes_of(size, factors)
        steps = ((f.shape[1], f.shape[0], t) for f, t in zip(factors, trailing, strict=True))
        self.steps, self.end = plan(size, tuple(steps))

    def slabs(self, *tensors: tuple[Tensor, Move]) -> Iterator[tuple[slice, list[Tensor]]]:
        """Some rows of each tensor at a time, contiguous in the working dtype, before its move.

        What is to be turned from main memory is first read in order, into the cache.
        """
        rows, total = max(1, SLAB // max(self.sizes)), len(tensors[0][0])
        rooms: list[Tensor | None] = []
        for t, move in tensors:
            near = t.numel() <= NEAR or not move.turns
            ready = near and t.dtype == self.dtype and t.is_contiguous()
            shape = min(rows, total), t.shape[1]
            rooms.append(None if ready else t.new_empty(shape, dtype=self.dtype))
        for start in range(0, total, rows):
            at = slice(start, start + rows)
            parts = zip((t[at] for t, _ in tensors), rooms, strict=True)
            yield at, [p if room is None else room[: len(p)].copy_(p) for p, room in parts]

    def run(self, z: Tensor, ends: bool) -> list[Tensor]:
        """What each factor is given, as a matrix; with `ends` also what the last leaves."""
        found = []
        for k, (step, factor) in enumerate(zip(self.steps, self.factors, strict=True)):
            z = turn(z, step.moves)
            z = z.view(-1, factor.shape[1]) if step.last else z.view(factor.shape[1], -1)
            found.append(z)
            if len(found) == len(self.steps) and not ends:
                return found
            bias = self.biases[k] if self.biases and not self.offsets else None
            if step.last:
                z = matmul.linear(z, factor, bias)
            else:
                z = matmul.linear(factor, z.t())
                if bias is not None:
                    z += bias[:, None]
        return [*found, z]

    def forward(self, x: Tensor) -> Tensor:
        """x [N, n] -> [N, m], contiguous, in the dtype of x."""
        y = x.new_empty(len(x), self.sizes[-1])
        offset = self.offsets[-1] if self.offsets else None
        for at, (z,) in self.slabs((x, self.steps[0].moves[0])):
            turn_into(y[at], self.run(z, True)[-1], self.end, offset)
        return y

    def backward(self, grad: Tensor, x: Tensor, need_x: bool) -> Grads:
        """Gradients of x, if needed, and of every factor and every bias."""
        n = len(self.factors)
        dx = torch.empty_like(x, memory_format=torch.contiguous_format) if need_x else None
        found = [torch.zeros_like(t) for t in (*self.factors, *self.biases)]
        total = grad.new_zeros(grad.shape[1] if self.offsets else 0, dtype=self.dtype)
        for at, (g, z) in self.slabs((grad, self.end.back), (x, self.steps[0].moves[0])):
            if self.offsets:
                total += g.sum(0)
            zs = self.run(z, False)
            self.walk_back(turn(g, [self.end.back]), zs, found, None if dx is None else dx[at])
        if self.offsets:
            ends, found[n:] = kronecker.offsets_backward(total, self.offsets, self.factors)
            for into, more in zip(found[1:n], ends, strict=True):
                into += more
        return dx, found

    def walk_back(
        self, g: Tensor, zs: Sequence[Tensor], found: Sequence[Tensor], dx: Tensor | None
    ) -> None:
        """One slab: add to `found`, write dx."""
        for k in reversed(range(len(zs))):
            step, factor, z = self.steps[k], self.factors[k], zs[k]
            g = g.view(-1, factor.shape[0]) if step.last else g.view(factor.shape[0], -1)
            found[k].add_(matmul.outer(g, z) if step.last else matmul.linear(g, z))
            if self.biases and not self.offsets:
                found[len(zs) + k].add_(g.sum(0 if step.last else 1))
            if k == 0 and dx is None:
                return
            g = matmul.linear(g, factor.t()) if step.last else matmul.linear(factor.t(), g.t())
            back = [move.back for move in reversed(step.moves)]
            if k or dx is None:
                g = turn(g, back)
            else:
                turn_into(dx, turn(g, back[:-1]), back[-1])


def along(factor: Tensor, z: Tensor, after: int) -> Tensor:
    """The factor times one axis of z, with `after` numbers behind each of its entries."""
    if after == 1:
        return z.view(-1, factor.shape[1]) @ factor.t()
    return torch.matmul(factor, z.view(-1, factor.shape[1], after))


class Matrix:
    """The chain as one matrix: what it makes of the identity, and of a row of zeros its bias.

    So few numbers that calls cost more than they do: plain products, biases for the last row alone.
    """

    def __init__(
        self,
        x: Tensor,
        factors: Sequence[Tensor],
        biases: Sequence[Tensor],
        trailing: Sequence[int],
    ) -> None:
        self.n, self.dtype, self.trailing = x.shape[1], working_dtype(x), trailing
        self.factors = [f.to(self.dtype) for f in factors]
        self.biases = [b.to(self.dtype) for b in biases]

    def run(self) -> list[Tensor]:
        """What each factor is given, and what the last leaves: n rows, and that of zeros."""
        z = torch.eye(self.n + 1, self.n, dtype=self.dtype, device=self.factors[0].device)
        found = []
        for k, (factor, after) in enumerate(zip(self.factors, self.trailing, strict=True)):
            found.append(z)
            z = along(factor, z, after)
            if self.biases:
                self.last(z, k).add_(self.biases[k][:, None])
        return [*found, z.view(self.n + 1, -1)]

    def last(self, z: Tensor, k: int) -> Tensor:
        """The last row of what factor k leaves: [axes before, o, axes after]."""
        return z.view(self.n + 1, -1, self.factors[k].shape[0], self.trailing[k])[-1]

    def forward(self, x: Tensor) -> Tensor:
        w = self.run()[-1]
        return matmul.linear(x.to(self.dtype), w[:-1].t(), w[-1] if self.biases else None)

    def backward(self, grad: Tensor, x: Tensor, need_x: bool) -> Grads:
        grad, x = grad.to(self.dtype), x.to(self.dtype)
        *zs, w = self.run()
        dx = matmul.linear(grad, w[:-1]) if need_x else None
        g = torch.empty_like(w)
        g[:-1] = matmul.outer(x, grad)
        torch.sum(grad, 0, out=g[-1])
        found: list[Tensor] = [g] * (len(zs) + len(self.biases))
        for k in reversed(range(len(zs))):
            factor, z, after = self.factors[k], zs[k], self.trailing[k]
            if after == 1:
                found[k] = g.view(-1, factor.shape[0]).t() @ z.view(-1, factor.shape[1])
            else:
                sides = g.view(-1, factor.shape[0], after), z.view(-1, factor.shape[1], after)
                found[k] = torch.bmm(sides[0], sides[1].transpose(1, 2)).sum(0)
            if self.biases:
                found[len(zs) + k] = self.last(g, k).sum((0, 2))
            if k:
                g = along(factor.t(), g, after)
        return dx, found


class Kronecker:
    """A Kronecker product as one matrix, and a row of what the biases add."""

    def __init__(self, x: Tensor, factors: Sequence[Tensor], biases: Sequence[Tensor]) -> None:
        self.dtype = working_dtype(x)
        self.factors = [f.to(self.dtype) for f in factors]
        self.biases = [b.to(self.dtype) for b in biases]

    def forward(self, x: Tensor) -> Tensor:
        offset = kronecker.offsets(self.factors, self.biases)[-1] if self.biases else None
        return matmul.linear(x.to(self.dtype), kronecker.products(self.factors)[-1], offset)

    def backward(self, grad: Tensor, x: Tensor, need_x: bool) -> Grads:
        grad, x = grad.to(self.dtype), x.to(self.dtype)
        products = kronecker.products(self.factors)
        dx = matmul.linear(grad, products[-1].t()) if need_x else None
        found = kronecker.products_backward(matmul.outer(grad, x), products, self.factors)
        if not self.biases:
            return dx, found
        offsets = kronecker.offsets(self.factors, self.biases)
        ends, last = kronecker.offsets_backward(grad.sum(0), offsets, self.factors)
        return dx, [found[0], *(f + more for f, more in zip(found[1:], ends, strict=True)), *last]


def chain_of(
    x: Tensor, factors: Sequence[Tensor], biases: Sequence[Tensor], trailing: Sequence[int]
) -> Chain | Kronecker | Matrix:
    if not narrow(x, len(x), sizes_of(x.shape[1], factors)):
        return Chain(x.shape[1], factors, biases, trailing, working_dtype(x))
    if kronecker.holds(x.shape[1], factors, trailing):
        return Kronecker(x, factors, biases)
    return Matrix(x, factors, biases, trailing)


def forward(
    x: Tensor, factors: Sequence[Tensor], biases: Sequence[Tensor], trailing: Sequence[int]
) -> Tensor:
    """x [N, n] -> [N, m], contiguous."""
    return chain_of(x, factors, biases, trailing).forward(x).to(x.dtype)


def backward(
    grad: Tensor,
    x: Tensor,
    factors: Sequence[Tensor],
    biases: Sequence[Tensor],
    trailing: Sequence[int],
    need_x: bool,
) -> list[Tensor]:
    """Gradients of x (empty without `need_x`), of every factor, of every bias."""
    dx, found = chain_of(x, factors, biases, trailing).backward(grad, x, need_x)
    first = x.new_empty(0) if dx is None else dx
    return [d.to(x.dtype).contiguous() for d in (first, *found)]
