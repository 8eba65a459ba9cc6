"""Block-sparse matrix times dense, the dense factor on either side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import _block_sparse_matmul_cpu as plain_torch
from ._block_index import Columns, index_of, unpacked
from ._runtime import (
    Impl,
    apply_of,
    check_tensor,
    device_status,
    dtype_status,
    eager,
    once_differentiable,
    refuse,
    register,
    use_kernel,
)
from ._windows import threads

DEVICES = ("cpu", "cuda")
OP = "block_sparse_matmul"
LEAST = 16  # rows and columns of a block from which tensor cores multiply it
SEEN = 1 << 19  # numbers that all rows of blocks see from which, on one core, a product a row pays
SHARED = 1 << 21  # on several cores: they meet at each product, but once in a batched one


def block_sparse_matmul(
    x: Tensor,
    values: Tensor,
    columns: Sequence[Sequence[int]],
    *,
    sparse_first: bool = False,
    impl: Impl = "auto",
) -> Tensor:
    """y = x W^T, or y = W x with `sparse_first`; W has dense blocks at a few places of a grid.

    x         [*, n, C * i], or [*, C * i, n] with `sparse_first`
    values    [blocks, o, i], row by row of the grid
    columns   of every row of the grid, the columns that hold a block, each once; rows may differ
              in number, and may be empty
    returns   [*, n, R * o] or [*, R * o, n] for R rows, contiguous

    float32, bfloat16, float16 (float64 on CPU), one dtype and device for both; any number of
    vectors. Sums are kept in float32. The gradient of `values` is the product of the output's
    gradient and x at the blocks alone. Once differentiable (impl="torch": any number of times).

    On CPU the kernel is a product a row of blocks, of what that sees of some vectors; with several
    threads, blocks of at most 24 and at least 64 of them across, a batch of rows at a time.
    impl="auto" takes the kernel on CUDA, and on CPU where the rows differ or together see at least
    2^19 numbers (n * blocks * i), 2^21 with several threads; elsewhere, and with impl="torch", it
    gathers those and multiplies in one batched product. On CUDA blocks need at least 16 rows and
    columns.

    Raises KernelError for shapes, dtypes or devices that do not fit, and for impl="kernel" where
    the kernel cannot run. Source: Gale et al. 2022, arXiv 2211.15841, section 5.
    """
    held = tuple(map(tuple, columns))
    width = _check(x, values, held, sparse_first)
    slower = _slower(x, values, held, width) if impl == "auto" else None
    if not use_kernel(OP, impl, unsupported(x.device, values.shape[1:]), slower):
        return _formula(x, values, held, width, sparse_first)
    index = index_of(held, width, x.device)
    trained = torch.is_grad_enabled() and (x.requires_grad or values.requires_grad)
    run = _run_differentiable if trained else _multiply
    return run(x, values, index, len(held), sparse_first)


def status(device: torch.device | str, dtype: torch.dtype = torch.float32) -> str | None:
    """The reason the kernel cannot run on `device` in `dtype`; None where it does."""
    return dtype_status(device, dtype) or device_status(device)


def unsupported(device: torch.device, block: Sequence[int]) -> str | None:
    """The reason the kernel cannot run on `device` with blocks [o, i] of this size."""
    if device.type != "cpu" and min(block) < LEAST:
        return f"blocks are {block[0]} x {block[1]}, on CUDA they need at least {LEAST} x {LEAST}"
    return device_status(device)


def _slower(x: Tensor, values: Tensor, columns: Columns, width: int) -> str | None:
    if not x.is_cpu:
        return None
    least = SEEN if threads() == 1 else SHARED
    if x.numel() // width * len(values) >= least or not _regular(columns):
        return None
    return f"the rows of blocks see fewer than {least} numbers"


def _regular(columns: Columns) -> bool:
    return len({len(row) for row in columns}) == 1 and len(columns[0]) > 0


def _check(x: Tensor, values: Tensor, columns: Columns, sparse_first: bool) -> int:
    """The number of columns of the grid."""
    check_tensor(OP, "x", x)
    check_tensor(OP, "values", values, like=x)
    blocks = sum(map(len, columns))
    if values.dim() != 3 or len(values) != blocks or 0 in values.shape[1:] or not columns:
        refuse(
            OP,
            f"values has shape {tuple(values.shape)}, columns {len(columns)} rows, {blocks} blocks",
            "Give values as [blocks, o, i] and at least one row",
        )
    axis, size = (-2 if sparse_first else -1), values.shape[2]
    if x.dim() < (2 if sparse_first else 1) or x.shape[axis] % size or x.shape[axis] == 0:
        refuse(
            OP,
            f"x has shape {tuple(x.shape)}, a block takes {size} inputs",
            f"Give x as {'[*, C * i, n]' if sparse_first else '[*, n, C * i]'}",
        )
    return x.shape[axis] // size


def _formula(x: Tensor, values: Tensor, columns: Columns, width: int, sparse_first: bool) -> Tensor:
    if sparse_first:
        return _formula(x.transpose(-1, -2), values, columns, width, False).transpose(-1, -2)
    rows = len(columns)
    at = unpacked(index_of(columns, width, x.device), rows, len(values))
    seen = x.unflatten(-1, (width, -1)).index_select(-2, at.column_of)
    if _regular(columns):
        seen, cores = seen.unflatten(-2, (rows, -1)), values.unflatten(0, (rows, -1))
        return torch.einsum("bkoi,...bki->...bo", cores, seen).flatten(-2)
    parts = torch.einsum("koi,...ki->...ko", values, seen)
    y = x.new_zeros(*x.shape[:-1], rows, values.shape[1])
    return y.index_add(-2, at.row_of, parts).flatten(-2)


def _cuda(x: Tensor, values: Tensor, index: Tensor, rows: int, first: bool) -> Tensor:
    from ._block_sparse_matmul_triton import forward

    return forward(x, values, index, rows, first)


def _cuda_backward(grad: Tensor, x: Tensor, *how: Any) -> tuple[Tensor, Tensor]:
    from ._block_sparse_matmul_triton import backward

    return backward(grad, x, *how)


def _fake(x: Tensor, values: Tensor, index: Tensor, rows: int, first: bool) -> Tensor:
    batch, out = x.shape[0], rows * values.shape[1]
    return x.new_empty((batch, out, x.shape[2]) if first else (batch, x.shape[1], out))


def _fake_backward(
    grad: Tensor, x: Tensor, values: Tensor, index: Tensor, *how: Any
) -> tuple[Tensor, Tensor]:
    need_x, need_values = how[2:]
    dx = x.new_empty(x.shape if need_x else 0)
    return dx, values.new_empty(values.shape if need_values else 0)


_HOW = "Tensor x, Tensor values, Tensor index, int rows, bool first"
_forward = register(OP, f"({_HOW}) -> Tensor", cpu=plain_torch.forward, cuda=_cuda, fake=_fake)
_backward = register(
    f"{OP}_backward",
    f"(Tensor grad, {_HOW}, bool need_x, bool need_values) -> (Tensor, Tensor)",
    cpu=plain_torch.backward,
    cuda=_cuda_backward,
    fake=_fake_backward,
)
_run_forward = eager(_forward, plain_torch.forward)
_run_backward = eager(_backward, plain_torch.backward)


def _cube(x: Tensor, first: bool) -> Tensor:
    """Any leading axes as one: [b, n, features], or [b, features, n]."""
    return x.reshape(-1, *x.shape[-2:]) if first else x.reshape(1, -1, x.shape[-1])


def _multiply(x: Tensor, values: Tensor, index: Tensor, rows: int, first: bool) -> Tensor:
    y: Tensor = _run_forward(_cube(x, first), values, index, rows, first)
    return y.view(*x.shape[:-2], *y.shape[1:]) if first else y.view(*x.shape[:-1], y.shape[2])


class _BlockSparse(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, values: Tensor, index: Tensor, rows: int, first: bool
    ) -> Tensor:
        ctx.save_for_backward(x, values, index)
        ctx.how = rows, first
        return _multiply(x, values, index, rows, first)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, values, index = ctx.saved_tensors
        rows, first = ctx.how
        need_x, need_values = ctx.needs_input_grad[:2]
        cubes = _cube(grad, first), _cube(x, first)
        dx, dvalues = _run_backward(*cubes, values, index, rows, first, need_x, need_values)
        found = dx.view(x.shape) if need_x else None
        return found, dvalues if need_values else None, None, None, None


_run_differentiable: Callable[..., Tensor] = apply_of(_BlockSparse)
