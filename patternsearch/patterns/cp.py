"""CP: a sum of rank-one tensors (Hitchcock 1927; Kolda and Bader 2009, doi 10.1137/07070111X).

As layers: Lebedev et al. 2015, arXiv 1412.6553.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor, einsum

from ..canonical import decompose
from ..domains import Domain, FloatRange, IntRange
from ..network import INPUTS, OUTPUTS, ModalNetwork, Plan, RankedNetwork, Step, truncated
from ..pattern import Cores, Dims, Projected


@dataclass(frozen=True, kw_only=True)
class CanonicalPolyadic(RankedNetwork, ModalNetwork, family="cp"):
    """W[o, i] = sum_r prod_k out_k[o_k, r] prod_k in_k[r, i_k].

    modes: at most how many each side is split into; with one it is low rank. rank: an integer, or a
    fraction of min(out, in). The modes of the input are contracted one at a time, the largest
    first, so that no array of rank x out x in is ever built.
    """

    def full_rank(self, out: Dims, inp: Dims) -> int:
        return min(math.prod(out), math.prod(inp))

    def most_rank(self, out: Dims, inp: Dims) -> int:
        outs, inps = self.factors(out, inp)
        return math.prod(outs + inps) // max(outs + inps)  # any tensor: one vector free

    def plan(self, out: Dims, inp: Dims) -> Plan:
        outs, inps = self.factors(out, inp)
        n = len(outs)
        o, i = OUTPUTS[:n], INPUTS[:n]
        sizes = dict(zip(o + i, outs + inps, strict=True)) | {"r": self.whole_rank(out, inp)}
        steps = [Step(f"in{k}", "r" + i[k], "r" + i[:k]) for k in reversed(range(n))]
        steps += [Step(f"out{k}", o[k] + "r", "r" + o[: k + 1]) for k in range(n - 1)]
        return Plan(sizes, i, (*steps, Step(f"out{n - 1}", o[-1] + "r", o)))

    def to_dense(self, cores: Cores, out: Dims, inp: Dims) -> Tensor:
        left, right = cores["out0"], cores["in0"]
        for k in range(1, len(cores) // 2):
            left = einsum("...or,...pr->...opr", left, cores[f"out{k}"]).flatten(-3, -2)
            right = einsum("...ri,...rj->...rij", right, cores[f"in{k}"]).flatten(-2)
        return left @ right

    def project(self, dense: Tensor, out: Dims, inp: Dims) -> Projected | None:
        """With one mode the best; with more exact for almost every member of a rank not too high.

        How high, `canonical.decompose` says: 32 for the four modes of 8 of a 64 x 64 matrix. A best
        approximation of other matrices need not even exist (De Silva and Lim 2008).
        """
        outs, inps = self.factors(out, inp)
        rank, n = self.whole_rank(out, inp), len(outs)
        if n == 1:
            left, right = truncated(dense, rank)
            return Projected({"out0": left, "in0": right}, True)
        if dense.dim() > 2 or (vectors := decompose(dense.reshape(outs + inps), rank)) is None:
            return None
        cores = {f"out{k}": vectors[k] for k in range(n)}
        return Projected(cores | {f"in{k}": vectors[n + k].T for k in range(n)}, False)

    @classmethod
    def domains(cls) -> dict[str, Domain]:
        return {"rank": FloatRange(1 / 16, 0.5, log=True), "modes": IntRange(2, 3)}
