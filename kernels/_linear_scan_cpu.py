"""Linear recurrence in plain torch: a blocked scan over tiles that stay in cache.

A tile of rows is cut into chunks that advance side by side, one torch call a step for all of them.
A first sweep finds what each chunk does to the state before it, a short walk over the chunks finds
the state each one starts from, and a second sweep writes the rows. The products of decays that this
needs span one chunk, never the sequence, so nothing grows with T and no logarithm is taken.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

TILE = 2**20  # elements of one operand in a tile: the operands together stay in cache
LANES = 2**16  # elements a call works on: two threads share it, torch's grain is 2**15
SHORT = 16  # rows in a tile up to which the chunks do not pay
WALK = 2**13  # one thread walks rows of this many elements: a second sweep would cost more

Rows = Sequence[Tensor]


def forward(a: Tensor, b: Tensor, initial: Tensor | None, reverse: bool) -> Tensor:
    """h [B, T, D] from a [B|1, T|1, p, D], b [B, T, D] and initial [B, p, D] or None."""
    out = b.new_empty(b.shape)
    kind = compute_dtype(b)
    lags = a.expand(*b.shape[:2], -1, -1).unbind(2)
    if initial is None:
        state = [b.new_zeros(b.shape[0], b.shape[2], dtype=kind)] * len(lags)
    else:
        state = list(initial.to(kind).unbind(1))
    for _ in _tiles(lags, b, out, state, flip=reverse, ahead=False):
        pass
    return out


def backward(
    grad: Tensor, a: Tensor, h: Tensor, initial: Tensor | None, reverse: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of a (in its own shape), of b and of the initial state [B, p, D].

    The adjoint of a scan is a scan the other way whose decays lie one lag ahead (Martin and Cundy,
    Parallelizing Linear Recurrent Neural Nets Over Sequence Length, 2018, section 2.2).
    """
    grad_b = h.new_empty(h.shape)
    whole = a.shape[:2] == h.shape[:2]
    grad_a = a.new_empty(a.shape) if whole else a.new_zeros(a.shape, dtype=compute_dtype(a))
    lags = a.expand(*h.shape[:2], -1, -1).unbind(2)
    before = () if initial is None else initial.unbind(1)
    state: list[Tensor] = []
    for lo, hi, g in _tiles(lags, grad, grad_b, state, flip=not reverse, ahead=True):
        for lag, target in enumerate(grad_a.unbind(2), start=1):
            for first, last, past in _past(h, before, lo, hi, lag, reverse):
                given = g[:, first - lo : last - lo]
                if whole:
                    torch.mul(given, past, out=target[:, first:last])
                else:
                    rows = target if target.shape[1] == 1 else target[:, first:last]
                    rows += (given * past).sum_to_size(rows.shape)
    if initial is None:
        return grad_a.to(a.dtype), grad_b, h.new_zeros(h.shape[0], a.shape[2], h.shape[2])
    return grad_a.to(a.dtype), grad_b, _grad_initial(lags, state, h, reverse)


