"""The types hold what they must: layers as assignments, exact against torch, plain in YAML."""

import math

import pytest
import torch
import yaml
from torch import nn
from torch.nn import functional as F

from patternsearch import Assignment, Block, Head, Mixer, Spec, Stem, build, build_model
from patternsearch.describe import outputs, short
from patternsearch.errors import PatternError
from patternsearch.export import Export, save, save_weights
from patternsearch.measure import latency, training_memory
from patternsearch.mixer import build_mixer
from patternsearch.patterns.average import Average
from patternsearch.patterns.banded import Banded
from patternsearch.patterns.block_diagonal import BlockDiagonal
from patternsearch.patterns.dense import Dense
from patternsearch.patterns.kronecker import Kronecker
from patternsearch.patterns.monarch import Monarch
from patternsearch.patterns.semiseparable import Semiseparable
from patternsearch.sizes import Sizes, model_cost, verify
from patternsearch.train import TrainSettings

PLAIN = {"norm": "none", "residual": False, "activation": "none"}
CLASSES = 3


def check(assignment: Assignment, spec: Spec, layers, forward, mode: str = "train") -> None:
    """Through YAML and back, and the same outputs and gradients as `forward` with `layers`.

    layers: torch modules, each with a function that gives its parameters' values from those of the
    model; gradients are carried over by the same (linear) function.
    """
    text = yaml.safe_dump(assignment.to_dict())
    assert Assignment.from_dict(yaml.safe_load(text)) == assignment
    assert hash(Assignment.from_dict(yaml.safe_load(text))) == hash(assignment)
    verify(assignment, spec)
    torch.manual_seed(0)
    model = build_model(assignment, spec).double().train(mode == "train")
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    ours = dict(model.named_parameters())
    assert model_cost(model.assignment, spec).parameters == sum(p.numel() for p in ours.values())
    for layer, values in layers:
        layer.double()
        for name, value in values(lambda n: ours[n].detach()).items():
            layer.get_parameter(name).data.copy_(value)
    x = torch.randn(4, *spec.grid, spec.channels, dtype=torch.float64, requires_grad=True)
    twin = x.detach().clone().requires_grad_()
    y, expected = model(x), forward(twin, ours)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    weight = torch.randn_like(y)
    (y * weight).sum().backward()
    mine = {n: p.grad.clone() for n, p in ours.items()}
    for p in ours.values():
        p.grad = None
    (expected * weight).sum().backward()
    torch.testing.assert_close(x.grad, twin.grad, rtol=1e-10, atol=1e-12)
    for layer, values in layers:
        for name, value in values(lambda n: mine[n]).items():
            found = layer.get_parameter(name).grad
            torch.testing.assert_close(found, value.reshape(found.shape), rtol=1e-10, atol=1e-12)


def linear(name: str):
    """torch's Linear has our numbers as they are."""
    return lambda of: {"weight": of(f"{name}.numbers.weight"), "bias": of(f"{name}.bias")}


@pytest.mark.parametrize("lower, upper, dilation", [(1, 1, 1), (2, 2, 1), (1, 1, 2)])
def test_conv2d_with_stride(lower, upper, dilation):
    band = Banded(lower=lower, upper=upper, dilation=dilation, entry=Dense())
    assignment = Assignment(
        width=6, stem=Stem(mixer=Mixer(positions=band), stride=2), head=Head(regions=2)
    )
    conv = nn.Conv2d(5, 6, lower + upper + 1, stride=2, padding=lower * dilation, dilation=dilation)
    head = nn.Linear(4 * 6, CLASSES)

    def values(of):
        taps = of("stem.mixer.matrix.numbers.taps_weight")
        return {"weight": taps.movedim((-2, -1), (0, 1)), "bias": of("stem.mixer.matrix.bias")}

    def forward(x, _):
        pooled = F.adaptive_avg_pool2d(conv(x.movedim(-1, 1)), 2)
        return head(pooled.movedim(1, -1).flatten(1))

    spec = Spec(grid=(8, 12), channels=5, classes=CLASSES)
    check(assignment, spec, [(conv, values), (head, linear("head"))], forward)


