"""Rows of [B, T, H, D] tensors in Triton, and what every launch on them needs."""

# The parameters of a Triton function have no Python type.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def load_rows(p, batch, head, u, phase, d, T, D, dilation, sb, st, sh, UPCAST: tl.constexpr):
    """[len(u), len(d)] of a [B, T, H, D] tensor at positions u * dilation + phase; 0 outside."""
    t = u * dilation + phase
    inside = ((u >= 0) & (t < T))[:, None] & (d < D)[None, :]
    at = batch * sb + head * sh + t.to(tl.int64)[:, None] * st + d[None, :]
    x = tl.load(p + at, mask=inside, other=0.0)
    return x.to(tl.float32) if UPCAST else x


@triton.jit
def store_rows(p, x, batch, head, u, phase, d, T, D, dilation, sb, st, sh):
    t = u * dilation + phase
    at = batch * sb + head * sh + t.to(tl.int64)[:, None] * st + d[None, :]
    tl.store(p + at, x.to(p.dtype.element_ty), mask=(t < T)[:, None] & (d < D)[None, :])


def numerics(x: Tensor) -> dict[str, Any]:
    interpreted = x.device.type == "cpu"  # the interpreter multiplies the bits of bfloat16
    # torch refuses to tell by the older name, allow_tf32, where this one was set
    exact = x.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision != "tf32"
    return {"UPCAST": interpreted, "PRECISION": "ieee" if exact else "tf32"}


def on(x: Tensor) -> AbstractContextManager[Any]:
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def short_name(dtype: torch.dtype) -> str:
    """Triton's name of a dtype."""
    return {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
