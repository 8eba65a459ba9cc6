"""Long bands on CPU by FFT: overlap-save in cache-sized tiles.

A tile is N positions of some channels of some sequences, twice: two neighbouring blocks of the same
sequences are the real and the imaginary part of one complex tile. The taps are real, so the two
stay apart, and no spectrum of a real signal has to be folded or unfolded. Channels lie side by side
in memory; the transform runs over the outer axis and leaves each signal compact. A grid is
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

TILE = 80 * 2**10  # complex entries of a tile: with its spectrum it stays in second-level cache
SETUP = 60e3  # ns of the torch calls before the first tile, and for each transform of one tile
OVERHEAD = 20e3


class Plan(NamedTuple):
    """Transform length, positions gained by a block, number of pairs of blocks."""

    size: int
    hop: int
    pairs: int


@functools.cache
def plan(length: int, span: int) -> Plan:
    """The cheapest transform length for a band that covers `span` positions.

    Few small factors, but no power of two: columns so far apart share their lines in cache.
    """
    smallest = 1 << (span - 1).bit_length()
    sizes = [smallest * 2**k * m // 16 for k in range(8) for m in (9, 10, 12)]
    plans = []
    for size in (n for n in sizes if n >= max(span, 16)):
        hop = size - span + 1
        plans.append(Plan(size, hop, math.ceil(length / (2 * hop))))
    return min(plans, key=lambda p: (p.pairs * p.size * math.log2(p.size), p.size))


def _spread(shape: Sequence[int], band: Band) -> tuple[int, int, int]:
    """Distance of rows once unrolled, length of the sequence, positions covered by the band."""
    height, length = shape[1], shape[2]
    row = length + max(band.before[1], band.after[1]) if height > 1 else length
    span = (band.before[0] + band.after[0]) * row + band.before[1] + band.after[1] + 1
    return row, height * row, span


def cost(shape: Sequence[int], band: Band, transforms: int) -> float:
    """ns on one core of so many transforms of everything."""
    _, length, span = _spread(shape, band)
    size, _, pairs = plan(length, span)
    entries = shape[0] * shape[3] * pairs * size
    tiles = math.ceil(entries / TILE)
    return SETUP + tiles * transforms * OVERHEAD + entries * transforms * 0.4 * math.log2(size)


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

    def spectrum(self, taps: Tensor, places: Tensor) -> Tensor:
        """[c, N] of taps [W, c] at these places."""
        spread = taps.new_zeros((taps.shape[1], self.plan.size))
        spread[:, places] = taps.t()
        spectrum: Tensor = torch.fft.fft(spread)
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
        _, hop, pairs = self.plan
        return range(0, 2 * hop * pairs, 2 * hop)

    def transform(self, x: Tensor, start: int, count: int) -> Tensor:
        """Spectra [b, c, N] of two blocks of x [b, T, c]: `count` rows from `start` on, and `hop`
        further; zero outside T and beyond count."""
        size, hop, _ = self.plan
        tile = x.new_empty((size, x.shape[0], x.shape[2]), dtype=x.dtype.to_complex())
        blocks = _rows(x, start, count), _rows(x, start + hop, count)
        torch.complex(*blocks, out=tile[:count])
        tile[count:].zero_()
        spectrum: Tensor = torch.fft.fft(tile.flatten(1), dim=0).t().unflatten(0, tile.shape[1:])
        return spectrum

    def write(self, out: Tensor, spectrum: Tensor, start: int, skip: int) -> None:
        """Both blocks into out [b, T, c] from `start` on; the first `skip` rows wrapped around."""
        hop = self.plan.hop
        found = torch.view_as_real(torch.fft.ifft(spectrum)).transpose(1, 2)
        for part, first in enumerate((start, start + hop)):
            rows = out[:, first : first + hop]
            rows.copy_(found[:, skip : skip + rows.shape[1], :, part])


def _rows(x: Tensor, start: int, count: int) -> Tensor:
    """[count, b, c] from x [b, T, c], zero outside T."""
    low, high = max(start, 0), min(start + count, x.shape[1])
    if high - low == count:
        return x[:, low:high].transpose(0, 1)
    rows = x.new_zeros((count, x.shape[0], x.shape[2]))
    if low < high:
        rows[low - start : high - start] = x[:, low:high].transpose(0, 1)
    return rows


def forward(x: Tensor, taps: Tensor, band: Band) -> Tensor:
    """As `_toeplitz_conv_cpu.forward`."""
    u = Unrolled(x.shape, band)
    seq, flat = u.sequence(x), taps.flatten(0, 1)
    y = torch.empty_like(seq, memory_format=torch.contiguous_format)
    for channels, groups in u.chunks():
        # y[t] = sum_j k[j] x[t - before + j] correlates: the taps run backward.
        kernel = u.spectrum(flat[:, channels], -u.places % u.plan.size)
        for group in groups:
            here, out = seq[group, :, channels], y[group, :, channels]
            for s in u.starts():
                spectrum = u.transform(here, s - u.before, u.plan.size).mul_(kernel)
                u.write(out, spectrum, s, 0)
    return u.grid(y)


def backward(
    g: Tensor, x: Tensor, taps: Tensor, band: Band, need_x: bool, need_taps: bool
) -> tuple[Tensor | None, Tensor | None]:
    """As `_toeplitz_conv_cpu.backward`; the spectrum of g serves both gradients."""
    u = Unrolled(x.shape, band)
    size, hop, _ = u.plan
    far, near, flat = u.sequence(x), u.sequence(g), taps.flatten(0, 1)
    dx = far.new_empty(far.shape) if need_x else None
    dtaps = taps.new_empty(flat.shape) if need_taps else None
    last = u.span - 1
    for channels, groups in u.chunks():
        kernel = u.spectrum(flat[:, channels], u.places)
        total = torch.zeros_like(kernel)
        for group in groups:
            for s in u.starts():
                spectrum = u.transform(near[group, :, channels], s + u.before - last, size)
                if dtaps is not None:
                    # Of a product of two tiles the real part holds both blocks with themselves.
                    other = u.transform(far[group, :, channels], s, hop).conj_physical_()
                    total += other.mul_(spectrum).sum(0)
                if dx is not None:
                    u.write(dx[group, :, channels], spectrum.mul_(kernel), s, last)
        if dtaps is not None:
            dtaps[:, channels] = torch.fft.ifft(total).real[:, last - u.places].t()
    return (
        None if dx is None else u.grid(dx),
        None if dtaps is None else dtaps.view(taps.shape),
    )
