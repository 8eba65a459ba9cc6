"""One suite for every kind of mixer: a new one is checked by its presence."""

import io
import math
import statistics
from dataclasses import replace

import pytest
import torch
import yaml
from mixer_cases import CASES, Case
from mixer_oracles import ORACLES
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from patternsearch import ops
from patternsearch.assignment import Assignment, Block, Mixer
from patternsearch.codec import decode, encode
from patternsearch.describe import mixer_words, sentences
from patternsearch.errors import KernelError, PatternError
from patternsearch.mixer import MixerModule, build_mixer, mixer_kinds
from patternsearch.model import build_model
from patternsearch.patterns.banded import Banded
from patternsearch.patterns.dense import Dense
from patternsearch.patterns.kronecker import Kronecker
from patternsearch.patterns.low_rank import LowRank
from patternsearch.patterns.semiseparable import Semiseparable
from patternsearch.pictures import matrix
from patternsearch.sizes import (
    Spec,
    mixer_places,
    model_cost,
    places,
    resolve,
    resolve_mixer,
)

KINDS = {kind.__name__: kind for kind in mixer_kinds()}
EVERY = [(name, i) for name in sorted(KINDS) for i in range(len(CASES.get(name, ())))]
every = pytest.mark.parametrize(("name", "i"), EVERY, ids=[f"{n}-{i}" for n, i in EVERY])
QKV = {name: Dense() for name in ("query", "key", "value")}


def build(case: Case, seed: int = 0) -> MixerModule:
    """With all parameters drawn, so that none hides behind a zero."""
    torch.manual_seed(seed)
    module = build_mixer(case.mixer, case.at).double()
    for parameter in module.parameters():
        parameter.data.normal_(0, 0.7)
    return module


def draw(case: Case, batch: int = 2, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, *case.at.inp, case.at.d_in)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


@pytest.fixture(params=sorted(KINDS))
def kind(request) -> str:
    return request.param


def test_every_kind_has_cases_on_grids(kind):
    assert CASES.get(kind), f"add cases of {kind} to mixer_cases.py"
    assert kind in ORACLES, f"write the formula of {kind} in mixer_oracles.py"
    assert {len(case.at.inp) for case in CASES[kind]} >= {2}, f"{kind}: no case on a grid"


def test_no_case_without_a_kind():
    assert set(CASES) == set(ORACLES) == set(KINDS)


@every
def test_the_kind_that_is_meant(name, i):
    case = CASES[name][i]
    fitting = [n for n, kind in KINDS.items() if kind.misfit(case.mixer) is None]
    assert fitting == [name]
    assert resolve_mixer(case.mixer, case.at, "mixer").maps.keys() == case.mixer.maps.keys()
    for place in mixer_places(case.mixer, case.at, "mixer"):
        assert place.unavailable() is None, place


@every
def test_formula_values_and_gradients(name, i):
    case = CASES[name][i]
    module, results = build(case), []
    for function in (module, lambda x: ORACLES[name](module, case, x)):
        x = draw(case).requires_grad_()
        y = function(x)
        assert y.shape == (2, *case.at.out, case.at.d_out)
        weight = torch.linspace(0.5, 2, y.numel(), dtype=y.dtype).reshape(y.shape)
        grads = torch.autograd.grad((y * y * weight).sum(), [x, *module.parameters()])
        results.append((y.detach(), *grads))
    names = ["y", "x", *(n for n, _ in module.named_parameters())]
    for got, wanted, what in zip(*results, names, strict=True):
        torch.testing.assert_close(
            got, wanted, rtol=1e-7, atol=1e-9, msg=lambda text, what=what: f"{what}: {text}"
        )
        shifted = what == "maps.key.bias" and case.mixer.order > 2  # a softmax may not notice
        assert got.any() or shifted or what == "maps.key2.bias", f"no gradient reaches {what}"


@every
def test_reference_and_kernel_agree(name, i):
    case = CASES[name][i]
    module, x = build(case), draw(case)
    with ops.implementation("reference"):
        wanted = module(x)
    with ops.implementation("kernel"):
        try:
            got = module(x)
        except KernelError as e:
            assert "use implementation('auto')" in str(e)
            return
    torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("kind", ["AttentionMixer", "LinearAttentionMixer", "TwoKeyMixer"])