def pyramid() -> Assignment:
    """A residual CNN whose channels double where its grid halves."""
    conv = Mixer(positions=Banded(lower=1, upper=1, entry=Dense()))
    block = Block(mixer=conv, norm="batch", activation="relu", stride=2, pool="max", widen=2)
    return Assignment(
        width=4,
        stem=Stem(mixer=conv, activation="relu"),
        blocks=(block,),
        head=Head(regions=2, norm="batch", pool="max"),
    )


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_residual_cnn_that_widens(mode):
    """Batch norms, zeros for new channels on the skip, the largest values of four regions."""
    spec = Spec(grid=(10, 6), channels=3, classes=CLASSES)
    convs, head = [nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 8, 3, padding=1)], nn.Linear(32, 3)
    norms = [nn.BatchNorm2d(4), nn.BatchNorm2d(8)]

    def values(name):
        return lambda of: {
            "weight": of(f"{name}.matrix.numbers.taps_weight").movedim((-2, -1), (0, 1)),
            "bias": of(f"{name}.matrix.bias"),
        }

    def norm(name):
        return lambda of: {key: of(f"{name}.{key}") for key in ("weight", "bias")}

    def forward(x, _):
        h = convs[0](x.movedim(-1, 1)).relu()
        h = F.max_pool2d(convs[1](norms[0](h)) + F.pad(h, (0, 0, 0, 0, 0, 4)), 2, ceil_mode=True)
        return head(F.adaptive_max_pool2d(norms[1](h), 2).movedim(1, -1).flatten(1))

    for module in norms:
        module.train(mode == "train")
    layers = [(convs[0], values("stem.mixer")), (convs[1], values("blocks.0.mixer"))]
    layers += [(norms[0], norm("blocks.0.mixer_norm")), (norms[1], norm("norm"))]
    check(pyramid(), spec, [*layers, (head, linear("head"))], forward, mode)
    assert short(pyramid()) == "w4 | conv 3 | conv 3 w8 /2max | max 2"


@pytest.mark.parametrize(
    ("block", "head", "spec", "said"),
    [
        ({"widen": 2}, {}, {}, "block0: widen=2 needs a mixer"),
        ({"widen": 0}, {}, {}, "widen=0 must be at least 1"),
        ({"norm": "batch"}, {}, {"causal": True, "per_position": True}, "a causal task needs"),
        ({}, {"norm": "batch"}, {"causal": True, "per_position": True}, "a causal task needs"),
        ({}, {"pool": "max"}, {"horizon": 2}, "pool='max' is for one label an example"),
    ],
    ids=str,
)
def test_what_a_task_excludes(block, head, spec, said):
    assignment = Assignment(
        width=4, blocks=(Block(channel=(Dense(),), **block),), head=Head(**head)
    )
    with pytest.raises(PatternError, match=said):
        verify(assignment, Spec(grid=(6,), channels=2, classes=CLASSES, **spec))


def test_a_model_of_batch_norms_is_measured_and_kept_as_it_is(tmp_path):
    spec = Spec(grid=(8, 8), channels=1, classes=CLASSES)
    model = build_model(pyramid(), spec)
    x = torch.randn(16, 8, 8, 1)
    model(x)  # a first step of the running statistics
    before = {name: t.clone() for name, t in model.state_dict().items()}
    assert any("running_var" in name for name in before)
    training_memory(model, lambda: model(x).sum())
    latency(model, x)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    save_weights(model, tmp_path / "cnn.safetensors")
    export = Export(schema=1, task="own", spec=spec, assignment=pyramid(), train=TrainSettings())
    save(export, tmp_path / "cnn.yaml")
    again = build(tmp_path / "cnn.yaml")
    assert not again.training and torch.equal(again(x), model.eval()(x))


def test_grouped_conv1d():
    band = Banded(lower=2, upper=2, entry=BlockDiagonal(blocks=3))
    block = Block(mixer=Mixer(positions=band), **PLAIN)
    assignment = Assignment(width=6, blocks=(block,))
    first, conv = nn.Linear(2, 6), nn.Conv1d(6, 6, 5, padding=2, groups=3)
    head = nn.Linear(6, CLASSES)

    def values(of):
        taps = of("blocks.0.mixer.matrix.numbers.taps_weight")  # [5, groups, out, in]
        weight = taps.flatten(1, 2).permute(1, 2, 0)
        return {"weight": weight, "bias": of("blocks.0.mixer.matrix.bias")}

    def forward(x, _):
        return head(conv(first(x).movedim(-1, 1)).mean(-1))

    spec = Spec(grid=(11,), channels=2, classes=CLASSES)
    layers = [(first, linear("stem.mixer")), (conv, values), (head, linear("head"))]
    check(assignment, spec, layers, forward)


