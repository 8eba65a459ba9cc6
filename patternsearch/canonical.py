"""Canonical polyadic decomposition of a tensor by simultaneous diagonalisation.

De Lathauwer 2006, "A link between the canonical decomposition in multilinear algebra and
simultaneous matrix diagonalization", doi 10.1137/040608830.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import product

import torch
from torch import Tensor, einsum

MOST = 20_000_000  # numbers in the equations, 160 MB

Group = tuple[int, ...]


def decompose(tensor: Tensor, rank: int) -> list[Tensor] | None:
    """Vectors [n_k, rank] for every axis whose `rank` outer products sum to the tensor.

    Exact for almost every tensor of that rank where its axes can be joined into three of sizes
    I, J, K with rank <= min(IJ, K) and rank (rank - 1) <= I (I - 1) J (J - 1) / 2; a guess for
    tensors near one. None where no such axes exist, or the equations would be too many.
    """
    groups = _groups(tensor.shape, rank)
    if groups is None:
        return None
    sizes = [math.prod(tensor.shape[k] for k in group) for group in groups]
    x = tensor.permute(*sum(groups, ())).reshape(sizes[0] * sizes[1], sizes[2])
    basis = torch.linalg.svd(x, full_matrices=False)[0][:, :rank]
    mixed = basis @ _mixing(basis.T.reshape(rank, *sizes[:2]))
    u, s, v = torch.linalg.svd(mixed.T.reshape(rank, *sizes[:2]))
    a, b = u[:, :, 0].T, s[:, 0] * v[:, 0].T
    c = (torch.linalg.pinv(einsum("ir,jr->ijr", a, b).reshape(-1, rank)) @ x).T
    vectors: dict[int, Tensor] = {}
    for group, joined in zip(groups, (a, b, c), strict=True):
        found = _split(joined, [tensor.shape[k] for k in group])
        vectors |= dict(zip(group, found, strict=True))
    return [vectors[k] for k in range(tensor.dim())]


def _groups(shape: Sequence[int], rank: int) -> tuple[Group, Group, Group] | None:
    """The axes joined into three; of those that are enough the fewest equations."""
    best: tuple[int, tuple[Group, Group, Group]] | None = None
    for to in product(range(3), repeat=len(shape)):
        i, j, k = (tuple(axis for axis, g in enumerate(to) if g == group) for group in range(3))
        m, n, rest = (math.prod(shape[axis] for axis in group) for group in (i, j, k))
        minors = m * (m - 1) * n * (n - 1) // 4
        numbers = minors * rank * (rank + 1) // 2
        enough = rank <= min(m * n, rest) and rank * (rank - 1) <= 2 * minors
        if i and j and k and enough and numbers <= MOST and (best is None or numbers < best[0]):
            best = numbers, (i, j, k)
    return None if best is None else best[1]


def _mixing(e: Tensor) -> Tensor:
    """[rank, rank] V such that the matrices sum_r e[r] V[r, p] have rank one; e: [rank, I, J].

    Bilinear 2 x 2 minors of two matrices are zero where both are one matrix of rank one. So
    symmetric M with sum_rs M[r, s] minors(e[r], e[s]) = 0 are V D V' with a diagonal D.
    """
    rank, m, n = e.shape
    (i, k), (j, l) = torch.triu_indices(m, m, 1), torch.triu_indices(n, n, 1)
    ij, kl, il, kj = (e[:, a][:, :, b].flatten(1) for a, b in ((i, j), (k, l), (i, l), (k, j)))
    r, s = torch.triu_indices(rank, rank)
    minors = ij[r] * kl[s] + ij[s] * kl[r] - il[r] * kj[s] - il[s] * kj[r]
    few = minors.shape[1] < len(r)
    kernel = torch.linalg.svd(minors, full_matrices=few)[0][:, len(r) - rank :]
    found = kernel.new_zeros(rank, rank, rank)
    found[:, r, s] = found[:, s, r] = torch.where(r == s, 1.0, 0.5).to(e) * kernel.T
    weights = torch.randn(2, rank, generator=torch.Generator().manual_seed(0)).to(e)
    one, two = einsum("kp,prs->krs", weights, found)
    values, vectors = torch.linalg.eig(one @ torch.linalg.pinv(two))
    # a pair of complex ones spans what its real and its imaginary part do
    return torch.where(values.imag < 0, vectors.imag, vectors.real)


def _split(joined: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    """Columns [prod(sizes), rank] as outer products of vectors [size, rank], by axis."""
    columns = joined.T.reshape(-1, *sizes)
    left = columns
    vectors = []
    for axis, size in enumerate(sizes):
        unfolded = columns.movedim(axis + 1, 1).reshape(len(columns), size, -1)
        vector = torch.linalg.svd(unfolded, full_matrices=False)[0][:, :, 0]
        left = einsum("rn...,rn->r...", left, vector)
        vectors.append(vector.T)
    vectors[0] = vectors[0] * left
    return vectors
