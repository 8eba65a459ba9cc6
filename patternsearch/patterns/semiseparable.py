"""Semiseparable: the matrix of a linear recurrence (Dao and Gu 2024, arXiv 2405.21060, sec. 3)."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..domains import Choice, Domain
from ..pattern import Core, Cores, Cost, Dims, Pattern


@dataclass(frozen=True, kw_only=True)
class Semiseparable(Pattern, family="semiseparable"):
    """M_ij = a_{j+1} ... a_i s_j for i >= j: the states h_i = a_i h_{i-1} + s_i x_i.

    tie: 'toeplitz' shares one decay (a time-invariant filter), 'none' gives each position its own.
    normalise: s_i = sqrt(1 - a_i^2), which keeps the variance of white input; else s_i = 1.
    two_sided: adds the mirrored recurrence from the end, its diagonal left out, with the same
    decays: a quasiseparable matrix, for tasks that are not causal.
    A grid is read row by row. With fewer rows than positions, row i is position floor(i in / out).
    With an entry the decay is a matrix along features, as in an RNN; `normalise` does not apply.
    """

    takes_entry: ClassVar[bool] = True
    operator: ClassVar[str | None] = "linear_scan"

    tie: Literal["none", "toeplitz"] = "toeplitz"
    normalise: bool = True
    two_sided: bool = False

    def unavailable(self, out: Dims, inp: Dims, causal: bool = False) -> str | None:
        (o, c_out), (i, c_in) = self.split(out), self.split(inp)
        if math.prod(o) > math.prod(i):
            return f"semiseparable: out={o} has more positions than inp={i}"
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
        return self.entry.unavailable(c_out, c_in)

    def resolve(self, out: Dims, inp: Dims, causal: bool = False) -> Semiseparable:
        entry = self.entry.resolve(out[-1:], inp[-1:]) if self.entry else None
        normalise = self.normalise and entry is None
        return replace(
            self, entry=entry, normalise=normalise, two_sided=self.two_sided and not causal
        )

    def cores(self, out: Dims, inp: Dims) -> dict[str, Core]:
        if self.entry is not None:
            return self.with_entry("decay", Core((), 1, 1), out, inp)
        n = 1 if self.tie == "toeplitz" else math.prod(inp)
        return {"decay": Core((n,), 1, 1, "decay")}

    def matmul(self, cores: Cores, x: Tensor, out: Dims) -> Tensor:
        inp = tuple(x.shape[x.dim() - len(out) :])
        if self.entry is not None:
            entry, own = self.entry, self.entry_cores("decay", cores)
            x = x.flatten(-len(out), -2)
            h = torch.zeros_like(x[..., 0, :])
            states = []
            for x_t in x.unbind(-2):
                h = entry.matmul(own, h, out[-1:]) + x_t
                states.append(h)
            return _rows(torch.stack(states, -2), -2, out[:-1])
        x = x.flatten(-len(out))
        a = cores["decay"].expand(*cores["decay"].shape[:-1], math.prod(inp))
        if self.normalise:
            x = x * (1 - a * a).sqrt()
        y = scan(a, x)
        if self.two_sided:
            y = y + scan(a.flip(-1), x.flip(-1)).flip(-1) - x
        return _rows(y, -1, out)

    def to_dense(self, cores: Cores, out: Dims, inp: Dims) -> Tensor:
        if self.entry is not None:
            return self._dense_entries(cores, out, inp)
        n = math.prod(inp)
        a = cores["decay"].expand(*cores["decay"].shape[:-1], n)
        dense = a.new_zeros(*a.shape[:-1], n, n)
        for j in range(n):
            for i in range(j, n):
                dense[..., i, j] = a[..., j + 1 : i + 1].prod(-1)
                if self.two_sided and i > j:
                    dense[..., j, i] = a[..., j:i].prod(-1)
        if self.normalise:
            dense = dense * (1 - a * a).sqrt()[..., None, :]
        return _rows(dense, -2, (math.prod(out),))

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
        dense = _rows(dense, -4, (math.prod(out[:-1]),))
        return dense.reshape(*step.shape[:-2], math.prod(out), math.prod(inp))

    def cost(self, out: Dims, inp: Dims) -> Cost:
        if self.entry is not None:
            one = self.entry.cost(out[-1:], inp[-1:]).flops
            return self.product_cost(out, inp, math.prod(inp[:-1]) * one, math.prod(inp))
        return self.product_cost(
            out, inp, 2 * math.prod(inp) * (1 + self.two_sided), math.prod(inp)
        )

    def matrix_rank(self, out: Dims, inp: Dims) -> int:
        return min(math.prod(out), math.prod(inp))

    @classmethod
    def domains(cls) -> dict[str, Domain]:
        return {"two_sided": Choice((False, True))}


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


def _rows(y: Tensor, dim: int, out: Dims) -> Tensor:
    """Positions floor(i in / out) of axis `dim`, unflattened to `out`."""
    n, rows = y.shape[dim], math.prod(out)
    if rows != n:
        y = y.index_select(dim, torch.arange(rows, device=y.device) * n // rows)
    return y.unflatten(dim, out)
