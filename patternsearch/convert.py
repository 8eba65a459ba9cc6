"""Layers of torch as patterns, and back: the same numbers, the same function.

`from_torch(layer, grid)` gives a module whose `.mixer` (`.pattern` for a linear layer) is what the
YAML holds; `to_torch(module)` gives the layer again. Modules keep channels last: where a
convolution maps [B, d, *grid], its module maps [B, *grid, d].

What the identities assume, and what is refused where an assumption does not hold:
- A convolution keeps every position, or every stride-th: the stride divides the length, and the
  padding makes up for the kernel, between (taps - 1) dilation + 1 - stride and (taps - 1) dilation
  in all. The padding before is a multiple of the dilation. No tap reaches past the whole grid,
  where it would only ever see padding. Padding is zeros or circular; padding of unequal sides is a
  layer before the convolution, as in `nn.Sequential(nn.ZeroPad1d((2, 0)), nn.Conv1d(...))`.
- A recurrent network has one layer and one direction, starts at zero, and returns all states.
- Attention is self-attention over one grid; which pairs of positions it sees is no part of torch's
  layer but of the pattern (`support`), and `module.support` gives torch's mask back.
- `nn.Bilinear`, of two inputs, is output(gate(x1) * value(x2)) with d1 min(d2, d_out) products
  between its maps, more than a gated mixer has: it is a module of its own (bilinear.py).
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .assignment import Mixer
from .bilinear import BilinearMap, from_bilinear, to_bilinear
from .errors import PatternError
from .layers import FeatureMap
from .mixer import MixerModule, build_mixer
from .mixers.attention import AttentionMixer
from .mixers.linear import LinearMixer
from .mixers.recurrence import RecurrentMixer
from .pattern import Dims, Pattern
from .patterns.banded import Banded
from .patterns.block_diagonal import BlockDiagonal
from .patterns.dense import Dense
from .patterns.diagonal import Diagonal
from .patterns.semiseparable import Semiseparable
from .sizes import Sizes

_CONVS: tuple[type[Any], ...] = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_ZEROS: tuple[type[Any], ...] = (nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d)
_CIRCLES: tuple[type[Any], ...] = (nn.CircularPad1d, nn.CircularPad2d, nn.CircularPad3d)
_KNOWN = (
    "Linear, Conv1d, Conv2d, Conv3d (or Sequential of a ZeroPad or CircularPad and one of them), "
    "RNN, MultiheadAttention, Bilinear"
)
Pads = tuple[tuple[int, int], ...]  # (before, after) an axis
Layer = TypeVar("Layer", bound=nn.Module)


def from_torch(
    layer: nn.Module, grid: Dims | None = None, *, support: Pattern | None = None
) -> MixerModule | FeatureMap | BilinearMap:
    """The module of patterns with the weights of `layer`, in its dtype and on its device.

    grid: the positions it stands on, (T,) or (H, W); a linear layer needs none. support: for
    attention, the pairs of positions it sees, by default all: `Banded(lower="full", upper=0)` is
    causal, `Banded(lower=8, upper=8)` a window.

    module(x) equals layer(x) for Linear, and module(x1, x2) layer(x1, x2) for Bilinear;
    layer(x.movedim(-1, 1)).movedim(1, -1) for convolutions; layer(x)[0] for RNN;
    layer(x, x, x, attn_mask=~module.support)[0] for MultiheadAttention, with no mask where
    `module.support` is None (the last two read the positions of a grid row by row, as one axis).
    Raises PatternError where there is no such pattern.
    """
    if isinstance(layer, nn.Linear):
        return _from_linear(layer)
    if isinstance(layer, nn.Bilinear):
        return from_bilinear(layer)
    pad, conv = _padded(layer)
    wanted = (*_CONVS, nn.RNN, nn.MultiheadAttention)
    if not isinstance(conv, wanted):
        raise PatternError(f"from_torch: {type(layer).__name__} has no pattern; known: {_KNOWN}")
    if grid is None:
        raise PatternError(
            f"from_torch: {type(conv).__name__} mixes positions; give its grid, such as (64,)"
        )
    if isinstance(conv, nn.RNN):
        return _from_rnn(conv, grid)
    if isinstance(conv, nn.MultiheadAttention):
        return _from_attention(conv, grid, support or Dense())
    return _from_conv(conv, pad, grid)


def to_torch(module: nn.Module) -> nn.Module:
    """The layer of torch that computes what `module` computes; see `from_torch` for the shapes.

    A map along features of any family gives Linear, with its dense matrix. Raises PatternError
    where torch has no such layer.
    """
    if isinstance(module, FeatureMap):
        return _to_linear(module)
    if isinstance(module, BilinearMap):
        return to_bilinear(module)
    if isinstance(module, LinearMixer):
        return _to_conv(module)
    if isinstance(module, RecurrentMixer):
        return _to_rnn(module)
    if type(module) is AttentionMixer:
        return _to_attention(module)
    raise PatternError(
        f"to_torch: torch has no layer for {type(module).__name__}; there are layers for linear "
        "maps, convolutions, tanh and ReLU recurrences and softmax attention"
    )


def _refuse(layer: str, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    for name, value in found.items():
        if value != wanted[name]:
            raise PatternError(f"{layer}: {name}={value!r} has no pattern; use {wanted[name]!r}")


def _like(module: Layer, weight: Tensor) -> Layer:
    return module.to(device=weight.device, dtype=weight.dtype)


def _put(parameter: Tensor | None, value: Tensor | None) -> None:
    assert (parameter is None) == (value is None)
    if parameter is not None and value is not None:
        parameter.data.copy_(value.detach())


def _matrix(layer: FeatureMap) -> Tensor:
    return layer.pattern.to_dense(layer.cores(), layer.out, layer.inp)


def _from_linear(layer: nn.Linear) -> FeatureMap:
    found = FeatureMap(Dense(), layer.in_features, layer.out_features, layer.bias is not None)
    found = _like(found, layer.weight)
    _put(found.numbers["weight"], layer.weight)
    _put(found.bias, layer.bias)
    return found


def _to_linear(module: FeatureMap) -> nn.Linear:
    weight = _matrix(module)
    if any(core.kind == "bias" for core in module.specs.values()):
        raise PatternError(
            f"to_torch: {module.pattern} has biases within; torch's Linear has one at its end"
        )
    layer = nn.Linear(weight.shape[1], weight.shape[0], module.bias is not None)
    _put(_like(layer, weight).weight, weight)
    _put(layer.bias, module.bias)
    return layer


def _padded(layer: nn.Module) -> tuple[nn.Module | None, nn.Module]:
    """A padding layer and the convolution after it, from a Sequential of both."""
    if not isinstance(layer, nn.Sequential):
        return None, layer
    if len(layer) == 2 and isinstance(layer[0], (*_ZEROS, *_CIRCLES)):
        return layer[0], layer[1]
    return None, layer


def _pads(pad: nn.Module | None, conv: Any) -> tuple[Pads, bool]:
    """(before, after) of every axis, and whether they go around."""
    axes = len(conv.kernel_size)
    within = conv.padding
    if within == "same":
        total = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
        sides = tuple((t // 2, t - t // 2) for t in total)
    else:
        sides = ((0, 0),) * axes if within == "valid" else tuple((p, p) for p in within)
    if conv.padding_mode not in ("zeros", "circular"):
        raise PatternError(
            f"{type(conv).__name__}: padding_mode={conv.padding_mode!r} has no pattern; use "
            "'zeros' or 'circular'"
        )
    if pad is None:
        return sides, conv.padding_mode == "circular"
    if any(map(any, sides)):
        raise PatternError(
            f"{type(conv).__name__}: padding={within!r} after {type(pad).__name__}; pad once"
        )
    flat: Any = pad.padding
    if len(flat) != 2 * axes:
        raise PatternError(f"{type(pad).__name__} pads {len(flat) // 2} axes, not {axes}")
    sides = tuple((flat[k], flat[k + 1]) for k in range(2 * axes - 2, -1, -2))  # last axis first
    return sides, isinstance(pad, _CIRCLES)


def _rows(conv: Any, sides: Pads, grid: Dims, circular: bool) -> Dims:
    """The positions a convolution leaves, where they are those of a band."""
    name, out = type(conv).__name__, []
    if len(grid) != len(conv.kernel_size):
        raise PatternError(f"{name}: grid={grid} has {len(grid)} axes; give the positions alone")
    for n, k, d, s, (before, after) in zip(
        grid, conv.kernel_size, conv.dilation, conv.stride, sides, strict=True
    ):
        if n % s:
            raise PatternError(f"{name}: stride={s} does not divide {n} positions; pad the input")
        reach = (k - 1) * d
        if before % d or not 0 <= before <= reach:
            raise PatternError(
                f"{name}: {before} positions before are no number of taps at dilation={d}; use a "
                f"multiple of {d} up to {reach}"
            )
        least = reach if circular else max(reach + 1 - s, before)
        if not least <= before + after <= reach:
            raise PatternError(
                f"{name}: padding=({before}, {after}) leaves other rows than every "
                f"{s} of {n}; use {least} to {reach} in all, such as ({before}, {reach - before})"
            )
        out.append(n // s)
    return tuple(out)


def _entry(conv: Any) -> Pattern:
    if conv.groups == 1:
        return Dense()
    if conv.groups == conv.in_channels == conv.out_channels:
        return Diagonal()
    return BlockDiagonal(blocks=conv.groups)


def _from_conv(conv: Any, pad: nn.Module | None, grid: Dims) -> MixerModule:
    sides, circular = _pads(pad, conv)
    out = _rows(conv, sides, grid, circular)
    lower = tuple(b // d for (b, _), d in zip(sides, conv.dilation, strict=True))
    band = Banded(
        lower=_join(lower),
        upper=_join(tuple(k - 1 - w for k, w in zip(conv.kernel_size, lower, strict=True))),
        dilation=_join(tuple(conv.dilation)),
        tie="circulant" if circular else "toeplitz",
        entry=_entry(conv),
    )
    at = Sizes(out=out, inp=grid, d_in=conv.in_channels, d_out=conv.out_channels)
    module = build_mixer(Mixer(positions=band, bias=conv.bias is not None), at)
    assert isinstance(module, LinearMixer)
    numbers = _like(module, conv.weight).matrix.numbers["taps_weight"]
    taps = conv.weight.detach().movedim((0, 1), (-2, -1))  # [*taps, d_out, d_in / groups]
    _put(numbers, taps.reshape(numbers.shape))
    _put(module.matrix.bias, conv.bias)
    return module


def _join(values: Dims) -> int | Dims:
    return values[0] if len(set(values)) == 1 else values


def _to_conv(module: LinearMixer) -> nn.Module:
    band, at = module.mixer.positions, module.at
    if not isinstance(band, Banded) or band.tie == "none" or module.mixer.maps:
        raise PatternError("to_torch: only a tied band without maps is a convolution")
    groups = {Dense: 1, Diagonal: at.d_in, BlockDiagonal: getattr(band.entry, "blocks", 0)}
    if (entry := type(band.entry)) not in groups:
        raise PatternError(
            f"to_torch: entries of {band.entry} are no convolution of torch; use dense, diagonal "
            "or block_diagonal"
        )
    if any(n % o for n, o in zip(at.inp, at.out, strict=True)):
        raise PatternError(f"to_torch: {at.out} rows of {at.inp} positions are no stride")
    lower, upper, dilation = band.window(at.inp)
    sides = [(a * d, b * d) for a, b, d in zip(lower, upper, dilation, strict=True)]
    even = all(a == b for a, b in sides)
    axes, bias = len(at.inp), module.matrix.bias
    weight = module.matrix.numbers["taps_weight"].detach()
    weight = weight.reshape(*weight.shape[:axes], at.d_out, -1).movedim((-2, -1), (0, 1))
    conv = _CONVS[axes - 1](
        at.d_in,
        at.d_out,
        weight.shape[2:],
        stride=tuple(n // o for n, o in zip(at.inp, at.out, strict=True)),
        padding=tuple(a for a, _ in sides) if even else 0,
        dilation=dilation,
        groups=groups[entry],
        bias=bias is not None,
        padding_mode="circular" if even and band.tie == "circulant" else "zeros",
    )
    _put(_like(conv, weight).weight, weight)
    _put(conv.bias, bias)
    layer: nn.Module = conv
    if not even:
        pad = (_CIRCLES if band.tie == "circulant" else _ZEROS)[axes - 1]
        layer = nn.Sequential(pad(tuple(p for side in reversed(sides) for p in side)), conv)
    return layer


def _from_rnn(layer: nn.RNN, grid: Dims) -> MixerModule:
    names = ("num_layers", "bidirectional", "batch_first", "dropout")
    wanted = dict(zip(names, (1, False, True, 0.0), strict=True))
    _refuse("RNN", {name: getattr(layer, name) for name in names}, wanted)
    mixer = Mixer(
        positions=Semiseparable(entry=Dense(), normalise=False),
        order=2,
        maps={"value": Dense()},
        gate=layer.nonlinearity,
        bias=layer.bias,
    )
    at = Sizes(out=grid, inp=grid, d_in=layer.input_size, d_out=layer.hidden_size)
    module = build_mixer(mixer, at)
    assert isinstance(module, RecurrentMixer)
    weights = dict(layer.named_parameters())
    value = _like(module, weights["weight_ih_l0"]).feature_map("value")
    _put(value.numbers["weight"], weights["weight_ih_l0"])
    _put(value.bias, weights.get("bias_ih_l0"))
    _put(module.matrix.numbers["decay_weight"], weights["weight_hh_l0"])
    _put(module.matrix.bias, weights.get("bias_hh_l0"))
    return module


def _to_rnn(module: RecurrentMixer) -> nn.RNN:
    mixer, at = module.mixer, module.at
    if mixer.positions.entry is None or mixer.gate not in ("tanh", "relu"):
        raise PatternError(
            "to_torch: torch's RNN has a pattern as entry and gate 'tanh' or 'relu', not "
            f"{mixer.positions} and {mixer.gate!r}"
        )
    if set(mixer.maps) != {"value"} or at.out != at.inp:
        raise PatternError("to_torch: torch's RNN has a map 'value' alone and keeps every position")
    value = module.feature_map("value")
    entry, d = mixer.positions.entry, (at.d_out,)
    weight = entry.to_dense(mixer.positions.entry_cores("decay", module.matrix.cores()), d, d)
    layer = nn.RNN(at.d_in, at.d_out, nonlinearity=mixer.gate, bias=mixer.bias, batch_first=True)
    weights = dict(_like(layer, weight).named_parameters())
    _put(weights["weight_ih_l0"], _to_linear(value).weight)
    _put(weights.get("bias_ih_l0"), value.bias)
    _put(weights["weight_hh_l0"], weight)
    _put(weights.get("bias_hh_l0"), module.matrix.bias)
    return layer


def _from_attention(layer: nn.MultiheadAttention, grid: Dims, support: Pattern) -> MixerModule:
    d = layer.embed_dim
    found = {name: getattr(layer, name) for name in ("batch_first", "dropout", "add_zero_attn")}
    found |= {"kdim": layer.kdim, "vdim": layer.vdim, "add_bias_kv": layer.bias_k is not None}
    wanted = dict.fromkeys(found, False) | {"batch_first": True, "kdim": d, "vdim": d}
    _refuse("MultiheadAttention", found, wanted)
    biased = layer.in_proj_bias is not None
    maps = {name: Dense() for name in ("query", "key", "value", "output")}
    mixer = Mixer(positions=support, order=3, heads=layer.num_heads, maps=maps, bias=biased)
    if reason := support.unavailable(grid, grid):
        raise PatternError(f"from_torch: support: {reason}")
    module = build_mixer(mixer, Sizes(out=grid, inp=grid, d_in=d, d_out=d))
    weight = layer.in_proj_weight
    weights = [*weight.chunk(3), layer.out_proj.weight]
    biases = [*layer.in_proj_bias.chunk(3), layer.out_proj.bias] if biased else [None] * 4
    _like(module, weight)
    for name, w, b in zip(maps, weights, biases, strict=True):
        _put(module.feature_map(name).numbers["weight"], w)
        _put(module.feature_map(name).bias, b)
    return module


def _to_attention(module: AttentionMixer) -> nn.MultiheadAttention:
    mixer, at = module.mixer, module.at
    if mixer.encoding != "none" or "output" not in mixer.maps:
        raise PatternError(
            f"to_torch: torch's attention has a map 'output' and no encoding, not "
            f"{sorted(mixer.maps)} and {mixer.encoding!r}"
        )
    if at.out != at.inp or at.d_in != at.d_out:
        raise PatternError(
            f"to_torch: torch's attention keeps positions and channels, not {at.inp} x {at.d_in} "
            f"to {at.out} x {at.d_out}"
        )
    maps = [_to_linear(module.feature_map(name)) for name in ("query", "key", "value", "output")]
    layer = nn.MultiheadAttention(at.d_out, mixer.heads, bias=mixer.bias, batch_first=True)
    _like(layer, maps[0].weight)
    _put(layer.in_proj_weight, torch.cat([m.weight for m in maps[:3]]))
    _put(layer.out_proj.weight, maps[3].weight)
    if mixer.bias:
        _put(layer.in_proj_bias, torch.cat([m.bias for m in maps[:3]]))
        _put(layer.out_proj.bias, maps[3].bias)
    return layer
