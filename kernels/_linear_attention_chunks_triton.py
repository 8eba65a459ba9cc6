"""Linear attention: the Triton kernels; `_linear_attention_triton` launches them.

One kernel serves the forward pass and every gradient, which are linear attentions themselves:

    o  = attention(q, k, v)              dq = attention(dO, v, k), the decay now that of the output
    dv = attention(k, q, dO) backwards   dk = attention(v, dO, q) backwards, likewise

A program owns one head of one sequence and BV channels of the output, walks over chunks of C
positions and keeps the state [BK, BV] in registers. Running sums of the logarithms of decays stay
inside a chunk, and only differences that are at most 0 are exponentiated.
"""

# The parameters of a Triton function have no Python type.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _rows(p, t, d, T, D, stride, UPCAST: tl.constexpr):
    """[len(t), len(d)] at positions t, zero outside."""
    mask = ((t >= 0) & (t < T))[:, None] & (d < D)[None, :]
    x = tl.load(p + t[:, None] * stride + d[None, :], mask=mask, other=0.0)
    return x.to(tl.float32) if UPCAST else x


@triton.jit
def _halves(sums, i, half, C: tl.constexpr, W: tl.constexpr):
    """Decay from the middle of its block of 2 half rows to each upper row, and from each lower row.

    0 for the rows of the other half. Blocks that nest make up all pairs of rows but the diagonal.
    """
    middle = i // (2 * half) * (2 * half) + half - 1
    away = sums - tl.gather(sums, tl.broadcast_to(middle[:, None], [C, W]), 0)
    upper = (i % (2 * half) >= half)[:, None]
    ahead = tl.exp(tl.where(upper, away, float("-inf")))
    behind = tl.exp(tl.where(upper, float("-inf"), -away))
    return ahead, behind


