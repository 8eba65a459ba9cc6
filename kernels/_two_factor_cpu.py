"""Two-factor products in plain torch: batched products of a few rows at a time.

What lies between the factors is kept with the rows innermost: the permutation that joins them then
moves whole runs of rows, and the batched products read it as it is. Some hundred rows at a time,
everything between stays in the caches. A structure whose products are too small for that, or need
as much work as a dense matrix, is multiplied out instead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ._windows import working_dtype

CHUNK = 1 << 18  # numbers of the widest array of some rows: 1 MB of float32
FEW = 1 << 19  # multiplications below which a call costs more than they do
SUMMED = 4  # terms of an entry of the matrix that are cheaper to add than to multiply out in bmm
FULL_SPEED = 80  # a product with a side below is as much slower than a dense one as it is shorter
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

    def multiplied_out(self, rows: int) -> bool:
        """Whether the dense matrix is cheaper to make and apply than the factors.

        A product of sides below FULL_SPEED counts as much more as it is shorter than that; making
        the matrix and the gradients of its factors costs r products an entry.
        """
        dense = self.inputs * self.outputs
        sides = (self.a, self.f * self.d * self.r), (self.r * self.b * self.g, self.e)
        work = sum(
            n * max(1.0, FULL_SPEED / min(pair))
            for n, pair in zip(self.products, sides, strict=True)
        )
        return work * rows > dense * (rows + self.r)

    def slower(self, rows: int) -> str | None:
        """Why two plain products are faster; None where they are not."""
        if self.low_rank:
            return "both products of a low-rank matrix are of whole rows"
        if sum(self.products) * rows < FEW:
            return f"a call costs more than fewer than {FEW} multiplications"
        return None

    def chunk(self) -> int:
        """Rows at a time."""
        return max(32, CHUNK // max(self.inputs, self.between, self.outputs))


def batches(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """The factors as matrices: [(g b), (f d r), a] and [(f d), e, (r b g)]."""
    n = Sizes.of(left, right)
    first = left.permute(3, 0, 1, 2, 4).reshape(n.g, 1, -1, n.a)
    second = right.reshape(n.f, 1, n.e, -1)
    return (
        first.expand(-1, n.b, -1, -1).reshape(n.g * n.b, -1, n.a),
        second.expand(-1, n.d, -1, -1).reshape(n.f * n.d, n.e, -1),
    )


def between(part: Tensor, first: Tensor, n: Sizes) -> Tensor:
    """Rows [c, inputs] times the first factor: [(f d), (r b g), c]."""
    seen = part.unflatten(1, (n.g * n.b, n.a)).permute(1, 2, 0)
    z = torch.bmm(first, seen).view(n.g, n.b, n.f, n.d, n.r, -1)
    return z.permute(2, 3, 4, 1, 0, 5).reshape(n.f * n.d, n.r * n.b * n.g, -1)


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
    if n.r <= SUMMED:
        w = sum((a * b for a, b in spread(left, right)), left.new_zeros(()))
    else:
        w = torch.einsum("fdrga,ferbg->efdgba", left, right)
    return w.reshape(n.outputs, n.inputs)


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
    if n.multiplied_out(x.shape[0]):
        u = F.linear(x.to(dtype), dense(left, right))
        y = finish(u, bias, activation, residual, given if keep else None)
        return y.to(x.dtype), given
    y = torch.empty(shape, dtype=x.dtype, device=x.device)
    first, second = batches(left, right)
    for at, (part,) in parts(dtype, n.chunk(), x):
        target = y[at]
        u = target if y.dtype == dtype else torch.empty_like(target, dtype=dtype)
        rows = torch.bmm(between(part, first, n).transpose(1, 2), second.transpose(1, 2))
        u.view(-1, n.e, n.f * n.d).copy_(rows.permute(1, 2, 0))
        added = None if residual is None else residual[at]
        done = finish(u, bias, activation, added, given[at] if keep else None)
        if done is not target:
            target.copy_(done)
    return y, given


def backward(
    grad: Tensor, x: Tensor, left: Tensor, right: Tensor, data: bool, weights: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x (where `data`), left and right (where `weights`); the others are empty."""
    n, dtype = Sizes.of(left, right), working(x)
    left, right = left.to(dtype), right.to(dtype)
    if n.multiplied_out(x.shape[0]):
        found = dense_backward(grad.to(dtype), x.to(dtype), left, right, data, weights)
    else:
        found = rows_backward(grad, x, left, right, data, weights)
    dx, one, two = (x.new_empty(0) if t is None else t.to(x.dtype).contiguous() for t in found)
    return dx, one, two


def dense_backward(
    grad: Tensor, x: Tensor, left: Tensor, right: Tensor, data: bool, weights: bool
) -> Found:
    n = Sizes.of(left, right)
    dx = grad @ dense(left, right) if data else None
    if not weights:
        return dx, None, None
    w = (grad.t() @ x).view(n.e, n.f, n.d, n.g, n.b, n.a)
    if n.r <= SUMMED:
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
    n = Sizes.of(left, right)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device) if data else None
    first, second = batches(left, right)
    one, two = torch.zeros_like(first), torch.zeros_like(second)
    for at, (part, given) in parts(left.dtype, n.chunk(), x, grad):
        columns = given.t().contiguous().view(n.e, n.f * n.d, -1).transpose(0, 1)  # [(f d), e, c]
        if weights:
            two.baddbmm_(columns, between(part, first, n).transpose(1, 2))
        z = torch.bmm(second.transpose(1, 2), columns).view(n.f, n.d, n.r, n.b, n.g, -1)
        z = z.permute(4, 3, 0, 1, 2, 5).reshape(n.g * n.b, n.f * n.d * n.r, -1)
        if weights:
            one.baddbmm_(z, part.unflatten(1, (n.g * n.b, n.a)).transpose(0, 1))
        if dx is not None:
            seen = torch.bmm(z.transpose(1, 2), first).transpose(0, 1)
            dx[at].unflatten(1, (n.g * n.b, n.a)).copy_(seen)
    if not weights:
        return dx, None, None
    one = one.view(n.g, n.b, n.f, n.d, n.r, n.a).sum(1).permute(1, 2, 3, 0, 4)
    return dx, one, two.view(n.f, n.d, n.e, n.r, n.b, n.g).sum(1)
