"""What every pattern promises, as assertions on one case."""

import math

import torch
from pattern_cases import Case, draw, draw_input
from pattern_oracles import ORACLES, oracle
from torch.utils.flop_counter import FlopCounterMode

from patternsearch.codec import decode, encode
from patternsearch.network import Network
from patternsearch.pattern import Pattern

# No matrix products in the reference: elementwise sums, scans, Fourier transforms.
UNCOUNTED = {"average", "circulant", "diagonal", "low_displacement", "semiseparable"}
EXACT = {"rtol": 1e-9, "atol": 1e-10}


def assert_equal(got, wanted, case, **tolerance) -> None:
    torch.testing.assert_close(
        got, wanted, **(tolerance or EXACT), msg=lambda text: f"{case}: {text}"
    )


def flat(x: torch.Tensor, case: Case) -> torch.Tensor:
    return x.flatten(-len(case.inp))


def dense_product(case: Case, cores, x: torch.Tensor) -> torch.Tensor:
    dense = case.pattern.to_dense(cores, case.out, case.inp).to(x.dtype)
    assert dense.shape[-2:] == (math.prod(case.out), math.prod(case.inp)), f"{case}: {dense.shape}"
    y = torch.einsum("...oi,...i->...o", dense, flat(x, case))
    return y.unflatten(-1, case.out)


def check_product(case: Case) -> None:
    """matmul is the product with to_dense: values, and gradients to the input and every core."""
    results = []
    for product in (case.pattern.matmul, None):
        cores = {name: value.requires_grad_() for name, value in draw(case).items()}
        x = draw_input(case, (2, 3)).requires_grad_()
        if product is None:
            y = dense_product(case, cores, x)
        else:
            y = product(cores, x, case.out)
        weight = torch.linspace(0.5, 2, y.numel(), dtype=y.dtype).reshape(y.shape)
        wanted = [x, *cores.values()]
        grads = torch.autograd.grad((y * y * weight).sum(), wanted, materialize_grads=True)
        results.append((y.detach(), *grads))
    for got, wanted, name in zip(*results, ["y", "x", *draw(case)], strict=True):
        assert_equal(got, wanted, f"{case}, {name}")
        if 1 not in (math.prod(case.out), math.prod(case.inp)):  # a first row has no past
            assert got.any(), f"{case}: no gradient reaches {name}"


def check_oracle(case: Case) -> None:
    """to_dense and matmul agree with the matrix written from the formula."""
    if case.pattern.entry is not None or case.pattern.family not in ORACLES:
        return
    cores = draw(case, seed=5)
    wanted = torch.as_tensor(oracle(case, cores), dtype=torch.float64)
    dense = case.pattern.to_dense(cores, case.out, case.inp).double()
    assert_equal(dense, wanted, case)
    x = draw_input(case, (3,))
    got = case.pattern.matmul(cores, x, case.out).flatten(-len(case.out))
    assert_equal(got, flat(x, case) @ wanted.T, case)


def check_batched_cores(case: Case) -> None:
    """Cores with leading axes are one matrix a head, shared by the axes of x beyond them."""
    if not case.pattern.cores(case.out, case.inp):
        return
    x = draw_input(case, (2, 3, 2))
    heads = draw(case, lead=(3,))
    together = {name: value.unsqueeze(1) for name, value in heads.items()}
    y = case.pattern.matmul(together, x, case.out)
    dense = case.pattern.to_dense(together, case.out, case.inp)
    for h in range(3):
        own = {name: value[h] for name, value in heads.items()}
        assert_equal(y[:, h], case.pattern.matmul(own, x[:, h], case.out), case)
        assert_equal(dense[h, 0], case.pattern.to_dense(own, case.out, case.inp), case)


def check_codec(case: Case) -> None:
    data = encode(case.pattern)
    again = decode(Pattern, data, "pattern")
    assert again == case.pattern and hash(again) == hash(case.pattern), case
    assert str(case.pattern).startswith(case.pattern.family)


def check_counts(case: Case) -> None:
    """Parameters are the cores' elements; the cost says so too and is free of contradictions."""
    cores = draw(case)
    n = sum(value.numel() for value in cores.values())
    cost = case.pattern.cost(case.out, case.inp)
    assert n == case.pattern.parameters(case.out, case.inp) == cost.parameters, case
    o, i = math.prod(case.out), math.prod(case.inp)
    assert cost.bytes >= 4 * (n + o + i) and cost.activations >= 4 * i, case
    assert all(isinstance(value, int) and value >= 0 for value in cost.astuple()), case


def counts_products(pattern: Pattern) -> bool:
    """Whether torch's counter sees everything the reference does: matrix products alone."""
    nested = [v for v in vars(pattern).values() if isinstance(v, Pattern)]
    nested += [t for v in vars(pattern).values() if isinstance(v, tuple) for t in v]
    parts = [p for p in nested if isinstance(p, Pattern)]
    if pattern.family == "banded" and pattern.entry is None:
        return False
    return pattern.family not in UNCOUNTED and all(map(counts_products, parts))


