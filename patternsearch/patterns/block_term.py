"""Block-term: a sum of Tucker terms (De Lathauwer 2008, doi 10.1137/070690729).

As layers: Ye et al. 2018, arXiv 1712.05134.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from ..domains import Domain, FloatRange, IntRange
from ..errors import PatternError
from ..network import ModalNetwork, Plan, RankedNetwork, sampled_rank
from ..pattern import Cores, Dims
from .tucker import tucker_dense, tucker_plan


@dataclass(frozen=True, kw_only=True)
class BlockTerm(RankedNetwork, ModalNetwork, family="block_term"):
    """The sum of `terms` Tucker structures of the same modes and rank, each with its own cores.

    With rank 1 and one mode it is low rank. modes, rank: as in tucker.
    """

    rank: int | float = 0.25
    terms: int = 2

    def check(self) -> None:
        super().check()
        if self.terms < 1:
            raise PatternError(f"block_term: terms={self.terms} must be at least 1")

    def full_rank(self, out: Dims, inp: Dims) -> int:
        outs, inps = self.factors(out, inp)
        return max(outs + inps)

    def plan(self, out: Dims, inp: Dims) -> Plan:
        modes = self.factors(out, inp)
        return tucker_plan(modes, self.whole_rank(out, inp), self.terms)

    def to_dense(self, cores: Cores, out: Dims, inp: Dims) -> Tensor:
        n = len(self.factors(out, inp)[0])
        if self.terms == 1:
            return tucker_dense(cores, n)
        axes = {name: len(core.shape) for name, core in self.cores(out, inp).items()}
        terms = (
            tucker_dense({c: v.select(v.dim() - axes[c], t) for c, v in cores.items()}, n)
            for t in range(self.terms)
        )
        return functools.reduce(torch.add, terms)

    def matrix_rank(self, out: Dims, inp: Dims) -> int:
        return sampled_rank(self, out, inp)  # spans of Kronecker products meet in more than zero

    @classmethod
    def domains(cls) -> dict[str, Domain]:
        return {
            "rank": FloatRange(0.125, 0.5, log=True),
            "modes": IntRange(2, 3),
            "terms": IntRange(2, 4),
        }
