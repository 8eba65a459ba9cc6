"""What every kind of mixer computes, position after position, from its formula."""

import itertools
import math
from dataclasses import replace

import torch
from mixer_cases import Case
from torch import Tensor

from patternsearch.mixer import MixerModule
from patternsearch.patterns.banded import Banded
from patternsearch.patterns.kronecker import Kronecker

ACTIVATIONS = {
    "sigmoid": torch.sigmoid,
    "silu": lambda z: z * torch.sigmoid(z),
    "tanh": torch.tanh,
    "relu": torch.relu,
}


def cells(grid):
    return list(itertools.product(*map(range, grid)))


def centre(row, case: Case):
    """The position a row stands on."""
    return tuple(r * n // m for r, n, m in zip(row, case.at.inp, case.at.out, strict=True))


def flat_index(cell, grid) -> int:
    index = 0
    for c, n in zip(cell, grid, strict=True):
        index = index * n + c
    return index


def feature(module: MixerModule, name: str, x: Tensor) -> Tensor:
    """A map as a matrix and a bias; x itself where there is none."""
    if name not in module.maps:
        return x
    layer = module.maps[name]
    y = x @ layer.pattern.to_dense(layer.cores(), layer.out, layer.inp).T
    return y if layer.bias is None else y + layer.bias


def by_heads(x: Tensor, case: Case) -> Tensor:
    """[B, *positions, d] -> [B, heads, n, d / heads]."""
    return x.flatten(1, -2).unflatten(-1, (case.mixer.heads, -1)).transpose(1, 2)


def joined(y: Tensor, case: Case) -> Tensor:
    return y.transpose(1, 2).flatten(2).unflatten(1, case.at.out)


def linear_product(module: MixerModule, case: Case, v: Tensor) -> Tensor:
    """A v with the matrix along positions written out."""
    matrix = module.matrix
    dense = matrix.pattern.to_dense(matrix.cores(), matrix.out, matrix.inp)
    if case.mixer.positions.entry is None:
        return joined(dense @ by_heads(v, case), case)
    y = (v.flatten(1) @ dense.T).unflatten(1, (*case.at.out, case.at.d_out))
    return y if matrix.bias is None else y + matrix.bias


def linear(module: MixerModule, case: Case, x: Tensor) -> Tensor:
    return feature(module, "output", linear_product(module, case, feature(module, "value", x)))


def on_rows(x: Tensor, case: Case) -> Tensor:
    rows = [x[(slice(None), *centre(row, case))] for row in cells(case.at.out)]
    return torch.stack(rows, 1).unflatten(1, case.at.out)


def gated(module: MixerModule, case: Case, x: Tensor) -> Tensor:
    gate = ACTIVATIONS[case.mixer.gate](feature(module, "gate", on_rows(x, case)))
    y = linear_product(module, case, feature(module, "value", x))
    return feature(module, "output", gate * y)


def recurrent(module: MixerModule, case: Case, x: Tensor) -> Tensor:
    value = feature(module, "value", x).flatten(1, -2)
    step = ACTIVATIONS[case.mixer.gate]
    if case.mixer.positions.entry is not None:
        own = case.mixer.positions.entry_cores("decay", module.matrix.cores())
        weight = case.mixer.positions.entry.to_dense(own, (case.at.d_out,), (case.at.d_out,))
        h, states = torch.zeros_like(value[:, 0]), []
        for v in value.unbind(1):
            h = step(h @ weight.T + module.matrix.bias + v)
            states.append(h)
        return torch.stack(states, 1).unflatten(1, case.at.out)
    a = torch.sigmoid(feature(module, "decay", x)).flatten(1, -2)
    n = a.shape[1]
    rows = []
    for r in cells(case.at.out):
        i = flat_index(centre(r, case), case.at.inp)
        y = torch.zeros_like(value[:, 0])
        for j in range(n if case.mixer.positions.two_sided else i + 1):
            between = a[:, j + 1 : i + 1] if j <= i else a[:, i:j]
            y = y + between.prod(1) * (1 - a[:, j] ** 2).sqrt() * value[:, j]
        rows.append(y)
    y = torch.stack(rows, 1).unflatten(1, case.at.out)
    if "gate" in module.maps:
        y = step(feature(module, "gate", on_rows(x, case))) * y
    return feature(module, "output", y)


def support(case: Case) -> Tensor:
    """[rows, positions], from the definition of a band an axis."""
    pattern, (out, inp) = case.mixer.positions, (case.at.out, case.at.inp)
    seen = torch.ones(math.prod(out), math.prod(inp), dtype=torch.bool)
    if not isinstance(pattern, Banded):
        return seen
    widths = zip(*pattern.window(inp), strict=True)
    for axis, (lower, upper, dilation) in enumerate(widths):
        for i, row in enumerate(cells(out)):
            for j, column in enumerate(cells(inp)):
                ahead, n = column[axis] - centre(row, case)[axis], inp[axis]
                turns = (-n, 0, n) if pattern.tie == "circulant" else (0,)
                steps = [k * dilation for k in range(-lower, upper + 1)]
                seen[i, j] &= any(ahead + turn in steps for turn in turns)
    return seen


def turned(x: Tensor, places: list[int]) -> Tensor:
    """Rotary encoding by complex numbers, [*, n, c]."""
    half = x.shape[-1] // 2
    speed = 10_000.0 ** (-torch.arange(half).double() / half)
    angle = torch.tensor(places)[:, None] * speed
    z = torch.complex(x[..., :half], x[..., half : 2 * half]) * torch.polar(
        torch.ones_like(angle), angle
    )
    return torch.cat([z.real, z.imag, x[..., 2 * half :]], -1)


def projections(module: MixerModule, case: Case, x: Tensor, key: str) -> tuple[Tensor, Tensor]:
    q = by_heads(feature(module, "query", on_rows(x, case)), case)
    k = by_heads(feature(module, key, x), case)
    if case.mixer.encoding == "rotary":
        q = turned(q, [flat_index(centre(r, case), case.at.inp) for r in cells(case.at.out)])
        k = turned(k, list(range(k.shape[-2])))
    return q, k


def attention(module: MixerModule, case: Case, x: Tensor) -> Tensor:
    q, k = projections(module, case, x, "key")
    v = by_heads(feature(module, "value", x), case)
    weights = (q @ k.mT / math.sqrt(q.shape[-1])).exp() * support(case)
    return feature(module, "output", joined(weights @ v / weights.sum(-1, keepdim=True), case))


def two_keys(module: MixerModule, case: Case, x: Tensor) -> Tensor:
    """The softmax over all pairs of positions on the support, as a tensor of third order."""
    q, k = projections(module, case, x, "key")
    _, k2 = projections(module, case, x, "key2")
    v, v2 = (by_heads(feature(module, name, x), case) for name in ("value", "value2"))
    first, second = q @ k.mT / math.sqrt(q.shape[-1]), q @ k2.mT / math.sqrt(q.shape[-1])
    seen = support(case)
    pairs = seen[:, :, None] & seen[:, None, :]
    logits = (first[..., :, None] + second[..., None, :]).masked_fill(~pairs, -math.inf)
    weights = logits.flatten(-2).softmax(-1).unflatten(-1, logits.shape[-2:])
    y = torch.einsum("bhisr,bhsc,bhrc->bhic", weights, v, v2)
    return feature(module, "output", joined(y, case))


def axial(module: MixerModule, case: Case, x: Tensor) -> Tensor:
    """Line after line; a mode already mixed has the rows that are left of it."""
    pattern = case.mixer.positions
    assert isinstance(pattern, Kronecker)
    outs, inps = pattern.factors(case.at.out, case.at.inp)
    q, k, y = (
        by_heads(feature(module, name, x), case).unflatten(2, inps)
        for name in ("query", "key", "value")
    )
    modes = range(len(outs)) if pattern.outer_first else reversed(range(len(outs)))
    left = list(inps)
    for m in modes:
        rows = [i * inps[m] // outs[m] for i in range(outs[m])]
        q = q.index_select(m + 2, torch.tensor(rows))
        others = [range(n) if axis != m else [slice(None)] for axis, n in enumerate(left)]
        left[m] = outs[m]
        mixed = torch.zeros(*y.shape[:2], *left, y.shape[-1], dtype=y.dtype)
        for line in itertools.product(*others):
            at = (slice(None), slice(None), *line)
            a, b = q[at], k[at]
            if case.mixer.encoding == "rotary":
                a, b = turned(a, rows), turned(b, list(range(inps[m])))
            mixed[at] = (a @ b.mT / math.sqrt(a.shape[-1])).softmax(-1) @ y[at]
        y, k = mixed, k.index_select(m + 2, torch.tensor(rows))
    return feature(module, "output", joined(y.flatten(2, -2), case))


def elu_plus_one(x: Tensor) -> Tensor:
    return torch.nn.functional.elu(x) + 1


def linear_attention(module: MixerModule, case: Case, x: Tensor) -> Tensor:
    """The matrix of every head entry by entry."""
    pattern, n = case.mixer.positions, math.prod(case.at.inp)
    q, k, v = (by_heads(feature(module, name, x), case) for name in ("query", "key", "value"))
    assert q.shape[-1] == pattern.state
    a = torch.ones_like(k)
    if "decay" in module.maps:
        a = torch.sigmoid(by_heads(feature(module, "decay", x), case))
    q, k = (elu_plus_one(q), elu_plus_one(k)) if pattern.normalise else (q, k)
    scale = 1 if pattern.normalise else 1 / math.sqrt(pattern.state)
    rows = []
    for r in cells(case.at.out):
        i = flat_index(centre(r, case), case.at.inp)
        row = []
        for j in range(n):
            between = a[:, :, j + 1 : i + 1] if j <= i else a[:, :, i:j]
            weight = scale * (q[:, :, i] * between.prod(2) * k[:, :, j]).sum(-1)
            row.append(weight if j <= i or pattern.two_sided else torch.zeros_like(weight))
        rows.append(torch.stack(row, -1))
    weights = torch.stack(rows, -2)
    if pattern.normalise:
        weights = weights / weights.sum(-1, keepdim=True)
    return feature(module, "output", joined(weights @ v, case))


def low_rank_attention(module: MixerModule, case: Case, x: Tensor) -> Tensor:
    q = elu_plus_one(by_heads(feature(module, "query", on_rows(x, case)), case))
    k = elu_plus_one(by_heads(feature(module, "key", x), case))
    v = by_heads(feature(module, "value", x), case)
    weights = q @ k.mT
    rank = case.mixer.positions.whole_rank(case.at.out, case.at.inp)
    assert torch.linalg.matrix_rank(weights).max() <= rank == q.shape[-1]
    return feature(module, "output", joined(weights / weights.sum(-1, keepdim=True) @ v, case))


def sum_of_parts(module: MixerModule, case: Case, x: Tensor) -> Tensor:
    y = torch.zeros(len(x), *case.at.out, case.at.d_out, dtype=x.dtype)
    for part, mixer in zip(module.parts, case.mixer.parts(), strict=True):
        y = y + ORACLES[type(part).__name__](part, replace(case, mixer=mixer), x)
    return y


ORACLES = {
    "LinearMixer": linear,
    "GatedMixer": gated,
    "RecurrentMixer": recurrent,
    "AttentionMixer": attention,
    "AxialMixer": axial,
    "LinearAttentionMixer": linear_attention,
    "LowRankAttentionMixer": low_rank_attention,
    "SumMixer": sum_of_parts,
    "TwoKeyMixer": two_keys,
}
