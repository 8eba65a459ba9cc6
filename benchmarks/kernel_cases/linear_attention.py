"""Linear attention beside the quadratic form, chunks of einsum, a loop over positions, and fla."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from kernel_cases import PLAIN, SMALL, Case, Overhead, Tensors, Way, no_compiler
from patternsearch.kernels import _linear_attention_cpu as plain_torch
from patternsearch.kernels.linear_attention import linear_attention

QUADRATIC = 4096  # positions above which all pairs of them no longer fit
CHUNK = 64
FACTORED = 16  # longer chunks overflow sooner


class Shape(NamedTuple):
    batch: int
    length: int
    heads: int
    size: int
    decay: str = "none"

    @property
    def elements(self) -> int:
        return self.batch * self.length * self.heads * self.size

    def make(self, device: torch.device, dtype: torch.dtype) -> Tensors:
        rows = self.batch, self.length, self.heads
        made = [torch.randn(*rows, self.size, device=device).to(dtype) for _ in range(3)]
        if self.decay != "none":
            wide = (self.size,) if self.decay == "channel" else ()
            made.append((-0.2 * torch.rand(*rows, *wide, device=device)).to(dtype))
        return tuple(made)


def ours(q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None = None) -> Tensor:
    return linear_attention(q, k, v, decay=decay)


def plain(q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None = None) -> Tensor:
    return linear_attention(q, k, v, decay=decay, impl="torch")


def exact(q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None = None) -> Tensor:
    """Position after position; also what a user writes first."""
    state = q.new_zeros(*q.shape[:1], *q.shape[2:], v.shape[-1])
    logs = [None] * q.shape[1] if decay is None else decay.unbind(1)
    rows = []
    for q_t, k_t, v_t, log in zip(*(x.unbind(1) for x in (q, k, v)), logs, strict=True):
        if log is not None:
            state = state * log.exp().view(*log.shape[:2], -1, 1)
        state = state + k_t.unsqueeze(-1) * v_t.unsqueeze(-2)
        rows.append((q_t.unsqueeze(-2) @ state).squeeze(-2))
    return torch.stack(rows, 1) * q.shape[-1] ** -0.5


def heads_first(*tensors: Tensor) -> Tensors:
    return tuple(x.transpose(1, 2).contiguous() for x in tensors)


def positions_first(o: Tensor) -> Tensor:
    return o.transpose(1, 2)


def quadratic(q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None = None) -> Tensor:
    scores = q @ k.mT * q.shape[-1] ** -0.5
    if decay is None:
        return scores.tril() @ v
    return (scores * between(decay.cumsum(-1))) @ v


def between(sums: Tensor) -> Tensor:
    """exp of the differences of running sums, 0 above the diagonal."""
    length = sums.shape[-1]
    ahead = torch.ones(length, length, dtype=torch.bool, device=sums.device).triu(1)
    away = sums.unsqueeze(-1) - sums.unsqueeze(-2)
    return away.masked_fill(ahead, -torch.inf).exp()


def chunked(q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None = None) -> Tensor:
    """Chunks as batches of matrix products; with a decay, a loop over the states between them."""
    per_channel = decay is not None and decay.dim() == 4
    rows = FACTORED if per_channel else CHUNK
    q, k, v = (x.unflatten(2, (-1, rows)) for x in (q * q.shape[-1] ** -0.5, k, v))
    if decay is None:
        updates = torch.einsum("bhnck,bhncv->bhnkv", k, v)
        before = updates.cumsum(2) - updates
        return ((q @ k.mT).tril() @ v + q @ before).flatten(2, 3)
    sums = decay.unflatten(2, (-1, rows)).cumsum(3)
    if per_channel:
        # the usual shortcut: exact while exp(-sums) does not overflow inside a chunk
        queries, last = q * sums.exp(), sums[:, :, :, -1]
        scores = (queries @ (k * (-sums).exp()).mT).tril()
        keys, whole = k * (last.unsqueeze(3) - sums).exp(), last.exp().unsqueeze(-1)
    else:
        queries, last = q * sums.exp().unsqueeze(-1), sums[..., -1]
        scores = (q @ k.mT) * between(sums)
        keys = k * (last.unsqueeze(-1) - sums).exp().unsqueeze(-1)
        whole = last.exp()[..., None, None]
    state = torch.zeros_like(keys[:, :, 0].mT @ v[:, :, 0])
    starts = []
    updates = keys.mT @ v
    for kept, update in zip(whole.unbind(2), updates.unbind(2), strict=True):
        starts.append(state)
        state = state * kept + update
    return (scores @ v + queries @ torch.stack(starts, 2)).flatten(2, 3)


def fla(shape: Shape, device: torch.device) -> Way:
    if device.type != "cuda" or not importlib.util.find_spec("fla"):
        return Way(exact, missing="needs CUDA and fla")
    from fla.ops.gla import chunk_gla
    from fla.ops.linear_attn import chunk_linear_attn
    from fla.ops.simple_gla import chunk_simple_gla

    def run(q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None = None) -> Tensor:
        o: Tensor
        if shape.decay == "none":
            o, _ = chunk_linear_attn(q, k, v, normalize=False)
        elif shape.decay == "head":
            o, _ = chunk_simple_gla(q, k, v, decay)
        else:
            o, _ = chunk_gla(q, k, v, decay)
        return o

    return Way(run)


def others(shape: Shape, device: torch.device) -> dict[str, Way]:
    missing = no_compiler(device)
    found: list[tuple[str, Callable[..., Tensor]]] = [("chunked einsum", chunked)]
    if shape.length <= QUADRATIC and shape.decay != "channel":
        found.append(("quadratic", quadratic))
    ways: dict[str, Way] = {}
    for name, run in found:
        ways[name] = Way(run, heads_first, positions_first)
        # a long loop over chunks takes minutes to compile
        if run is quadratic or shape.decay == "none" or shape.length <= 1024:
            built = torch.compile(run, dynamic=False)
            ways[f"{name} compiled"] = Way(
                built, heads_first, positions_first, missing, compiled=True
            )
    if shape.length <= 1024:
        ways["loop"] = Way(exact)
    if shape.length <= 64:
        ways[PLAIN] = Way(plain)
    return ways | {"fla": fla(shape, device)}


def case(shape: Shape, device: torch.device, goals: dict[str, float] | None = None) -> Case:
    n = shape.elements
    extra = {"none": 0.0, "head": n / shape.size, "channel": float(n)}[shape.decay]
    sizes = f"B{shape.batch} T{shape.length} H{shape.heads} D{shape.size}"
    return Case(
        f"{sizes} decay {shape.decay}",
        shape.make,
        Way(ours),
        others(shape, device),
        exact,
        (4 * n + extra, 11 * n + 3 * extra),
        (4.0 * n * shape.size, 12.0 * n * shape.size),
        goals or {},
    )


def cases(device: torch.device) -> list[Case]:
    if device.type == "cuda":
        sizes = ((64, 64, 4, 16), (1, 8192, 96, 128), (2, 16_384, 16, 128), (4, 4096, 64, 128))
        plain = [case(Shape(*s), device) for s in (*sizes, (8, 2048, 32, 256))]
        return plain + [case(Shape(4, 4096, 64, 128, d), device) for d in ("head", "channel")]
    goal = {"quadratic": 8.0}
    return [
        case(Shape(64, 64, 4, 16), device, SMALL),
        case(Shape(8, 256, 4, 32, "head"), device),
        case(Shape(2, 1024, 8, 64), device),
        case(Shape(1, 4096, 4, 64), device, goal),
        case(Shape(1, 4096, 4, 64, "head"), device, goal),
        case(Shape(1, 4096, 4, 64, "channel"), device),
        case(Shape(1, 16_384, 2, 64), device),
    ]


def growth(device: torch.device, length: int) -> Case:
    return case(Shape(1, length, 1, 64, "head"), device)


def overhead() -> Overhead:
    shape = Shape(2, 8, 2, 8)

    def forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return plain_torch.forward(q, k, v, None, 0.5)

    def backward(do: Tensor, q: Tensor, k: Tensor, v: Tensor) -> object:
        return plain_torch.backward(do, q, k, v, None, 0.5)

    def make() -> Tensors:
        return shape.make(torch.device("cpu"), torch.float32)

    return Overhead(make, ours, forward, backward)
