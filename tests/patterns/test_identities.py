"""Families contain one another, and known layers, exactly; exponents are what the counts say."""

import itertools
import math

import numpy as np
import pytest
import torch
from pattern_cases import Case, draw, draw_input
from torch import nn

from patternsearch.codec import decode, encode
from patternsearch.errors import PatternError
from patternsearch.network import sampled_rank
from patternsearch.pattern import Pattern
from patternsearch.patterns.banded import Banded
from patternsearch.patterns.blast import Blast
from patternsearch.patterns.block_diagonal import BlockDiagonal
from patternsearch.patterns.block_sparse import BlockSparse
from patternsearch.patterns.block_term import BlockTerm
from patternsearch.patterns.btt import BlockTensorTrain
from patternsearch.patterns.butterfly import Butterfly
from patternsearch.patterns.circulant import Circulant
from patternsearch.patterns.cp import CanonicalPolyadic
from patternsearch.patterns.dense import Dense
from patternsearch.patterns.diagonal import Diagonal
from patternsearch.patterns.einsum import Einsum
from patternsearch.patterns.kronecker import Kronecker
from patternsearch.patterns.low_displacement import LowDisplacement
from patternsearch.patterns.low_rank import LowRank
from patternsearch.patterns.monarch import Monarch
from patternsearch.patterns.product import Product
from patternsearch.patterns.semiseparable import Semiseparable
from patternsearch.patterns.sum import Sum
from patternsearch.patterns.tt import TensorTrain
from patternsearch.patterns.tucker import Tucker


