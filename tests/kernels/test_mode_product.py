import importlib
import math
from itertools import accumulate

import pytest
import torch
from common import LOW, assert_within_budget, doubled, leaves, needs_interpreter

from patternsearch.errors import KernelError
from patternsearch.kernels import _mode_product_cpu as plain_torch
from patternsearch.kernels.mode_product import mode_product, status
from patternsearch.layers import FeatureMap
from patternsearch.ops import implementation
from patternsearch.patterns.kronecker import Kronecker
from patternsearch.patterns.tt import TensorTrain
from patternsearch.patterns.tucker import Tucker

CASES = {  # name: rows, inputs of a row, (out, in, trailing) of each step
    "one": (1, 1, ((1, 1, 1),)),
    "linear": (5, 12, ((7, 12, 1),)),
    "two modes": (9, 6 * 5, ((4, 6, 5), (7, 5, 1))),
    "last first": (9, 6 * 5, ((7, 5, 1), (4, 6, 7))),
    "wide modes": (3, 3 * 70, ((5, 3, 70), (66, 70, 1))),
    "three modes": (33, 17 * 3 * 11, ((2, 17, 33), (5, 3, 11), (11, 11, 1))),
    "across": (3, 24, ((3, 6, 4), (5, 2, 6), (4, 10, 1))),  # an axis of parts of the two before it
    "bonds": (4, 4 * 3 * 5, ((6 * 3, 4, 15), (2 * 2, 3 * 3, 5), (5, 2 * 5, 1))),
}
everywhere = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def naive(x, steps, factors, biases):
    for k, (factor, (_, _, after)) in enumerate(zip(factors, steps, strict=True)):
        z = x.unflatten(-1, (-1, factor.shape[1], after)).transpose(-1, -2)
        z = z @ factor.t()
        z = z + biases[k] if biases else z
        x = z.transpose(-1, -2).flatten(-3)
    return x


def make(case, dtype, bias=True, device="cpu"):
    rows, n, steps = case
    factors = [torch.randn(o, i, device=device) / i**0.5 for o, i, _ in steps]
    biases = [torch.randn(o, device=device) for o, _, _ in steps if bias]
    m = n * math.prod(o for o, _, _ in steps) // math.prod(i for _, i, _ in steps)
    x, grad = torch.randn(rows, n, device=device), torch.randn(rows, m, device=device)
    return [t.to(dtype) for t in (x, *factors, *biases)], grad.to(dtype)


def run(tensors, steps, **how):
    x, *cores = tensors
    n = len(steps)
    return mode_product(
        x, cores[:n], trailing=[s[2] for s in steps], biases=cores[n:] or None, **how
    )


def registered(tensors, grad, steps):
    ours = leaves(*tensors)
    y = run(ours, steps, impl="kernel")
    y.backward(grad)
    return y.detach(), *(t.grad for t in ours)


def launched(tensors, grad, steps):
    """Forward and backward through the Triton kernels, whatever the device."""
    module = importlib.import_module("patternsearch.kernels._mode_product_triton")
    x, *cores = tensors
    how = cores[: len(steps)], cores[len(steps) :], [s[2] for s in steps]
    return module.forward(x, *how), *module.backward(grad, x, *how, True)


def differentiated(inputs, grad, steps):
    """Output and gradients of naive."""
    x, *cores = inputs
    z = naive(x, steps, cores[: len(steps)], cores[len(steps) :])
    z.backward(grad.to(z.dtype))
    return z.detach(), *(t.grad for t in inputs)


def compare(case, dtype, bias=True, device="cpu", run_all=registered):
    """Output and gradients against naive, beside naive in the same dtype."""
    steps = case[2]
    tensors, grad = make(case, dtype, bias, device)
    got = run_all(tensors, grad, steps)
    reference = differentiated(leaves(*tensors), grad, steps)
    exact = differentiated(doubled(*tensors), grad, steps)
    for k, values in enumerate(zip(got, reference, exact, strict=True)):
        assert_within_budget(f"result {k}", *values)


