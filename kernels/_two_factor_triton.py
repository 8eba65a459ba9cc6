"""Two-factor products on CUDA: both factors on some rows in one program.

What lies between the factors stays in the second-level cache, a tile of BM rows at a time with the
rows innermost, so that neither factor meets a permutation there. At the side of (e, f, d) a
program takes P columns (f, d) at a time, which lie side by side in memory, as one batched product.
Few tiles of rows are too few programs: then one launch a factor shares out the columns as well.
No atomics: every number has one writer, and sums over parts of the rows are added in order.
"""

# The parameters of a Triton function have no Python type.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._rows_triton import numerics, on, short_name
from ._runtime import Compiled
from ._two_factor_cpu import Sizes
from ._two_factor_products_triton import inner, load, outer

ENOUGH = 264  # programs that fill a large device twice; a constant, so that results do not depend
FREE = ("rows", "share", "ahead")  # sizes that must not lead to another compilation


@triton.jit(do_not_specialize=FREE)
def rows_kernel(
    x, left, right, z, y, bias, residual, given, rows, xs, ys, share, ahead,
    A, B, G, N, K, E, D, FD,
    FORWARD: tl.constexpr, ACTIVATION: tl.constexpr, INNER: tl.constexpr, OUTER: tl.constexpr,
    KEEP: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    P: tl.constexpr, PN: tl.constexpr, PK: tl.constexpr,
):  # fmt: skip
    """x to y forward, y to x backward, or one factor alone; `share` programs for a tile of rows.

    KEEP: every tile of rows has memory between of its own, else every program.
    """
    pid = tl.program_id(0).to(tl.int64)
    part = (pid % share).to(tl.int32)
    for tile in range(pid // share, tl.cdiv(rows, BM), ahead):
        row = tile * BM
        height = (rows - row).to(tl.int32)  # of the last tile less than BM
        between = z + (tile if KEEP else pid) * (N * B * G * BM)
        if FORWARD:
            if INNER:
                inner(
                    x + row * xs, left, between, height, xs, part, share, N, B, G, A,
                    True, UPCAST, PRECISION, BM, BN, BK,
                )  # fmt: skip
            if INNER and OUTER:
                tl.debug_barrier()  # what other threads of this program wrote
            if OUTER:
                outer(
                    between, right, y + row * ys, bias,
                    None if residual is None else residual + row * ys,
                    None if given is None else given + row * ys,
                    height, ys, part, share, K, E, D, FD,
                    True, ACTIVATION, UPCAST, PRECISION, BM, P, PN, PK,
                )  # fmt: skip
        else:
            if OUTER:
                outer(
                    between, right, y + row * ys, None, None, None,
                    height, ys, part, share, K, E, D, FD,
                    False, ACTIVATION, UPCAST, PRECISION, BM, P, PN, PK,
                )  # fmt: skip
            if INNER and OUTER:
                tl.debug_barrier()
            if INNER:
                inner(
                    x + row * xs, left, between, height, xs, part, share, N, B, G, A,
                    False, UPCAST, PRECISION, BM, BN, BK,
                )  # fmt: skip
        if not KEEP:
            tl.debug_barrier()  # before the next tile overwrites it


@triton.jit(do_not_specialize=FREE)
def left_kernel(
    x, dz, out, rows, xs, share, A, B, G, N,
    UPCAST: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """out [part, (f d r), g, a]: products of dz and x over `share` tiles of rows."""
    pid = tl.program_id(0).to(tl.int64)
    down, across = tl.cdiv(N, BN), tl.cdiv(A, BK)
    a = (pid % across) * BK + tl.arange(0, BK)
    pid //= across
    n = (pid % down) * BN + tl.arange(0, BN)
    pid //= down
    g, part = pid % G, pid // G
    lane = tl.arange(0, BM)
    first = part * share
    count = tl.minimum(tl.cdiv(rows, BM), first + share) - first
    total = tl.zeros([BN, BK], tl.float32)
    for step in range(count.to(tl.int32) * B):
        tile, b = first + step // B, step % B
        m = tile * BM + lane
        u = dz + ((tile * N + n) * (B * G) + b * G + g)[:, None] * BM + lane[None, :]
        s = load(u, (n < N)[:, None], UPCAST)
        v = x + m[:, None] * xs + ((g * B + b) * A + a)[None, :]
        c = load(v, (m < rows)[:, None] & (a < A)[None, :], UPCAST)
        total = tl.dot(s, c, total, input_precision=PRECISION)
    to = out + ((part * N + n) * G + g)[:, None] * A + a[None, :]
    tl.store(to, total, mask=(n < N)[:, None] & (a < A)[None, :])


@triton.jit(do_not_specialize=FREE)
def right_kernel(
    dy, z, out, rows, ys, share, K, E, FD,
    UPCAST: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, P: tl.constexpr, PN: tl.constexpr, PK: tl.constexpr,
):  # fmt: skip
    """out [part, (f d), e, (r b g)]: products of dy and z over `share` tiles of rows."""
    pid = tl.program_id(0).to(tl.int64)
    down, across, groups = tl.cdiv(E, PN), tl.cdiv(K, PK), tl.cdiv(FD, P)
    k = (pid % across) * PK + tl.arange(0, PK)[None, None, :]
    pid //= across
    e = (pid % down) * PN + tl.arange(0, PN)[None, :, None]
    pid //= down
    p = (pid % groups) * P + tl.arange(0, P)[:, None, None]
    part = pid // groups
    first = part * share
    count = tl.minimum(tl.cdiv(rows, BM), first + share) - first
    total = tl.zeros([P, PN, PK], tl.float32)
    for step in range(count.to(tl.int32)):
        tile = first + step
        lane = tl.arange(0, BM)[None, None, :]
        m = tile * BM + lane
        s = load(dy + m * ys + e * FD + p, (m < rows) & (e < E) & (p < FD), UPCAST)
        lane = tl.arange(0, BM)[None, :, None]
        v = z + ((tile * FD + p) * K + k) * BM + lane
        c = load(v, (p < FD) & (k < K) & (lane < BM), UPCAST)
        total = tl.dot(s, c, total, input_precision=PRECISION)
    inside = (p < FD) & (e < E) & (k < K)
    tl.store(out + ((part * FD + p) * E + e) * K + k, total, mask=inside)


def launch_of(dtype: torch.dtype, columns: int) -> dict[str, int]:
    """Tiles for so many columns (f, d); float32 has no tensor cores at full precision."""
    if dtype == torch.float32:
        tiles = {"BM": 32, "BN": 32, "BK": 32, "P": 4, "PN": 16, "PK": 16}
        return tiles | {"num_warps": 4, "num_stages": 2}
    wide = {"BM": 32, "P": 16, "PN": 16} if columns >= 16 else {"BM": 64, "P": 4, "PN": 32}
    return {**wide, "BN": 64, "BK": 32, "PK": 32, "num_warps": 8, "num_stages": 2}


def pieces(n: Sizes, tiles: dict[str, int], forward: bool) -> tuple[int, int]:
    """How many programs can share a tile of rows in either factor."""
    inner = n.f * n.d * n.r if forward else n.a
    outer = n.e if forward else n.r * n.b * n.g
    return (
        n.g * n.b * triton.cdiv(inner, tiles["BN"]),
        triton.cdiv(n.f * n.d, tiles["P"]) * triton.cdiv(outer, tiles["PN"]),
    )


def launch(
    tensors: tuple[Tensor | None, ...],
    n: Sizes,
    forward: bool,
    activation: str,
    factors: tuple[bool, bool] = (True, True),
    z: Tensor | None = None,
) -> Tensor:
    """Run `rows_kernel` on (x, left, right, y, bias, residual, given); what lies between.

    With `z`, or where one factor is left out, that is kept for every row.
    """
    x, left, right, y, bias, residual, given = tensors
    like = x if x is not None else y
    assert like is not None and left is not None and right is not None
    columns = n.f * n.d
    tiles = launch_of(like.dtype, columns)
    rows = like.shape[0]
    count = triton.cdiv(rows, tiles["BM"])
    split = count < ENOUGH // 2 and all(factors)
    keep = split or not all(factors) or z is not None
    ahead = count if keep else min(count, ENOUGH)
    if z is None:
        slots = count if keep else ahead
        z = torch.empty(slots * n.between * tiles["BM"], dtype=like.dtype, device=like.device)
    sizes = n.a, n.b, n.g, columns * n.r, n.r * n.b * n.g, n.e, n.d, columns
    order = [(True, False), (False, True)] if split else [factors]
    for one, two in order if forward else reversed(order):
        items = pieces(n, tiles, forward)[two] if keep and one != two else 1
        share = min(items, triton.cdiv(ENOUGH, count))
        with on(like):
            rows_kernel[(ahead * share,)](
                x, left, right, z, y, bias, residual, given, rows,
                0 if x is None else x.stride(0), 0 if y is None else y.stride(0), share, ahead,
                *sizes, FORWARD=forward, ACTIVATION=activation, INNER=one, OUTER=two, KEEP=keep,
                **numerics(like), **tiles,
            )  # fmt: skip
    return z


def apply(
    x: Tensor,
    left: Tensor,
    right: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    """x [rows, inputs] -> y [rows, outputs], and what the activation was given where asked for."""
    n = Sizes.of(left, right)
    y = torch.empty(x.shape[0], n.outputs, dtype=x.dtype, device=x.device)
    given = torch.empty(y.shape if keep else (0,), dtype=x.dtype, device=x.device)
    if y.numel():
        pre = given if keep else None
        launch((x, left, right, y, bias, residual, pre), n, True, activation)
    return y, given


def backward(
    grad: Tensor, x: Tensor, left: Tensor, right: Tensor, data: bool, weights: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x (where `data`), left and right (where `weights`); the others are empty."""
    n = Sizes.of(left, right)
    dx = torch.empty(x.shape if data else (0,), dtype=x.dtype, device=x.device)
    if x.shape[0] == 0:
        shapes = (left.shape, right.shape) if weights else ((0,), (0,))
        return dx, x.new_zeros(shapes[0]), x.new_zeros(shapes[1])
    rest = None, None, None
    dz = None
    if weights:
        count = triton.cdiv(x.shape[0], launch_of(x.dtype, n.f * n.d)["BM"])
        size = count * n.between * launch_of(x.dtype, n.f * n.d)["BM"]
        dz = torch.empty(size, dtype=x.dtype, device=x.device)
    target = dx if data else None
    launch((target, left, right, grad, *rest), n, False, "none", (data, True), dz)
    if dz is None:
        return dx, x.new_empty(0), x.new_empty(0)
    z = launch((x, left, right, None, *rest), n, True, "none", (True, False))
    return dx, left_gradient(x, dz, left, n), right_gradient(grad, z, right, n)


def left_gradient(x: Tensor, dz: Tensor, left: Tensor, n: Sizes) -> Tensor:
    tiles = launch_of(x.dtype, n.f * n.d)
    heights = n.f * n.d * n.r
    programs = n.g * triton.cdiv(heights, tiles["BN"]) * triton.cdiv(n.a, tiles["BK"])
    share, parts = shared(x.shape[0], tiles["BM"], programs)
    out = torch.empty((parts, *left.shape), dtype=torch.float32, device=x.device)
    chosen = {k: tiles[k] for k in ("BM", "BN", "BK", "num_warps", "num_stages")}
    with on(x):
        left_kernel[(programs * parts,)](
            x, dz, out, x.shape[0], x.stride(0), share, n.a, n.b, n.g, heights,
            **numerics(x), **chosen,
        )  # fmt: skip
    return out.sum(0).to(left.dtype)


def right_gradient(grad: Tensor, z: Tensor, right: Tensor, n: Sizes) -> Tensor:
    tiles = launch_of(grad.dtype, n.f * n.d)
    size, columns = n.r * n.b * n.g, n.f * n.d
    programs = triton.cdiv(columns, tiles["P"]) * triton.cdiv(n.e, tiles["PN"])
    programs *= triton.cdiv(size, tiles["PK"])
    share, parts = shared(grad.shape[0], tiles["BM"], programs)
    out = torch.empty((parts, n.f, n.d, n.e, size), dtype=torch.float32, device=grad.device)
    chosen = {k: tiles[k] for k in ("BM", "P", "PN", "PK", "num_warps", "num_stages")}
    with on(grad):
        right_kernel[(programs * parts,)](
            grad, z, out, grad.shape[0], grad.stride(0), share, size, n.e, columns,
            **numerics(grad), **chosen,
        )  # fmt: skip
    return out.sum((0, 2)).view(right.shape).to(right.dtype)


def shared(rows: int, block: int, programs: int) -> tuple[int, int]:
    """Tiles of rows for one program, and how many programs share the rows."""
    tiles = triton.cdiv(rows, block)
    share = triton.cdiv(tiles, min(tiles, triton.cdiv(ENOUGH, programs)))
    return share, triton.cdiv(tiles, share)


def _compiled(
    kernel: Any, dtype: torch.dtype, precision: str, columns: int, **how: Any
) -> Compiled:
    short = short_name(dtype)
    tiles = launch_of(dtype, columns)
    names = ("x", "left", "right", "z", "y", "bias", "residual", "given", "dz", "dy")
    pointers = dict.fromkeys(names, f"*{short}") | {"out": "*fp32"}
    constants: dict[str, Any] = {k: v for k, v in tiles.items() if k[:1] in "BP"}
    constants |= {"UPCAST": False, "PRECISION": precision, "B": 1, "D": 1, **how}
    constants = {k: v for k, v in constants.items() if k in kernel.arg_names}
    signature = {k: pointers.get(k, "i32") for k in kernel.arg_names if k not in constants}
    return Compiled(
        kernel,
        signature,
        constants,
        tiles["num_warps"],
        tiles["num_stages"],
        divisible=tuple(k for k in signature if k not in FREE),
        tensor_cores=precision != "ieee",
        label=f"{kernel.__name__} {short} {precision} {how} {tiles}",
    )


def _configs() -> list[Compiled]:
    none = {"bias": None, "residual": None, "given": None}
    fused = {"INNER": True, "OUTER": True, "KEEP": False}
    train = {"ACTIVATION": "gelu", "FORWARD": True, **fused}
    back = {"ACTIVATION": "none", "FORWARD": False, **none, **fused, "KEEP": True}
    found = []
    for dtype, precision in (
        (torch.bfloat16, "tf32"),
        (torch.float16, "tf32"),
        (torch.float32, "tf32"),
        (torch.float32, "ieee"),
    ):
        for columns in (4, 64) if dtype == torch.bfloat16 else (64,):
            found.append(_compiled(rows_kernel, dtype, precision, columns, **train))
            found.append(_compiled(rows_kernel, dtype, precision, columns, **back))
            found.append(_compiled(right_kernel, dtype, precision, columns))
        found.append(_compiled(left_kernel, dtype, precision, 64))
    return found


CONFIGS = _configs()
