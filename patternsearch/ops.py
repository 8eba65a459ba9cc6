"""Which implementation runs a pattern: a kernel of kernels/, found by name, or the reference."""

from __future__ import annotations

import logging
from typing import Literal

from torch import Tensor

from .pattern import Cores, Dims, Pattern

Impl = Literal["auto", "reference", "kernel"]

logger = logging.getLogger(__name__)


def along_features(pattern: Pattern, cores: Cores, x: Tensor, out: int) -> Tensor:
    """[*, d_in] -> [*, out]."""
    return pattern.matmul(cores, x, (out,))


def along_positions(pattern: Pattern, cores: Cores, x: Tensor, out: Dims, d_out: int) -> Tensor:
    """[B, *positions, d_in] -> [B, *out, d_out].

    With an entry the pattern maps channels too. Else cores are [heads, ...] and a head's matrix is
    shared by d_out / heads channels.
    """
    if pattern.entry is not None:
        return pattern.matmul(cores, x, (*out, d_out))
    axes = len(out)
    heads = {name: core.unsqueeze(1) for name, core in cores.items()}
    h = next(iter(heads.values())).shape[0] if heads else 1
    y = x.movedim(-1, 1).unflatten(1, (h, -1))  # [B, h, channels, *positions]
    y = pattern.matmul(heads, y, out)
    return y.flatten(1, 2).movedim(1, -1) if axes else y
