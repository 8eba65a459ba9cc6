"""Linear attention in plain torch: chunks as matrix products, over tiles that stay in cache.

Inside a chunk of C positions the scores are a small matrix; what came before is a state of K x V
numbers a head. Rows of a tile are gathered as [chunks, batch x heads, C, channels], so that every
product is one batched call for all chunks of the tile (Hua et al., Transformer Quality in Linear
Time, 2022, section 3.2; with decays: Yang et al., Gated Linear Attention, 2023, section 4).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from . import _linear_attention_decay as decays
from . import _linear_attention_short_cpu as short

TILE = 2**18  # elements of the largest operand in a tile: all of them together stay in cache
CHUNK = 32  # positions in a chunk
WIDE = 64  # channels above which chunks of twice the length pay
NARROW = 32  # channels up to which even two chunks beat one of twice the length


@dataclass(frozen=True)
class Tile:
    """Sequences `rows` and positions `first` to `last`, in `count` chunks from number `chunk`."""

    rows: slice
    first: int
    last: int
    chunk: int
    count: int
    size: int

    def load(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """[chunks x batch x heads, C, channels] of x [B, T, H, channels], zero after the end."""
        part = x[self.rows, self.first : self.last]
        batch, length, heads, width = part.shape
        whole = self.count * self.size == length
        make = torch.empty if whole else torch.zeros
        out = make(self.count, batch, heads, self.size, width, dtype=dtype, device=x.device)
        for target, given in self._pairs(out, part):
            target.copy_(given)
        return out.view(-1, self.size, width)

    def store(self, out: Tensor, value: Tensor) -> None:
        part = out[self.rows, self.first : self.last]
        if part.dim() == 3:
            part = part.unsqueeze(-1)
        batch, _, heads, width = part.shape
        for given, target in self._pairs(value.view(self.count, batch, heads, -1, width), part):
            target.copy_(given)

    def _pairs(self, chunked: Tensor, part: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """The same positions of a chunked and a plain tensor: whole chunks, then the rest."""
        length = part.shape[1]
        whole = length // self.size
        if whole:
            plain = part[:, : whole * self.size].unflatten(1, (whole, self.size))
            yield chunked[:whole], plain.permute(1, 0, 3, 2, 4)
        if whole * self.size < length:
            rest = part[:, whole * self.size :]
            yield chunked[whole, :, :, : rest.shape[1]], rest.transpose(1, 2)


def chunk_size(length: int, width: int) -> int:
    """A power of two, since the decays are built by doubling."""
    short = length <= 2 * CHUNK and width > NARROW
    size = 2 * CHUNK if short or width > WIDE else CHUNK
    return min(size, 1 << max(0, length - 1).bit_length())


def tiles(shape: torch.Size, width: int) -> list[list[Tile]]:
    """For each group of sequences its tiles in the order of positions."""
    batch, length, heads, _ = shape
    size = chunk_size(length, width)
    most = -(-length // size)
    fitting = max(1, TILE // max(1, size * heads * max(size, width)))
    together, count = max(1, fitting // max(1, most)), max(1, min(fitting, most))
    found = []
    for start in range(0, batch, together):
        rows = slice(start, min(start + together, batch))
        group = []
        for chunk in range(0, most, count):
            first, last = chunk * size, min((chunk + count) * size, length)
            group.append(Tile(rows, first, last, chunk, -(-(last - first) // size), size))
        found.append(group)
    return found


class Gates:
    """The decays of a tile: within its chunks, and over each chunk as a whole."""

    def __init__(self, tile: Tile, decay: Tensor | None, dtype: torch.dtype) -> None:
        self.mode = 0 if decay is None else decay.dim() - 2
        if decay is not None:
            logs = tile.load(decay if self.mode == 2 else decay.unsqueeze(-1), dtype)
            self.factors, self.to_start, self.to_end = decays.levels(logs.exp_())

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        if self.mode == 2:
            return decays.scores(q, k, self.factors)
        product = torch.bmm(q, k.mT)
        if self.mode == 0:
            return product.tril_()
        self.weights = decays.weights(self.factors, self.to_start)
        return product.mul_(self.weights)

    def scores_backward(self, grad: Tensor, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """After `scores`; overwrites grad."""
        if self.mode == 2:
            return decays.scores_backward(grad, q, k, self.factors)
        grad = grad.mul_(self.weights) if self.mode else grad.tril_()
        return torch.bmm(grad, k), torch.bmm(grad.mT, q)

    def from_start(self, x: Tensor) -> Tensor:
        """Rows as they meet the state before their chunk."""
        return x * self.to_start if self.mode else x

    def until_end(self, x: Tensor) -> Tensor:
        """Rows as they enter the state after their chunk."""
        return x * self.to_end if self.mode else x

    def carry(self, updates: Tensor, first: Tensor | None, flip: bool = False) -> Tensor:
        """All states [chunks + 1, B x H, K, V]: each is the one before, decayed, plus its update.

        From the first chunk to the last, or with `flip` from the last to the first.
        """
        count = updates.shape[0]
        places = updates.new_empty(count + 1, *updates.shape[1:])
        rows, given = places.unbind(0), updates.unbind(0)
        if self.mode:
            whole = self.to_start[:, -1].view(count, updates.shape[1], -1, 1).unbind(0)
        state = rows[count if flip else 0]
        state.zero_() if first is None else state.copy_(first)
        for c in reversed(range(count)) if flip else range(count):
            target = rows[c if flip else c + 1]
            if self.mode:
                torch.addcmul(given[c], state, whole[c], out=target)
            else:
                torch.add(state, given[c], out=target)
            state = target
        return places


def forward(q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, scale: float) -> Tensor:
    """o [B, T, H, V]; decay None, [B, T, H] or [B, T, H, K], logarithms."""
    out = v.new_empty(v.shape)
    if not out.numel():
        return out
    if short.suits(q, decay):
        return short.forward(q, k, v, scale)
    dtype = compute_dtype(q)
    for group in tiles(q.shape, max(q.shape[3], v.shape[3])):
        state = None
        for tile in group:
            gates = Gates(tile, decay, dtype)
            queries, keys, values = (tile.load(x, dtype) for x in (q, k, v))
            queries *= scale
            result = torch.bmm(gates.scores(queries, keys), values)
            if len(group) * tile.count > 1:
                states = _states(tile, gates, keys, values, state)
                result.baddbmm_(gates.from_start(queries), states[:-1].flatten(0, 1))
                state = states[-1]
            tile.store(out, result)
    return out


def compute_dtype(x: Tensor) -> torch.dtype:
    """The half precisions are multiplied and added up in float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _states(tile: Tile, gates: Gates, keys: Tensor, values: Tensor, first: Tensor | None) -> Tensor:
    """The states before each chunk of the tile and after the last: [chunks + 1, B x H, K, V]."""
    updates = torch.bmm(gates.until_end(keys).mT, values).unflatten(0, (tile.count, -1))
    return gates.carry(updates, first)


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, scale: float
) -> tuple[Tensor, ...]:
    """Gradients of q, k, v and, where there is one, the decay; states are computed once more."""
    inputs = (q, k, v) if decay is None else (q, k, v, decay)
    if not v.numel():
        return tuple(x.new_zeros(x.shape) for x in inputs)
    if short.suits(q, decay):
        return short.backward(grad, q, k, v, scale)
    grads = tuple(x.new_empty(x.shape) for x in inputs)
    dtype = compute_dtype(q)
    for group in tiles(q.shape, max(q.shape[3], v.shape[3])):
        known: list[Tensor | None] = [None] * len(group)
        if sum(tile.count for tile in group) > 1:
            state = None
            for i, tile in enumerate(group):
                keys, values = tile.load(k, dtype), tile.load(v, dtype)
                states = _states(tile, Gates(tile, decay, dtype), keys, values, state)
                known[i], state = states, states[-1]
        after = None
        for tile, found in zip(reversed(group), reversed(known), strict=True):
            after = _tile_backward(tile, grad, inputs, grads, scale, found, after)
    return grads


