"""Tucker: a small core between one factor a mode (Tucker 1966, doi 10.1007/BF02289464).

As layers: Kim et al. 2016, arXiv 1511.06530. Block-term decompositions are sums of these.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, einsum

from ..domains import Domain, FloatRange, IntRange
from ..network import INPUTS, OUTPUTS, ModalNetwork, Plan, RankedNetwork, Step
from ..pattern import Cores, Dims, Projected


@dataclass(frozen=True, kw_only=True)
class Tucker(RankedNetwork, ModalNetwork, family="tucker"):
    """W[o, i] = sum core[p, q] prod_k out_k[o_k, p_k] prod_k in_k[q_k, i_k].

    modes: at most how many each side is split into. rank: of every mode, where it is not more than
    its size; an integer, or a fraction of the largest mode.
    """

    rank: int | float = 0.5

    def full_rank(self, out: Dims, inp: Dims) -> int:
        outs, inps = self.factors(out, inp)
        return max(outs + inps)

    def plan(self, out: Dims, inp: Dims) -> Plan:
        return tucker_plan(self.factors(out, inp), self.whole_rank(out, inp), 1)

    def feature_operator(self, out: Dims, inp: Dims, device: torch.device) -> str:
        return "mode_product"

    def run_features(
        self, operator: Callable[..., Tensor], cores: Cores, x: Tensor, out: Dims
    ) -> Tensor:
        """Factors of the input, the core as one matrix, factors of the output."""
        n, inps = len(self.factors(out, x.shape[-1:])[0]), self.factors(out, x.shape[-1:])[1]
        narrow = [cores[f"in{k}"] for k in range(n)]
        wide = [cores[f"out{k}"] for k in range(n)]
        core = cores["core"].reshape(math.prod(f.shape[1] for f in wide), -1)
        trailing = [math.prod(inps[k + 1 :]) for k in range(n)]
        after = [math.prod(f.shape[1] for f in wide[k + 1 :]) for k in range(n)]
        return operator(x, [*narrow, core, *wide], trailing=[*trailing, 1, *after])

    def to_dense(self, cores: Cores, out: Dims, inp: Dims) -> Tensor:
        return tucker_dense(cores, len(self.factors(out, inp)[0]))

    def project(self, dense: Tensor, out: Dims, inp: Dims) -> Projected:
        """The leading singular vectors of every unfolding (De Lathauwer et al. 2000)."""
        outs, inps = self.factors(out, inp)
        batch, modes, n = dense.dim() - 2, outs + inps, len(outs)
        core, whole = dense.reshape(*dense.shape[:-2], *modes), self.whole_rank(out, inp)
        tensor, found = core, {}
        for k, size in enumerate(modes):
            unfolded = tensor.movedim(batch + k, batch).flatten(batch + 1)
            u = torch.linalg.svd(unfolded, full_matrices=False)[0]
            u = F.pad(u, (0, max(0, size - u.shape[-1])))[..., : min(whole, size)]
            found[f"out{k}" if k < n else f"in{k - n}"] = u if k < n else u.transpose(-1, -2)
            moved = core.movedim(batch + k, batch)
            shape = moved.shape[batch + 1 :]
            smaller = (u.transpose(-1, -2) @ moved.flatten(batch + 1)).unflatten(-1, shape)
            core = smaller.movedim(batch, batch + k)
        return Projected(found | {"core": core}, n == 1 or whole >= max(modes))

    @classmethod
    def domains(cls) -> dict[str, Domain]:
        return {"rank": FloatRange(0.25, 1.0), "modes": IntRange(2, 3)}


def tucker_plan(modes: tuple[Dims, Dims], rank: int, terms: int) -> Plan:
    """Factors of the input one by one, the core, factors of the output; a letter for terms > 1."""
    outs, inps = modes
    n = len(outs)
    o, i, p, q = OUTPUTS[:n], INPUTS[:n], "IJKLMNOP"[:n], "ijklmnop"[:n]
    t = "t" if terms > 1 else ""
    ranks = [min(rank, size) for size in (*outs, *inps)]
    sizes = dict(zip(o + i + p + q + t, (*outs, *inps, *ranks, *[terms] * len(t)), strict=True))
    steps = [Step(f"in{k}", t + q[k] + i[k], t + q[: k + 1] + i[k + 1 :]) for k in range(n)]
    steps.append(Step("core", t + p + q, t + p))
    for k in range(n):
        left = t if k < n - 1 else ""
        steps.append(Step(f"out{k}", t + o[k] + p[k], left + o[: k + 1] + p[k + 1 :]))
    return Plan(sizes, i, tuple(steps))


def tucker_dense(cores: Cores, n: int) -> Tensor:
    """The Kronecker product of the factors on each side of the core, [*batch, out, in]."""
    left, right = cores["out0"], cores["in0"]
    for k in range(1, n):
        left, right = kron(left, cores[f"out{k}"]), kron(right, cores[f"in{k}"])
    core = cores["core"].flatten(-n)
    core = core.flatten(-n - 1, -2)
    return left @ core @ right


def kron(a: Tensor, b: Tensor) -> Tensor:
    """torch.kron of the last two axes, with batch axes."""
    pairs = einsum("...oi,...pj->...opij", a, b)
    return pairs.flatten(-4, -3).flatten(-2)
