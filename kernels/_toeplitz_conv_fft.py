"""Long bands on CPU by FFT: overlap-save forward, overlap-add backward, in cache-sized tiles.

A tile is N positions of some channels of some sequences. Channels lie side by side in memory, so
the real transform runs over the outer axis of a compact tile; MKL gathers it on the way. A grid is
unrolled to one sequence whose rows are padded apart, and its band to offsets in that sequence.

Every position of a tile is touched by the rounding (of relative size 1e-7) and by an infinity or
NaN anywhere in the same tile, positions ahead included; the direct way has neither property.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ._toeplitz_conv_band import Band

TILE = 160 * 2**10  # entries of a tile: with its spectrum it stays in the second-level cache
SETUP = 60e3  # ns of the torch calls before the first tile, and for each transform of one tile
OVERHEAD = 20e3


class Plan(NamedTuple):
    """Transform length, positions gained by a tile, number of tiles along the sequence."""

    size: int
    hop: int
    blocks: int


@functools.cache
def plan(length: int, span: int) -> Plan:
    """The cheapest transform length for a band that covers `span` positions, 2^a 3^b with b < 3."""
    smallest = 1 << (span - 1).bit_length()
    sizes = [smallest * 2**k * m // 8 for k in range(7) for m in (8, 9, 12)]
    plans = []
    for size in (n for n in sizes if n >= max(span, 16)):
        hop = size - span + 1
        plans.append(Plan(size, hop, math.ceil(length / hop)))
    return min(plans, key=lambda p: (p.blocks * p.size * math.log2(p.size), p.size))


def _spread(shape: Sequence[int], band: Band) -> tuple[int, int, int]:
    """Distance of rows once unrolled, length of the sequence, positions covered by the band."""
    height, length = shape[1], shape[2]
    row = length + max(band.before[1], band.after[1]) if height > 1 else length
    span = (band.before[0] + band.after[0]) * row + band.before[1] + band.after[1] + 1
    return row, height * row, span


def cost(shape: Sequence[int], band: Band, transforms: int) -> float:
    """ns on one core of so many transforms of everything."""
    _, length, span = _spread(shape, band)
    size, _, blocks = plan(length, span)
    entries = shape[0] * shape[3] * blocks * size
    tiles = math.ceil(entries / TILE)
    return SETUP + tiles * transforms * OVERHEAD + entries * transforms * 0.25 * math.log2(size)


class Unrolled:
    """A grid as sequences [B, T, D], with its band: where each tap lies in `span` offsets."""

    def __init__(self, shape: Sequence[int], band: Band) -> None:
        self.shape, self.band = shape, band
        self.row, self.length, self.span = _spread(shape, band)
        self.plan = plan(self.length, self.span)
        self.before = band.before[0] * self.row + band.before[1]
        places = [self.before + h * self.row + w for _, _, h, w in band.offsets()]
        self.places = torch.tensor(places)

    def sequence(self, x: Tensor) -> Tensor:
        gap = self.row - x.shape[2]
        return (F.pad(x, (0, 0, 0, gap)) if gap else x).flatten(1, 2)

    def grid(self, y: Tensor) -> Tensor:
        grid: Tensor = y.unflatten(1, (-1, self.row))[:, :, : self.shape[2]].contiguous()
        return grid

    def spectrum(self, taps: Tensor) -> Tensor:
        """[c, 1, F] of taps [W, c]."""
        spread = taps.new_zeros((taps.shape[1], 1, self.plan.size))
        spread[:, 0, self.places] = taps.t()
        spectrum: Tensor = torch.fft.rfft(spread)
        return spectrum

    def chunks(self) -> Iterator[tuple[slice, list[slice]]]:
        """Channels, and the groups of sequences that make a tile with them."""
        batch, width, size = self.shape[0], self.shape[3], self.plan.size
        channels = min(width, max(16, TILE // size // 16 * 16))
        group = max(1, TILE // (size * channels))
        groups = [slice(b, min(b + group, batch)) for b in range(0, batch, group)]
        for c in range(0, width, channels):
            yield slice(c, min(c + channels, width)), groups

    def starts(self) -> range:
        return range(0, self.plan.blocks * self.plan.hop, self.plan.hop)


def _tile(x: Tensor, start: int, count: int, size: int) -> Tensor:
    """[c, b, size] from x [b, T, c]: rows start..start+count, zero outside T and beyond count."""
    low, high = max(start, 0), min(start + count, x.shape[1])
    rows = x.new_empty((x.shape[0], size, x.shape[2]))
    rows[:, : low - start].zero_()
    rows[:, low - start : high - start].copy_(x[:, low:high])
    rows[:, high - start :].zero_()
    # A compact matrix: torch transposes it in blocks, five times faster than any other.
    tile: Tensor = rows.flatten(0, 1).t().contiguous().unflatten(1, (x.shape[0], size))
    return tile


def _rows(tile: Tensor) -> Tensor:
    """The inverse transpose: [b, size, c] of [c, b, size]."""
    rows: Tensor = tile.flatten(1).t().contiguous().unflatten(0, tile.shape[1:])
    return rows


def forward(x: Tensor, taps: Tensor, band: Band) -> Tensor:
    """As `_toeplitz_conv_cpu.forward`."""
    u = Unrolled(x.shape, band)
    size, hop, _ = u.plan
    seq, flat = u.sequence(x), taps.flatten(0, 1)
    y = torch.empty_like(seq, memory_format=torch.contiguous_format)
    for channels, groups in u.chunks():
        # y[t] = sum_j k[j] x[t - before + j] correlates: the spectrum of the taps is conjugated.
        kernel = u.spectrum(flat[:, channels]).conj_physical_()
        for group in groups:
            here = seq[group, :, channels]
            for s in u.starts():
                tile = _tile(here, s - u.before, size, size)
                full = _rows(torch.fft.irfft(torch.fft.rfft(tile).mul_(kernel), size))
                out = y[group, s : s + hop, channels]
                out.copy_(full[:, : out.shape[1]])
    return u.grid(y)


def backward(
    g: Tensor, x: Tensor, taps: Tensor, band: Band, need_x: bool, need_taps: bool
) -> tuple[Tensor, Tensor]:
    """As `_toeplitz_conv_cpu.backward`; the spectrum of g serves both gradients."""
    u = Unrolled(x.shape, band)
    size, hop, _ = u.plan
    far, near, flat = u.sequence(x), u.sequence(g), taps.flatten(0, 1)
    dx = far.new_empty(far.shape) if need_x else x.new_empty(0)
    dtaps = taps.new_empty(flat.shape) if need_taps else x.new_empty(0)
    for channels, groups in u.chunks():
        kernel = u.spectrum(flat[:, channels])
        total = torch.zeros_like(kernel[:, 0])
        for group in groups:
            for s in u.starts():
                spectrum = torch.fft.rfft(_tile(near[group, :, channels], s, hop, size))
                if need_taps:
                    tile = _tile(far[group, :, channels], s - u.before, size, size)
                    other = torch.fft.rfft(tile).conj_physical_()
                    other.mul_(spectrum)
                    total += other[:, 0] if other.shape[1] == 1 else other.sum(1)
                if need_x:
                    full = _rows(torch.fft.irfft(spectrum.mul_(kernel), size))
                    _overlap_add(dx[group, :, channels], full, s - u.before, u.span - 1 if s else 0)
        if need_taps:  # total holds the conjugate of what correlates
            lags = torch.fft.irfft(total.conj_physical_(), size)
            dtaps[:, channels] = lags[:, u.places].t()
    dx = u.grid(dx) if need_x else dx
    return dx, dtaps.view(taps.shape) if need_taps else dtaps


def _overlap_add(out: Tensor, full: Tensor, start: int, shared: int) -> None:
    """full [b, N, c] into out [b, T, c] from start on; the last tile wrote `shared` rows of it."""
    low, high = max(start, 0), min(start + full.shape[1], out.shape[1])
    middle = min(max(start + shared, 0), high)
    if low < middle:
        out[:, low:middle] += full[:, low - start : middle - start]
    out[:, middle:high].copy_(full[:, middle - start : high - start])
