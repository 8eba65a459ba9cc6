"""Products of decays inside a chunk, and the scores and gradients they weigh, in plain torch.

The decay from s to t is built by doubling: in blocks of 2m rows, a row t of the upper half and a
row s of the lower half meet in the middle, so their factor is (product down to the middle) x
(product up to the middle). Both are at most 1, underflow to 0 at worst, and stay exact where the
difference of two running sums of logarithms would cancel, or turn a decay of 0 into NaN.
"""

from __future__ import annotations

import torch
from torch import Tensor

ELEMENTWISE = 2  # halves of this many rows are too small for a matrix product each

Level = tuple[int, Tensor, Tensor]


def levels(steps: Tensor) -> tuple[list[Level], Tensor, Tensor]:
    """Half sizes m with the factors of upper and lower halves [blocks, m, K], smallest first.

    steps [N, C, K] hold one decay a row. The two tensors after the levels are the products from the
    chunk's start to each row, itself included, and from each row, itself excluded, to the end.
    """
    prefix, suffix = steps.clone(), torch.ones_like(steps)
    found = []
    half = 1
    while half < steps.shape[1]:
        shape = (-1, 2, half, steps.shape[2])
        pairs = prefix.view(shape)  # indexed, since views of unbind may not be changed in place
        below, above = pairs[:, 0], pairs[:, 1]
        left = suffix.view(shape)[:, 0]
        found.append((half, above.clone(), left.clone()))
        left *= above[:, -1:]
        above *= below[:, -1:]
        half *= 2
    return found, prefix, suffix


def blocks(scores: Tensor, half: int) -> Tensor:
    """Scores [N, C, C] of upper rows with lower columns: a view [N, C / 2m, m, m]."""
    count, rows, _ = scores.shape
    size = (count, rows // (2 * half), half, half)
    stride = (rows * rows, 2 * half * (rows + 1), rows, 1)
    return scores.as_strided(size, stride, scores.storage_offset() + half * rows)


def weights(factors: list[Level], like: Tensor) -> Tensor:
    """The lower triangular matrix [N, C, C] of all factors; like [N, C, 1], one decay a row."""
    count, rows, _ = like.shape
    matrix = like.new_zeros(count, rows, rows)
    matrix.diagonal(0, 1, 2).fill_(1)
    for half, upper, lower in factors:
        shape = (count, -1, half)
        target = blocks(matrix, half)
        torch.mul(upper.view(shape)[..., None], lower.view(shape)[..., None, :], out=target)
    return matrix


def scores(q: Tensor, k: Tensor, factors: list[Level]) -> Tensor:
    """One decay a channel: sum_k q_t k_s (decay from s to t), [N, C, C], 0 for s > t."""
    count, rows, _ = q.shape
    result = q.new_zeros(count, rows, rows)
    torch.sum(q * k, -1, out=result.diagonal(0, 1, 2))
    for half, upper, lower in factors:
        left, right = _halves(q, k, half, upper, lower)
        if half <= ELEMENTWISE:
            product = (left[:, :, None] * right[:, None]).sum(-1)
        else:
            product = torch.bmm(left, right.mT)
        target = blocks(result, half)
        target.copy_(product.view(target.shape))
    return result


def scores_backward(
    grad: Tensor, q: Tensor, k: Tensor, factors: list[Level]
) -> tuple[Tensor, Tensor]:
    """Gradients of q and k for `grad` of the scores; its entries with s > t are not read."""
    diagonal = grad.diagonal(0, 1, 2)[..., None]
    grad_q, grad_k = diagonal * k, diagonal * q
    for half, upper, lower in factors:
        left, right = _halves(q, k, half, upper, lower)
        given = blocks(grad, half).reshape(-1, half, half)
        if half <= ELEMENTWISE:
            to_q = (given[..., None] * right[:, None]).sum(2)
            to_k = (given[..., None] * left[:, :, None]).sum(1)
        else:
            to_q, to_k = torch.bmm(given, right), torch.bmm(given.mT, left)
        shape = (-1, 2, half, q.shape[2])
        grad_q.view(shape)[:, 1].addcmul_(to_q, upper)
        grad_k.view(shape)[:, 0].addcmul_(to_k, lower)
    return grad_q, grad_k


def _halves(q: Tensor, k: Tensor, half: int, upper: Tensor, lower: Tensor) -> tuple[Tensor, Tensor]:
    shape = (-1, 2, half, q.shape[2])
    return q.view(shape)[:, 1] * upper, k.view(shape)[:, 0] * lower
