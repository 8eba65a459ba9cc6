"""Banded: each row sees a window of its input. Tied along diagonals it is a convolution."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ..domains import Domain, IntRange
from ..errors import PatternError
from ..pattern import Core, Cores, Cost, Dims, Pattern, Projected
from .block_diagonal import BlockDiagonal
from .dense import Dense
from .diagonal import Diagonal

Width = int | Literal["full"] | tuple[int | Literal["full"], ...]


@dataclass(frozen=True, kw_only=True)
class Banded(Pattern, family="banded"):
    """Row i sees columns c(i) - lower*dilation to c(i) + upper*dilation, c(i) = floor(i in / out).

    lower, upper: how far back and ahead, in steps of `dilation`; 'full' reaches every position. On
    a grid one value stands for all axes, a tuple gives one an axis; the band is then the product of
    its axes (a 3x3 kernel is one band over (H, W)).
    tie: 'toeplitz' shares a weight along each diagonal (a convolution; fewer rows than columns are
    its stride), 'none' gives every row its own. Outside of the input there are zeros; 'circulant'
    is 'toeplitz' on an input that goes around, each axis on its own.
    """

    takes_entry: ClassVar[bool] = True
    operators: ClassVar[tuple[str, ...]] = ("toeplitz_conv", "banded_matmul")

    lower: Width = 1
    upper: Width = 1
    dilation: int | tuple[int, ...] = 1
    tie: Literal["none", "toeplitz", "circulant"] = "toeplitz"

    def check(self) -> None:
        for name, least in (("lower", 0), ("upper", 0), ("dilation", 1)):
            values = getattr(self, name)
            for v in values if isinstance(values, tuple) else (values,):
                if v != "full" and v < least:
                    raise PatternError(f"banded: {name}={v} must be at least {least}")

    def window(self, inp: Dims) -> tuple[Dims, Dims, Dims]:
        """lower, upper, dilation per axis of `inp` (positions), 'full' replaced by its reach."""
        dil = _per_axis(self.dilation, inp)
        reach = [(n - 1) // d for n, d in zip(inp, dil, strict=True)]
        lower, upper = (
            tuple(r if v == "full" else v for v, r in zip(_per_axis(w, inp), reach, strict=True))
            for w in (self.lower, self.upper)
        )
        return lower, upper, dil

    def unavailable(self, out: Dims, inp: Dims, causal: bool = False) -> str | None:
        (o, _), (i, _) = self.split(out), self.split(inp)
        if len(o) != len(i):
            return f"banded: out={o} and inp={i} have different numbers of axes"
        for name in ("lower", "upper", "dilation"):
            if isinstance(v := getattr(self, name), tuple) and len(v) != len(i):
                return f"banded: {name}={v} has {len(v)} values, the grid {i} has {len(i)} axes"
        lower, upper, dil = self.window(i)
        for name, width in (("lower", lower), ("upper", upper)):
            for w, d, n in zip(width, dil, i, strict=True):
                if w * d > max(n - 1, 0):
                    less = f", or dilation at most {(n - 1) // w}" if w < n else ""
                    return (
                        f"banded: {name}={w} at dilation={d} reaches past a grid of {n}; "
                        f"use {name} at most {(n - 1) // d}, or 'full'{less}"
                    )
        if self.tie == "circulant":
            return self._wrap_misfit(lower, upper, dil, i, causal) or self._entry_misfit(out, inp)
        if causal and any(upper):
            return f"banded: upper={_join(upper)} sees the future in a causal task; use upper=0"
        if causal and o != i:
            return f"banded: a causal task needs as many rows as columns, not out={o}, inp={i}"
        return self._entry_misfit(out, inp)

    def _entry_misfit(self, out: Dims, inp: Dims) -> str | None:
        return self.entry.unavailable(out[-1:], inp[-1:]) if self.entry else None

    def _wrap_misfit(
        self, lower: Dims, upper: Dims, dil: Dims, inp: Dims, causal: bool
    ) -> str | None:
        if causal:
            return "banded: tie='circulant' sees the future in a causal task; use tie='toeplitz'"
        for a, b, d, n in zip(lower, upper, dil, inp, strict=True):
            if (a + b) * d >= n > 1:
                return (
                    f"banded: lower={a} and upper={b} at dilation={d} go around {n} positions more "
                    f"than once; use at most {(n - 1) // d} in all"
                )
        return None

    def resolve(self, out: Dims, inp: Dims, causal: bool = False) -> Banded:
        (_, c_out), (i, c_in) = self.split(out), self.split(inp)
        dil = _per_axis(self.dilation, i)
        dil = tuple(min(d, max(n - 1, 1)) for d, n in zip(dil, i, strict=True))
        lower, upper, dil = replace(self, dilation=dil).window(i)
        reach = [(n - 1) // d for n, d in zip(i, dil, strict=True)]
        lower = tuple(min(w, r) for w, r in zip(lower, reach, strict=True))
        if self.tie == "circulant":  # once around at most
            reach = [r - w for r, w in zip(reach, lower, strict=True)]
        upper = tuple(0 if causal else min(w, r) for w, r in zip(upper, reach, strict=True))
        dil = tuple(d if a + b else 1 for d, a, b in zip(dil, lower, upper, strict=True))
        wraps = self.tie == "circulant" and not causal and any(lower + upper)
        return replace(
            self,
            lower=_join(lower),
            upper=_join(upper),
            dilation=_join(dil),
            entry=self.entry.resolve(c_out, c_in) if self.entry else None,
            tie="toeplitz" if self.tie == "circulant" and not wraps else self.tie,
        )

    def taps(self, inp: Dims) -> Dims:
        """Window size per axis."""
        lower, upper, _ = self.window(self.split(inp)[0])
        return tuple(a + b + 1 for a, b in zip(lower, upper, strict=True))

    def cores(self, out: Dims, inp: Dims) -> dict[str, Core]:
        taps = self.taps(inp)
        rows = self.split(out)[0] if self.tie == "none" else ()
        fan = math.prod(taps)
        return self.with_entry("taps", Core((*rows, *taps), fan, fan), out, inp)

    def matmul(self, cores: Cores, x: Tensor, out: Dims) -> Tensor:
        inp = tuple(x.shape[x.dim() - len(out) :])
        (o, c_out), (i, _) = self.split(out), self.split(inp)
        if self.tie != "none" and isinstance(self.entry, Dense | Diagonal | BlockDiagonal):
            weight = cores["taps_weight"]
            own = {Dense: 2, Diagonal: 1, BlockDiagonal: 3}[type(self.entry)]
            if weight.dim() == len(i) + own and all(a % b == 0 for a, b in zip(i, o, strict=True)):
                return self._convolve(weight, x, o, i)
        padded = self._pad(x, i)
        y: Tensor | None = None
        for tap in itertools.product(*map(range, self.taps(inp))):
            seen = self._shift(padded, tap, o, i)
            term = self._term(cores, tap, seen, len(o), c_out)
            y = term if y is None else y + term
        assert y is not None  # taps are at least one per axis
        return y

    def _term(self, cores: Cores, tap: Dims, seen: Tensor, axes: int, c_out: Dims) -> Tensor:
        """What one tap adds: its numbers or entries times the rows it sees."""
        if self.entry is None:
            at: tuple[Any, ...] = (..., *tap)
            number = cores["taps"][at]
            if self.tie != "none":
                number = number.reshape(*number.shape, *(1,) * axes)
            return number * seen
        picked = {}
        for key, core in self.entry_cores("taps", cores).items():
            own = len(self.entry.cores(c_out, (seen.shape[-1],))[key].shape)
            at = (..., *tap, *(slice(None),) * own)
            value = core[at]
            if self.tie != "none" and value.dim() > own:  # batch axes before the positions
                value = value.reshape(
                    *value.shape[: -own or None], *(1,) * axes, *value.shape[-own:]
                )
            picked[key] = value
        return self.entry.matmul(picked, seen, c_out)

    def _pad(self, x: Tensor, inp: Dims) -> Tensor:
        """Zeros around the positions, or with tie='circulant' the positions of the other end."""
        lower, upper, dil = self.window(inp)
        if self.tie == "circulant":
            for k, (a, b, d, n) in enumerate(zip(lower, upper, dil, inp, strict=True)):
                around = torch.arange(-a * d, n + b * d, device=x.device) % n
                x = x.index_select(k - len(inp) - self.lead, around)
            return x
        sides = [0, 0] * self.lead
        for a, b, d in zip(reversed(lower), reversed(upper), reversed(dil), strict=True):
            sides += [a * d, b * d]
        return F.pad(x, sides) if any(sides) else x

    def _shift(self, padded: Tensor, tap: Dims, out: Dims, inp: Dims) -> Tensor:
        """Rows c(i) + tap - lower of every axis."""
        for axis, (t, d, o, i) in enumerate(zip(tap, self.window(inp)[2], out, inp, strict=True)):
            dim = padded.dim() - self.lead - len(inp) + axis
            if i % o == 0:
                rows = (slice(None),) * dim + (slice(t * d, t * d + i, i // o),)
                padded = padded[rows]
            else:
                centre = torch.arange(o, device=padded.device) * i // o
                padded = padded.index_select(dim, centre + t * d)
        return padded

    def _convolve(self, weight: Tensor, x: Tensor, out: Dims, inp: Dims) -> Tensor:
        """With dense, diagonal or block-diagonal entries it is torch's (grouped) convolution."""
        axes, batch = len(inp), x.shape[: -len(inp) - 1]
        taps = weight.shape[:axes]
        groups = 1 if isinstance(self.entry, Dense) else weight.shape[axes]
        kernel = weight.reshape(*taps, -1, weight.shape[-1] if weight.dim() > axes + 1 else 1)
        kernel = kernel.movedim((-2, -1), (0, 1)).contiguous()  # torch's float64 path needs it
        lower, upper, dil = self.window(inp)
        even = lower == upper and self.tie == "toeplitz"
        stride = tuple(i // o for i, o in zip(inp, out, strict=True))
        x = x if even else self._pad(x, inp)
        pad = tuple(a * d for a, d in zip(lower, dil, strict=True)) if even else (0,) * axes
        x = x.reshape(-1, *x.shape[len(batch) :]).movedim(-1, 1)
        if axes == 1:  # as an image of one row: torch keeps channel-last memory only in 2-D
            y = F.conv2d(
                x[:, :, None], kernel[:, :, None], None, (1, *stride), (0, *pad), (1, *dil), groups
            )[:, :, 0]
        else:
            conv = F.conv2d if axes == 2 else F.conv3d
            y = conv(x, kernel, None, stride, pad, dil, groups)
        return y.movedim(1, -1).reshape(*batch, *out, kernel.shape[0])

    def operator(self, out: Dims, inp: Dims) -> tuple[str, str]:
        axes = len(self.split(inp)[0])
        if self.split(out)[0] != self.split(inp)[0]:
            return "", "the operators of kernels/ keep every position; this band drops rows"
        if self.tie == "toeplitz" and axes <= 2 and isinstance(self.entry, Diagonal | None):
            return "toeplitz_conv", ""
        if self.tie == "none" and axes == 1 and self.entry is None:
            return "banded_matmul", ""
        entry = self.entry.family if self.entry else "no"
        return "", f"no operator takes tie={self.tie!r} with {entry} entry on {axes} axes"

    def run(self, operator: Callable[..., Tensor], cores: Cores, x: Tensor, out: Dims) -> Tensor:
        lower, upper, dil = self.window(tuple(x.shape[1:-1]))
        if self.tie == "none":
            heads = x.unflatten(-1, (len(cores["taps"]), -1))
            y = operator(heads, cores["taps"], lower=lower[0], upper=upper[0], dilation=dil[0])
            return y.flatten(-2)
        if self.entry is None:
            shared = x.shape[-1] // len(cores["taps"])
            taps = cores["taps"].repeat_interleave(shared, 0).movedim(0, -1).contiguous()
        else:
            taps = cores["taps_weight"]
        return operator(x, taps, lower=lower, upper=upper, dilation=dil)

    def to_dense(self, cores: Cores, out: Dims, inp: Dims) -> Tensor:
        (o, c_out), (i, c_in) = self.split(out), self.split(inp)
        if self.entry is None:
            values = cores["taps"]
        else:
            values = self.entry.to_dense(self.entry_cores("taps", cores), c_out, c_in)
        tail = 2 * self.lead
        index = len(i) + (len(o) if self.tie == "none" else 0)
        batch = values.shape[: values.dim() - index - tail]
        dense = values.new_zeros(*batch, *o, *i, *values.shape[values.dim() - tail :])
        own: tuple[Any, ...] = (slice(None),) * tail
        for row, tap, column in self.cells(o, i):
            at = row + tap if self.tie == "none" else tap
            dense[(..., *row, *column, *own)] = values[(..., *at, *own)]
        if self.entry is not None:
            dense = dense.movedim(-2, -2 - len(i))  # [*o, *i, c, d] -> [*o, c, *i, d]
        return dense.reshape(*batch, math.prod(out), math.prod(inp))

    def cells(self, out: Dims, inp: Dims) -> Iterator[tuple[Dims, Dims, Dims]]:
        """Every (row, tap, column) of the positions' matrix that lies inside of the input."""
        lower, upper, dil = self.window(inp)
        taps = [range(a + b + 1) for a, b in zip(lower, upper, strict=True)]
        for row in itertools.product(*map(range, out)):
            for tap in itertools.product(*taps):
                column = tuple(
                    r * n // m + (t - low) * d
                    for r, n, m, t, low, d in zip(row, inp, out, tap, lower, dil, strict=True)
                )
                if self.tie == "circulant":
                    column = tuple(c % n for c, n in zip(column, inp, strict=True))
                if all(0 <= c < n for c, n in zip(column, inp, strict=True)):
                    yield row, tap, column

    def reach(self, out: Dims, inp: Dims) -> list[tuple[list[int], list[int]]]:
        """Per axis: how many columns each row sees, and how many rows see each column."""
        found = []
        for low, up, d, m, n in zip(
            *self.window(self.split(inp)[0]), self.split(out)[0], self.split(inp)[0], strict=True
        ):
            rows, columns = [0] * m, [0] * n
            for r, k in itertools.product(range(m), range(-low, up + 1)):
                if 0 <= (c := r * n // m + k * d) < n or self.tie == "circulant":
                    rows[r] += 1
                    columns[c % n] += 1
            found.append((rows, columns))
        return found

    def support(self, out: Dims, inp: Dims) -> int:
        """How many entries of the positions' matrix lie inside of the input."""
        return math.prod(sum(rows) for rows, _ in self.reach(out, inp))

    def cost(self, out: Dims, inp: Dims) -> Cost:
        (o, c_out), (_, c_in) = self.split(out), self.split(inp)
        one = self.entry.cost(c_out, c_in).flops if self.entry else 2
        return self.product_cost(out, inp, one * math.prod(o) * math.prod(self.taps(inp)))

    def matrix_rank(self, out: Dims, inp: Dims) -> int:
        (_, c_out), (_, c_in) = self.split(out), self.split(inp)
        one = self.entry.matrix_rank(c_out, c_in) if self.entry else 1
        least: int = math.prod(out)
        for side, c in enumerate((math.prod(c_out), math.prod(c_in))):
            axes = [sees[side] for sees in self.reach(out, inp)]
            nonzero = sum(min(c, one * math.prod(seen)) for seen in itertools.product(*axes))
            least = min(least, nonzero)
        return least

    def project(self, dense: Tensor, out: Dims, inp: Dims) -> Projected | None:
        """The mean of all entries that share a number (a block, with an entry)."""
        (o, c_out), (i, c_in) = self.split(out), self.split(inp)
        batch = dense.shape[:-2]
        own: tuple[Any, ...] = (slice(None),) * (2 * self.lead)
        entries = dense.reshape(*batch, *o, *c_out, *i, *c_in)
        if self.lead:  # [*o, c, *i, d] -> [*o, *i, c, d]
            entries = entries.movedim(-2 - len(i), -2)
        taps, rows = self.taps(inp), o if self.tie == "none" else ()
        total = dense.new_zeros(*batch, *rows, *taps, *c_out, *c_in)
        count = dense.new_zeros(*rows, *taps, *(1,) * len(own))
        for row, tap, column in self.cells(o, i):
            at = row + tap if self.tie == "none" else tap
            total[(..., *at, *own)] += entries[(..., *row, *column, *own)]
            count[at] += 1
        means = total / count.clamp(min=1)
        if self.entry is None:
            return Projected({"taps": means}, True)
        found = self.entry.project(means, c_out, c_in)
        return found.named("taps") if found else None

    @classmethod
    def domains(cls) -> dict[str, Domain]:
        return {"lower": IntRange(0, 3), "upper": IntRange(0, 3), "dilation": IntRange(1, 2)}


def _per_axis(value: Any, dims: Dims) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,) * len(dims)


def _join(values: Dims) -> int | Dims:
    """One value where all axes agree."""
    return values[0] if len(set(values)) == 1 else values