def same(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def dense(pattern: Pattern, cores, out: int, inp: int) -> torch.Tensor:
    return pattern.to_dense(cores, (out,), (inp,))


def ndlinear(layers: list[nn.Linear], x: torch.Tensor, first_to_last: bool) -> torch.Tensor:
    """NdLinear as its paper states it: each mode in turn through a linear layer with a bias."""
    modes = range(len(layers)) if first_to_last else reversed(range(len(layers)))
    for mode in modes:
        x = layers[mode](x.transpose(mode + 1, -1)).transpose(mode + 1, -1)
    return x


@pytest.mark.parametrize("first_to_last", [True, False])
@pytest.mark.parametrize("modes", [((5,), (3,)), ((2, 3), (4, 2)), ((2, 3, 4), (3, 1, 2))])
@pytest.mark.parametrize("bias", [True, False])
def test_kronecker_is_ndlinear(modes, first_to_last, bias):
    torch.manual_seed(0)
    inps, outs = modes
    check_ndlinear(inps, outs, first_to_last, bias)
    check_ndlinear((*inps, 2), (*outs, 3), first_to_last, bias)


def check_ndlinear(inps, outs, first_to_last, bias):
    layers = [nn.Linear(i, o, bias).double() for i, o in zip(inps, outs, strict=True)]
    pattern = Kronecker(in_modes=inps, out_modes=outs, bias=bias, outer_first=first_to_last)
    cores = {f"factor{m}": layer.weight for m, layer in enumerate(layers)}
    if bias:
        cores |= {f"bias{m}": layer.bias for m, layer in enumerate(layers)}
    x = torch.randn(3, *inps, dtype=torch.float64, requires_grad=True)
    wanted = ndlinear(layers, x, first_to_last)
    got = pattern.matmul(cores, x.flatten(1), (math.prod(outs),)).unflatten(1, outs)
    same(got, wanted)
    parameters = [x, *itertools.chain(*(layer.parameters() for layer in layers))]
    for a, b in zip(
        torch.autograd.grad(got.sin().sum(), parameters),
        torch.autograd.grad(wanted.sin().sum(), parameters),
        strict=True,
    ):
        same(a, b)


def test_parameter_counts_of_published_ndlinear_adapters():
    """The 1.15 M and 2.26 M of NdLinear-LoRA's table for Qwen3-1.7B and Llama-3-8B."""
    qwen = [(2048, 2048)] * 2 + [(1024, 2048)] * 2 + [(6144, 2048)] * 2 + [(2048, 6144)]
    llama = [(4096, 4096)] * 2 + [(1024, 4096)] * 2 + [(14336, 4096)] * 2 + [(4096, 14336)]
    for maps, layers, wanted in ((qwen, 28, 1_146_880), (llama, 32, 2_260_992)):
        total = sum(Kronecker().parameters((o,), (i,)) for o, i in maps)
        assert layers * total == wanted


@pytest.mark.parametrize("size", [16, 36])
def test_btt_of_rank_one_is_monarch(size):
    root = math.isqrt(size)
    btt, monarch = BlockTensorTrain(rank=1), Monarch(blocks=root)
    cores = draw(Case(btt, (size,), (size,)))
    left, right = cores["left"].squeeze(2), cores["right"].squeeze(3)
    assert btt.parameters((size,), (size,)) == monarch.parameters((size,), (size,))
    same(dense(btt, cores, size, size), dense(monarch, {"left": left, "right": right}, size, size))


def test_einsum_holds_low_rank_kronecker_tt_monarch_and_btt():
    n, root = 64, 8
    low = Einsum(alpha=1, beta=0, gamma=0, delta=0, epsilon=1, phi=0, rho=math.log(5) / math.log(n))
    cores = draw(Case(low, (n,), (n,)))
    left, right = cores["left"].reshape(5, n), cores["right"].reshape(n, 5)
    assert low.parameters((n,), (n,)) == LowRank(rank=5).parameters((n,), (n,))
    same(dense(low, cores, n, n), dense(LowRank(rank=5), {"left": right, "right": left}, n, n))

    half = {"alpha": 0.5, "beta": 0.5, "gamma": 0, "delta": 0.5, "epsilon": 0.5, "phi": 0}
    kron = Einsum(**half, rho=0)
    cores = draw(Case(kron, (n,), (n,)))
    factors = {"factor1": cores["left"].reshape(root, root)}
    factors["factor0"] = cores["right"].reshape(root, root)
    same(dense(kron, cores, n, n), dense(Kronecker(), factors, n, n))

    train = Einsum(**half, rho=math.log(3) / math.log(n))
    cores = draw(Case(train, (n,), (n,)))  # left [f, d, r, g, a], right [f, e, r, b, g]
    last = cores["left"].reshape(root, 3, root).transpose(0, 1)
    first = cores["right"].reshape(root, 3, root).transpose(1, 2)
    tt = TensorTrain(rank=3)
    assert train.parameters((n,), (n,)) == tt.parameters((n,), (n,))
    same(dense(train, cores, n, n), dense(tt, {"core0": first, "core1": last}, n, n))

    blocks = {"alpha": 0.5, "beta": 0, "gamma": 0.5, "delta": 0, "epsilon": 0.5, "phi": 0.5}
    for rank in (1, 4):
        point = Einsum(**blocks, rho=math.log(rank) / math.log(n))
        cores = draw(Case(point, (n,), (n,)))
        left = cores["left"].reshape(root, rank, root, root).permute(2, 0, 1, 3)  # [g, f, r, a]
        right = cores["right"].reshape(root, root, rank, root).transpose(2, 3)  # [f, e, g, r]
        btt = BlockTensorTrain(rank=rank)
        same(dense(point, cores, n, n), dense(btt, {"left": left, "right": right}, n, n))
        if rank == 1:
            cores = {"left": left.squeeze(2), "right": right.squeeze(3)}
            same(
                dense(btt, {"left": left, "right": right}, n, n),
                dense(Monarch(blocks=root), cores, n, n),
            )


def test_einsum_holds_every_dense_matrix():
    point = Einsum(alpha=1, beta=0, gamma=0, delta=0, epsilon=0, phi=1, rho=0)
    weight = torch.randn(6, 4, dtype=torch.float64)
    cores = {"left": weight.reshape(6, 1, 1, 1, 4), "right": weight.new_ones(6, 1, 1, 1, 1)}
    same(dense(point, cores, 6, 4), weight)


def test_tensor_train_is_a_sum_of_kronecker_products():
    cores = draw(Case(TensorTrain(rank=3), (12,), (8,)))
    terms = [torch.kron(cores["core0"][..., r], cores["core1"][r]) for r in range(3)]
    same(dense(TensorTrain(rank=3), cores, 12, 8), sum(terms))


def test_full_ranks_reach_every_matrix():
    """At full rank the tensor formats have the dimension of all matrices, by their Jacobian."""
    for pattern in (TensorTrain(rank=1.0), Tucker(rank=1.0), BlockTensorTrain(rank=1.0)):
        case = Case(pattern, (6,), (4,))
        cores = draw(case)
        names = list(cores)

        def matrix(*values, case=case, names=names):
            return case.pattern.to_dense(
                dict(zip(names, values, strict=True)), (6,), (4,)
            ).flatten()

        jacobian = torch.autograd.functional.jacobian(matrix, tuple(cores.values()))
        assert torch.linalg.matrix_rank(torch.cat([j.flatten(1) for j in jacobian], 1)) == 24


def test_cp_and_block_term_of_one_mode_are_low_rank():
    cores = draw(Case(LowRank(rank=3), (6,), (4,)))
    wanted = dense(LowRank(rank=3), cores, 6, 4)
    cp = {"out0": cores["left"], "in0": cores["right"]}
    same(dense(CanonicalPolyadic(modes=1, rank=3), cp, 6, 4), wanted)
    terms = {"out0": cores["left"].T[..., None], "in0": cores["right"][:, None]}
    terms["core"] = wanted.new_ones(3, 1, 1)
    same(dense(BlockTerm(modes=1, rank=1, terms=3), terms, 6, 4), wanted)


def test_blast_holds_low_rank_and_block_diagonal():
    cores = draw(Case(LowRank(rank=3), (8,), (12,)))
    blast = {
        "left": cores["left"].reshape(4, 2, 3),
        "middle": torch.ones(4, 4, 3, dtype=torch.float64),
        "right": cores["right"].reshape(3, 4, 3).transpose(0, 1),
    }
    pattern = Blast(blocks=4, rank=3)
    same(dense(pattern, blast, 8, 12), dense(LowRank(rank=3), cores, 8, 12))
    weight = draw(Case(BlockDiagonal(), (8,), (12,)))["weight"]  # [4, 2, 3], each of rank 2
    blast = {
        "left": torch.eye(2, dtype=torch.float64).expand(4, 2, 2),
        "middle": torch.eye(4, dtype=torch.float64)[..., None].expand(4, 4, 2),
        "right": weight,
    }
    wanted = dense(BlockDiagonal(), {"weight": weight}, 8, 12)
    same(dense(Blast(blocks=4, rank=2), blast, 8, 12), wanted)


def test_butterfly_holds_hadamard():
    factor = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    cores = {f"factor{k}": factor.expand(2 ** (3 - k), 2**k, 2, 2) for k in range(4)}
    wanted = torch.ones(1, 1, dtype=torch.float64)
    for _ in range(4):
        wanted = torch.kron(wanted, factor)
    same(dense(Butterfly(), cores, 16, 16), wanted)


def test_low_displacement_rank_is_what_it_says_and_holds_toeplitz():
    n, rank = 9, 2
    w = dense(LowDisplacement(rank=rank), draw(Case(LowDisplacement(rank=rank), (n,), (n,))), n, n)
    shift = torch.diag(torch.ones(n - 1, dtype=torch.float64), -1)
    one, minus = shift.clone(), shift.clone()
    one[0, -1], minus[0, -1] = 1, -1
    assert torch.linalg.matrix_rank(one @ w - w @ minus) == rank
    rng = np.random.default_rng(0)
    diagonals = torch.tensor(rng.standard_normal(2 * n - 1))
    index = torch.arange(n)[:, None] - torch.arange(n) + n - 1
    toeplitz = diagonals[index]
    assert torch.linalg.matrix_rank(one @ toeplitz - toeplitz @ minus) == 2


def test_circulant_is_a_band_that_goes_around():
    weight = torch.randn(7, dtype=torch.float64)
    band = Banded(lower="full", upper=0, tie="circulant").resolve((7,), (7,))
    same(
        dense(Circulant(), {"weight": weight.reshape(1, 1, 7)}, 7, 7),
        dense(band, {"taps": weight.flip(0)}, 7, 7),
    )


def test_circulant_band_is_torchs_circular_convolution():
    conv = nn.Conv1d(3, 5, 3, padding=1, padding_mode="circular", bias=False).double()
    x = torch.randn(2, 8, 3, dtype=torch.float64)
    cores = {"taps_weight": conv.weight.permute(2, 0, 1)}
    got = Banded(tie="circulant", entry=Dense()).matmul(cores, x, (8, 5))
    same(got, conv(x.movedim(-1, 1)).movedim(1, -1))


@pytest.mark.parametrize("order", [1, 2, 4])
def test_recurrence_of_any_order_against_a_loop(order):
    """h_t = sum_k a_k h_{t-k} + x_t with the a_k of stable poles, complex ones too."""
    poles = np.array([0.9 * np.exp(0.6j), 0.9 * np.exp(-0.6j), 0.7, 0.2])[:order]
    poles = np.array([0.8]) if order == 1 else poles
    lags = -np.poly(poles).real[1:]
    pattern = Semiseparable(order=order, normalise=False)
    cores = partial_correlations(lags)
    x = torch.randn(2, 12, dtype=torch.float64)
    h = torch.zeros(2, 12 + order, dtype=torch.float64)
    for t in range(12):
        past = sum(lags[k] * h[:, order + t - 1 - k] for k in range(order))
        h[:, order + t] = past + x[:, t]
    same(pattern.matmul(cores, x, (12,)), h[:, order:])


def partial_correlations(lags) -> dict[str, torch.Tensor]:
    """The recursion of Durbin and Levinson backwards."""
    found, a = [], np.array(lags)
    while len(a):
        k, rest = a[-1], a[:-1]
        found.insert(0, k)
        a = (rest + k * rest[::-1]) / (1 - k * k)
    cores = {"decay": torch.tensor(found[:1])}
    if len(found) > 1:
        cores["reflection"] = torch.tensor(found[1:]).atanh()[:, None]
    return cores


def test_state_space_of_size_n_against_the_dual_form():
    """M_ij = sum_n C_in a_n,j+1 ... a_n,i B_jn (Dao and Gu 2024, equation 3)."""
    n, states = 10, 3
    pattern = Semiseparable(state=states, tie="none", normalise=False)
    cores = draw(Case(pattern, (n,), (n,)))
    w = dense(pattern, cores, n, n)
    for i, j in itertools.product(range(n), range(n)):
        product = cores["decay"][:, j + 1 : i + 1].prod(1)
        wanted = (cores["read"][:, i] * product * cores["write"][:, j]).sum() if i >= j else 0.0
        assert float(w[i, j]) == pytest.approx(float(wanted), abs=1e-12)
    below = w[6:, :5]
    assert torch.linalg.matrix_rank(below) == states


def test_product_on_axes_is_a_x_b():
    pattern = Product(factors=(BlockDiagonal(blocks=2), Dense()), axes=(0, 1))
    case = Case(pattern, (4, 3), (6, 5))
    cores = draw(case)
    x = draw_input(case)
    a = BlockDiagonal(blocks=2).to_dense({"weight": cores["factor0_weight"]}, (4,), (6,))
    same(pattern.matmul(cores, x, (4, 3)), a @ x @ cores["factor1_weight"].T)


def test_product_of_bands_is_two_convolutions():
    first, second = (nn.Conv1d(4, 4, 3, padding=1, bias=False).double() for _ in range(2))
    pattern = Product(factors=(Banded(), Banded()), entry=Dense())
    cores = {
        f"factor{k}_taps_weight": c.weight.permute(2, 0, 1) for k, c in ((0, second), (1, first))
    }
    x = torch.randn(2, 6, 4, dtype=torch.float64)
    wanted = second(first(x.movedim(-1, 1))).movedim(1, -1)
    same(pattern.matmul(cores, x, (6, 4)), wanted)


def test_combinators_nest_and_say_where_they_are_wrong():
    deep = Sum(terms=(Product(factors=(Sum(terms=(Dense(), LowRank())), Diagonal())), Monarch()))
    assert decode(Pattern, encode(deep), "p") == deep
    case = Case(deep.resolve((8,), (8,)), (8,), (8,))
    cores, x = draw(case), draw_input(case)
    same(case.pattern.matmul(cores, x, (8,)), x @ case.pattern.to_dense(cores, (8,), (8,)).T)
    assert deep.unavailable((4,), (8,)).startswith("sum: term 0: product: factor1: diagonal: ")
    with pytest.raises(PatternError, match="give at least one"):
        Sum(terms=())
    with pytest.raises(PatternError, match="monarch of its terms takes none"):
        Sum(terms=(Banded(), Monarch()), entry=Dense())
    with pytest.raises(PatternError, match="'entry' too"):
        Sum(terms=(Banded(entry=Dense()),))
    with pytest.raises(PatternError, match=r"axes=\(0,\) for 2 factors"):
        Product(axes=(0,))


@pytest.mark.parametrize(
    ("blocks", "factors", "density"), [(8, 2, 0.375), (16, 4, 0.3125), (32, 3, 0.125)]
)
def test_pixelfly_densities(blocks, factors, density):
    pattern = BlockSparse(blocks=blocks, density=(factors + 1) / blocks)
    n = 2 * blocks
    assert pattern.parameters((n,), (n,)) == density * n * n
    w = dense(pattern, {"weight": torch.ones(blocks, factors + 1, 2, 2)}, n, n)
    assert torch.equal(w, w.T) and torch.equal(w.sum(1), torch.full((n,), 2.0 * (factors + 1)))


def test_random_masks_are_regular_fixed_and_differ_by_seed():
    masks = [
        BlockSparse(blocks=16, density=0.25, mask="random", seed=s).columns() for s in range(3)
    ]
    assert len(set(masks)) == 3
    for mask in masks:
        counts = np.bincount([c for row in mask for c in row], minlength=16)
        assert counts.tolist() == [4] * 16
    assert masks[0][:2] == ((1, 3, 5, 10), (3, 7, 8, 10)), "a saved model would get another mask"


EXPONENTS = [  # pattern, omega, psi, nu at d -> infinity (arXiv 2410.02117, table 1)
    (Dense(), 0, 1, 1),
    (Kronecker(), 0.5, 1, 0.5),
    (Monarch(blocks=64), 0, 1, 0.5),
    (BlockTensorTrain(rank=1), 0, 1, 0.5),
    (LowRank(rank=64), 0, 0.5, 0.5),
]


@pytest.mark.parametrize(("pattern", "omega", "psi", "nu"), EXPONENTS, ids=str)
def test_exponents_approach_the_published_ones(pattern, omega, psi, nu):
    """At d = 4096 a factor of 2 in a count is log 2 / log d = 1/12."""
    d = (4096,)
    assert pattern.omega(d, d) == pytest.approx(omega, abs=1 / 12 + 1e-9)
    assert pattern.psi(d, d) == pytest.approx(psi, abs=1e-9)
    assert pattern.nu(d, d) == pytest.approx(nu, abs=1 / 12 + 1e-9)


def test_exponents_are_the_counts():
    for pattern in (Einsum(), TensorTrain(), Blast(), Banded(), CanonicalPolyadic()):
        o, i = (24,), (16,)
        at = pattern.resolve(o, i)
        d, cost = math.sqrt(24 * 16), at.cost(o, i)
        assert d ** at.omega(o, i) == pytest.approx(cost.flops / 2 / cost.parameters)
        assert 16 ** at.psi(o, i) == pytest.approx(sampled_rank(at, o, i))
        assert d ** (1 + at.nu(o, i)) == pytest.approx(cost.flops / 2)
    assert Dense().omega((1,), (1,)) is Dense().psi((1,), (1,)) is Dense().nu((1,), (1,)) is None


def test_numeric_example_of_the_taxonomy():
    """d = 256: parameters as a share of dense, products a parameter, rank."""
    d = (256,)
    low_btt = {"alpha": 0.75, "beta": 0, "gamma": 0.25, "delta": 0, "epsilon": 0.75, "phi": 0.25}
    generic = {
        "alpha": 0.5,
        "beta": 0.25,
        "gamma": 0.25,
        "delta": 0.25,
        "epsilon": 0.5,
        "phi": 0.25,
    }
    table = [
        (Kronecker(), 0.008, 16, 256),
        (TensorTrain(rank=4), 0.031, 16, 256),
        (BlockTensorTrain(rank=1), 0.125, 1, 256),
        (LowRank(rank=16), 0.125, 1, 16),
        (Einsum(**low_btt, rho=0), 0.031, 1, 16),
        (Einsum(**generic, rho=0), 0.031, 4, 256),
    ]
    for pattern, share, reuse, rank in table:
        cost = pattern.cost(d, d)
        assert cost.parameters / 256**2 == pytest.approx(share, abs=5e-4)
        assert cost.flops / 2 / cost.parameters == pytest.approx(reuse)
        assert pattern.matrix_rank(d, d) == rank
