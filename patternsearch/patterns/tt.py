"""Tensor train (Oseledets 2011, doi 10.1137/090752286; as layers: Novikov et al. 2015).

The layer: arXiv 1509.06569, section 4.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, einsum

from ..domains import Domain, IntRange
from ..network import INPUTS, OUTPUTS, ModalNetwork, Plan, RankedNetwork, Step, tensor_train
from ..pattern import Cores, Dims, Projected


@dataclass(frozen=True, kw_only=True)
class TensorTrain(RankedNetwork, ModalNetwork, family="tt"):
    """W[(o1 ... on), (i1 ... in)] = G_1[o1, i1] G_2[o2, i2] ... G_n[on, in], matrices of `rank`.

    modes: at most how many. rank: of every bond, where it is not more than the bond's full rank; an
    integer, or a fraction of the largest full rank. Rank 1 is a Kronecker product.
    """

    rank: int | float = 4

    def full_ranks(self, out: Dims, inp: Dims) -> list[int]:
        """Of every bond: what lies left of it, or right, whichever is less."""
        pairs = [o * i for o, i in zip(*self.factors(out, inp), strict=True)]
        return [min(math.prod(pairs[:k]), math.prod(pairs[k:])) for k in range(1, len(pairs))]

    def full_rank(self, out: Dims, inp: Dims) -> int:
        return max(self.full_ranks(out, inp), default=1)

    def bonds(self, out: Dims, inp: Dims) -> list[int]:
        rank = self.whole_rank(out, inp)
        return [min(rank, full) for full in self.full_ranks(out, inp)]

    def plan(self, out: Dims, inp: Dims) -> Plan:
        outs, inps = self.factors(out, inp)
        n, bonds = len(outs), self.bonds(out, inp)
        o, i, r = OUTPUTS[:n], INPUTS[:n], "rstuvwxyz"[: n - 1]
        sizes = dict(zip(o + i + r, (*outs, *inps, *bonds), strict=True))
        steps = []
        for k in range(n):
            before, after = r[k - 1 : k] if k else "", r[k : k + 1]
            core = before + o[k] + i[k] + after
            steps.append(Step(f"core{k}", core, i[k + 1 :] + o[: k + 1] + after))
        return Plan(sizes, i, tuple(steps))

    def feature_operator(self, out: Dims, inp: Dims, device: torch.device) -> str:
        return "mode_product"

    def run_features(
        self, operator: Callable[..., Tensor], cores: Cores, x: Tensor, out: Dims
    ) -> Tensor:
        """Every core as a matrix [o_k r_k, r_{k-1} i_k]: the bond goes before the next mode."""
        outs, inps = self.factors(out, x.shape[-1:])
        n, bonds = len(outs), [1, *self.bonds(out, x.shape[-1:]), 1]
        matrices, trailing = [], []
        for k in range(n):
            core = cores[f"core{k}"].reshape(bonds[k], outs[k], inps[k], bonds[k + 1])
            matrices.append(core.permute(1, 3, 0, 2).reshape(outs[k] * bonds[k + 1], -1))
            trailing.append(math.prod(inps[k + 1 :]))
        return operator(x, matrices, trailing=trailing)

    def to_dense(self, cores: Cores, out: Dims, inp: Dims) -> Tensor:
        n = len(cores)
        if n == 1:
            return cores["core0"]
        dense = cores["core0"]  # [o, i, bond]
        for k in range(1, n):
            last = "" if k == n - 1 else "s"
            dense = einsum(f"...oir,...rpj{last}->...opij{last}", dense, cores[f"core{k}"])
            start = -4 - len(last)
            dense = dense.flatten(start, start + 1).flatten(start + 2, start + 3)
        return dense

    def project(self, dense: Tensor, out: Dims, inp: Dims) -> Projected:
        cores = tensor_train(dense, *self.factors(out, inp), self.bonds(out, inp))
        n = len(cores)
        cores[0] = cores[0].squeeze(-4)
        cores[-1] = cores[-1].squeeze(-1)
        return Projected({f"core{k}": core for k, core in enumerate(cores)}, n <= 2)

    @classmethod
    def domains(cls) -> dict[str, Domain]:
        return {"rank": IntRange(1, 16, log=True), "modes": IntRange(2, 3)}