def test_tanh_rnn():
    mixer = Mixer(
        positions=Semiseparable(entry=Dense(), normalise=False),
        order=2,
        gate="tanh",
        maps={"value": Dense()},
    )
    assignment = Assignment(width=5, blocks=(Block(mixer=mixer, **PLAIN),))
    first, rnn, head = nn.Linear(2, 5), nn.RNN(5, 5, batch_first=True), nn.Linear(5, CLASSES)

    def values(of):
        at = "blocks.0.mixer"
        return {
            "weight_ih_l0": of(f"{at}.maps.value.numbers.weight"),
            "bias_ih_l0": of(f"{at}.maps.value.bias"),
            "weight_hh_l0": of(f"{at}.matrix.numbers.decay_weight"),
            "bias_hh_l0": of(f"{at}.matrix.bias"),
        }

    spec = Spec(grid=(7,), channels=2, classes=CLASSES, per_position=True, causal=True)
    layers = [(first, linear("stem.mixer")), (rnn, values), (head, linear("head"))]
    check(assignment, spec, layers, lambda x, _: head(rnn(first(x))[0]))


@pytest.mark.parametrize("lower, upper", [(2, 1), (3, 0), ("full", 0), ("full", "full")])
def test_windowed_multi_head_attention(lower, upper):
    names = ("query", "key", "value", "output")
    mixer = Mixer(
        positions=Banded(lower=lower, upper=upper),
        order=3,
        heads=2,
        maps={name: Dense() for name in names},
    )
    assignment = Assignment(width=6, blocks=(Block(mixer=mixer, **PLAIN),))
    first, mha = nn.Linear(2, 6), nn.MultiheadAttention(6, 2, batch_first=True)
    head = nn.Linear(6, CLASSES)

    def values(of):
        at = "blocks.0.mixer.maps"
        return {
            "in_proj_weight": torch.cat([of(f"{at}.{n}.numbers.weight") for n in names[:3]]),
            "in_proj_bias": torch.cat([of(f"{at}.{n}.bias") for n in names[:3]]),
            "out_proj.weight": of(f"{at}.output.numbers.weight"),
            "out_proj.bias": of(f"{at}.output.bias"),
        }

    def forward(x, _):
        h, i = first(x), torch.arange(9)
        ahead = i[None, :] - i[:, None]
        hidden = torch.zeros(9, 9, dtype=torch.bool)
        hidden |= ahead < -(9 if lower == "full" else lower)
        hidden |= ahead > (9 if upper == "full" else upper)
        return head(mha(h, h, h, attn_mask=hidden)[0])

    causal = upper == 0
    spec = Spec(grid=(9,), channels=2, classes=CLASSES, per_position=True, causal=causal)
    layers = [(first, linear("stem.mixer")), (mha, values), (head, linear("head"))]
    check(assignment, spec, layers, forward)


def test_rectangular_monarch_layer():
    """12 -> 18 in 6 blocks, written out: block-diagonal, transpose, block-diagonal."""
    assignment = Assignment(width=12, head=Head(map=Monarch(blocks=6)))
    first = nn.Linear(2, 12)

    def forward(x, ours):
        left, right = ours["head.numbers.left"], ours["head.numbers.right"]
        h = first(x).mean(1)
        middle = torch.block_diag(*left) @ h.T  # block k holds 2 inputs and makes 6 numbers
        shuffled = middle.reshape(6, 6, -1).transpose(0, 1).reshape(36, -1)
        out = torch.block_diag(*right) @ shuffled  # block r holds the r-th number of every block
        ordered = out.reshape(6, 3, -1).transpose(0, 1).reshape(18, -1)
        return ordered.T + ours["head.bias"]

    spec = Spec(grid=(4,), channels=2, classes=18)
    check(assignment, spec, [(first, linear("stem.mixer"))], forward)


