"""Semiseparable: the matrix of a linear recurrence (Dao and Gu 2024, arXiv 2405.21060, sec. 3)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ..domains import Choice, Domain
from ..errors import PatternError
from ..pattern import Core, Cores, Cost, Dims, Pattern, Projected, linear_attention_cost

STARTS = 20  # of Newton's method


@dataclass(frozen=True, kw_only=True)
class Semiseparable(Pattern, family="semiseparable"):
    """M_ij = a_{j+1} ... a_i s_j for i >= j: the states h_i = a_i h_{i-1} + s_i x_i.

    tie: 'toeplitz' shares one decay (a time-invariant filter), 'none' gives each position its own.
    normalise: s_i = sqrt(1 - a_i^2), which keeps the variance of white input; else s_i = 1.
    two_sided: adds the mirrored recurrence from the end, its diagonal left out, with the same
    decays: a quasiseparable matrix, for tasks that are not causal.
    order: how many states back, h_i = a_i1 h_{i-1} + ... + a_ip h_{i-p} + s_i x_i. The coefficients
    come from partial correlations k1 = decay and k = tanh(reflection) by the recursion of Durbin
    and Levinson, so that every stable filter with k1 in (0, 1) is reached and no other
    (Barndorff-Nielsen and Schou 1973, doi 10.1016/0047-259X(73)90030-4); s_i = prod sqrt(1 - k^2).
    state: so many recurrences side by side, M = sum_n diag(read_n) M_n diag(write_n); with
    tie='toeplitz' `read` alone, which `write` would only scale.
    A grid is read row by row. With fewer rows than positions, row i of an axis is its position
    floor(i in / out), as in a band.
    With an entry the decay is a matrix along features, as in an RNN; `normalise`, `order` and
    `state` do not apply.
    """

    takes_entry: ClassVar[bool] = True
    operators: ClassVar[tuple[str, ...]] = ("linear_scan",)

    tie: Literal["none", "toeplitz"] = "toeplitz"
    normalise: bool = True
    two_sided: bool = False
    order: int = 1
    state: int = 1

    def check(self) -> None:
        for name in ("order", "state"):
            if (value := getattr(self, name)) < 1:
                raise PatternError(f"semiseparable: {name}={value} must be at least 1")

    def unavailable(self, out: Dims, inp: Dims, causal: bool = False) -> str | None:
        (o, c_out), (i, c_in) = self.split(out), self.split(inp)
        if len(o) != len(i):
            return f"semiseparable: out={o} and inp={i} have different numbers of axes"
        if any(rows > n for rows, n in zip(o, i, strict=True)):
            return f"semiseparable: out={o} has more positions than inp={i}; use at most {i}"
        if causal and self.two_sided:
            return "semiseparable: two_sided sees the future in a causal task; use two_sided=false"
        if causal and o != i:
            return f"semiseparable: a causal task needs as many rows as columns, not {o} of {i}"
        if self.entry is None:
            return None
        if c_out != c_in:
            return f"semiseparable: its entry maps {c_in} to {c_out}; a state needs both the same"
        if self.two_sided or self.tie == "none":
            return "semiseparable: with an entry only tie='toeplitz', two_sided=false is built"
        if self.order > 1 or self.state > 1:
            return "semiseparable: with an entry only order=1 and state=1 are built"
        return self.entry.unavailable(c_out, c_in)

    def resolve(self, out: Dims, inp: Dims, causal: bool = False) -> Semiseparable:
        n, numbers = math.prod(self.split(inp)[0]), self.entry is None
        return replace(
            self,
            entry=self.entry.resolve(out[-1:], inp[-1:]) if self.entry else None,
            normalise=self.normalise and numbers,
            two_sided=self.two_sided and not causal,
            order=min(self.order, max(n - 1, 1)) if numbers else 1,
            state=min(self.state, n) if numbers else 1,
        )

    def cores(self, out: Dims, inp: Dims) -> dict[str, Core]:
        if self.entry is not None:
            return self.with_entry("decay", Core((), 1, 1), out, inp)
        n = 1 if self.tie == "toeplitz" else math.prod(inp)
        shape = (n,) if self.state == 1 else (self.state, n)
        found = {"decay": Core(shape, 1, 1, "decay")}
        if self.order > 1:  # from zero on: it begins as a recurrence of order 1
            found["reflection"] = Core((self.order - 1, *shape), 1, 1, "zero")
        if self.state > 1:
            found["read"] = Core(shape, self.state, self.state)
            if self.tie == "none":
                found["write"] = Core(shape, 1, 1)
        return found

    def chains(self, out: Dims, inp: Dims) -> list[list[str]]:
        return super().chains(out, inp) if self.entry is None else []  # powers of its matrix

    def matmul(self, cores: Cores, x: Tensor, out: Dims) -> Tensor:
        if self.entry is not None:
            return self._step_entries(cores, x, out)
        inp = x.shape[-len(out) :]
        x = x.flatten(-len(out))
        lags, scale = self.lags(cores, x.shape[-1])
        x = x if self.state == 1 else x[..., None, :]
        x = x * cores["write"] if "write" in cores else x
        x = x if scale is None else x * scale
        y = run(lags, x)
        if self.two_sided:
            y = y + run([a.flip(-1) for a in lags], x.flip(-1)).flip(-1) - x
        y = y if self.state == 1 else (y * cores["read"]).sum(-2)
        return _rows(y, -1, out, inp)

    def lags(self, cores: Cores, n: int) -> tuple[list[Tensor], Tensor | None]:
        """Coefficients a_1 ... a_p, each [*, n] (or [*, state, n]), and the scale of the input."""
        decay = cores["decay"]
        lags = [decay.expand(*decay.shape[:-1], n)]
        scale = 1 - lags[0] * lags[0]
        for m in range(self.order - 1):
            k = cores["reflection"].select(-2 - (self.state > 1), m).tanh()
            lags = [a - k * b for a, b in zip(lags, reversed(lags), strict=True)]
            lags.append(k.expand(lags[0].shape))
            scale = scale * (1 - k * k)
        # a decay rounded to 1 leaves a scale of 0, where the root has no finite gradient
        tiny = torch.finfo(scale.dtype).tiny
        return lags, scale.clamp_min(tiny).sqrt() if self.normalise else None

    def _step_entries(self, cores: Cores, x: Tensor, out: Dims) -> Tensor:
        assert self.entry is not None
        entry, own = self.entry, self.entry_cores("decay", cores)
        inp = x.shape[-len(out) : -1]
        x = x.flatten(-len(out), -2)
        h = torch.zeros_like(x[..., 0, :])
        states = []
        for x_t in x.unbind(-2):
            h = entry.matmul(own, h, out[-1:]) + x_t
            states.append(h)
        return _rows(torch.stack(states, -2), -2, out[:-1], inp)

    def operator(self, out: Dims, inp: Dims) -> tuple[str, str]:
        if self.entry is not None or self.order > 1 or self.state > 1:
            return "", "linear_scan takes decays that are numbers, of order 1 and state size 1"
        return "linear_scan", ""

    def run(self, operator: Callable[..., Tensor], cores: Cores, x: Tensor, out: Dims) -> Tensor:
        """Decays [heads, n], or computed ones [B, *positions, channels], along flat positions."""
        inp = x.shape[1:-1]
        x = x.flatten(1, -2)
        decay = cores["decay"]
        if decay.dim() == 2:
            decay = decay.repeat_interleave(x.shape[-1] // len(decay), 0).movedim(0, -1)
            a = decay.expand(x.shape[1], -1).contiguous()
        else:
            a = decay.flatten(1, -2)
        if self.normalise:
            x = x * (1 - a * a).clamp_min(torch.finfo(a.dtype).tiny).sqrt()
        y = operator(a, x)
        if self.two_sided:
            y = y + operator(a, x, reverse=True) - x
        return _rows(y, 1, out, inp)

    def to_dense(self, cores: Cores, out: Dims, inp: Dims) -> Tensor:
        if self.entry is not None:
            return self._dense_entries(cores, out, inp)
        lags, scale = self.lags(cores, math.prod(inp))
        dense = _unrolled(lags)
        if self.two_sided:
            mirrored = _unrolled([a.flip(-1) for a in lags]).flip(-1, -2)
            dense = dense + mirrored - dense.new_ones(dense.shape[-1]).diag_embed()
        if scale is not None:
            dense = dense * scale[..., None, :]
        if "write" in cores:
            dense = dense * cores["write"][..., None, :]
        if self.state > 1:
            dense = (dense * cores["read"][..., :, None]).sum(-3)
        return _rows(dense, -2, out, inp).flatten(-1 - len(out), -2)

    def _dense_entries(self, cores: Cores, out: Dims, inp: Dims) -> Tensor:
        assert self.entry is not None
        c, n = inp[-1], math.prod(inp[:-1])
        step = self.entry.to_dense(self.entry_cores("decay", cores), out[-1:], inp[-1:])
        dense = step.new_zeros(*step.shape[:-2], n, c, n, c)
        power = torch.eye(c, dtype=step.dtype, device=step.device).expand(step.shape)
        for k in range(n):
            for j in range(n - k):
                dense[..., j + k, :, j, :] = power
            power = step @ power
        dense = _rows(dense, -4, out[:-1], inp[:-1])
        return dense.reshape(*step.shape[:-2], math.prod(out), math.prod(inp))

    def cost(self, out: Dims, inp: Dims) -> Cost:
        if self.entry is not None:
            one = self.entry.cost(out[-1:], inp[-1:]).flops
            return self.product_cost(out, inp, math.prod(inp[:-1]) * one, math.prod(inp))
        n = math.prod(inp) * self.state
        steps = self.order * (1 + self.two_sided)
        outside = 0 if self.state == 1 else 1 + (self.tie == "none")
        return self.product_cost(out, inp, 2 * n * (steps + outside), n)

    def features(self, out: Dims, inp: Dims) -> int:
        return min(self.state, math.prod(inp))

    def attention_cost(self, out: Dims, inp: Dims, channels: int) -> Cost:
        sums = channels + self.normalise  # one more vector sums the entries of a row
        once = linear_attention_cost(math.prod(out), math.prod(inp), self.state, sums)
        return once.repeat(1 + self.two_sided, 1)

    def matrix_rank(self, out: Dims, inp: Dims) -> int:
        return min(math.prod(out), math.prod(inp))

    def project(self, dense: Tensor, out: Dims, inp: Dims) -> Projected | None:
        """Each row's regression on the rows before it: exact for members, near in general.

        Two-sided, on the rows after it too. Of the first rows, which have too few before them, see
        `_first_row`; of several states that are tied, `_exponentials`. With fewer rows than
        positions, or several states that are not tied or of a higher order, None: a search.
        """
        if self.entry is not None or out != inp:
            return None
        if self.state > 1:
            tied = self.tie == "toeplitz" and self.order == 1 and dense.dim() == 2
            return self._exponentials(dense) if tied else None
        n, sides = dense.shape[-1], [dense.tril()]
        if self.two_sided and self.tie == "none":
            sides.append(dense.triu().flip(-1, -2))
        seen, rows = [], []
        for mirrored, side in enumerate(sides):
            past = [F.pad(side, (0, 0, lag, 0))[..., :n, :] for lag in range(1, self.order + 1)]
            before = torch.stack(past, -1) * dense.new_ones(n, n).tril(-1)[..., None]
            seen.append(before.flip(-3) if mirrored else before)
            rows.append(side.tril(-1).flip(-2) if mirrored else side.tril(-1))
        known, row = torch.cat(seen, -2), torch.cat(rows, -1)
        if self.tie == "toeplitz":  # one regression over all rows
            known, row = known.flatten(-3, -2)[..., None, :, :], row.flatten(-2)[..., None, :]
        lags = (torch.linalg.pinv(known) @ row[..., None]).squeeze(-1)
        found = torch.stack(_partial_correlations(list(lags.unbind(-1))))
        if self.tie == "none" and dense.dim() == 2 and not (self.two_sided and n > self.order):
            for i in range(not self.normalise, min(self.order, n)):
                scale = dense[i, i] if self.normalise else None
                found[:, i] = self._first_row(lags[i, :i], scale)
        cores = {"decay": found[0].clamp(0, 1)}
        if self.order > 1:
            reflection = found[1:].movedim(0, -2).clamp(-1 + 1e-9, 1 - 1e-9).atanh()
            cores["reflection"] = reflection
        return Projected(cores, False)

    def _exponentials(self, dense: Tensor) -> Projected:
        """The filter sum_n c_n a_n^k by the matrix pencil (Hua and Sarkar 1990).

        doi 10.1109/29.56027; a_n are the eigenvalues of a shift in the range of a Hankel matrix.
        """
        n = dense.shape[-1]
        h = torch.stack([dense.diagonal(-k).mean() for k in range(n)])
        rows = min(n, max((n + 1) // 2, self.state + 1))
        spanned = torch.linalg.svd(h.unfold(0, n - rows + 1, 1))[0][:, : self.state]
        shift = torch.linalg.pinv(spanned[:-1]) @ spanned[1:]
        decay = torch.linalg.eigvals(shift).real.clamp(1e-6, 1 - 1e-6)
        decay = torch.nn.functional.pad(decay, (0, self.state - len(decay)), value=0.5)
        powers = decay ** torch.arange(n, device=dense.device)[:, None]
        read = (torch.linalg.pinv(powers) @ h)[:, None]
        scale = self.lags({"decay": decay[:, None]}, 1)[1]
        read = read if scale is None else read / scale
        return Projected({"decay": decay[:, None], "read": read}, False)

    def _first_row(self, lags: Tensor, scale: Tensor | None) -> Tensor:
        """Partial correlations with these first lags and this scale, of the many there may be.

        By Newton's method with the least step, from several starts.
        """

        def partial(point: Tensor) -> Tensor:
            return torch.cat([point[:1].sigmoid(), point[1:].tanh()])

        def misfit(point: Tensor) -> Tensor:
            cores = {"decay": point[:1].sigmoid(), "reflection": point[1:, None]}
            made, size = self.lags(cores, 1)
            missed = torch.cat([*made[: len(lags)], point[:0]]) - lags
            return missed if scale is None or size is None else torch.cat([missed, size - scale])

        generator = torch.Generator().manual_seed(0)
        best, least = torch.zeros(self.order).to(lags), math.inf
        for _ in range(STARTS):
            point = torch.randn(self.order, generator=generator).to(lags)
            for _ in range(40):
                jacobian = torch.autograd.functional.jacobian(misfit, point)
                step = torch.linalg.pinv(jacobian) @ misfit(point)
                point = point - step / max(1.0, float(step.norm()))
            if (size := float(misfit(point).norm())) < least:
                best, least = partial(point), size
            if least < 1e-14:
                break
        return best

    @classmethod
    def domains(cls) -> dict[str, Domain]:
        return {"two_sided": Choice((False, True))}


def _unrolled(lags: list[Tensor]) -> Tensor:
    """The lower-triangular matrix of a recurrence, [*, n, n], row by row."""
    n = lags[0].shape[-1]
    eye = lags[0].new_ones(n).diag_embed()
    rows: list[Tensor] = []
    for i in range(n):
        row = eye[i].expand(*lags[0].shape[:-1], n)
        for k, a in enumerate(lags[:i], 1):
            row = row + a[..., i, None] * rows[i - k]
        rows.append(row)
    return torch.stack(rows, -2)


def _partial_correlations(lags: list[Tensor]) -> list[Tensor]:
    """The recursion of Durbin and Levinson backwards; clamped where a filter is not stable."""
    found: list[Tensor] = []
    while lags:
        k = lags[-1].clamp(-1 + 1e-9, 1 - 1e-9)
        found.insert(0, k)
        rest = lags[:-1]
        lags = [(a + k * b) / (1 - k * k) for a, b in zip(rest, reversed(rest), strict=True)]
    return found


def run(lags: list[Tensor], x: Tensor) -> Tensor:
    """h_t = sum_k lags[k-1]_t h_{t-k} + x_t along the last axis, from h = 0 before the start."""
    if len(lags) == 1:
        return scan(lags[0], x)
    p = len(lags)
    zeros = torch.zeros_like(x)
    below = torch.eye(p, dtype=x.dtype, device=x.device)[:-1].expand(*lags[0].shape, p - 1, p)
    step = torch.cat([torch.stack(lags, -1)[..., None, :], below], -2)  # companion, [*, n, p, p]
    h = torch.stack([x] + [zeros] * (p - 1), -1)[..., None]
    n, reach = x.shape[-1], 1
    while reach < n:
        h = torch.cat(
            [
                h[..., :reach, :, :],
                h[..., reach:, :, :] + step[..., reach:, :, :] @ h[..., :-reach, :, :],
            ],
            -3,
        )
        step = torch.cat(
            [step[..., :reach, :, :], step[..., reach:, :, :] @ step[..., :-reach, :, :]], -3
        )
        reach *= 2
    return h[..., 0, 0]


def scan(a: Tensor, x: Tensor) -> Tensor:
    """h_t = a_t h_{t-1} + x_t along the last axis, by doubling: log2(T) steps of whole tensors.

    Never divides by a decay, so that it is exact for decays of zero. (Blelloch 1990.)
    """
    a = a.expand(x.shape)
    n, step = x.shape[-1], 1
    while step < n:
        x = torch.cat([x[..., :step], x[..., step:] + a[..., step:] * x[..., :-step]], -1)
        a = torch.cat([a[..., :step], a[..., step:] * a[..., :-step]], -1)
        step *= 2
    return x


def standing(out: Dims, inp: Dims, device: torch.device) -> Tensor:
    """Positions floor(i in / out) of every axis, on which the rows stand; counted row by row."""
    index = torch.zeros(1, dtype=torch.long, device=device)
    for o, n in zip(out, inp, strict=True):
        index = (index[:, None] * n + torch.arange(o, device=device) * n // o).flatten()
    return index


def _rows(y: Tensor, dim: int, out: Dims, inp: Dims) -> Tensor:
    """Of the positions `inp`, flat on axis `dim`, those of the rows, unflattened to `out`."""
    kept = y if out == inp else y.index_select(dim, standing(out, inp, y.device))
    rows: Tensor = kept.unflatten(dim, out)
    return rows
