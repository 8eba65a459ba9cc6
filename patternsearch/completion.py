"""A matrix of low rank from some of its entries.

By variable projection: for given left factors the right ones are linear least squares, so that the
left ones alone are searched, by Levenberg and Marquardt's method with the Jacobian of Kaufman 1975
(doi 10.1007/BF01932995). Golub and Pereyra 1973, doi 10.1137/0710036.
"""

from __future__ import annotations

import torch
from torch import Tensor

STEPS = 60


def complete(dense: Tensor, known: Tensor, rank: int) -> Tensor:
    """[m, n] of `rank`, near `dense` in least squares where `known` [m, n] is true.

    A local minimum in general: where there is a matrix that agrees and enough is known of it, it
    was found from the singular vectors of what is known (tests/patterns/test_project.py).
    """
    if dense.shape[0] > dense.shape[1]:
        return complete(dense.mT, known.mT, rank).mT
    kinds, kind = known.mT.unique(dim=0, return_inverse=True)  # of columns, often few
    left: Tensor = torch.linalg.svd(dense * known)[0][:, :rank]
    eye = torch.eye(left.numel(), dtype=dense.dtype, device=dense.device)
    right, rest, within = _right(dense, kinds, kind, left)
    damping = 1e-2
    for _ in range(STEPS):
        size = float(rest.norm())
        if size <= 1e-15 * float(dense.norm()) or damping > 1e12:
            break
        slope = (rest @ right).flatten()
        pairs = right[:, :, None] * right[:, None, :]
        pairs = pairs.new_zeros(len(kinds), rank, rank).index_add(0, kind, pairs)
        normal = torch.einsum("uik,urs->irks", within, pairs).reshape(eye.shape)
        scale = float(normal.diagonal().mean()) or 1.0
        step = torch.linalg.solve(normal + damping * scale * eye, slope).reshape(left.shape)
        moved = torch.linalg.qr(left + step)[0]
        found = _right(dense, kinds, kind, moved)
        if float(found[1].norm()) < size:
            left, (right, rest, within) = moved, found
            damping = max(damping / 10, 1e-12)
        else:
            damping *= 10
    return left @ right.mT


def _right(
    dense: Tensor, kinds: Tensor, kind: Tensor, left: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Right factor [n, rank], residual [m, n], and the projection [kinds, m, m] that leaves it.

    kinds: which entries columns of a kind are known in, [kinds, m]; kind: of every column.
    """
    held = kinds[:, :, None] * left  # [kinds, m, rank]
    inverse = torch.linalg.pinv(held)
    wanted = dense * kinds[kind].mT
    right = torch.einsum("jri,ij->jr", inverse[kind], wanted)
    residual = wanted - (left @ right.mT) * kinds[kind].mT
    within = kinds.to(dense.dtype).diag_embed() - held @ inverse
    return right, residual, within