def _tile_backward(
    tile: Tile,
    grad: Tensor,
    inputs: tuple[Tensor, ...],
    grads: tuple[Tensor, ...],
    scale: float,
    states: Tensor | None,
    after: Tensor | None,
) -> Tensor | None:
    """Write the tile's gradients; return that of the state before it, from that after it."""
    dtype = compute_dtype(grad)
    gates = Gates(tile, inputs[3] if len(inputs) == 4 else None, dtype)
    queries, keys, values, given = (tile.load(x, dtype) for x in (*inputs[:3], grad))
    queries *= scale
    dv = torch.bmm(gates.scores(queries, keys).mT, given)
    dq, dk = gates.scores_backward(torch.bmm(given, values.mT), queries, keys)
    crossing = before = None
    if states is not None:
        updates = torch.bmm(gates.from_start(queries).mT, given).unflatten(0, (tile.count, -1))
        ends = gates.carry(updates, after, flip=True)
        before, later = ends[0], ends[1:].flatten(0, 1)
        dq += gates.from_start(torch.bmm(given, states[:-1].flatten(0, 1).mT))
        dk += gates.until_end(torch.bmm(values, later.mT))
        dv.baddbmm_(gates.until_end(keys), later)
        if gates.mode:
            crossing = (states[1:].flatten(0, 1) * later).sum(-1).unsqueeze(1)
    if gates.mode:
        tile.store(grads[3], _grad_decay(queries * dq - keys * dk, crossing, gates.mode))
    for target, value in zip(grads[:3], (dq.mul_(scale), dk, dv), strict=True):
        tile.store(target, value)
    return before


def _grad_decay(own: Tensor, crossing: Tensor | None, mode: int) -> Tensor:
    """Gradient of each row's logarithm: what flows from any row before it to itself or later.

    Inside the chunk that is a sum over the rows that follow; `crossing` [N, 1, K] is what flows out
    of the chunk. A sum over the whole sequence would cancel ever worse with T.
    """
    if crossing is not None:
        own[:, -1:] += crossing
    if mode == 1:
        own = own.sum(-1, keepdim=True)
    return own.flip(1).cumsum(1).flip(1)
