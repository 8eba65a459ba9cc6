"""Projection: members come back exactly, and closed forms called optimal are not beaten."""

import math

import pytest
import torch
from pattern_cases import FAMILIES, Case, cases, draw
from torch import nn

from patternsearch.errors import PatternError
from patternsearch.patterns.banded import Banded
from patternsearch.patterns.blast import Blast
from patternsearch.patterns.block_diagonal import BlockDiagonal
from patternsearch.patterns.block_sparse import BlockSparse
from patternsearch.patterns.block_term import BlockTerm
from patternsearch.patterns.butterfly import Butterfly
from patternsearch.patterns.cp import CanonicalPolyadic
from patternsearch.patterns.dense import Dense
from patternsearch.patterns.kronecker import Kronecker
from patternsearch.patterns.low_rank import LowRank
from patternsearch.patterns.monarch import Monarch
from patternsearch.patterns.product import Product
from patternsearch.patterns.semiseparable import Semiseparable
from patternsearch.patterns.sum import Sum
from patternsearch.patterns.tt import TensorTrain
from patternsearch.patterns.tucker import Tucker
from patternsearch.project import Fit, from_dense

SIZES = [((6,), (6,)), ((4,), (6,)), ((2, 2), (2, 3))]


def matrix(case: Case, seed: int = 7) -> torch.Tensor:
    return case.pattern.to_dense(draw(case, seed=seed), case.out, case.inp).double()