@triton.jit
def _decayed_scores(
    q, k, sums, i,
    C: tl.constexpr, LEVELS: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """sum_k q_i k_j (decay from j to i), 0 above the diagonal: one decay a channel of k."""
    queries, keys = q.to(tl.float32), k.to(tl.float32)
    own = tl.sum(queries * keys, 1)
    scores = tl.where(i[:, None] == i[None, :], own[:, None], 0.0)
    for level in range(LEVELS):
        half = 1 << level
        ahead, behind = _halves(sums, i, half, C, BK)
        left, right = (queries * ahead).to(q.dtype), (keys * behind).to(k.dtype)
        block = i // (2 * half)
        found = tl.dot(left, tl.trans(right), input_precision=PRECISION)
        scores += tl.where(block[:, None] == block[None, :], found, 0.0)
    return scores


@triton.jit
def _decayed_rows(
    scores, v, sums, i,
    C: tl.constexpr, LEVELS: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """sum_j scores_ij v_j (decay from j to i) over j <= i: one decay a channel of v."""
    values = v.to(tl.float32)
    own = tl.sum(tl.where(i[:, None] == i[None, :], scores, 0.0), 1)
    rows = own[:, None] * values
    for level in range(LEVELS):
        half = 1 << level
        ahead, behind = _halves(sums, i, half, C, BV)
        block = i // (2 * half)
        same = (block[:, None] == block[None, :]).to(tl.float32)
        part = tl.dot(
            (scores * same).to(v.dtype), (values * behind).to(v.dtype), input_precision=PRECISION
        )
        rows += ahead * part
    return rows


@triton.jit(do_not_specialize=["T", "segment"])
def chunk_kernel(
    q, k, v, o, decay, starts, summary, total, x, z, states,
    T, H, K, V, segment, scale,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, g_b, g_t, g_h, x_b, x_t, x_h,
    MODE: tl.constexpr, FLIP: tl.constexpr, ROLE: tl.constexpr, SUMMARY: tl.constexpr,
    C: tl.constexpr, LEVELS: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    TILES: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr, WIDE_STATE: tl.constexpr,
):  # fmt: skip
    """MODE: 0 no decay, 1 one a head, 2 one a channel of k, 3 one a channel of v.

    ROLE: 1 also keeps the state before each chunk and z = x . o; 2, which runs backwards over the
    same chunks, makes of them the gradient of the decay and leaves it in z.
    SUMMARY: only what the segment does to the state, and its whole decay.
    """
    tile = tl.program_id(0) % TILES
    lane = (tl.program_id(0) // TILES).to(tl.int64)
    batch, head = lane // H, lane % H
    part = tl.program_id(1)
    place = lane * tl.num_programs(1) + part
    dk = tl.arange(0, BK)
    dv = tile * BV + tl.arange(0, BV)
    i = tl.arange(0, C)
    inside = (dk < K)[:, None] & (dv < V)[None, :]
    square = dk[:, None] * V + dv[None, :]
    chunks = tl.cdiv(T, C)
    first = part * segment
    last = tl.minimum(first + segment, chunks)
    state = tl.zeros([BK, BV], tl.float32)
    if starts is not None:
        state = tl.load(starts + place * K * V + square, mask=inside, other=0.0)
    if MODE == 1:
        whole = tl.zeros([1], tl.float32)
    elif MODE == 2:
        whole = tl.zeros([BK], tl.float32)
    elif MODE == 3:
        whole = tl.zeros([BV], tl.float32)
    p_q = q + batch * q_b + head * q_h
    p_k = k + batch * k_b + head * k_h
    p_v = v + batch * v_b + head * v_h
    if MODE > 0:
        p_g = decay + batch * g_b + head * g_h
    if ROLE > 0:
        p_x = x + batch * x_b + head * x_h
    for n in range(first, last):
        c = chunks - 1 - n if FLIP else n
        t = (c * C + (C - 1 - i if FLIP else i)).to(tl.int64)
        keys = _rows(p_k, t, dk, T, K, k_t, UPCAST)
        values = _rows(p_v, t, dv, T, V, v_t, UPCAST)
        if MODE > 0:
            t_g = t + 1 if FLIP else t  # backwards, row t meets the decay between t + 1 and t
            if MODE == 1:
                logs = tl.load(p_g + t_g * g_t, mask=t_g < T, other=0.0).to(tl.float32)
            elif MODE == 2:
                logs = _rows(p_g, t_g, dk, T, K, g_t, False).to(tl.float32)
            else:
                logs = _rows(p_g, t_g, dv, T, V, g_t, False).to(tl.float32)
            logs = tl.maximum(logs, -60.0)  # nothing is left of a state after exp(-60)
            sums = tl.cumsum(logs, 0)
            end = tl.sum(logs, 0)
        if not SUMMARY:
            queries = _rows(p_q, t, dk, T, K, q_t, UPCAST)
            if MODE == 2:
                scores = _decayed_scores(queries, keys, sums, i, C, LEVELS, BK, PRECISION)
                seen = (queries.to(tl.float32) * tl.exp(sums)).to(queries.dtype)
            else:
                scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION)
                seen = queries
            if MODE == 0:
                scores = tl.where(i[:, None] >= i[None, :], scores, 0.0)
            elif MODE == 1:
                away = sums[:, None] - sums[None, :]
                scores *= tl.exp(tl.where(i[:, None] >= i[None, :], away, float("-inf")))
            if WIDE_STATE:
                rows = tl.dot(seen.to(tl.float32), state, input_precision="tf32")
            else:
                rows = tl.dot(seen, state.to(seen.dtype), input_precision=PRECISION)
            if MODE == 1:
                rows *= tl.exp(sums)[:, None]
            if MODE == 3:
                rows *= tl.exp(sums)
                rows += _decayed_rows(scores, values, sums, i, C, LEVELS, BV, PRECISION)
            else:
                rows += tl.dot(scores.to(values.dtype), values, input_precision=PRECISION)
            rows *= scale
            there = (t < T)[:, None] & (dv < V)[None, :]
            row = (batch * T + t) * H + head
            tl.store(o + row[:, None] * V + dv[None, :], rows.to(o.dtype.element_ty), mask=there)
            if ROLE > 0:
                grown = rows * _rows(p_x, t, dv, T, V, x_t, UPCAST).to(tl.float32)
                if MODE == 1:
                    grown = tl.sum(grown, 1)
                    p_z = z + row * TILES + tile
                    kept = t < T
                else:
                    p_z = z + row[:, None] * V + dv[None, :]
                    kept = there
                if ROLE == 1:
                    p_states = states + (lane * chunks + c) * K * V
                    tl.store(p_states + square, state.to(states.dtype.element_ty), mask=inside)
                    tl.store(p_z, grown, mask=kept)
                else:
                    p_states = states + (lane * chunks + c + 1) * K * V
                    width = tl.where(c + 1 < chunks, V, 0)  # nothing leaves the last chunk
                    ended = (dk < K)[:, None] & (dv < width)[None, :]
                    other = tl.load(p_states + square, mask=ended, other=0.0).to(tl.float32)
                    flow = tl.sum(other * state, 0) * scale
                    grown = tl.load(p_z, mask=kept, other=0.0) - grown
                    # The state has not met the first decay yet, that into the next chunk.
                    if MODE == 1:
                        flow = tl.sum(flow, 0) * tl.exp(logs)
                        grown += tl.where(i == 0, flow, 0.0)
                    else:
                        flow = flow[None, :] * tl.exp(logs)
                        grown += tl.where((i == 0)[:, None], flow, 0.0)
                    tl.store(p_z, tl.cumsum(grown, 0), mask=kept)
        if MODE == 1:
            keys = (keys.to(tl.float32) * tl.exp(end - sums)[:, None]).to(keys.dtype)
            state *= tl.exp(end)
            whole += end
        elif MODE == 2:
            keys = (keys.to(tl.float32) * tl.exp(end[None, :] - sums)).to(keys.dtype)
            state *= tl.exp(end)[:, None]
            whole += end
        elif MODE == 3:
            values = (values.to(tl.float32) * tl.exp(end[None, :] - sums)).to(values.dtype)
            state *= tl.exp(end)[None, :]
            whole += end
        state += tl.dot(tl.trans(keys), values, input_precision=PRECISION)
    if SUMMARY:
        tl.store(summary + place * K * V + square, state, mask=inside)
        if MODE == 1:
            tl.store(total + place + tl.zeros([1], tl.int64), whole)
        elif MODE == 2:
            tl.store(total + place * K + dk, whole, mask=dk < K)
        elif MODE == 3:
            tl.store(total + place * V + dv, whole, mask=dv < V)


@triton.jit(do_not_specialize=["parts"])
def carry_kernel(summary, total, starts, parts, K, V, MODE: tl.constexpr, BLOCK: tl.constexpr):
    """The state before each segment, from what each segment adds to the one before."""
    lane = tl.program_id(0).to(tl.int64)
    e = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = e < K * V
    state = tl.zeros([BLOCK], tl.float32)
    for part in range(parts):
        row = lane * parts + part
        tl.store(starts + row * K * V + e, state, mask=inside)
        if MODE == 1:
            state *= tl.exp(tl.load(total + row))
        elif MODE == 2:
            state *= tl.exp(tl.load(total + row * K + e // V, mask=inside, other=0.0))
        elif MODE == 3:
            state *= tl.exp(tl.load(total + row * V + e % V, mask=inside, other=0.0))
        state += tl.load(summary + row * K * V + e, mask=inside, other=0.0)
