"""The two products of a two-factor structure in Triton, each from and to rows of memory.

The kernels of _two_factor_triton.py are made of them.
"""

# The parameters of a Triton function have no Python type.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load(p, inside, UPCAST: tl.constexpr):
    x = tl.load(p, mask=inside, other=0.0)
    return x.to(tl.float32) if UPCAST else x


@triton.jit
def inner(
    x, left, z, height, xs, first, step, N, B, G, A,
    FORWARD: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """x [BM, (g b), a] to z [(f d r), (b g), BM] forward, z to x backward; N = f d r."""
    lane = tl.arange(0, BM)
    here = lane < height
    columns = tl.cdiv(N if FORWARD else A, BN)
    for item in range(first, B * G * columns, step):
        n = (item % columns) * BN + tl.arange(0, BN)
        q = item // columns
        g, b = q // B, q % B
        between = z + (b * G + g) * BM
        total = tl.zeros([BM, BN], tl.float32)
        if FORWARD:
            for k0 in range(0, A, BK):
                k = k0 + tl.arange(0, BK)
                seen = x + (lane * xs)[:, None] + (q * A + k)[None, :]
                s = load(seen, here[:, None] & (k < A)[None, :], UPCAST)
                w = left + (n * G + g)[None, :] * A + k[:, None]
                c = load(w, (k < A)[:, None] & (n < N)[None, :], UPCAST)
                total = tl.dot(s, c, total, input_precision=PRECISION)
            to = between + lane[:, None] + n[None, :] * (B * G * BM)
            tl.store(to, total.to(z.dtype.element_ty), mask=(n < N)[None, :])
        else:
            for k0 in range(0, N, BK):
                k = k0 + tl.arange(0, BK)
                seen = between + lane[:, None] + k[None, :] * (B * G * BM)
                s = load(seen, (k < N)[None, :], UPCAST)
                w = left + (k * G + g)[:, None] * A + n[None, :]
                c = load(w, (k < N)[:, None] & (n < A)[None, :], UPCAST)
                total = tl.dot(s, c, total, input_precision=PRECISION)
            to = x + (lane * xs)[:, None] + (q * A + n)[None, :]
            tl.store(to, total.to(x.dtype.element_ty), mask=here[:, None] & (n < A)[None, :])


@triton.jit
def activate(u, ACTIVATION: tl.constexpr):
    if ACTIVATION == "relu":
        u = tl.maximum(u, 0.0)
    elif ACTIVATION == "gelu":
        u = 0.5 * u * (1 + tl.erf(u * 0.7071067811865476))
    elif ACTIVATION == "silu":
        u = u * tl.sigmoid(u)
    elif ACTIVATION == "tanh":
        u = 2 * tl.sigmoid(2 * u) - 1
    return u


@triton.jit
def outer(
    z, right, y, bias, residual, given, height, ys, first, step, K, E, D, FD,
    FORWARD: tl.constexpr, ACTIVATION: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, P: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """z [(f d), (r b g), BM] to y [BM, e, (f d)] forward, y to z backward; K = r b g."""
    lane = tl.arange(0, BM)[None, :, None]
    here = lane < height
    columns = tl.cdiv(E if FORWARD else K, BN)
    for item in range(first, tl.cdiv(FD, P) * columns, step):
        p = (item // columns) * P + tl.arange(0, P)[:, None, None]
        n = (item % columns) * BN + tl.arange(0, BN)[None, None, :]
        w = right + (p // D) * (E * K)
        total = tl.zeros([P, BM, BN], tl.float32)
        if FORWARD:
            for k0 in range(0, K, BK):
                k = k0 + tl.arange(0, BK)[None, None, :]
                s = load(z + (p * K + k) * BM + lane, (p < FD) & (k < K) & (lane < BM), UPCAST)
                k = k0 + tl.arange(0, BK)[None, :, None]
                c = load(w + n * K + k, (p < FD) & (k < K) & (n < E), UPCAST)
                total = tl.dot(s, c, total, input_precision=PRECISION)
            inside = here & (n < E) & (p < FD)
            column = n * FD + p
            if bias is not None:
                total += tl.load(bias + column, mask=(n < E) & (p < FD), other=0.0).to(tl.float32)
            at = lane * ys + column
            if given is not None:
                tl.store(given + at, total.to(given.dtype.element_ty), mask=inside)
            total = activate(total, ACTIVATION)
            if residual is not None:
                total += tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
            tl.store(y + at, total.to(y.dtype.element_ty), mask=inside)
        else:
            for k0 in range(0, E, BK):
                k = k0 + tl.arange(0, BK)[None, None, :]
                s = load(y + lane * ys + (k * FD + p), here & (p < FD) & (k < E), UPCAST)
                k = k0 + tl.arange(0, BK)[None, :, None]
                c = load(w + k * K + n, (p < FD) & (k < E) & (n < K), UPCAST)
                total = tl.dot(s, c, total, input_precision=PRECISION)
            to = z + (p * K + n) * BM + lane
            tl.store(to, total.to(z.dtype.element_ty), mask=(p < FD) & (n < K) & (lane < BM))