def outer_products(case: Case) -> int:
    """FLOPs of the steps of a network that sum over nothing, which torch runs elementwise."""
    if not isinstance(case.pattern, Network):
        return 0
    plan = case.pattern.plan(case.out, case.inp)
    outer = [(s, given) for s, given in plan.walk() if set(given) <= set(s.result)]
    return sum(2 * plan.size({*step.core, *given}) for step, given in outer)


def check_flops(case: Case) -> None:
    """Torch's counter agrees; it sees products and convolutions, without a dim of one only."""
    with FlopCounterMode(display=False) as counter:
        case.pattern.matmul(draw(case), draw_input(case, ()), case.out)
    counted, stated = counter.get_total_flops(), case.pattern.cost(case.out, case.inp).flops
    shapes = [core.shape for core in case.pattern.cores(case.out, case.inp).values()]
    if counts_products(case.pattern) and not any(1 in shape for shape in shapes):
        counted += outer_products(case)
        assert counted == stated, f"{case}: torch counts {counted}, cost() says {stated}"
    elif case.pattern.family not in UNCOUNTED:
        assert counted <= stated, f"{case}: torch counts {counted}, cost() says {stated}"


def check_layouts(case: Case) -> None:
    """Zero rows give zero rows; a transposed input gives what its copy gives."""
    cores = draw(case)
    empty = case.pattern.matmul(cores, draw_input(case, (0,)), case.out)
    assert empty.shape == (0, *case.out), f"{case}: {empty.shape}"
    axes = len(case.inp) + 1
    x = draw_input(case, (3,)).permute(*reversed(range(axes))).contiguous()
    x = x.permute(*reversed(range(axes)))
    assert x.numel() <= 3 or not x.is_contiguous() or 1 in x.shape
    copied = case.pattern.matmul(cores, x.contiguous(), case.out)
    assert_equal(case.pattern.matmul(cores, x, case.out), copied, case)


def check_low_precision(case: Case, dtype: torch.dtype) -> None:
    """The error is at most twice that of the dense matrix built and applied in that precision.

    Or the first-order bound where that one was lucky: roundings x unit roundoff x |cores| |x|.
    """
    cores, x = draw(case, dtype=dtype), draw_input(case, (16,), dtype=dtype)
    exact = dense_product(case, {k: v.double() for k, v in cores.items()}, x.double())
    independent = dense_product(case, cores, x).double()
    got = case.pattern.matmul(cores, x, case.out)
    assert got.dtype == dtype, f"{case}: {got.dtype}"
    sizes = {name: value.double().abs() for name, value in cores.items()}
    scale = dense_product(case, sizes, x.double().abs()).abs().max()
    bound = roundings(case) * torch.finfo(dtype).eps / 2 * scale
    budget = torch.maximum(2 * (independent - exact).abs().max(), bound)
    error = (got.double() - exact).abs().max()
    assert error <= budget, f"{case}, {dtype}: error {error:.2e} is above {budget:.2e}"


def roundings(case: Case) -> int:
    """On the way of one number through the product: a result a core, or a position's state."""
    if case.pattern.family == "semiseparable":
        return math.prod(case.inp) + 1
    return len(case.pattern.cores(case.out, case.inp)) + 1


def check_rank(case: Case) -> None:
    dense = case.pattern.to_dense(draw(case, seed=3), case.out, case.inp).double()
    got, stated = int(torch.linalg.matrix_rank(dense)), case.pattern.matrix_rank(case.out, case.inp)
    assert got == stated, f"{case}: rank {got}, matrix_rank() says {stated}"


def check_gradcheck(case: Case) -> None:
    cores = {name: value.requires_grad_() for name, value in draw(case).items()}
    names, x = list(cores), draw_input(case, (2,)).requires_grad_()

    def product(x, *values):
        return case.pattern.matmul(dict(zip(names, values, strict=True)), x, case.out)

    assert torch.autograd.gradcheck(product, (x, *cores.values()), fast_mode=True), case


def check_causal(case: Case, axes: int) -> None:
    """Changing any position changes nothing before it. `axes`: how many dims are positions."""
    cores, x = draw(case), draw_input(case)
    y = case.pattern.matmul(cores, x, case.out)
    n = math.prod(case.inp[:axes])
    for cut in range(1, n):
        changed = x.flatten(1, axes).clone()
        changed[:, cut:] += 1
        again = case.pattern.matmul(cores, changed.unflatten(1, case.inp[:axes]), case.out)
        before = (y - again).flatten(1, axes)[:, :cut]
        assert not before.any(), f"{case}: position {cut} leaks"
    dense = case.pattern.to_dense(cores, case.out, case.inp).double()
    channels = math.prod(case.inp[axes:])
    blocks = dense.unflatten(-1, (n, channels)).unflatten(-3, (n, -1)).abs().sum((-1, -3))
    assert not blocks.triu(1).any(), f"{case}: to_dense sees the future"
