"""Two-factor products in plain torch: batched products of a few rows at a time.

Everything between the factors has the rows innermost: the permutation that joins them then moves
whole runs of rows, and every product is as wide as there are rows, however short its other sides.
Some hundred rows at a time stay in the caches, in room taken once a call: fresh pages cost more
than the products that fill them. A Kronecker product runs as two mode products, and a structure
that needs as much work as a dense matrix is multiplied out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _matmul_cpu as matmul
from . import _mode_product_cpu as modes
from ._windows import threads, working_dtype

CHUNK = 1 << 18  # numbers of the widest array of some rows: 1 MB of float32
FEW = 1 << 19  # multiplications below which a call costs more than they do
SUMMED = 4  # terms of an entry of the matrix that are cheaper to add than to multiply out in bmm
LEAST = 64  # rows at a time, where that is more than CHUNK
WIDE = 32  # inputs of a product from which turning the rows takes longer than it saves
BATCHED, SHORT = 1.4, 12  # a multiplication with a side of n costs 1.4 + 12 / n of a dense one
TURNED = 24  # multiplications that take as long as a number of x or y on its way in and out
ONEDNN = 0.5  # of a multiplication's time it takes where products go through oneDNN
KEPT = 1 << 20  # numbers of x up to which, on several cores, keeping what lies between is faster
MADE = 64  # rows whose dense product takes as long as making the matrix and its gradients
FULL_SPEED = 80  # on CUDA a product with a side below is as much slower as it is shorter
Found = tuple[Tensor | None, Tensor | None, Tensor | None]
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda u: u,
    "relu": torch.relu,
    "gelu": F.gelu,
    "silu": F.silu,
    "tanh": torch.tanh,
}


class Sizes(NamedTuple):
    """x is [rows, g, b, a], what lies between [rows, f, d, r, b, g], the result [rows, e, f, d]."""

    f: int
    d: int
    r: int
    g: int
    a: int
    e: int
    b: int

    @classmethod
    def of(cls, left: Tensor, right: Tensor) -> Sizes:
        """Of left [f, d, r, g, a] and right [f, e, r, b, g]."""
        f, d, r, g, a = left.shape
        return cls(f, d, r, g, a, right.shape[1], right.shape[3])

    @property
    def inputs(self) -> int:
        return self.g * self.b * self.a

    @property
    def outputs(self) -> int:
        return self.e * self.f * self.d

    @property
    def between(self) -> int:
        return self.f * self.d * self.r * self.b * self.g

    @property
    def products(self) -> tuple[int, int]:
        """Multiplications of the two factors on one row."""
        return self.between * self.a, self.between * self.e

    @property
    def low_rank(self) -> bool:
        """Whether both products are of whole rows."""
        return self.inputs == self.a and self.outputs == self.e

    @property
    def two_modes(self) -> bool:
        """Whether it is a Kronecker product, of `left` and `right` as matrices."""
        return self.f * self.g * self.r == 1

    def multiplied_out(self, rows: int, cuda: bool = False, price: float = 1.0) -> bool:
        """Whether the dense matrix is cheaper to make and apply than the factors.

        Making the matrix and the gradients of its factors costs r products an entry, and on CPU,
        where passes over it take long, those of MADE rows more. `price` is that of a multiplication
        in the products with the whole matrix there.
        """
        dense = self.inputs * self.outputs
        sides = (self.a, self.f * self.d * self.r), (self.r * self.b * self.g, self.e)
        pairs = list(zip(self.products, map(min, sides), strict=True))
        if cuda:
            work = sum(n * max(1.0, FULL_SPEED / side) for n, side in pairs)
            return work * rows > dense * (rows + self.r)
        work = sum(n * (BATCHED + SHORT / side) for n, side in pairs)
        work += TURNED * (self.inputs + self.outputs)
        return work * rows > dense * (price * rows + self.r + MADE)

    def dense_for(self, x: Tensor) -> bool:
        """`multiplied_out` for rows x."""
        price = ONEDNN if x.is_cpu and matmul.fast(working(x)) else 1.0
        return self.multiplied_out(x.shape[0], x.is_cuda, price)

    def slower(self, rows: int) -> str | None:
        """Why two plain products are faster; None where they are not."""
        if self.low_rank:
            return "both products of a low-rank matrix are of whole rows"
        if sum(self.products) * rows < FEW:
            return f"a call costs more than fewer than {FEW} multiplications"
        plain = self.two_modes and rows * self.inputs <= KEPT and threads() > 1
        if plain and not self.multiplied_out(rows):
            return f"two products of at most {KEPT} numbers are faster where autograd keeps both"
        return None

    def chunk(self) -> int:
        """Rows at a time."""
        return max(LEAST, CHUNK // max(self.inputs, self.between, self.outputs))


class Batches:
    """Both factors as batched matrices, and room for what lies around them."""

    def __init__(self, left: Tensor, right: Tensor, rows: int) -> None:
        self.n = n = Sizes.of(left, right)
        first = left.permute(3, 0, 1, 2, 4).reshape(n.g, 1, -1, n.a)
        self.first = first.expand(-1, n.b, -1, -1).reshape(n.g * n.b, -1, n.a)
        second = right.reshape(n.f, 1, n.e, -1)
        self.second = second.expand(-1, n.d, -1, -1).reshape(n.f * n.d, n.e, -1)
        self.rows = n.chunk()
        ends, c = max(n.inputs, n.outputs), min(rows, self.rows)
        self.rooms = [left.new_empty(c * size) for size in (ends, ends, n.between, n.between)]

    def room(self, which: int, *shape: int) -> Tensor:
        return self.rooms[which][: math.prod(shape)].view(shape)

    def columns(self, which: int, part: Tensor) -> Tensor:
        """Rows [c, m] as [m, c], in a room."""
        return self.room(which, part.shape[1], part.shape[0]).copy_(part.t())

    def seen(self, part: Tensor) -> Tensor:
        """Rows [c, inputs] as [(g b), a, c]."""
        n = self.n
        if n.a < WIDE:
            return self.columns(0, part).view(n.g * n.b, n.a, -1)
        seen: Tensor = part.unflatten(1, (n.g * n.b, n.a)).permute(1, 2, 0)
        return seen

    def between(self, seen: Tensor) -> Tensor:
        """What `seen` gives by the first factor: [(f d), (r b g), c]."""
        n, c = self.n, seen.shape[2]
        z = torch.bmm(self.first, seen, out=self.room(2, n.g * n.b, n.f * n.d * n.r, c))
        z = z.view(n.g, n.b, n.f, n.d, n.r, c).permute(2, 3, 4, 1, 0, 5)
        return self.room(3, *z.shape).copy_(z).view(n.f * n.d, -1, c)

    def forward(self, part: Tensor) -> Tensor:
        """Rows [c, inputs] times the matrix, as columns [outputs, c]."""
        n, c = self.n, part.shape[0]
        z = self.between(self.seen(part))
        u = torch.bmm(self.second, z, out=self.room(1, n.f * n.d, n.e, c)).transpose(0, 1)
        return self.room(0, *u.shape).copy_(u).view(n.outputs, c)

    def back(self, columns: Tensor) -> Tensor:
        """Gradients [(f d), e, c] by the second factor: [(g b), (f d r), c]."""
        n, c = self.n, columns.shape[2]
        z = torch.bmm(
            self.second.transpose(1, 2), columns, out=self.room(2, n.f * n.d, n.r * n.b * n.g, c)
        )
        z = z.view(n.f, n.d, n.r, n.b, n.g, c).permute(4, 3, 0, 1, 2, 5)
        return self.room(3, *z.shape).copy_(z).view(n.g * n.b, -1, c)

    def put(self, dx: Tensor, z: Tensor) -> None:
        """Gradients of x [c, inputs], from those between the factors as `back` gives them."""
        n, c = self.n, z.shape[2]
        if n.a < WIDE:
            found = torch.bmm(self.first.transpose(1, 2), z, out=self.room(1, n.g * n.b, n.a, c))
            dx.copy_(found.view(n.inputs, c).t())
        else:
            found = torch.bmm(z.transpose(1, 2), self.first, out=self.room(1, n.g * n.b, c, n.a))
            dx.unflatten(1, (n.g * n.b, n.a)).copy_(found.transpose(0, 1))


def parts(dtype: torch.dtype, rows: int, *tensors: Tensor) -> Iterator[tuple[slice, list[Tensor]]]:
    """Some rows of each tensor at a time, in `dtype`."""
    for start in range(0, tensors[0].shape[0], rows):
        at = slice(start, start + rows)
        yield at, [t[at].to(dtype) for t in tensors]


def finish(
    u: Tensor, bias: Tensor | None, activation: str, residual: Tensor | None, keep: Tensor | None
) -> Tensor:
    """activation(u + bias) + residual; u + bias goes to `keep`. Overwrites u."""
    if bias is not None:
        u += bias
    if keep is not None:
        keep.copy_(u)
    y = ACTIVATIONS[activation](u)
    if residual is not None:
        y += residual
    return y


def working(x: Tensor) -> torch.dtype:
    """CUDA keeps sums of half precision in float32 itself."""
    return x.dtype if x.is_cuda else working_dtype(x)


def dense(left: Tensor, right: Tensor) -> Tensor:
    """The matrix, [outputs, inputs]."""
    n = Sizes.of(left, right)
    if n.r > SUMMED:
        w = torch.einsum("fdrga,ferbg->efdgba", left, right)
        return w.reshape(n.outputs, n.inputs)
    w = left.new_empty(n.e, n.f, n.d, n.g, n.b, n.a)
    for k, (a, b) in enumerate(spread(left, right)):
        if k:
            w.addcmul_(a, b)
        else:
            torch.mul(a, b, out=w)
    return w.view(n.outputs, n.inputs)


def spread(left: Tensor, right: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """For each r, views of both factors that broadcast to the matrix [e, f, d, g, b, a]."""
    for one, two in zip(left.unbind(2), right.unbind(2), strict=True):
        yield one[None, :, :, :, None, :], two.permute(1, 0, 3, 2)[:, :, None, :, :, None]


def apply(
    x: Tensor,
    left: Tensor,
    right: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    """x [rows, inputs] -> y [rows, outputs], and what the activation was given where asked for."""
    n, dtype = Sizes.of(left, right), working(x)
    left, right = left.to(dtype), right.to(dtype)
    bias = None if bias is None else bias.to(dtype)
    shape = x.shape[0], n.outputs
    given = torch.empty(shape if keep else (0,), dtype=x.dtype, device=x.device)
    u = None
    if n.dense_for(x):
        u = matmul.linear(x.to(dtype), dense(left, right))
    elif n.two_modes and x.dtype == dtype:
        u = modes.forward(x, matrices(left, right), (), (1, n.d))
    if u is not None:
        y = finish(u, bias, activation, residual, given if keep else None)
        return y.to(x.dtype), given
    y = torch.empty(shape, dtype=x.dtype, device=x.device)
    work = Batches(left, right, x.shape[0])
    for at, (part,) in parts(dtype, work.rows, x):
        target = y[at]
        u = target if y.dtype == dtype else torch.empty_like(target, dtype=dtype)
        u.copy_(work.forward(part).t())
        added = None if residual is None else residual[at]
        done = finish(u, bias, activation, added, given[at] if keep else None)
        if done is not target:
            target.copy_(done)
    return y, given


def matrices(left: Tensor, right: Tensor) -> list[Tensor]:
    """Of two modes: [d, a] for the last and [e, b] for the first."""
    return [left[0, :, 0, 0], right[0, :, 0, :, 0]]


def backward(
    grad: Tensor, x: Tensor, left: Tensor, right: Tensor, data: bool, weights: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x (where `data`), left and right (where `weights`); the others are empty."""
    n, dtype = Sizes.of(left, right), working(x)
    left, right = left.to(dtype), right.to(dtype)
    found: Found
    if n.dense_for(x):
        found = dense_backward(grad.to(dtype), x.to(dtype), left, right, data, weights)
    elif n.two_modes and x.dtype == dtype:
        ends = modes.backward(grad, x, matrices(left, right), (), (1, n.d), data)
        found = ends[0], None, None
        if weights:
            found = ends[0], ends[1].view(left.shape), ends[2].view(right.shape)
    else:
        found = rows_backward(grad, x, left, right, data, weights)
    dx, one, two = (x.new_empty(0) if t is None else t.to(x.dtype).contiguous() for t in found)
    return dx, one, two


