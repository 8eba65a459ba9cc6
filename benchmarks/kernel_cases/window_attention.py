"""Windowed attention beside scaled_dot_product_attention, FlexAttention and varlen_attn."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kernel_cases import PLAIN, SMALL, Case, Overhead, Tensors, Way, no_compiler
from patternsearch.kernels import _window_attention_cpu as plain_torch
from patternsearch.kernels.window_attention import window_attention


class Shape(NamedTuple):
    batch: int
    length: int
    heads: int
    shared: int
    size: int
    lower: int | None
    upper: int | None

    @property
    def widths(self) -> tuple[int, int]:
        return plain_torch.reach(self.length, self.lower, self.upper, 1)

    @property
    def pairs(self) -> int:
        """Visible (query, key) pairs of one head."""
        low, up = self.widths
        return self.length * (low + up + 1) - low * (low + 1) // 2 - up * (up + 1) // 2

    def make(self, device: torch.device, dtype: torch.dtype) -> Tensors:
        heads = self.heads, self.shared, self.shared
        shapes = [(self.batch, self.length, n, self.size) for n in heads]
        return tuple(torch.randn(s, device=device).to(dtype) for s in shapes)

    def ours(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return window_attention(q, k, v, lower=self.lower, upper=self.upper)

    def plain(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return window_attention(q, k, v, lower=self.lower, upper=self.upper, impl="torch")

    def exact(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        low, up = self.widths
        group = self.heads // self.shared
        k, v = (t.repeat_interleave(group, 2) for t in (k, v))
        parts = []
        for first in range(0, self.length, 256):
            t = torch.arange(first, min(first + 256, self.length), device=q.device)
            s = torch.arange(
                max(0, first - low), min(self.length, first + 256 + up), device=q.device
            )
            step = s - t[:, None]
            scores = torch.einsum("bthd,bshd->bhts", q[:, t], k[:, s]) / self.size**0.5
            hidden = (step < -low) | (step > up)
            weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
            parts.append(torch.einsum("bhts,bshd->bthd", weights, v[:, s]))
        return torch.cat(parts, 1)


def heads_first(*tensors: Tensor) -> Tensors:
    return tuple(t.transpose(1, 2).contiguous() for t in tensors)


def positions_first(y: Tensor) -> Tensor:
    return y.transpose(1, 2)


def band_mask(shape: Shape, device: torch.device) -> Tensor:
    low, up = shape.widths
    t = torch.arange(shape.length, device=device)
    step = t - t[:, None]
    return (step >= -low) & (step <= up)


def masked(shape: Shape) -> Way:
    """The mask is made once, untimed."""
    masks: list[Tensor] = []

    def prepare(*inputs: Tensor) -> Tensors:
        masks[:] = [band_mask(shape, inputs[0].device)]
        return heads_first(*inputs)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        grouped = shape.heads != shape.shared
        return F.scaled_dot_product_attention(q, k, v, masks[0], enable_gqa=grouped)

    return Way(run, prepare, positions_first)


def causal(shape: Shape) -> Way:
    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        grouped = shape.heads != shape.shared
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)

    return Way(run, heads_first, positions_first)


def on_blocks(shape: Shape, rows: int) -> Way:
    """Blocks of queries as a batch, each with the neighbouring blocks of keys, under one mask."""
    low, up = shape.widths
    before, after = -(-low // rows), -(-up // rows)
    near = before + 1 + after

    def windows(t: Tensor) -> Tensor:
        t = F.pad(t, (0, 0, before * rows, after * rows)).unflatten(2, (-1, rows))
        blocks = shape.length // rows
        return torch.cat([t[:, :, i : i + blocks] for i in range(near)], 3).transpose(1, 2)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        blocks = shape.length // rows
        at = torch.arange(blocks, device=q.device)[:, None, None] * rows
        t = torch.arange(rows, device=q.device)[:, None]
        s = torch.arange(-before * rows, (1 + after) * rows, device=q.device)
        seen = (s >= t - low) & (s <= t + up) & (at + s >= 0) & (at + s < shape.length)
        folded = [q.unflatten(2, (blocks, rows)).transpose(1, 2), windows(k), windows(v)]
        mask = seen[:, None].expand(shape.batch, blocks, 1, rows, near * rows)
        y = F.scaled_dot_product_attention(
            *(x.flatten(0, 1) for x in folded),
            attn_mask=mask.flatten(0, 1),
            enable_gqa=shape.heads != shape.shared,
        )
        return y.unflatten(0, (shape.batch, blocks)).transpose(1, 2).flatten(2, 3)

    return Way(run, heads_first, positions_first)


def flex(shape: Shape, device: torch.device) -> Way:
    from torch.nn.attention import flex_attention as module

    low, up = shape.widths
    attend = torch.compile(module.flex_attention, dynamic=False)
    masks: list[module.BlockMask] = []

    def seen(b: Tensor, h: Tensor, t: Tensor, s: Tensor) -> Tensor:
        return (s >= t - low) & (s <= t + up)

    def prepare(*inputs: Tensor) -> Tensors:
        n = shape.length
        masks[:] = [module.create_block_mask(seen, None, None, n, n, device=inputs[0].device)]
        return heads_first(*inputs)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        grouped = shape.heads != shape.shared
        y: Tensor = attend(q, k, v, block_mask=masks[0], enable_gqa=grouped)
        return y

    one_way = "FlexAttention has no backward on CPU" if device.type == "cpu" else None
    return Way(run, prepare, positions_first, no_compiler(device), one_way, compiled=True)


def varlen(shape: Shape, device: torch.device) -> Way:
    """Sequences of one length, packed; FlashAttention-2 behind it."""
    low, up = shape.widths
    found = importlib.util.find_spec("torch.nn.attention.varlen") is not None
    missing = None if device.type == "cuda" else "runs on CUDA only"
    if missing is None and not found:
        missing = "this torch has no varlen_attn"
    run: Callable[..., Tensor] = shape.ours
    if missing is None:
        from torch.nn.attention.varlen import varlen_attn

        def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            n = shape.length
            ends = torch.arange(shape.batch + 1, device=q.device, dtype=torch.int32) * n
            flat = (t.flatten(0, 1) for t in (q, k, v))
            y: Tensor = varlen_attn(*flat, ends, ends, n, n, window_size=(low, up))
            return y.unflatten(0, (shape.batch, n))

    return Way(run, missing=missing)


def case(name: str, shape: Shape, device: torch.device, goal: float = 0.0) -> Case:
    others = {"SDPA, mask": masked(shape)}
    if shape.lower is None and shape.upper == 0:
        others["SDPA, is_causal"] = causal(shape)
    elif shape.length % 64 == 0 and shape.length > sum(shape.widths):
        others["SDPA on blocks of 64"] = on_blocks(shape, 64)
    goals = {"SDPA, mask": goal} if goal else {}
    if shape.length <= 64:
        others[PLAIN], goals = Way(shape.plain), dict(SMALL)
    others["FlexAttention, compiled"] = flex(shape, device)
    others["varlen_attn"] = varlen(shape, device)
    queries = shape.batch * shape.length * shape.heads * shape.size
    keys = shape.batch * shape.length * shape.shared * shape.size
    work = shape.batch * shape.heads * shape.pairs * shape.size
    return Case(
        name,
        shape.make,
        Way(shape.ours),
        others,
        shape.exact,
        moved=(2 * queries + 2 * keys, 6 * queries + 6 * keys),
        flops=(4 * work, 14 * work),
        goals=goals,
    )


SHAPES = {
    "B64 T64 H4 D16 w16 causal": Shape(64, 64, 4, 4, 16, 15, 0),
    "B8 T256 H4 D32 w32 causal": Shape(8, 256, 4, 4, 32, 31, 0),
    "B2 T1024 H4 D64 w129": Shape(2, 1024, 4, 4, 64, 64, 64),
    "B1 T2048 H4 D64 causal full": Shape(1, 2048, 4, 4, 64, None, 0),
    "B1 T4096 H4 D64 w256 causal": Shape(1, 4096, 4, 4, 64, 255, 0),
    "B1 T4096 H8/2 D64 w512 causal": Shape(1, 4096, 8, 2, 64, 511, 0),
}
ON_CUDA = {
    "B4 T8192 H16 D64 w1024 causal": Shape(4, 8192, 16, 16, 64, 1023, 0),
    "B4 T8192 H16 D128 w1024 causal": Shape(4, 8192, 16, 16, 128, 1023, 0),
    "B4 T8192 H16/4 D128 w512": Shape(4, 8192, 16, 4, 128, 255, 256),
}


def cases(device: torch.device) -> list[Case]:
    if device.type == "cuda":
        return [case(name, shape, device) for name, shape in (SHAPES | ON_CUDA).items()]
    goals = {"B1 T4096 H4 D64 w256 causal": 8.0}
    return [case(name, shape, device, goals.get(name, 0.0)) for name, shape in SHAPES.items()]


def growth(device: torch.device, length: int) -> Case:
    return case(f"T{length}", Shape(1, length, 1, 1, 64, 63, 0), device)


def overhead() -> Overhead:
    """The shortest sequence that is cut into blocks: shorter ones are torch's own attention."""
    shape = Shape(1, 192, 1, 1, 4, 8, 0)
    how = 8, 0, 1, 0.5

    def make() -> Tensors:
        return shape.make(torch.device("cpu"), torch.float32)

    return Overhead(
        make,
        shape.ours,
        lambda q, k, v: plain_torch.forward(q, k, v, *how),
        lambda dy, q, k, v: plain_torch.backward(dy, q, k, v, *how),
    )
