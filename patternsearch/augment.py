"""Images moved about in batches, on the device they are on."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Moves:
    """How each of n images is moved: down and right [n, 2], at most `shift`, and mirrored [n]."""

    shift: int
    by: Tensor
    mirrored: Tensor

    @classmethod
    def draw(cls, n: int, shift: int, flip: bool, generator: torch.Generator) -> Moves:
        """Uniform; drawn on the CPU, so that it is the same on every device."""
        by, mirrored = torch.zeros(n, 2, dtype=torch.int64), torch.zeros(n, dtype=torch.bool)
        if shift:
            by.random_(-shift, shift + 1, generator=generator)
        if flip:
            mirrored.random_(0, 2, generator=generator)
        return cls(shift, by, mirrored)


def moved(x: Tensor, moves: Moves) -> Tensor:
    """Images [n, H, W, channels], zeros where there was nothing, mirrored after they are moved."""
    n, height, width, channels = x.shape
    s, device = moves.shift, x.device
    padded = x.new_zeros(n, height + 2 * s, width + 2 * s, channels)
    padded[:, s : s + height, s : s + width] = x
    by, mirrored = moves.by.to(device), moves.mirrored.to(device)
    rows = torch.arange(height, device=device) + s - by[:, :1]
    columns = torch.arange(width, device=device).expand(n, width)
    columns = torch.where(mirrored[:, None], width - 1 - columns, columns) + s - by[:, 1:]
    first = torch.arange(n, device=device)[:, None] * (height + 2 * s) + rows
    index = first[:, :, None] * (width + 2 * s) + columns[:, None, :]
    return padded.flatten(0, 2)[index.flatten()].view(x.shape)
