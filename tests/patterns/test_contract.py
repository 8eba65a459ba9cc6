"""One suite for every pattern family: a new one is checked by its presence."""

import dataclasses
import math
import random
import re

import pytest
import torch
from pattern_cases import (
    FAMILIES,
    Case,
    cases,
    draw,
    draw_input,
    entry_cases,
    field_names,
    options,
    possible,
    random_option,
    resolve_if_possible,
)
from pattern_checks import (
    check_batched_cores,
    check_causal,
    check_codec,
    check_counts,
    check_flops,
    check_gradcheck,
    check_layouts,
    check_low_precision,
    check_oracle,
    check_product,
    check_rank,
)
from pattern_oracles import ORACLES

from patternsearch.assignment import Assignment
from patternsearch.domains import FloatRange, IntRange
from patternsearch.errors import PatternError
from patternsearch.layers import MAX_RATE, FeatureMap, Matrix, PositionMap
from patternsearch.model import build_model, quieten
from patternsearch.pattern import families, get_family
from patternsearch.patterns.banded import Banded
from patternsearch.patterns.dense import Dense
from patternsearch.patterns.diagonal import Diagonal
from patternsearch.patterns.kronecker import Kronecker
from patternsearch.patterns.low_rank import LowRank
from patternsearch.patterns.monarch import Monarch
from patternsearch.patterns.product import Product
from patternsearch.patterns.semiseparable import Semiseparable
from patternsearch.patterns.sum import Sum
from patternsearch.patterns.tt import TensorTrain
from patternsearch.sizes import Spec, model_cost, resolve

SQUARE = [((6,), (6,)), ((2, 3), (2, 3))]
NO_UNIT_DIMS = [((16,), (16,)), ((12,), (18,)), ((24,), (8,)), ((16, 8), (16, 8))]


@pytest.fixture(params=sorted(FAMILIES))
def family(request) -> str:
    return request.param


def test_product_is_the_dense_matrix(family):
    for case in cases(family):
        check_product(case)


def test_dense_matrix_is_its_formula(family):
    assert family in ORACLES, f"write the matrix of {family} in pattern_oracles.py"
    for case in cases(family):
        check_oracle(case)


def test_cores_with_batch_axes(family):
    for case in cases(family):
        check_batched_cores(case)


def test_yaml_round_trip_and_hash(family):
    for pattern in options(family):
        check_codec(Case(pattern, (), ()))
    for case in cases(family):
        check_codec(case)


def test_counts(family):
    for case in cases(family):
        check_counts(case)


def test_flops_against_torchs_counter(family):
    for case in cases(family, NO_UNIT_DIMS):
        check_flops(case)


def test_flops_of_entries():
    for case in [c for f in FAMILIES if FAMILIES[f].takes_entry for c in entry_cases(f)]:
        check_flops(case) if 1 not in case.out + case.inp else None


def test_zero_rows_and_strided_input(family):
    for case in cases(family):
        check_layouts(case)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_low_precision(family, dtype):
    for case in cases(family):
        check_low_precision(case, dtype)


def test_rank(family):
    for case in cases(family):
        check_rank(case)


def test_gradcheck(family):
    for case in cases(family, [((4,), (6,)), ((6,), (6,)), ((2, 2), (2, 3))])[:8]:
        check_gradcheck(case)


def test_resolve_is_final_and_available_at_200_random_sizes(family):
    rng = random.Random(1)
    for trial in range(200):
        axes = rng.choice([1, 1, 2])
        out = tuple(rng.choice([1, 2, 3, 5, 7, 8, 13, 16, 24, 31, 36, 60]) for _ in range(axes))
        same = rng.random() < 0.4
        inp = out if same else tuple(rng.randint(1, 64) for _ in range(axes))
        causal = out == inp and trial % 4 == 0
        pattern = random_option(family, rng)
        resolved = pattern.resolve(out, inp, causal)
        assert resolved.resolve(out, inp, causal) == resolved, f"{pattern} {inp} -> {out}"
        reason = resolved.unavailable(out, inp, causal)
        if causal:
            assert (reason is None) == has_causal_form(family), f"{pattern} {out}: {reason}"
        else:
            assert (reason is None) == possible(family, out, inp), (
                f"{pattern} {inp}->{out}: {reason}"
            )
        if reason is None:
            assert resolved.parameters(out, inp) >= 0