def compare_any_order(case):
    """Within the bound of sums in any order: the interpreter adds one term after the other.

    Every result is a sum of products, each rounded at most as often as the longest chain of
    operations is long; so the error is at most that many roundings of the sum of magnitudes (Higham
    2002, section 3.1). Of a sum whose terms cancel, twice the error of torch's would be less.
    """
    rows, n, steps = case
    tensors, grad = make(case, torch.float32)
    exact = differentiated(doubled(*tensors), grad, steps)
    magnitudes = differentiated(doubled(*(t.abs() for t in tensors)), grad.abs(), steps)
    sizes = accumulate(steps, lambda size, step: size // step[1] * step[0], initial=n)
    roundings = sum(o + i + 2 for o, i, _ in steps) + rows * max(sizes)
    unit = torch.finfo(torch.float32).eps / 2
    for got, right, size in zip(launched(tensors, grad, steps), exact, magnitudes, strict=True):
        assert ((got.double() - right).abs() <= roundings * unit * size).all()


@everywhere
@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("bias", (False, True))
def test_cpu(case, dtype, bias):
    compare(case, dtype, bias)


@everywhere
@pytest.mark.parametrize("impl", ("auto", "torch", "kernel"))
@pytest.mark.parametrize("rows", (2, 300))
def test_float64_is_exact(case, impl, rows):
    steps = case[2]
    tensors, grad = make((rows, *case[1:]), torch.float64)
    pairs = []
    for compute in (
        lambda t: run(t, steps, impl=impl),
        lambda t: naive(t[0], steps, t[1 : len(steps) + 1], t[len(steps) + 1 :]),
    ):
        ours = leaves(*tensors)
        y = compute(ours)
        y.backward(grad)
        pairs.append((y, *(t.grad for t in ours)))
    for a, b in zip(*pairs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


def test_many_slabs():
    """Rows beyond one slab add up in the factors' gradients."""
    compare((700, 32 * 32, ((32, 32, 32), (32, 32, 1))), torch.float32)


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("bias", (False, True))
def test_one_matrix(dtype, bias):
    """So few numbers, and so many rows, that the factors are multiplied first."""
    steps = ((7, 5, 6), (3, 6, 1))
    assert plain_torch.narrow(torch.empty(0, dtype=dtype), 61, (30, 42, 21))
    assert not plain_torch.narrow(torch.empty(0, dtype=dtype), 59, (30, 42, 21))
    compare((61, 30, steps), dtype, bias)


def test_gradcheck():
    case = CASES["bonds"]
    tensors, _ = make((2, *case[1:]), torch.float64)
    inputs = leaves(*tensors)
    assert torch.autograd.gradcheck(
        lambda *t: run(t, case[2], impl="kernel"), inputs, fast_mode=True
    )


def test_opcheck(unpoisoned):
    case = CASES["two modes"]
    tensors, grad = make(case, torch.float32)
    x, *cores = tensors
    how = cores[:2], cores[2:], [s[2] for s in case[2]]
    ops = torch.ops.patternsearch
    torch.library.opcheck(ops.mode_product.default, (x, *how))
    torch.library.opcheck(ops.mode_product_backward.default, (grad, x, *how, True))


@pytest.mark.parametrize("lead", ((), (0,), (2, 0), (2, 3)))
def test_leading_axes(lead):
    steps = CASES["two modes"][2]
    tensors, _ = make(CASES["two modes"], torch.float64)
    tensors[0] = torch.randn(*lead, 30, dtype=torch.float64).requires_grad_()
    y = run(tensors, steps, impl="kernel")
    torch.testing.assert_close(y, run(tensors, steps, impl="torch"))
    y.sum().backward()  # a gradient without strides
    assert tensors[0].grad.shape == (*lead, 30)


# torch's own tracing of an autograd function warns in the name of its user
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiles_whole(unpoisoned):
    steps = CASES["two modes"][2]
    tensors, grad = make(CASES["two modes"], torch.float32)
    results = []
    f = lambda *t: run(t, steps, impl="kernel") * 2  # noqa: E731
    for g in (f, torch.compile(f, fullgraph=True, backend="aot_eager")):
        ours = leaves(*tensors)
        y = g(*ours)
        y.backward(grad)
        results.append((y, *(t.grad for t in ours)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize(
    "pattern",
    (
        Kronecker(modes=3),
        Kronecker(modes=3, bias=True, outer_first=False),
        Tucker(modes=2, rank=3),
        Tucker(modes=3),
        TensorTrain(modes=3, rank=3),
        TensorTrain(modes=1, rank=1),
    ),
    ids=str,
)
def test_patterns_run_by_it(pattern):
    layer = FeatureMap(pattern, 60, 96)
    for numbers in layer.numbers.values():
        torch.nn.init.normal_(numbers)
    layer, x = layer.double(), torch.randn(2, 40, 60, dtype=torch.float64)
    with implementation("reference"):
        expected = layer(x)
    for impl in ("auto", "kernel"):
        with implementation(impl):
            torch.testing.assert_close(layer(x), expected)


def test_wrong_arguments():
    x, factor = torch.randn(2, 6), torch.randn(4, 3)
    with pytest.raises(KernelError, match="one number in trailing for each"):
        mode_product(x, [factor], trailing=[])
    with pytest.raises(KernelError, match="step 0 is given 6 entries a row"):
        mode_product(x, [factor], trailing=[4])
    with pytest.raises(KernelError, match=r"biases\[0\] has shape \(3,\)"):
        mode_product(x, [factor], trailing=[2], biases=[torch.randn(3)])
    with pytest.raises(KernelError, match=r"Give a matrix \[out, in\]"):
        mode_product(x, [factor[0]], trailing=[2])


def test_status():
    assert status("cpu") is None
    assert "meta" in status("meta")


@needs_interpreter
@everywhere
def test_triton_interpreted(case):
    compare_any_order(case)


@needs_interpreter
@pytest.mark.parametrize("dtype", LOW[1:], ids=str)
def test_triton_interpreted_half(dtype):
    compare(CASES["linear"], dtype, False, run_all=launched)


@pytest.mark.gpu
@everywhere
@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_cuda(case, dtype):
    compare(case, dtype, device="cuda")
