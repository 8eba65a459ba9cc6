"""Product of patterns: deep factorisations, and A X B on a grid.

(With block-diagonal A and B that is the NeoCell of github.com/HapKoM/neonext.)
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, einsum

from ..domains import Domain
from ..errors import PatternError
from ..network import sampled_rank, tensor_train
from ..pattern import Core, Cores, Cost, Dims, Pattern, Projected
from .block_diagonal import BlockDiagonal
from .block_sparse import BlockSparse
from .sum import filled, own_support


@dataclass(frozen=True, slots=True)
class Factor:
    """One factor where it stands: on a grid's `axis` alone, or on everything (None)."""

    name: str
    pattern: Pattern
    out: Dims
    inp: Dims
    axis: int | None
    before: int = 1  # positions of the other axes, so many independent vectors
    after: int = 1


@dataclass(frozen=True, kw_only=True)
class Product(Pattern, family="product"):
    """W = W_1 W_2 ... W_n: the last factor is applied first.

    inner: the sizes between factors, as a fraction of the smaller of the two sides, per axis.
    axes: empty where factors act on everything; else the axis of the grid that each acts on alone,
    so that two factors on axes (0, 1) are A X B' of an image X.
    With an entry, factors that have none of their own get it.
    """

    takes_entry: ClassVar[bool] = True

    factors: tuple[Pattern, ...] = (BlockDiagonal(), BlockSparse())
    inner: float = 1.0
    axes: tuple[int, ...] = ()

    def check(self) -> None:
        self.parts()
        if not self.inner > 0:
            raise PatternError(f"product: inner={self.inner} must be above 0")
        if self.axes and len(self.axes) != len(self.factors):
            raise PatternError(
                f"product: axes={self.axes} for {len(self.factors)} factors; give one a factor"
            )
        if self.axes and (self.entry or min(self.axes) < 0):
            raise PatternError(
                f"product: axes={self.axes} counts from 0 and goes with numbers only"
            )

    def parts(self) -> tuple[Pattern, ...]:
        return filled(self, "factors", self.factors)

    def places(self, out: Dims, inp: Dims) -> Iterator[Factor]:
        """The factors in the order they are applied."""
        middle = tuple(max(1, round(self.inner * min(p))) for p in zip(out, inp, strict=True))
        now = inp
        for k, pattern in reversed(list(enumerate(self.parts()))):
            if not self.axes:
                to = out if k == 0 else middle
                yield Factor(f"factor{k}", pattern, to, now, None)
            else:
                axis = self.axes[k]
                last = axis not in self.axes[:k]
                to = (*now[:axis], (out if last else middle)[axis], *now[axis + 1 :])
                rest = math.prod(now[:axis]), math.prod(now[axis + 1 :])
                yield Factor(f"factor{k}", pattern, (to[axis],), (now[axis],), axis, *rest)
            now = to

    def unavailable(self, out: Dims, inp: Dims, causal: bool = False) -> str | None:
        if reason := self.misplaced(out, inp):
            return reason
        for place in self.places(out, inp):
            if reason := place.pattern.unavailable(place.out, place.inp, causal):
                return f"product: {place.name}: {reason}"
        return None

    def misplaced(self, out: Dims, inp: Dims) -> str | None:
        """Why `axes` do not fit these dims."""
        if self.axes and max(self.axes) >= len(inp):
            most = len(inp) - 1
            return f"product: axes={self.axes} are not all axes of {inp}; use at most {most}"
        idle = [a for a in range(len(inp)) if self.axes and a not in self.axes and out[a] != inp[a]]
        if idle:
            return (
                f"product: axis {idle[0]} goes from {inp} to {out} without a factor; add it to axes"
            )
        return None

    def resolve(self, out: Dims, inp: Dims, causal: bool = False) -> Product:
        if self.misplaced(out, inp):
            return self
        factors = [p.pattern.resolve(p.out, p.inp, causal) for p in self.places(out, inp)]
        entry = self.entry.resolve(out[-1:], inp[-1:]) if self.entry else None
        return replace(self, factors=tuple(reversed(factors)), entry=entry)

    def cores(self, out: Dims, inp: Dims) -> dict[str, Core]:
        return {
            f"{place.name}_{name}": core
            for place in self.places(out, inp)
            for name, core in place.pattern.cores(place.out, place.inp).items()
        }

    def chains(self, out: Dims, inp: Dims) -> list[list[str]]:
        """Of factors that are sums the last one's, without such all factors' in one."""
        found = []
        for place in self.places(out, inp):
            of_one = place.pattern.chains(place.out, place.inp)
            found.append([[f"{place.name}_{name}" for name in one] for one in of_one])
        sums = [of_one for of_one in found if len(of_one) > 1]
        whole = [name for of_one in found for one in of_one for name in one]
        return sums[-1] if sums else [whole] if whole else []

    def matmul(self, cores: Cores, x: Tensor, out: Dims) -> Tensor:
        axes = len(out)
        for place in self.places(out, tuple(x.shape[x.dim() - axes :])):
            own = self.entry_cores(place.name, cores)
            if place.axis is None:
                x = place.pattern.matmul(own, x, place.out)
                continue
            specs = place.pattern.cores(place.out, place.inp)
            for name, core in own.items():  # batch axes stand before those of the grid
                batch = core.shape[: core.dim() - len(specs[name].shape)]
                own[name] = core.reshape(*batch, *(1,) * (axes - 1), *specs[name].shape)
            dim = place.axis - axes
            x = place.pattern.matmul(own, x.movedim(dim, -1), place.out).movedim(-1, dim)
        return x

    def to_dense(self, cores: Cores, out: Dims, inp: Dims) -> Tensor:
        dense: Tensor | None = None
        for place in self.places(out, inp):
            own = self.entry_cores(place.name, cores)
            factor = place.pattern.to_dense(own, place.out, place.inp)
            for n, left in ((place.before, True), (place.after, False)):
                eye = factor.new_ones(n).diag_embed()
                pair = (eye, factor) if left else (factor, eye)
                factor = einsum("...oi,...pj->...opij", *pair).flatten(-4, -3).flatten(-2)
            dense = factor if dense is None else factor @ dense
        assert dense is not None  # there is a factor at least
        return dense

    def cost(self, out: Dims, inp: Dims) -> Cost:
        flops = between = 0
        for place in self.places(out, inp):
            one, vectors = place.pattern.cost(place.out, place.inp), place.before * place.after
            flops += vectors * one.flops
            between += vectors * one.activations // 4
        return self.product_cost(out, inp, flops, between - math.prod(inp))

    def matrix_rank(self, out: Dims, inp: Dims) -> int:
        return sampled_rank(self, out, inp)  # ranges of structured factors meet in any dimension

    def project(self, dense: Tensor, out: Dims, inp: Dims) -> Projected | None:
        """Exact for members where a factor stands on every axis, or two have supports of their own.

        One factor an axis is a Kronecker product, of which the factors are the nearest members. Of
        two factors whose entries are numbers of their own on fixed supports (one of them dense or
        block-diagonal) see `_by_supports`. Else None: a search ends in a local minimum.
        """
        places = list(self.places(out, inp))
        if self.entry is not None or dense.dim() > 2:
            return None
        if self.axes and len(set(self.axes)) == len(self.axes):
            found = dict(zip(sorted(self.axes), self._along_axes(dense, out, inp), strict=True))
            wanted = [found[place.axis] for place in places if place.axis is not None]
        elif len(places) == 2 and not self.axes:
            right, left = (own_support(p.pattern, p.out, p.inp, dense) for p in places)
            if left is None or right is None:
                return None
            if _apart(left):
                wanted = list(reversed(_by_supports(dense, left, right)))
            elif _apart(right.mT):
                wanted = [factor.mT for factor in _by_supports(dense.mT, right.mT, left.mT)]
            else:
                return None
        else:
            return None
        cores: dict[str, Tensor] = {}
        for place, factor in zip(places, wanted, strict=True):
            if (one := place.pattern.project(factor, place.out, place.inp)) is None:
                return None
            cores |= one.named(place.name).cores
        return Projected(cores, False)

    def _along_axes(self, dense: Tensor, out: Dims, inp: Dims) -> list[Tensor]:
        """A matrix for every axis with a factor, in their order; the others are the identity."""
        whole, n = dense.reshape(*out, *inp), len(out)
        for axis in reversed(range(n)):
            if axis not in self.axes:
                whole = whole.diagonal(dim1=axis, dim2=whole.dim() // 2 + axis).mean(-1)
        outs, inps = (tuple(side[a] for a in sorted(self.axes)) for side in (out, inp))
        cores = tensor_train(
            whole.reshape(math.prod(outs), math.prod(inps)), outs, inps, [1] * (len(outs) - 1)
        )
        return [core[0, :, :, 0] for core in cores]

    @classmethod
    def domains(cls) -> dict[str, Domain]:
        return {}


def _apart(support: Tensor) -> bool:
    """Whether rows see the same columns, or none in common."""
    return int(support.unique(dim=0).sum(0).max()) <= 1


def _by_supports(dense: Tensor, left: Tensor, right: Tensor) -> list[Tensor]:
    """Both factors of a product of matrices with these supports, exact for almost every member.

    Rows of W for which the left factor sees the same rows of the right one span what those span.
    A row of the right factor is found in that space by the columns where it is zero.
    """
    first, second = dense.new_zeros(left.shape), dense.new_zeros(right.shape)
    generator = torch.Generator().manual_seed(0)
    for seen in left.unique(dim=0):
        rows = (left == seen).all(-1)
        basis = torch.linalg.svd(dense[rows])[2][: int(seen.sum())]  # [seen, in]
        for support in right[seen].unique(dim=0):
            alike = seen & (right == support).all(-1)
            u, s, _ = torch.linalg.svd(basis[:, ~support])
            zero = len(u) - int((s > 1e-9 * len(u)).sum())  # basis has unit rows
            count = int(alike.sum())
            free = u[:, len(u) - max(zero, count) :]
            drawn = torch.randn(free.shape[1], count, generator=generator).to(dense)
            rotated = torch.linalg.qr(free @ drawn)[0]
            second[alike] = (rotated.mT @ basis) * support
        first[rows] = (dense[rows] @ torch.linalg.pinv(second[seen])) @ _columns(seen, dense)
    return [first, second]


def _columns(kept: Tensor, like: Tensor) -> Tensor:
    """[kept, all]: puts a vector of the kept entries where they belong."""
    return torch.eye(len(kept), dtype=like.dtype, device=like.device)[kept]