def has_causal_form(family) -> bool:
    default = FAMILIES[family]()
    return default.resolve((4,), (4,), True).unavailable((4,), (4,), True) is None


def test_causal_forms_see_no_future(family):
    for pattern in options(family):
        for out, inp in SQUARE:
            resolved = pattern.resolve(out, inp, True)
            if resolved.unavailable(out, inp, True) is None:
                check_causal(Case(resolved, out, inp), len(out))
    for case in entry_cases(family) if FAMILIES[family].takes_entry else []:
        resolved = case.pattern.resolve(case.out, case.inp, True)
        if resolved.unavailable(case.out, case.inp, True) is None:
            check_causal(Case(resolved, case.out, case.inp), len(case.out) - 1)


def test_unavailable_names_the_nearest_choice(family):
    """A whole number no size allows: the sentence holds the value that resolve() would take."""
    default = FAMILIES[family]()
    for name, domain in default.domains().items():
        if not isinstance(domain, IntRange | FloatRange):
            continue
        try:
            pattern = dataclasses.replace(default, **{name: 9973})
        except ValueError as e:  # outside of the field's own range, which the message gives
            assert re.search(rf"{family}.*{name}", str(e))
            continue
        for out, inp in [((12,), (18,)), ((7,), (7,))]:
            if not possible(family, out, inp):
                continue
            reason = pattern.unavailable(out, inp)
            nearest = getattr(pattern.resolve(out, inp), name)
            if reason is None:
                assert pattern.parameters(out, inp) == pattern.resolve(out, inp).parameters(
                    out, inp
                )
            else:
                assert str(nearest) in re.findall(r"\d+", reason), reason
                assert reason.startswith(f"{family}: "), reason


def test_layers_refuse_what_cannot_stand():
    """Ranks above full rank, blocks that do not divide, sizes that differ: choices are named."""
    for pattern, d_in, choices in [
        (Monarch(blocks=5), 12, "choose one of [1, 2, 4]"),
        (LowRank(rank=9), 12, "use at most 8"),
        (Banded(lower=9), 8, "use lower at most 7"),
        (Diagonal(), 12, "it needs both the same"),
    ]:
        with pytest.raises(PatternError, match=re.escape(choices)):
            FeatureMap(pattern, d_in, 8)


def test_layers_give_the_same_after_save_and_load(family, tmp_path):
    from safetensors.torch import load_file, save_file

    def build(out, inp, seed):
        torch.manual_seed(seed)
        pattern = FAMILIES[family]().resolve(out, inp)
        if len(out) == 1:
            return FeatureMap(pattern, inp[0], out[0])
        return PositionMap(pattern, out, inp, 6, 6, heads=2)

    for sizes in [((12,), (12,)), ((3, 4), (3, 4))]:
        first, second = build(*sizes, seed=1), build(*sizes, seed=2)
        save_file(first.state_dict(), tmp_path / "weights.safetensors")
        second.load_state_dict(load_file(tmp_path / "weights.safetensors"))
        x = torch.randn(5, *sizes[1]) if len(sizes[1]) == 1 else torch.randn(5, *sizes[1], 6)
        assert torch.equal(first(x), second(x))
        assert len(first.rates()) == len(first.numbers)


def chain(specs) -> float:
    """Output variance of a product of independent cores on white input (init_std's rule)."""
    normal = [s for s in specs.values() if s.kind == "normal"]
    return math.prod(min(1.0, s.fan_out / s.fan_in) for s in normal)


