"""A Kronecker product of small matrices as one, and what biases between them add to every row.

A bias is constant along the axes that later factors have to themselves, so that these meet only
the sums of their rows: the row of all biases takes a few products of vectors.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def holds(size: int, factors: Sequence[Tensor], trailing: Sequence[int]) -> bool:
    """Whether each factor has one axis of a row of `size` to itself, from the first to the last."""
    for factor, after in zip(factors, trailing, strict=True):
        if factor.shape[1] * after != size:
            return False
        size = after
    return size == 1


def products(factors: Sequence[Tensor]) -> list[Tensor]:
    """Of the first factor, of the first two, ... of all: matrices."""
    found = [factors[0]]
    for f in factors[1:]:
        w = found[-1]
        made = w[:, None, :, None] * f[:, None, :]
        found.append(made.view(w.shape[0] * f.shape[0], -1))
    return found


def products_backward(
    grad: Tensor, found: Sequence[Tensor], factors: Sequence[Tensor]
) -> list[Tensor]:
    """Gradients of the factors, from that of the last of `products`."""
    grads = []
    for k in range(len(factors) - 1, 0, -1):
        f, w = factors[k], found[k - 1]
        pairs = grad.view(w.shape[0], f.shape[0], w.shape[1], f.shape[1]).transpose(1, 2)
        pairs = pairs.reshape(w.numel(), f.numel())
        grads.append(torch.mv(pairs.t(), w.reshape(-1)).view(f.shape))
        grad = torch.mv(pairs, f.reshape(-1)).view(w.shape)
    return [grad, *reversed(grads)]


def offsets(factors: Sequence[Tensor], biases: Sequence[Tensor]) -> list[Tensor]:
    """What the biases add after each factor, along the axes that have had theirs: vectors."""
    found = [biases[0]]
    for f, b in zip(factors[1:], biases[1:], strict=True):
        found.append(torch.addcmul(b, found[-1][:, None], f.sum(1)).view(-1))
    return found


def offsets_backward(
    grad: Tensor, found: Sequence[Tensor], factors: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """From the gradient of the last of `offsets`: what it adds to the gradients of all factors but
    the first, as columns, and the gradients of the biases."""
    columns, biases = [], []
    for k in range(len(factors) - 1, 0, -1):
        grad = grad.view(-1, factors[k].shape[0])
        biases.append(grad.sum(0))
        columns.append(torch.mv(grad.t(), found[k - 1])[:, None])
        grad = torch.mv(grad, factors[k].sum(1))
    return columns[::-1], [grad, *reversed(biases)]