def noise(out: int, inp: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(out, inp, generator=generator, dtype=torch.float64)


def budget(case: Case) -> float | None:
    """Relative error a member comes back with; None where the search may end in a local minimum."""
    pattern = case.pattern
    if pattern.family == "semiseparable" and pattern.order > 1 and pattern.tie == "none":
        if pattern.state > 1 or case.out != case.inp:
            return None  # lags of their own in states side by side, or of rows that are left out
    if pattern.family == "semiseparable" and pattern.state > 1:
        return 1e-6  # sums of exponentials: nearly the same for other decays
    if pattern.family == "block_term" and pattern.terms > 2:
        return None  # terms that cancel: convergence is too slow to wait for
    return 1e-9


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_members_come_back(family):
    for case in cases(family, SIZES):
        if (allowed := budget(case)) is None:
            continue
        wanted = matrix(case)
        found = from_dense(case.pattern, wanted, case.out, case.inp)
        again = case.pattern.to_dense(found.cores, case.out, case.inp).double()
        error = float((again - wanted).norm() / wanted.norm())
        assert found.error <= allowed, f"{case}: {found.error:.1e} after {found.steps} steps"
        assert error == pytest.approx(found.error, abs=1e-12), case
        assert {n: tuple(v.shape) for n, v in found.cores.items()} == {
            n: core.shape for n, core in case.pattern.cores(case.out, case.inp).items()
        }, case


LARGE = [
    *(Blast(blocks=b, rank=r) for b, r in ((2, 32), (4, 16), (16, 4))),
    *(Product(), Product(factors=(Dense(), Banded(tie="none")))),
    *(Sum(), Sum(terms=(BlockSparse(mask="random"), LowRank(rank=8)))),
    *(Semiseparable(tie="none", order=p, two_sided=s) for p in (2, 3) for s in (False, True)),
    *(Semiseparable(state=n) for n in (2, 4)),
    *(CanonicalPolyadic(modes=m, rank=r) for m, r in ((2, 32), (3, 24))),
    *(Butterfly(), Tucker(), TensorTrain(modes=3, rank=8)),
]


@pytest.mark.parametrize("pattern", LARGE, ids=str)
def test_large_members_come_back(pattern):
    """64 x 64 members of three seeds: no search ends in a local minimum."""
    case = Case(pattern.resolve((64,), (64,)), (64,), (64,))
    for seed in range(3):
        found = from_dense(case.pattern, matrix(case, seed), case.out, case.inp)
        assert found.error <= 1e-10, f"seed {seed}: {found.error:.1e} after {found.steps} steps"


def test_one_factor_an_axis_comes_back():
    """A X B' of an image, the factors block-diagonal; and an axis without a factor."""
    cell = Product(factors=(BlockDiagonal(), BlockDiagonal(blocks=2)), axes=(0, 1))
    for pattern, dims in ((cell, (8, 8)), (Product(factors=(Dense(),), axes=(1,)), (3, 4, 2))):
        case = Case(pattern.resolve(dims, dims), dims, dims)
        assert from_dense(case.pattern, matrix(case), dims, dims).error <= 1e-14


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_no_search_beats_what_is_called_optimal(family):
    """Refinements from three random starts end no nearer, and at least one as near."""
    for case in cases(family, [((4,), (6,)), ((6,), (6,))]):
        wanted = noise(math.prod(case.out), math.prod(case.inp))
        closed = from_dense(case.pattern, wanted, case.out, case.inp, restarts=0, steps=1)
        if not closed.optimal or not case.pattern.cores(case.out, case.inp):
            continue
        fit = Fit(case.pattern, wanted, case.out, case.inp)
        errors = [fit.run(fit.start(seed), 1e-12, 60).error for seed in range(3)]
        assert closed.error <= min(errors) + 1e-9, f"{case}: {closed.error} against {errors}"
        assert closed.error >= min(errors) - 1e-2, f"{case}: the search is no test, {errors}"


def test_low_rank_error_is_that_of_eckart_and_young():
    wanted = noise(8, 5)
    s = torch.linalg.svdvals(wanted)
    found = from_dense(LowRank(rank=2), wanted)
    assert found.error == pytest.approx(float(s[2:].norm() / s.norm()), rel=1e-12)


def test_nearest_kronecker_is_van_loan_and_pitsianis():
    wanted = noise(4, 6)
    pieces = wanted.reshape(2, 2, 2, 3).transpose(1, 2).reshape(4, 6)
    s = torch.linalg.svdvals(pieces)
    found = from_dense(Kronecker(), wanted)
    assert found.optimal and found.error == pytest.approx(float(s[1:].norm() / s.norm()), rel=1e-12)


@pytest.mark.parametrize(
    ("pattern", "sides"),
    [
        (Tucker(modes=2, rank=2), 4),
        (TensorTrain(modes=3, rank=2), 2),
        (Kronecker(modes=3), 2),
    ],
    ids=str,
)
def test_quasi_optimal_starts_are_within_their_bound_and_refined(pattern, sides):
    """HOSVD and TT-SVD are within the root of their number of truncations of the best."""
    wanted, dims = noise(8, 8), (8,)
    pattern = pattern.resolve(dims, dims)
    start = pattern.project(wanted, dims, dims)
    assert not start.optimal
    first = float((pattern.to_dense(start.cores, dims, dims) - wanted).norm() / wanted.norm())
    best = from_dense(pattern, wanted)
    assert best.error <= first + 1e-12
    assert first <= math.sqrt(sides) * best.error


def test_refinements_end_where_the_gradient_is_zero():
    for pattern in (CanonicalPolyadic(rank=2), Sum(), Semiseparable(), Kronecker(modes=3)):
        wanted = noise(8, 8)
        pattern = pattern.resolve((8,), (8,))
        found = from_dense(pattern, wanted, restarts=1)
        fit = Fit(pattern, wanted, (8,), (8,))
        point = fit.point(found.cores).requires_grad_()
        loss = 0.5 * fit.residual(point).square().sum()
        (gradient,) = torch.autograd.grad(loss, point)
        assert gradient.norm() <= 1e-3 * wanted.square().sum(), str(pattern)


def test_large_problems_are_refined_without_a_jacobian(monkeypatch):
    monkeypatch.setattr("patternsearch.project.MAX_JACOBIAN", 0)
    case = Case(BlockTerm(rank=1), (6,), (6,))
    found = from_dense(case.pattern, matrix(case))
    assert found.error <= 1e-3 and found.steps > 1


def test_a_convolution_comes_back_from_its_matrix():
    conv = nn.Conv2d(2, 3, 3, padding=1, bias=False).double()
    pattern, out, inp = Banded(entry=Dense()), (4, 5, 3), (4, 5, 2)
    eye = torch.eye(40, dtype=torch.float64).reshape(40, 4, 5, 2)
    wanted = conv(eye.movedim(-1, 1)).movedim(1, -1).reshape(40, 60).T.detach()
    found = from_dense(pattern, wanted, out, inp)
    assert found.optimal and found.error <= 1e-15
    torch.testing.assert_close(found.cores["taps_weight"], conv.weight.permute(2, 3, 0, 1))


def test_entries_are_projected_on_their_own_pattern():
    """A dense convolution on a factorised one: the mean block's nearest low rank, optimal."""
    full, out = Banded(entry=Dense()), (5, 4)
    wanted = matrix(Case(full, out, out))
    narrow = Banded(entry=LowRank(rank=2))
    found = from_dense(narrow, wanted, out, out)
    fit = Fit(narrow, wanted, out, out)
    assert found.optimal
    assert found.error <= min(fit.run(fit.start(s), 1e-12, 60).error for s in range(3)) + 1e-9


def test_dtype_and_heads():
    found = from_dense(Monarch(blocks=2), noise(4, 4).float())
    assert all(core.dtype == torch.float32 for core in found.cores.values())
    heads = torch.stack([noise(8, 8, seed) for seed in range(3)])
    for pattern in (
        LowRank(rank=2),
        Monarch(),
        BlockSparse(),
        BlockDiagonal(),
        TensorTrain(rank=2),
    ):
        together = pattern.project(heads, (8,), (8,)).cores
        one = pattern.project(heads[1], (8,), (8,)).cores
        dense = pattern.to_dense(together, (8,), (8,))[1]
        torch.testing.assert_close(dense, pattern.to_dense(one, (8,), (8,)))


def test_bad_matrices_are_refused():
    with pytest.raises(PatternError, match=r"\(4, 6\) does not map \(5,\) to \(4,\)"):
        from_dense(Dense(), noise(4, 6), (4,), (5,))
    with pytest.raises(PatternError, match="2 axes"):
        from_dense(Dense(), torch.zeros(3))
    with pytest.raises(PatternError, match="at most 4"):
        from_dense(LowRank(rank=9), noise(4, 6))