def predicted_variance(pattern, out, inp) -> float:
    (rows, c_out), (positions, c_in) = pattern.split(out), pattern.split(inp)
    if pattern.family in ("banded", "dense"):
        entry = predicted_variance(pattern.entry, c_out, c_in) if pattern.entry else 1.0
        if pattern.family == "dense":
            return entry * min(1.0, math.prod(rows) / math.prod(positions))
        # rows at the edge see less than a whole window
        seen = pattern.support(out, inp) / (math.prod(rows) * math.prod(pattern.taps(inp)))
        return seen * entry
    if pattern.family == "butterfly":  # padded: so many of the inputs are zeros
        n = math.prod(inp)
        return n / 2 ** (n - 1).bit_length() * chain(pattern.cores(out, inp))
    if pattern.family == "sum":
        return sum(predicted_variance(t, out, inp) for t in pattern.parts()) / len(pattern.terms)
    return chain(pattern.cores(out, inp))


def check_scale(pattern, out, inp, draws: int = 48) -> None:
    """Output variance on white input at initialisation, as the rule of the cores predicts it."""
    torch.manual_seed(0)
    matrix = Matrix(pattern, out, inp, draws)
    cores = {k: v.detach() for k, v in matrix.cores().items()}
    variance = pattern.to_dense(cores, out, inp).double().square().sum(-1).mean(-1)
    error = 5 * float(variance.std()) / math.sqrt(draws) + 1e-6
    predicted = predicted_variance(pattern, out, inp)
    assert predicted <= 1 + 1e-9, f"{pattern} {inp} -> {out}: predicts {predicted}"
    assert float(variance.mean()) == pytest.approx(predicted, abs=error), f"{pattern} {inp}->{out}"


def test_output_scale_at_initialisation(family):
    if family in ("average", "semiseparable"):
        pytest.skip("no normal cores; semiseparable's decays are checked below")
    for pattern in options(family):
        for out, inp in [((64,), (64,)), ((32,), (64,)), ((64,), (16,)), ((6, 8), (6, 8))]:
            resolved = resolve_if_possible(pattern, out, inp)
            if resolved is not None:
                check_scale(resolved, out, inp)


CONVOLUTIONS = [
    Banded(),
    Banded(tie="none", upper=0),
    Banded(tie="circulant", lower=2, upper=1),
    Dense(),
    Sum(terms=(Banded(upper=0), Banded(lower=0))),
]
TWO_TERMS = Sum(terms=(LowRank(), Dense()))
FACTORISED = [LowRank(rank=4), Monarch(), TensorTrain(rank=2, modes=3), Kronecker(), TWO_TERMS]


@pytest.mark.parametrize("pattern", CONVOLUTIONS, ids=str)
@pytest.mark.parametrize("entry", [Dense(), Diagonal(), *FACTORISED], ids=str)
def test_entries_start_as_they_do_along_features(pattern, entry):
    """However many cores an entry has, and at the rates it has there."""
    for dims in [((6, 16), (6, 16)), ((4, 4, 12), (4, 4, 24))]:
        resolved = resolve_if_possible(dataclasses.replace(pattern, entry=entry), *dims)
        if resolved is None:
            continue
        check_scale(resolved, *dims)
        convolution = Matrix(resolved, *dims).rates()
        alone = Matrix(entry.resolve(*(d[-1:] for d in dims)), *(d[-1:] for d in dims)).rates()
        terms = len(pattern.terms) if isinstance(pattern, Sum) else 1
        for name, rate in convolution.items():
            wanted = next(r for key, r in alone.items() if name.endswith(key.split(".")[1]))
            assert wanted == MAX_RATE or rate == pytest.approx(wanted / terms), name


NESTED = [
    Sum(terms=(Sum(terms=(LowRank(), Dense())), Kronecker(bias=True))),
    Product(factors=(LowRank(), Sum(terms=(LowRank(), Monarch())), Semiseparable())),
]


@pytest.fixture(params=[*sorted(FAMILIES), *range(len(NESTED))], ids=str)
def scaled(request) -> list[Case]:
    """Cases of a family, and of nests of several."""
    if isinstance(request.param, str):
        return cases(request.param)
    return [Case(NESTED[request.param].resolve((8,), (12,)), (8,), (12,))]