def dense_backward(
    grad: Tensor, x: Tensor, left: Tensor, right: Tensor, data: bool, weights: bool
) -> Found:
    n = Sizes.of(left, right)
    dx = matmul.linear(grad, dense(left, right).t()) if data else None
    if not weights:
        return dx, None, None
    w = matmul.outer(grad, x).view(n.e, n.f, n.d, n.g, n.b, n.a)
    if n.r * n.b <= SUMMED:
        pairs = list(spread(left, right))
        one = torch.stack([(w * b).sum((0, 4)) for _, b in pairs], 2)
        two = torch.stack([(w * a).sum((2, 5)).permute(1, 0, 3, 2) for a, _ in pairs], 2)
        return dx, one, two
    one = torch.einsum("efdgba,ferbg->fdrga", w, right)
    return dx, one, torch.einsum("efdgba,fdrga->ferbg", w, left)


def rows_backward(
    grad: Tensor, x: Tensor, left: Tensor, right: Tensor, data: bool, weights: bool
) -> Found:
    """As `apply` goes, some rows at a time; sums over rows are added in order."""
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device) if data else None
    work = Batches(left, right, x.shape[0])
    n, two = work.n, torch.zeros_like(work.second)
    narrow = n.a < WIDE
    one = work.first.new_zeros(work.first.transpose(1, 2).shape if narrow else work.first.shape)
    for at, (part, given) in parts(left.dtype, work.rows, x, grad):
        columns = work.columns(1, given).view(n.e, n.f * n.d, -1).transpose(0, 1)
        if weights:
            seen = work.seen(part)
            two.baddbmm_(columns, work.between(seen).transpose(1, 2))
        z = work.back(columns)
        if weights:
            a, b = (seen, z) if narrow else (z, seen)
            one.baddbmm_(a, b.transpose(1, 2))
        if dx is not None:
            work.put(dx[at], z)
    if not weights:
        return dx, None, None
    one = one.transpose(1, 2) if narrow else one
    one = one.view(n.g, n.b, n.f, n.d, n.r, n.a).sum(1).permute(1, 2, 3, 0, 4)
    return dx, one, two.view(n.f, n.d, n.e, n.r, n.b, n.g).sum(1)