def test_the_kernel_runs_on_one_axis(kind):
    case = CASES[kind][0]
    with ops.implementation("kernel"):
        assert build(case)(draw(case)).isfinite().all()


@every
def test_causality(name, i):
    case = CASES[name][i]
    if not case.causal:
        return
    module, x = build(case), draw(case)
    for t in range(1, case.at.inp[0]):
        later = x.clone()
        later[:, t:] += 1.0
        before, after = module(x), module(later)
        torch.testing.assert_close(after[:, :t], before[:, :t], rtol=0, atol=1e-12)
        assert (after[:, t] != before[:, t]).any(), f"{name}: position {t} does not see itself"


def test_families_that_see_the_future_are_refused_in_causal_tasks():
    for positions in (Kronecker(), LowRank(), Dense(), Semiseparable(two_sided=True)):
        case = Case(Mixer(positions=positions, order=3, maps=QKV), (6,), causal=True)
        places = list(mixer_places(case.mixer, case.at, "mixer"))
        assert "future" in places[-1].unavailable()


@every
def test_yaml_round_trip_and_hash(name, i):
    mixer = CASES[name][i].mixer
    text = yaml.safe_dump(encode(mixer))
    back = decode(Mixer, yaml.safe_load(text), "mixer")
    assert back == mixer
    assert hash(back) == hash(mixer)
    assert mixer_words(back) == mixer_words(mixer) != ""


@every
def test_parameters_are_counted(name, i):
    case = CASES[name][i]
    counted = sum(p.cost().parameters for p in mixer_places(case.mixer, case.at, "mixer"))
    assert counted == sum(p.numel() for p in build(case).parameters())


def products(case: Case) -> int:
    """FLOPs of the reference's matrix products for one example, by torch's counter."""
    module = build(case).float()
    counter = FlopCounterMode(display=False)
    with ops.implementation("reference"), sdpa_kernel(SDPBackend.MATH), counter:
        module(draw(case, batch=1).float())
    return counter.get_total_flops()


@pytest.mark.parametrize("kind", ["AttentionMixer", "AxialMixer", "TwoKeyMixer"])
def test_flops_of_softmax_products(kind):
    for case in CASES[kind]:
        if isinstance(case.mixer.positions, Banded):
            continue  # the reference computes what lies outside of the band too
        places = mixer_places(case.mixer, case.at, "mixer")
        assert products(case) == sum(place.cost().flops for place in places), case


def test_flops_of_linear_attention():
    for case in CASES["LowRankAttentionMixer"]:
        places = mixer_places(case.mixer, case.at, "mixer")
        assert products(case) == sum(place.cost().flops for place in places), case


def test_flops_of_causal_linear_attention():
    """Four products of state x channels a position: to add k v', and to ask q'."""
    for case in CASES["LinearAttentionMixer"]:
        pattern, heads = case.mixer.positions, case.mixer.heads
        rows, n = math.prod(case.at.out), math.prod(case.at.inp)
        channels = case.at.d_out // heads + pattern.normalise
        wanted = 2 * heads * pattern.state * channels * (rows + n) * (1 + pattern.two_sided)
        *_, place = mixer_places(case.mixer, case.at, "mixer")
        assert place.cost().flops == wanted


@every
def test_in_a_model(name, i):
    case = CASES[name][i]
    stride = case.at.inp[0] // case.at.out[0]
    assignment = Assignment(width=4, blocks=(Block(mixer=case.mixer, stride=stride),))
    spec = Spec(
        grid=case.at.inp,
        channels=3,
        classes=2,
        causal=case.causal,
        per_position=case.causal,
    )
    resolved = resolve(assignment, spec)
    model = build_model(resolved, spec)
    assert type(model.blocks[0].mixer).__name__ == name
    assert model_cost(resolved, spec).parameters == sum(p.numel() for p in model.parameters())
    assert resolve(resolved, spec) == resolved
    assert len(sentences(resolved, spec)) == 1 + len(list(places(resolved, spec)))
    for place in places(resolved, spec):
        assert matrix(model, place).any() or place.name == "head.map", place
    x = torch.randn(5, *spec.grid, 3, generator=torch.Generator().manual_seed(0))
    sizes = []
    for seed in range(9):
        model = build_model(resolved, spec, seed)
        sizes.append(float(model.blocks[0].mixer(model.stem(x)).detach().std()))
    assert 0.02 < statistics.median(sizes) < 3, "too little or too much out of a fresh mixer"


