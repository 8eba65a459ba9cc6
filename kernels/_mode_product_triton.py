"""Mode products on CUDA: one pass a factor, on the array as it lies.

Pointers read [a, i, b] and write [a, o, b], so nothing is transposed; vectors (a, b) fill the rows
of a tile. The backward keeps x alone: it computes the intermediates again. No atomics: every output
element has one writer, and sums over parts of the vectors are stored apart and added in order.
"""

# The parameters of a Triton function have no Python type.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._rows_triton import numerics, on, short_name
from ._runtime import Compiled

ENOUGH = 264  # programs that fill a large device twice; fixed, so that results do not depend on it
FREE = ("N", "share")  # sizes that must not lead to another compilation


@triton.jit
def load_modes(p, n, k, N, size, after, UPCAST: tl.constexpr):
    """[len(n), len(k)]: vectors n = (a, b) and entries k of the axis of `size`; 0 outside."""
    at = (n // after) * (size * after) + n % after
    inside = (n < N)[:, None] & (k < size)[None, :]
    z = tl.load(p + at[:, None] + k[None, :] * after, mask=inside, other=0.0)
    return z.to(tl.float32) if UPCAST else z


@triton.jit(do_not_specialize=FREE)
def step_kernel(
    z, factor, bias, y, N, O, I, after, fo, fi,
    UPCAST: tl.constexpr, PRECISION: tl.constexpr,
    BN: tl.constexpr, BO: tl.constexpr, BI: tl.constexpr,
):  # fmt: skip
    """y[a, o, b] = sum_i factor[o, i] z[a, i, b] + bias[o]."""
    pid = tl.program_id(0).to(tl.int64)
    tiles = tl.cdiv(O, BO)
    o = (pid % tiles) * BO + tl.arange(0, BO)
    n = (pid // tiles) * BN + tl.arange(0, BN)
    total = tl.zeros([BN, BO], tl.float32)
    for i0 in range(0, I, BI):
        i = i0 + tl.arange(0, BI)
        a = load_modes(z, n, i, N, I, after, UPCAST)
        inside = (i < I)[:, None] & (o < O)[None, :]
        f = tl.load(factor + o[None, :] * fo + i[:, None] * fi, mask=inside, other=0.0)
        if UPCAST:
            f = f.to(tl.float32)
        total = tl.dot(a, f, total, input_precision=PRECISION)
    if bias is not None:
        total += tl.load(bias + o, mask=o < O, other=0.0).to(tl.float32)[None, :]
    at = (n // after) * (O * after) + n % after
    inside = (n < N)[:, None] & (o < O)[None, :]
    tl.store(y + at[:, None] + o[None, :] * after, total.to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=FREE)
def outer_kernel(
    g, z, out, offset, N, O, I, after, share,
    UPCAST: tl.constexpr, PRECISION: tl.constexpr, BIAS: tl.constexpr,
    BN: tl.constexpr, BO: tl.constexpr, BI: tl.constexpr,
):  # fmt: skip
    """out[o, i] = sum_n g[n, o] z[n, i] and offset[o] = sum_n g[n, o] over `share` vectors."""
    pid = tl.program_id(0).to(tl.int64)
    across = tl.cdiv(I, BI)
    i = (pid % across) * BI + tl.arange(0, BI)
    first_tile = pid % across == 0
    pid //= across
    tiles = tl.cdiv(O, BO)
    o = (pid % tiles) * BO + tl.arange(0, BO)
    part = pid // tiles
    total = tl.zeros([BO, BI], tl.float32)
    sums = tl.zeros([BO], tl.float32)
    for n0 in range(0, share, BN):
        n = part * share + n0 + tl.arange(0, BN)
        a = load_modes(g, n, o, N, O, after, UPCAST)
        b = load_modes(z, n, i, N, I, after, UPCAST)
        total = tl.dot(tl.trans(a), b, total, input_precision=PRECISION)
        if BIAS:
            sums += tl.sum(a.to(tl.float32), 0)
    inside = (o < O)[:, None] & (i < I)[None, :]
    tl.store(out + part * O * I + o[:, None] * I + i[None, :], total, mask=inside)
    if BIAS:
        if first_tile:
            tl.store(offset + part * O + o, sums, mask=o < O)


def tile(size: int, most: int) -> int:
    power: int = triton.next_power_of_2(size)
    return max(16, min(most, power))


def launch_of(dtype: torch.dtype, o: int, i: int) -> dict[str, int]:
    """Tiles of `step_kernel`; float32 has no tensor cores at full precision."""
    if dtype == torch.float32:
        sizes = {"BN": 32, "BO": tile(o, 32), "BI": tile(i, 32)}
        return {**sizes, "num_warps": 4, "num_stages": 2}
    sizes = {"BN": 128, "BO": tile(o, 64), "BI": tile(i, 64)}
    return {**sizes, "num_warps": 4, "num_stages": 3}


def outer_launch(dtype: torch.dtype, o: int, i: int) -> dict[str, int]:
    """Tiles of `outer_kernel`."""
    sizes = {"BN": 32, "BO": tile(o, 32), "BI": tile(i, 32)}
    if dtype != torch.float32:
        sizes = {"BN": 32, "BO": tile(o, 64), "BI": tile(i, 64)}
    return {**sizes, "num_warps": 8, "num_stages": 2}


def step(z: Tensor, factor: Tensor, bias: Tensor | None, after: int) -> Tensor:
    """[rows, n] -> [rows, m] by one factor."""
    o, i = factor.shape
    n = z.numel() // i
    size = z.shape[1] // i * o
    y = torch.empty((z.shape[0], size), dtype=z.dtype, device=z.device)
    if n:
        tiles = launch_of(z.dtype, o, i)
        grid = (triton.cdiv(o, tiles["BO"]) * triton.cdiv(n, tiles["BN"]),)
        with on(z):
            step_kernel[grid](
                z, factor, bias, y, n, o, i, after, *factor.stride(), **numerics(z), **tiles
            )
    return y


def outer(g: Tensor, z: Tensor, factor: Tensor, after: int, bias: bool) -> tuple[Tensor, Tensor]:
    """Gradients of one factor and of its bias (empty where there is none)."""
    o, i = factor.shape
    n = z.numel() // i
    tiles = outer_launch(z.dtype, o, i)
    programs = triton.cdiv(o, tiles["BO"]) * triton.cdiv(i, tiles["BI"])
    slabs = max(1, triton.cdiv(n, tiles["BN"]))
    share = triton.cdiv(slabs, min(slabs, triton.cdiv(ENOUGH, programs))) * tiles["BN"]
    parts = max(1, triton.cdiv(n, share))
    out = torch.empty((parts, o, i), dtype=torch.float32, device=z.device)
    offset = torch.empty((parts, o if bias else 0), dtype=torch.float32, device=z.device)
    with on(z):
        outer_kernel[(programs * parts,)](
            g, z, out, offset, n, o, i, after, share, BIAS=bias, **numerics(z), **tiles
        )
    return out.sum(0).to(z.dtype), offset.sum(0).to(z.dtype)


def _walk(
    x: Tensor, factors: Sequence[Tensor], biases: Sequence[Tensor], trailing: Sequence[int]
) -> list[Tensor]:
    """x and what follows each factor."""
    found = [x.contiguous()]
    for k, factor in enumerate(factors):
        found.append(step(found[-1], factor, biases[k] if biases else None, trailing[k]))
    return found


def forward(
    x: Tensor, factors: Sequence[Tensor], biases: Sequence[Tensor], trailing: Sequence[int]
) -> Tensor:
    """x [N, n] -> [N, m], contiguous."""
    z = x.contiguous()
    for k, factor in enumerate(factors):
        z = step(z, factor, biases[k] if biases else None, trailing[k])
    return z


def backward(
    grad: Tensor,
    x: Tensor,
    factors: Sequence[Tensor],
    biases: Sequence[Tensor],
    trailing: Sequence[int],
    need_x: bool,
) -> list[Tensor]:
    """Gradients of x (empty without `need_x`), of every factor, of every bias."""
    zs = _walk(x, factors[:-1], biases[:-1], trailing[:-1])
    g, found = grad.contiguous(), []
    for k in reversed(range(len(factors))):
        found.append(outer(g, zs.pop(), factors[k], trailing[k], bool(biases)))
        if k or need_x:
            g = step(g, factors[k].t(), None, trailing[k])
    found.reverse()
    dx = g if need_x else torch.empty(0, dtype=x.dtype, device=x.device)
    return [dx, *(f for f, _ in found), *(b for _, b in found if biases)]


def _compiled(kernel: Any, dtype: torch.dtype, size: int, precision: str, **fixed: Any) -> Compiled:
    launch = outer_launch if kernel is outer_kernel else launch_of
    short, tiles = short_name(dtype), launch(dtype, size, size)
    pointers = dict.fromkeys(("z", "factor", "bias", "y", "g"), f"*{short}")
    pointers |= {"out": "*fp32", "offset": "*fp32"}
    constants = {k: n for k, n in tiles.items() if k[0] == "B"} | fixed
    constants |= {"UPCAST": False, "PRECISION": precision}
    signature = {n: pointers.get(n, "i32") for n in kernel.arg_names if n not in constants}
    return Compiled(
        kernel,
        signature,
        constants,
        tiles["num_warps"],
        tiles["num_stages"],
        divisible=tuple(n for n in signature if n not in FREE),
        tensor_cores=precision != "ieee",
        label=f"{kernel.__name__} {short} {precision} {fixed} {tiles}",
    )


def _configs() -> list[Compiled]:
    found = []
    kinds = [(torch.bfloat16, size, "tf32") for size in (16, 32, 64)]
    kinds += [(torch.float16, 32, "tf32"), (torch.float32, 32, "ieee"), (torch.float32, 32, "tf32")]
    for kind in kinds:
        found.append(_compiled(step_kernel, *kind, fi=1))
        found.append(_compiled(step_kernel, *kind, fo=1, bias=None, after=1))
        found.append(_compiled(outer_kernel, *kind, BIAS=True))
        found.append(_compiled(outer_kernel, *kind, BIAS=False, after=1))
    return found


CONFIGS = _configs()