def test_one_core_of_every_chain_scales_the_matrix(scaled):
    for case in scaled:
        cores, found = draw(case), case.pattern.chains(case.out, case.inp)
        if not found:
            assert case.pattern.family in ("average", "semiseparable"), case
            continue
        dense = case.pattern.to_dense(cores, case.out, case.inp)
        for end, by in ((0, 3.0), (-1, 0.0)):
            some = {one[end] for one in found}
            changed = {n: by * core if n in some else core for n, core in cores.items()}
            got = case.pattern.to_dense(changed, case.out, case.inp)
            torch.testing.assert_close(got, by * dense, rtol=1e-9, atol=1e-9)


def test_a_head_starts_at_zero_and_learns(scaled):
    for case in scaled:
        last = [one[-1] for one in case.pattern.chains(case.out, case.inp)]
        if len(case.out) > 1 or not last:
            continue
        torch.manual_seed(0)
        head = FeatureMap(case.pattern, *case.inp, *case.out, role="head")
        y = head(torch.randn(3, *case.inp))
        assert not y.any(), case
        (y + torch.randn_like(y)).square().sum().backward()
        assert all(head.numbers[name].grad.any() for name in last), case


def test_the_readout_of_a_forecast_starts_at_a_tenth(scaled):
    for case in scaled:
        if case.pattern.entry is None and case.pattern.chains(case.out, case.inp):
            torch.manual_seed(0)
            matrix = Matrix(case.pattern, case.out, case.inp).double()
            before = case.pattern.to_dense(matrix.cores(), case.out, case.inp).clone()
            quieten(matrix)
            after = case.pattern.to_dense(matrix.cores(), case.out, case.inp)
            torch.testing.assert_close(after, 0.1 * before)


def test_semiseparable_keeps_unit_variance():
    """White input gives states of unit variance once the start is forgotten, less before."""
    out = inp = (64,)
    for pattern in options("semiseparable"):
        if pattern.normalise and not pattern.two_sided:
            torch.manual_seed(0)
            matrix = Matrix(pattern, out, inp, 32)
            cores = {k: v.detach() for k, v in matrix.cores().items()}
            variance = pattern.to_dense(cores, out, inp).double().square().sum(-1)
            assert variance[:, -1].mean() == pytest.approx(1, abs=0.3)
            if pattern.state == 1:
                assert variance.max() <= 1 + 1e-5


def test_families_are_named_and_documented(family):
    cls = get_family(family)
    assert cls.family == family and families()[family] is cls
    assert cls.__doc__ and cls.__module__.startswith("patternsearch.patterns.")
    assert set(cls.domains()) <= set(field_names(family))


def test_stands_along_positions_and_features_of_a_model(family):
    """The parameters of the model are those its cost says, and every core of it learns."""
    anywhere = {"average": "dense"}.get(family, family)
    block = {"mixer": {"positions": anywhere, "heads": 2, "maps": {"value": "dense"}}}
    assignment = Assignment.from_dict({"width": 16, "blocks": [block | {"channel": [anywhere]}]})
    spec = Spec(grid=(4, 6), classes=3, channels=1)
    model = build_model(assignment, spec)
    model(torch.randn(2, 4, 6, 1)).sum().backward()
    cost = model_cost(resolve(assignment, spec), spec)
    assert cost.parameters == sum(p.numel() for p in model.parameters())
    assert all(p.grad is not None for p in model.parameters())


def test_product_stays_on_its_device(family):
    """No index or constant of the reference is left behind on the CPU ('meta' holds no data)."""
    for case in cases(family, [((12,), (18,)), ((6,), (6,)), ((2, 3), (4, 6))]):
        cores = {name: value.to("meta") for name, value in draw(case).items()}
        y = case.pattern.matmul(cores, draw_input(case).to("meta"), case.out)
        assert y.device.type == "meta" and y.shape == (2, *case.out), case