@every
def test_nothing_is_free(name, i):
    case = CASES[name][i]
    for place in mixer_places(case.mixer, case.at, "mixer"):
        cost = place.cost()
        assert cost.flops > 0
        assert cost.bytes >= 4 * cost.parameters
        assert cost.activations > 0


@every
def test_saved_and_loaded(name, i):
    case = CASES[name][i]
    module, other = build(case), build(case, seed=5)
    x, file = draw(case), io.BytesIO()
    assert (other(x) != module(x)).any()
    torch.save(module.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file))
    torch.testing.assert_close(other(x), module(x), rtol=0, atol=0)


@every
def test_batch_of_none_and_strided_input(name, i):
    case = CASES[name][i]
    module = build(case)
    assert module(draw(case, batch=0)).shape == (0, *case.at.out, case.at.d_out)
    x = draw(case)
    strided = x.transpose(0, -1).contiguous().transpose(0, -1)
    torch.testing.assert_close(module(strided), module(x))


@every
def test_heads_are_apart(name, i):
    """With a matrix a head, the values of one head reach the channels of no other."""
    case = CASES[name][i]
    heads = case.mixer.heads
    if heads == 1:
        return
    maps = {k: p for k, p in case.mixer.maps.items() if k != "output"}
    apart = replace(case, mixer=replace(case.mixer, maps=maps))
    module, x = build(apart), draw(apart)
    before = module(x)
    module.maps["value"].bias = torch.nn.Parameter(torch.zeros(4, dtype=torch.float64))
    reference = module(x)
    module.maps["value"].bias.data[: 4 // heads] = 1.0
    moved = (module(x) - reference).abs().amax(tuple(range(before.dim() - 1))) > 1e-12
    assert moved.tolist() == [c < 4 // heads for c in range(4)]


BAD = [
    (Mixer(positions=Banded(), order=3, maps=QKV | {"gate": Dense()}), "maybe 'output'"),
    (Mixer(positions=Banded(entry=Dense()), order=3, maps=QKV), "remove 'entry'"),
    (Mixer(positions=Dense(), order=4, maps=QKV), "'key2', 'value2'"),
    (Mixer(positions=Dense(), order=5, maps=QKV), "order 4"),
    (Mixer(positions=Kronecker(bias=True), order=3, maps=QKV), "bias=false"),
    (Mixer(positions=Semiseparable(order=2), order=3, maps=QKV), "order=1"),
    (Mixer(positions=LowRank(), order=3, maps=QKV, encoding="rotary"), "encoding='none'"),
    (Mixer(positions=Semiseparable(), order=3, maps=QKV, encoding="rotary"), "encoding='none'"),
    (Mixer(positions=LowRank(), order=3, maps=QKV | {"decay": Dense()}), "maybe 'output'"),
    (Mixer(positions=Banded(), order=2, maps={"decay": Dense()}), "semiseparable"),
    (Mixer(positions=Banded(), maps={"gate": Dense()}), "not 'gate'"),
]


@pytest.mark.parametrize(("mixer", "words"), BAD, ids=[words for _, words in BAD])
def test_what_is_no_mixer_is_named(mixer, words):
    with pytest.raises(PatternError, match="no kind of mixer fits") as e:
        build_mixer(mixer, Case(mixer, (6,)).at)
    assert words in str(e.value)


def test_features_far_from_zero_do_not_divide_by_zero():
    for kind in ("LinearAttentionMixer", "LowRankAttentionMixer"):
        case = CASES[kind][0]
        module = build(case).float()
        for name in ("query", "key"):
            module.maps[name].bias.data.fill_(-300.0)
        x = draw(case).float().requires_grad_()
        y = module(x)
        (gradient,) = torch.autograd.grad(y.square().sum(), x)
        assert not y.any()
        assert gradient.isfinite().all()
