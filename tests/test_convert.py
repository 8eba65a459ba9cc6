"""from_torch and to_torch: values and gradients equal in float64, both ways, at random shapes."""

import copy

import pytest
import torch
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn

import patternsearch
from patternsearch import from_torch, ops, to_torch
from patternsearch.assignment import Mixer
from patternsearch.bilinear import BilinearMap
from patternsearch.codec import decode, encode
from patternsearch.errors import PatternError
from patternsearch.layers import FeatureMap
from patternsearch.mixer import build_mixer
from patternsearch.patterns.banded import Banded
from patternsearch.patterns.block_diagonal import BlockDiagonal
from patternsearch.patterns.dense import Dense
from patternsearch.patterns.kronecker import Kronecker
from patternsearch.patterns.low_rank import LowRank
from patternsearch.patterns.monarch import Monarch
from patternsearch.patterns.semiseparable import Semiseparable
from patternsearch.sizes import Sizes

CONVS = [nn.Conv1d, nn.Conv2d, nn.Conv3d]
ZEROS = [nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d]
CIRCLES = [nn.CircularPad1d, nn.CircularPad2d, nn.CircularPad3d]
CAUSAL = Banded(lower="full", upper=0)
few = settings(max_examples=60, deadline=None, derandomize=True)
whole = st.integers


def same(a, b) -> None:
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)


def as_image(layer):
    return lambda x: layer(x.movedim(-1, 1)).movedim(1, -1)


def backward(module, call, x):
    """The output, and the gradient to the input; those to the parameters lie at them."""
    module.zero_grad()
    x = x.clone().requires_grad_()
    y = call(x)
    weight = torch.linspace(0.5, 2, y.numel(), dtype=y.dtype).reshape(y.shape)
    (y * y * weight).sum().backward()
    return y.detach(), x.grad


def of_gradients(module):
    """The layer whose parameters are the gradients of the module's."""
    held = copy.deepcopy(module)
    for mine, theirs in zip(held.parameters(), module.parameters(), strict=True):
        mine.data = theirs.grad.clone()
    return to_torch(held)


