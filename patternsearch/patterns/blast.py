"""BLAST: blocks that share their left and right factors (Lee et al. 2024, arXiv 2410.21262)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, einsum
from torch.linalg import pinv

from ..domains import Domain, FloatRange, IntRange
from ..network import BlockedNetwork, Plan, RankedNetwork, Step
from ..pattern import Cores, Dims, Projected

SWEEPS = 60  # of alternating least squares


@dataclass(frozen=True, kw_only=True)
class Blast(RankedNetwork, BlockedNetwork, family="blast"):
    """Block (i, j) of blocks x blocks is left_i diag(middle_ij) right_j.

    rank: the length of those diagonals; an integer, or a fraction of min(out, in). With constant
    diagonals it is low rank, with diagonals that do not overlap block-diagonal.
    """

    operators: ClassVar[tuple[str, ...]] = ("two_factor",)

    def full_rank(self, out: Dims, inp: Dims) -> int:
        return min(math.prod(out), math.prod(inp))

    def plan(self, out: Dims, inp: Dims) -> Plan:
        b, o, i = self.blocks, math.prod(out) // self.blocks, math.prod(inp) // self.blocks
        sizes = {"i": b, "j": b, "p": o, "q": i, "r": self.whole_rank(out, inp)}
        steps = (Step("right", "jrq", "jr"), Step("middle", "ijr", "ir"), Step("left", "ipr", "ip"))
        return Plan(sizes, "jq", steps)

    def feature_operator(self, out: Dims, inp: Dims, device: torch.device) -> str:
        """From 16 blocks on: products with fewer diagonals are too small to gain anything."""
        return "two_factor" if self.blocks >= 16 else ""

    def run_features(
        self, operator: Callable[..., Tensor], cores: Cores, x: Tensor, out: Dims
    ) -> Tensor:
        """Right factors and diagonals together are a Monarch product."""
        first, second = cores["right"].transpose(0, 1), cores["middle"].permute(2, 0, 1)
        z = operator(x, first[:, None, None], second[:, :, None, None])
        z = z.unflatten(-1, (self.blocks, -1))
        return einsum("ipr,...ir->...ip", cores["left"], z).flatten(-2)

    def to_dense(self, cores: Cores, out: Dims, inp: Dims) -> Tensor:
        left, middle, right = cores["left"], cores["middle"], cores["right"]
        w_ipjq = einsum("...ipr,...ijr,...jrq->...ipjq", left, middle, right)
        return w_ipjq.flatten(-4, -3).flatten(-2)

    def project(self, dense: Tensor, out: Dims, inp: Dims) -> Projected:
        """Alternating least squares from shared eigenvectors; exact for almost every member.

        That is where `rank` is at most the sides of a block. Beyond it the factors of a member are
        no eigenvectors of its blocks, and the sweeps, from random factors, end near it.
        """
        b, rank = self.blocks, self.whole_rank(out, inp)
        w_ijpq = dense.unflatten(-1, (b, -1)).unflatten(-3, (b, -1)).movedim(-2, -3)
        if 1 < b and rank <= min(w_ijpq.shape[-2:]):
            left, right = _by_eigenvectors(w_ijpq, rank)
        else:
            generator = torch.Generator().manual_seed(0)
            batch, (p, q) = dense.shape[:-2], w_ijpq.shape[-2:]
            left = torch.randn(*batch, b, p, rank, generator=generator).to(dense)
            right = torch.randn(*batch, b, rank, q, generator=generator).to(dense)
        cores, error = _sweep(w_ijpq, left, right)
        for _ in range(SWEEPS):
            again, less = _sweep(w_ijpq, cores["left"], cores["right"])
            if not less < 0.999 * error:
                break
            cores, error = again, less
        return Projected(cores, False)

    @classmethod
    def domains(cls) -> dict[str, Domain]:
        return {"rank": FloatRange(1 / 16, 0.5, log=True), "blocks": IntRange(2, 16, log=True)}


def _by_eigenvectors(w: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Factors of blocks [*, i, j, p, q], left [*, i, p, rank] and right [*, j, rank, q].

    In bases of the spaces that the blocks of a row, and of a column, share, the blocks are square,
    K_ij = L_i D_ij R_j, and K_00 K_a0^-1 K_ac K_0c^-1 = L_0 (...) L_0^-1 with a diagonal inside.
    """
    row = torch.linalg.svd(w.movedim(-3, -2).flatten(-2), full_matrices=False)[0]
    column = torch.linalg.svd(w.movedim(-4, -2).flatten(-3, -2), full_matrices=False)[2]
    u, v = row[..., :rank], column[..., :rank, :].mT
    k = einsum("...ipr,...ijpq,...jqs->...ijrs", u, w, v)
    first = k[..., :1, :1, :, :]
    loops = first @ pinv(k[..., 1:, :1, :, :]) @ k[..., 1:, 1:, :, :] @ pinv(k[..., :1, 1:, :, :])
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(*loops.shape[-4:-2], 1, 1, generator=generator).to(w)
    values, vectors = torch.linalg.eig((weights * loops).sum((-4, -3)))
    # a pair of complex ones spans what its real and its imaginary part do
    shared = torch.where(values.imag[..., None, :] < 0, vectors.imag, vectors.real)
    right = torch.nn.functional.normalize(
        pinv(shared)[..., None, :, :] @ k[..., 0, :, :, :], dim=-1
    )
    left = k[..., :, 0, :, :] @ pinv(right[..., :1, :, :])
    return u @ torch.nn.functional.normalize(left, dim=-2), right @ v.mT


def _sweep(w: Tensor, left: Tensor, right: Tensor) -> tuple[dict[str, Tensor], float]:
    """Each factor in turn is the least-squares one for the other two; and the error left."""
    pairs = einsum("...ipr,...jrq->...ijpqr", left, right).flatten(-3, -2)
    middle = (pinv(pairs) @ w.flatten(-2)[..., None]).squeeze(-1)
    seen = einsum("...ijr,...jrq->...irjq", middle, right).flatten(-2)
    left = w.movedim(-3, -2).flatten(-2) @ pinv(seen)
    made = einsum("...ipr,...ijr->...jipr", left, middle).flatten(-3, -2)
    right = pinv(made) @ w.transpose(-4, -3).flatten(-3, -2)
    found = einsum("...ipr,...ijr,...jrq->...ijpq", left, middle, right)
    return {"left": left, "middle": middle, "right": right}, float((found - w).norm())