def compute_dtype(x: Tensor) -> torch.dtype:
    """The half precisions are added up in float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _past(
    h: Tensor, before: Rows, lo: int, hi: int, lag: int, reverse: bool
) -> Iterator[tuple[int, int, Tensor]]:
    """Rows first to last of the tile lo to hi, each with the state `lag` steps before it."""
    length, shift = h.shape[1], lag if reverse else -lag
    first = min(max(lo, -shift), hi)
    last = max(min(hi, length - shift), lo)
    if first < last:
        yield first, last, h[:, first + shift : last + shift]
    for t in range(last, hi) if reverse else range(lo, first):
        place = t + shift - length if reverse else -1 - t - shift
        yield t, t + 1, before[place].unsqueeze(1) if before else h.new_zeros(1, 1, 1)


def _grad_initial(lags: Rows, state: Rows, h: Tensor, reverse: bool) -> Tensor:
    """sum_i a_{t,i} g_t over the rows t that look back i steps to the initial state."""
    order, (width, length, depth) = len(lags), h.shape
    grad = h.new_zeros(width, order, depth, dtype=compute_dtype(h))
    for back in range(order):
        for lag in range(back, order):
            step = lag - back  # the row that many steps after the start
            if step < min(order, length):
                row = length - 1 - step if reverse else step
                grad[:, back] += lags[lag][:, row] * state[step]
    return grad.to(h.dtype)


def _tiles(
    lags: Rows, b: Tensor, out: Tensor, state: list[Tensor], *, flip: bool, ahead: bool
) -> Iterator[tuple[int, int, Tensor]]:
    """Scan b into out, tile by tile: the tile's ends and its rows in the dtype of the state.

    `state` is the newest row first, and is replaced as the scan goes on. With `ahead`, row t meets
    lag i with the decays of the row i steps nearer to the start of the scan; a state that is not
    full yet takes part with the lags it has.
    """
    width, length, depth = b.shape
    kind = compute_dtype(b)
    rows = max(1, (TILE if kind == b.dtype else TILE // 2) // max(1, width * depth))
    toward = (1 if flip else -1) if ahead else 0
    lagged = [(x, toward * i) for i, x in enumerate(lags, start=1)]
    starts = range(0, length, rows)
    for lo in reversed(starts) if flip else starts:
        hi = min(lo + rows, length)
        if kind == out.dtype:
            tile = out if hi - lo == length else out[:, lo:hi]
        else:
            tile = b.new_empty(width, hi - lo, depth, dtype=kind)
        short = hi - lo if hi - lo <= SHORT else len(lags) - len(state)
        left, right = (lo, hi - short) if flip else (lo + short, hi)
        if short:
            first, last = (right, hi) if flip else (lo, left)
            decays = [_window(x, first + o, last + o, flip) for x, o in lagged]
            given = _steps(b[:, first:last], 1, flip)
            state[:] = _walk(decays, given, _steps(tile[:, first - lo : last - lo], 1, flip), state)
        if left < right:
            views = [x[:, left + o : right + o].to(kind) for x, o in lagged]
            _tile(views, b[:, left:right].to(kind), tile[:, left - lo : right - lo], state, flip)
        if tile.dtype != out.dtype:
            out[:, lo:hi] = tile
        yield lo, hi, tile


def _window(x: Tensor, first: int, last: int, flip: bool) -> Rows:
    """Rows first to last in the order of the scan; those that x lacks are never met by a state."""
    rows = _steps(x[:, max(first, 0) : last], 1, flip)
    lacking = last - first - len(rows)
    return [x] * lacking + list(rows) if lacking else rows


def _tile(lags: Rows, b: Tensor, out: Tensor, state: list[Tensor], flip: bool) -> None:
    length = b.shape[1]
    chunk = _chunk(length, b.shape[0] * b.shape[2])
    count = length // chunk if chunk else 0
    inside = count * chunk
    left = length - inside if flip else 0  # rows that fill no chunk come last
    if count:
        cut = [
            [x[:, left : left + inside].unflatten(1, (count, chunk)) for x in group]
            for group in (lags, (b,), (out,))
        ]
        _chunks(cut[0], cut[1][0], cut[2][0], state, flip)
    if inside < length:
        rest = slice(0, left) if flip else slice(inside, length)
        steps = [[_steps(x[:, rest], 1, flip) for x in group] for group in (lags, (b,), (out,))]
        state[:] = _walk(steps[0], steps[1][0], steps[2][0], state)


def _chunk(length: int, lanes: int) -> int:
    """Rows in a chunk; 0 where one row is work enough for a call."""
    if lanes >= (LANES if torch.get_num_threads() > 1 else WALK):
        return 0
    chunk = max(math.isqrt(length // 3), length * lanes // LANES, 2)
    return chunk if 2 * chunk <= length else 0


def _chunks(lags: Rows, b: Tensor, out: Tensor, state: list[Tensor], flip: bool) -> None:
    """All chunks side by side: operands [B, chunks, rows, D]."""
    decays = [_steps(x, 2, flip) for x in lags]
    inputs = _steps(b, 2, flip)
    summary = _summary if len(lags) > 1 else _summary_first_order
    starts = summary(decays, inputs, state, flip)
    ends = _walk(decays, inputs, _steps(out, 2, flip), starts)
    state[:] = [x[:, 0 if flip else -1] for x in ends]


def _steps(x: Tensor, axis: int, flip: bool) -> Rows:
    steps = x.unbind(axis)
    return steps[::-1] if flip else steps


def _walk(decays: Sequence[Rows], inputs: Rows, outs: Rows, state: Rows) -> list[Tensor]:
    """Write one row after another, and return the newest of them first."""
    past = list(state)
    order = len(decays)
    if order == 1 and past:
        newest = past[0]
        for decay, given, out in zip(decays[0], inputs, outs, strict=True):
            newest = torch.addcmul(given, decay, newest, out=out)
        return [newest]
    for t, (given, out) in enumerate(zip(inputs, outs, strict=True)):
        if past:
            torch.addcmul(given, decays[0][t], past[0], out=out)
        else:
            out.copy_(given)
        for lag, row in zip(decays[1:], past[1:], strict=False):
            out.addcmul_(lag[t], row)
        past = [out, *past[: order - 1]]
    return past


def _summary_first_order(
    decays: Sequence[Rows], inputs: Rows, state: Rows, flip: bool
) -> list[Tensor]:
    """The state [B, chunks, D] each chunk starts from: h_end = P h_start + S, chunk after chunk."""
    (decay,) = decays
    product = decay[0] * decay[1]
    local = torch.addcmul(inputs[1], decay[1], inputs[0])
    for a, b in zip(decay[2:], inputs[2:], strict=True):
        product *= a
        torch.addcmul(b, a, local, out=local)
    starts = torch.empty_like(local)
    places = _steps(starts, 1, flip)
    places[0].copy_(state[0])
    _walk([_steps(product, 1, flip)[:-1]], _steps(local, 1, flip)[:-1], places[1:], places[:1])
    return [starts]


def _summary(decays: Sequence[Rows], inputs: Rows, state: Rows, flip: bool) -> list[Tensor]:
    """The same for order p: slot 0 starts from no state, slot j from a one in the j-th place."""
    order, first = len(decays), inputs[0]
    basis = torch.eye(order, dtype=first.dtype, device=first.device)
    past = []
    for unit in basis:
        row = first.new_zeros(order + 1, *first.shape)
        row[1:] = unit.view(-1, 1, 1, 1)
        past.append(row)
    for t, given in enumerate(inputs):
        new = decays[0][t] * past[0]
        for decay, row in zip(decays[1:], past[1:], strict=True):
            new.addcmul_(decay[t], row)
        new[0] += given
        past = [new, *past[:-1]]
    ends = torch.stack(past)  # [p, p + 1, B, chunks, D]
    starts = ends.new_empty(ends[:, 0].shape)
    now = torch.stack(list(state))
    for end, place in zip(_steps(ends, 3, flip), _steps(starts, 2, flip), strict=True):
        place.copy_(now)
        now = end[:, 0] + (end[:, 1:] * now).sum(1)
    return list(starts.unbind(0))