def check(layer, module, call, channels: int) -> None:
    """The module does what the layer does, and so does the layer made of the module."""
    x = torch.randn(2, *module.at.inp, channels, dtype=torch.float64)
    y, to_x = backward(module, module, x)
    wanted, wanted_to_x = backward(layer, call(layer), x)
    same(y, wanted)
    same(to_x, wanted_to_x)
    grads = list(of_gradients(module).parameters())
    for mine, theirs in zip(grads, layer.parameters(), strict=True):
        same(mine, theirs.grad.reshape(mine.shape))
    again = to_torch(module)
    same(call(again)(x), wanted)
    for mine, theirs in zip(again.parameters(), layer.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    data = yaml.safe_load(yaml.safe_dump(encode(module.mixer)))
    assert decode(Mixer, data, "mixer") == module.mixer
    rebuilt = build_mixer(module.mixer, module.at).double()
    rebuilt.load_state_dict(module.state_dict())
    same(rebuilt(x), wanted)


@st.composite
def convolutions(draw, axes: int):
    """A convolution with every row or every stride-th, padded before it or by itself."""
    groups = draw(st.sampled_from([1, 1, 2, 3, "depthwise"]))
    if groups == "depthwise":
        d_in = d_out = groups = draw(whole(1, 4))
    else:
        d_in, d_out = groups * draw(whole(1, 3)), groups * draw(whole(1, 3))
    sides, sizes = [], []
    around = draw(st.booleans())
    for _ in range(axes):
        dilation, stride = draw(whole(1, 2)), draw(whole(1, 3))
        lower, upper = draw(whole(0, 2)), draw(whole(0, 2))
        least = (lower + upper if around else max(lower, upper)) * dilation + 1
        length = stride * -(-draw(whole(least, 7)) // stride) if least <= 7 else stride * least
        less = 0 if around else draw(whole(0, min(stride - 1, upper * dilation)))
        sides.append((lower * dilation, upper * dilation - less))
        sizes.append((length, lower + upper + 1, dilation, stride))
    grid, taps, dilation, stride = zip(*sizes, strict=True)
    even = all(a == b for a, b in sides)
    conv = CONVS[axes - 1](
        d_in,
        d_out,
        taps,
        stride=stride,
        dilation=dilation,
        groups=groups,
        bias=draw(st.booleans()),
        padding=tuple(a for a, _ in sides) if even else 0,
        padding_mode="circular" if even and around else "zeros",
    ).double()
    if even:
        return conv, grid
    pad = (CIRCLES if around else ZEROS)[axes - 1]
    return nn.Sequential(pad([p for side in reversed(sides) for p in side]), conv), grid


@pytest.mark.parametrize("axes", [1, 2])
def test_convolutions(axes):
    @few
    @given(convolutions(axes))
    def run(case):
        layer, grid = case
        torch.manual_seed(0)
        conv = layer[1] if isinstance(layer, nn.Sequential) else layer
        check(layer, from_torch(layer, grid), as_image, conv.in_channels)

    run()


@settings(max_examples=15, deadline=None, derandomize=True)
@given(convolutions(3))
def test_convolutions_on_three_axes(case):
    layer, grid = case
    conv = layer[1] if isinstance(layer, nn.Sequential) else layer
    check(layer, from_torch(layer, grid), as_image, conv.in_channels)


def test_padding_same_is_the_band_around_each_position():
    layer = nn.Conv2d(3, 4, (3, 5), padding="same", dilation=(2, 1)).double()
    module = from_torch(layer, (6, 5))
    assert module.mixer.positions == Banded(
        lower=(1, 2), upper=(1, 2), dilation=(2, 1), entry=Dense()
    )
    x = torch.randn(2, 6, 5, 3, dtype=torch.float64)
    same(module(x), as_image(layer)(x))


def test_a_causal_convolution_is_a_lower_band():
    layer = nn.Sequential(nn.ConstantPad1d((2, 0), 0.0), nn.Conv1d(3, 3, 3))
    with pytest.raises(PatternError, match="Sequential has no pattern"):
        from_torch(layer, (8,))
    layer[0] = nn.ZeroPad1d((2, 0))
    assert from_torch(layer, (8,)).mixer.positions == Banded(lower=2, upper=0, entry=Dense())


@few
@given(
    st.booleans(),
    st.sampled_from(["tanh", "relu"]),
    st.tuples(whole(1, 6), whole(1, 5), whole(1, 5)),
)
def test_recurrent_networks(bias, nonlinearity, sizes):
    n, d_in, d_out = sizes
    torch.manual_seed(n)
    layer = nn.RNN(d_in, d_out, nonlinearity=nonlinearity, bias=bias, batch_first=True).double()
    check(layer, from_torch(layer, (n,)), lambda rnn: lambda x: rnn(x)[0], d_in)


@st.composite
def supports(draw):
    n = draw(whole(1, 7))
    lower, upper = draw(whole(0, n - 1)), draw(whole(0, n - 1))
    window = Banded(lower=lower, upper=upper)
    around = Banded(lower=lower, upper=min(upper, n - 1 - lower), tie="circulant")
    return n, draw(st.sampled_from([Dense(), CAUSAL, window, around]))


@few
@given(st.booleans(), supports(), whole(1, 3), whole(1, 3))
@example(True, (12, Banded(lower=2, upper=1, tie="circulant")), 2, 3)
def test_attention(bias, where, heads, channels):
    n, support = where
    torch.manual_seed(n)
    layer = nn.MultiheadAttention(heads * channels, heads, bias=bias, batch_first=True).double()
    for parameter in layer.parameters():
        parameter.data.normal_()
    module = from_torch(layer, (n,), support=support)
    mask = None if module.support is None else ~module.support

    def attend(attention):
        return lambda x: attention(x, x, x, attn_mask=mask, need_weights=False)[0]

    check(layer, module, attend, heads * channels)


def test_a_causal_support_is_torchs_causal_mask():
    layer = nn.MultiheadAttention(4, 2, batch_first=True).double()
    module = from_torch(layer, (5,), support=CAUSAL)
    hidden = nn.Transformer.generate_square_subsequent_mask(5, dtype=torch.float64)
    assert torch.equal(~module.support, hidden == -torch.inf)


def test_attention_by_kernel_and_by_reference():
    layer = nn.MultiheadAttention(6, 2, batch_first=True).double()
    module, x = from_torch(layer, (9,), support=CAUSAL), torch.randn(2, 9, 6).double()
    with ops.implementation("reference"):
        wanted = module(x)
    with ops.implementation("kernel"):
        same(module(x), wanted)


@few
@given(st.booleans(), whole(1, 9), whole(1, 9))
def test_linear(bias, d_in, d_out):
    torch.manual_seed(d_in)
    layer = nn.Linear(d_in, d_out, bias=bias).double()
    module, x = from_torch(layer), torch.randn(2, 3, d_in, dtype=torch.float64)
    assert module.pattern == Dense()
    y, to_x = backward(module, module, x)
    wanted, wanted_to_x = backward(layer, layer, x)
    same(y, wanted)
    same(to_x, wanted_to_x)
    for mine, theirs in zip(of_gradients(module).parameters(), layer.parameters(), strict=True):
        same(mine, theirs.grad)
    for mine, theirs in zip(to_torch(module).parameters(), layer.parameters(), strict=True):
        assert torch.equal(mine, theirs)


@few
@given(st.booleans(), whole(1, 5), whole(1, 5), whole(1, 7))
def test_bilinear(bias, d1, d2, d_out):
    torch.manual_seed(d1)
    layer = nn.Bilinear(d1, d2, d_out, bias=bias).double()
    module = from_torch(layer)
    results = []
    for f in (layer, module):
        torch.manual_seed(0)
        inputs = [torch.randn(2, 3, d, dtype=torch.float64, requires_grad=True) for d in (d1, d2)]
        y = f(*inputs)
        (y * torch.linspace(0.5, 2, y.numel(), dtype=y.dtype).reshape(y.shape)).sum().backward()
        results.append((y, *(x.grad for x in inputs)))
    for mine, theirs in zip(*results, strict=True):
        same(mine, theirs)
    held = module.value if d_out <= d2 else module.output
    same(held.numbers["weight"].grad, layer.weight.grad.reshape(held.numbers["weight"].shape))
    for mine, theirs in zip(to_torch(module).parameters(), layer.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_bilinear_with_patterns_of_any_family():
    maps = {"gate": LowRank(rank=2), "value": Monarch(blocks=2), "output": BlockDiagonal(blocks=2)}
    module = BilinearMap((4, 6, 2), 8, maps).double()
    x1, x2 = torch.randn(5, 4, dtype=torch.float64), torch.randn(5, 6, dtype=torch.float64)
    same(to_torch(module)(x1, x2), module(x1, x2))


@pytest.mark.parametrize("pattern", [Kronecker(), Monarch(), LowRank(), BlockDiagonal()], ids=str)
def test_every_map_along_features_is_a_linear_layer(pattern):
    module = FeatureMap(pattern, 16, 8).double()
    module.bias.data.normal_()
    x = torch.randn(5, 16, dtype=torch.float64)
    same(to_torch(module)(x), module(x))


def conv(**settings):
    return nn.Conv1d(2, 2, 3, **settings)


REFUSED = [
    (nn.LSTM(2, 2), "LSTM has no pattern; known: Linear"),
    (conv(), "padding=(0, 0) leaves other rows than every 1 of 8; use 2 to 2 in all"),
    (conv(padding=1, stride=3), "stride=3 does not divide 8"),
    (conv(padding=1, dilation=2), "no number of taps at dilation=2"),
    (conv(padding=3), "use a multiple of 1 up to 2"),
    (conv(padding=1, padding_mode="reflect"), "use 'zeros' or 'circular'"),
    (nn.Conv1d(1, 1, 19, padding=9), "reaches past a grid of 8"),
    (nn.Conv2d(1, 1, 3, padding=1), "grid=(8,) has 1 axes"),
    (nn.Sequential(nn.ZeroPad1d(1), conv(padding=1)), "pad once"),
    (nn.Sequential(nn.ZeroPad2d(1), conv()), "pads 2 axes, not 1"),
    (nn.RNN(2, 2, num_layers=2, batch_first=True), "num_layers=2"),
    (nn.RNN(2, 2), "batch_first=False has no pattern; use True"),
    (nn.RNN(2, 2, bidirectional=True, batch_first=True), "bidirectional=True"),
    (nn.MultiheadAttention(2, 1), "batch_first=False has no pattern; use True"),
    (nn.MultiheadAttention(2, 1, batch_first=True, dropout=0.5), "dropout=0.5"),
    (nn.MultiheadAttention(2, 1, batch_first=True, kdim=3, vdim=2), "kdim=3"),
    (nn.MultiheadAttention(2, 1, batch_first=True, add_bias_kv=True), "add_bias_kv=True"),
]


@pytest.mark.parametrize(("layer", "words"), REFUSED, ids=[words for _, words in REFUSED])
def test_what_has_no_pattern_is_refused(layer, words):
    with pytest.raises(PatternError) as e:
        from_torch(layer, (8,))
    assert words in str(e.value)


def test_positions_are_asked_for():
    with pytest.raises(PatternError, match="Conv1d mixes positions; give its grid"):
        from_torch(conv(padding=1))


QKV = {name: Dense() for name in ("query", "key", "value")}
NO_LAYER = [
    (Mixer(positions=Banded(tie="none", entry=Dense())), "only a tied band"),
    (Mixer(positions=Banded(entry=LowRank(rank=1))), "are no convolution of torch"),
    (Mixer(positions=Banded(), maps={"value": Dense()}), "only a tied band"),
    (Mixer(positions=Semiseparable(), order=2, maps={"decay": Dense()}), "a pattern as entry"),
    (
        Mixer(positions=Semiseparable(entry=Dense()), order=2, maps={"value": Dense()}),
        "gate 'tanh' or 'relu'",
    ),
    (Mixer(positions=Dense(), order=3, maps=QKV), "a map 'output'"),
    (Mixer(positions=LowRank(), order=3, maps=QKV), "no layer for LowRankAttentionMixer"),
]


@pytest.mark.parametrize(("mixer", "words"), NO_LAYER, ids=[words for _, words in NO_LAYER])
def test_what_has_no_layer_is_refused(mixer, words):
    module = build_mixer(mixer, Sizes(out=(6,), inp=(6,), d_in=4, d_out=4))
    with pytest.raises(PatternError) as e:
        to_torch(module)
    assert words in str(e.value)


def test_structured_maps_go_to_the_layers_of_torch():
    maps = QKV | {"output": Monarch(blocks=2), "query": LowRank(rank=2)}
    at = Sizes(out=(5,), inp=(5,), d_in=4, d_out=4)
    module = build_mixer(Mixer(positions=Dense(), order=3, heads=2, maps=maps), at).double()
    x = torch.randn(2, 5, 4, dtype=torch.float64)
    same(to_torch(module)(x, x, x)[0], module(x))
    maps = {"value": Kronecker()}
    mixer = Mixer(positions=Semiseparable(entry=Monarch(blocks=2)), order=2, maps=maps, gate="tanh")
    module = build_mixer(mixer, at).double()
    same(to_torch(module)(x)[0], module(x))


def test_exported():
    assert {"from_torch", "to_torch", "from_dense"} <= set(patternsearch.__all__)
    weight = torch.randn(6, 4, dtype=torch.float64)
    found = patternsearch.from_dense(LowRank(rank=4), weight)
    assert found.error < 1e-12
