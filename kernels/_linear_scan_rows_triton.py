"""Linear recurrence: the Triton kernels; `_linear_scan_triton` launches them.

`b` is the input and `out` the states h; in the adjoint they are the gradient of h and that of the
input. Steps count in the order of the scan, t is a position.
"""

# The parameters of a Triton function have no Python type.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _combine(a1, b1, a2, b2):
    return a1 * a2, a2 * b1 + b2


@triton.jit(do_not_specialize=["T", "segment"])
def first_order_kernel(
    a, b, out, h, da, starts, initial, summary, dinitial,
    T, D, segment,
    a_b, a_t, b_b, b_t, h_b, h_t, da_b, da_t, i_b,
    FLIP: tl.constexpr, ADJOINT: tl.constexpr, SUMMARY: tl.constexpr, SUM_T: tl.constexpr,
    BT: tl.constexpr, BD: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(D, BD)
    batch = (tl.program_id(0) // tiles).to(tl.int64)
    part = tl.program_id(1)
    batches, parts = tl.num_programs(0) // tiles, tl.num_programs(1)
    d = tl.program_id(0) % tiles * BD + tl.arange(0, BD)
    inside = d < D
    steps = tl.arange(0, BT)
    first = part * segment
    last = tl.minimum(first + segment, T)
    carry = tl.zeros([BD], tl.float32)
    if starts is not None:
        carry = tl.load(starts + (part * batches + batch) * D + d, mask=inside, other=0.0)
    elif initial is not None:
        if not ADJOINT:
            carry = tl.load(initial + batch * i_b + d, mask=inside, other=0.0).to(tl.float32)
    product = tl.full([BD], 1.0, tl.float32)
    total = tl.zeros([BD], tl.float32)
    a += batch * a_b
    b += batch * b_b
    for start in tl.range(first, last, BT, num_stages=STAGES):
        i = start + steps  # counts in the order of the scan; t is the position
        t = (T - 1 - i if FLIP else i).to(tl.int64)
        mask = (i < last)[:, None] & inside[None, :]
        if ADJOINT:
            back = (t + 1 if FLIP else t - 1)[:, None] * a_t + d[None, :]
            decay = tl.load(a + back, mask=mask & (i > 0)[:, None], other=1.0)
        else:
            decay = tl.load(a + t[:, None] * a_t + d[None, :], mask=mask, other=1.0)
        given = tl.load(b + t[:, None] * b_t + d[None, :], mask=mask, other=0.0)
        decay, given = decay.to(tl.float32), given.to(tl.float32)
        decays, local = tl.associative_scan((decay, given), 0, _combine)
        rows = local + decays * carry[None, :]
        carry = tl.sum(tl.where(steps[:, None] == BT - 1, rows, 0.0), 0)
        if SUMMARY:
            product *= tl.sum(tl.where(steps[:, None] == BT - 1, decays, 0.0), 0)
        else:
            place = (batch * T + t)[:, None] * D + d[None, :]
            tl.store(out + place, rows.to(out.dtype.element_ty), mask=mask)
        if ADJOINT and not SUMMARY:
            past = (t - 1 if FLIP else t + 1)[:, None] * h_t + d[None, :]
            known = mask & (i < T - 1)[:, None]
            before = tl.load(h + batch * h_b + past, mask=known, other=0.0).to(tl.float32)
            if initial is not None:
                end = tl.load(initial + batch * i_b + d, mask=inside, other=0.0).to(tl.float32)
                before = tl.where((i == T - 1)[:, None], end[None, :], before)
            grads = rows * before
            if SUM_T:
                total += tl.sum(tl.where(mask, grads, 0.0), 0)
            else:
                p_da = da + batch * da_b + t[:, None] * da_t + d[None, :]
                tl.store(p_da, grads.to(da.dtype.element_ty), mask=mask)
    if SUMMARY:
        p_summary = summary + (part * 2 * batches + batch) * D + d
        tl.store(p_summary, carry, mask=inside)
        tl.store(p_summary + batches * D, product, mask=inside)
    if ADJOINT and not SUMMARY:
        if SUM_T:
            tl.store(da + (part * batches + batch) * D + d, total, mask=inside)
        if initial is not None:
            if part == parts - 1:
                t = (0 if FLIP else T - 1) + tl.zeros([1], tl.int64)
                decay = tl.load(a + t * a_t + d, mask=inside, other=0.0).to(tl.float32)
                p_dinitial = dinitial + batch * D + d
                tl.store(p_dinitial, (decay * carry).to(dinitial.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["T", "segment", "parts"])
def order_kernel(
    a, b, out, h, da, starts, initial, summary, dinitial,
    T, D, segment, parts,
    a_b, a_t, a_p, b_b, b_t, h_b, h_t, da_b, da_t, da_p, i_b, i_p,
    ORDER: tl.constexpr, P: tl.constexpr,
    FLIP: tl.constexpr, ADJOINT: tl.constexpr, SUMMARY: tl.constexpr, SUM_T: tl.constexpr,
    BD: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(D, BD)
    batch = (tl.program_id(0) // tiles).to(tl.int64)
    batches = tl.num_programs(0) // tiles
    # A summary runs once with the inputs and no state, and once for a one in each place of it.
    unit = tl.program_id(1) // parts
    part = tl.program_id(1) % parts
    d = tl.program_id(0) % tiles * BD + tl.arange(0, BD)
    inside = d < D
    slot = tl.arange(0, P)
    real = (slot < ORDER)[:, None] & inside[None, :]
    first = part * segment
    last = tl.minimum(first + segment, T)
    # Slot j holds the newest state whose step is j modulo the order: nothing ever moves.
    lag = (first + ORDER - 1 - slot + ORDER) % ORDER + 1
    state = tl.zeros([P, BD], tl.float32)
    if SUMMARY:
        state = tl.where((lag == unit)[:, None] & real, 1.0, 0.0)
    elif starts is not None:
        place = ((part * ORDER + lag - 1) * batches + batch)[:, None] * D + d[None, :]
        state = tl.load(starts + place, mask=real, other=0.0)
    elif initial is not None:
        if not ADJOINT:
            p_initial = initial + batch * i_b + (lag - 1)[:, None] * i_p + d[None, :]
            state = tl.load(p_initial, mask=real, other=0.0).to(tl.float32)
    total = tl.zeros([P, BD], tl.float32)
    a += batch * a_b
    b += batch * b_b
    for i in tl.range(first, last, num_stages=STAGES):
        t = (T - 1 - i if FLIP else i) + tl.zeros([1], tl.int64)
        lag = (i + ORDER - 1 - slot + ORDER) % ORDER + 1
        rows = t + tl.zeros([P], tl.int64)
        use = real
        if ADJOINT:
            rows = t + (lag if FLIP else -lag)
            use = real & (lag <= i)[:, None]
        place = rows[:, None] * a_t + (lag - 1)[:, None] * a_p + d[None, :]
        decay = tl.load(a + place, mask=use, other=0.0).to(tl.float32)
        row = tl.sum(tl.where(use, decay * state, 0.0), 0)
        given = tl.load(b + t * b_t + d, mask=inside, other=0.0).to(tl.float32)
        if SUMMARY:
            given = tl.where(unit == 0, given, 0.0)
        row += given
        state = tl.where((slot == i % ORDER)[:, None], row[None, :], state)
        if not SUMMARY:
            tl.store(out + (batch * T + t) * D + d, row.to(out.dtype.element_ty), mask=inside)
        if ADJOINT and not SUMMARY:
            ahead = i + slot + 1
            rows = t + (-1 - slot if FLIP else slot + 1)
            known = real & (ahead < T)[:, None]
            p_h = h + batch * h_b + rows[:, None] * h_t + d[None, :]
            before = tl.load(p_h, mask=known, other=0.0).to(tl.float32)
            if initial is not None:
                p_initial = initial + batch * i_b + (ahead - T)[:, None] * i_p + d[None, :]
                beyond = tl.load(p_initial, mask=real & (ahead >= T)[:, None], other=0.0)
                before += beyond.to(tl.float32)
            grads = row[None, :] * before
            if SUM_T:
                total += tl.where(real, grads, 0.0)
            else:
                p_da = da + batch * da_b + t * da_t + slot[:, None] * da_p + d[None, :]
                tl.store(p_da, grads.to(da.dtype.element_ty), mask=real)
    if SUMMARY:
        lag = (last + ORDER - 1 - slot + ORDER) % ORDER + 1
        place = (part * (ORDER + 1) + unit) * ORDER + lag - 1
        p_summary = summary + (place * batches + batch)[:, None] * D + d[None, :]
        tl.store(p_summary, state, mask=real)
    if ADJOINT and not SUMMARY:
        if SUM_T:
            p_da = da + ((part * batches + batch) * ORDER + slot)[:, None] * D + d[None, :]
            tl.store(p_da, total, mask=real)
        if initial is not None:
            if part == parts - 1:
                # The scan goes on over the initial states, which take no input.
                for m in range(1, ORDER + 1):
                    i = T - 1 + m
                    lag = (i + ORDER - 1 - slot + ORDER) % ORDER + 1
                    use = real & (lag >= m)[:, None] & (lag <= i)[:, None]
                    step = (i - lag).to(tl.int64)
                    rows = T - 1 - step if FLIP else step
                    place = rows[:, None] * a_t + (lag - 1)[:, None] * a_p + d[None, :]
                    decay = tl.load(a + place, mask=use, other=0.0).to(tl.float32)
                    row = tl.sum(tl.where(use, decay * state, 0.0), 0)
                    p_dinitial = dinitial + (batch * ORDER + m - 1) * D + d
                    tl.store(p_dinitial, row.to(dinitial.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["parts"])
def carry_kernel(
    summary, initial, starts, parts, D, i_b, i_p,
    ORDER: tl.constexpr, P: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """The state before each segment: the summary's place 0 plus what it does to the last state."""
    batch = tl.program_id(0).to(tl.int64)
    batches = tl.num_programs(0)
    d = tl.program_id(1) * BD + tl.arange(0, BD)
    lag = tl.arange(0, P)
    real = (lag < ORDER)[:, None] & (d < D)[None, :]
    both = (lag < ORDER)[:, None, None] & real[None, :, :]
    state = tl.zeros([P, BD], tl.float32)
    if initial is not None:
        p_initial = initial + batch * i_b + lag[:, None] * i_p + d[None, :]
        state = tl.load(p_initial, mask=real, other=0.0).to(tl.float32)
    for part in range(parts):
        place = ((part * ORDER + lag) * batches + batch)[:, None] * D + d[None, :]
        tl.store(starts + place, state, mask=real)
        row = part * (ORDER + 1) * ORDER
        place = ((row + lag) * batches + batch)[:, None] * D + d[None, :]
        local = tl.load(summary + place, mask=real, other=0.0)
        # [newer lag, unit, channel]
        place = row + (lag[None, :, None] + 1) * ORDER + lag[:, None, None]
        place = (place * batches + batch) * D + d[None, None, :]
        moved = tl.load(summary + place, mask=both, other=0.0)
        state = local + tl.sum(moved * state[None, :, :], 1)