@pytest.mark.parametrize("outer_first", [True, False])
def test_ndlinear(outer_first):
    """A torch Linear a mode, each on its own axis, biases included (arXiv 2503.17353)."""
    inps, outs = (2, 3, 2), (3, 1, 4)
    nd = Kronecker(in_modes=inps, out_modes=outs, bias=True, outer_first=outer_first, modes=3)
    assignment = Assignment(width=12, head=Head(map=nd))
    first = nn.Linear(2, 12)
    modes = [nn.Linear(i, o) for i, o in zip(inps, outs, strict=True)]

    def values(k):
        return lambda of: {
            "weight": of(f"head.numbers.factor{k}"),
            "bias": of(f"head.numbers.bias{k}"),
        }

    def forward(x, ours):
        h = first(x).mean(1).unflatten(-1, inps)
        for k in range(3) if outer_first else reversed(range(3)):
            h = modes[k](h.movedim(k + 1, -1)).movedim(-1, k + 1)
        return h.flatten(1) + ours["head.bias"]

    spec = Spec(grid=(4,), channels=2, classes=12)
    layers = [(first, linear("stem.mixer"))] + [(m, values(k)) for k, m in enumerate(modes)]
    check(assignment, spec, layers, forward)


def test_one_mixer_at_three_lengths():
    """Sizes are no fields: the same mixer, with the same numbers, at 5, 8 and 13 positions."""
    mixer = Mixer(positions=Banded(lower=2, upper=1, entry=Dense()))
    conv = nn.Conv1d(4, 4, 4).double()
    state = None
    for n in (5, 8, 13):
        torch.manual_seed(n)
        module = build_mixer(mixer, Sizes(out=(n,), inp=(n,), d_in=4, d_out=4)).double()
        if state is None:
            state = module.state_dict()
            conv.weight.data = state["matrix.numbers.taps_weight"].permute(1, 2, 0)
            conv.bias.data = state["matrix.bias"].normal_()
        module.load_state_dict(state)
        x = torch.randn(2, n, 4, dtype=torch.float64)
        expected = conv(F.pad(x.movedim(-1, 1), (2, 1))).movedim(1, -1)
        torch.testing.assert_close(module(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "pattern",
    [
        Banded(lower=(2, 1), upper="full", dilation=(1, 2), tie="none"),
        Banded(lower=1, upper=1, entry=BlockDiagonal(blocks=3)),
        Semiseparable(tie="none", two_sided=True),
        Kronecker(in_modes=(2, 3), out_modes=(3, 2), bias=True),
        Monarch(blocks=6),
        Average(),
    ],
    ids=str,
)
def test_patterns_are_values(pattern):
    """Equal, hashable and the same after YAML; a field more makes another pattern."""
    mixer = Mixer(positions=pattern)
    data = yaml.safe_load(yaml.safe_dump(Assignment(width=4, stem=Stem(mixer=mixer)).to_dict()))
    again = Assignment.from_dict(data).stem.mixer
    assert again == mixer and hash(again) == hash(mixer)
    assert again != Mixer(positions=pattern, heads=2)
    assert not any(isinstance(v, torch.Tensor) for v in vars(again.positions).values())


def test_strides_of_a_grid_that_they_do_not_divide():
    """Row i of `out` looks at floor(i in / out), whatever the sizes: no torch layer does it."""
    band = Banded(lower=0, upper=0, entry=Dense())
    module = build_mixer(Mixer(positions=band), Sizes(out=(3,), inp=(7,), d_in=2, d_out=2))
    x = torch.randn(1, 7, 2)
    weight = module.get_parameter("matrix.numbers.taps_weight")[0]
    expected = x[:, [math.floor(i * 7 / 3) for i in range(3)]] @ weight.T
    torch.testing.assert_close(module(x), expected)


def test_what_a_model_says_of_an_example():
    assert outputs(Spec(grid=(8, 8), channels=1, classes=10)) == "one of 10 classes"
    words = Spec(grid=(64,), vocabulary=1000, classes=1000, per_position=True, causal=True)
    assert outputs(words) == "one of 1,000 classes at every position"
    series = Spec(grid=(48,), channels=2, classes=2, horizon=12)
    assert outputs(series) == "the next 12 rows of 2 numbers"
