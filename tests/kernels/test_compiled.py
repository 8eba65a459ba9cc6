"""What torch.compile sees of the operators on CPU: loops it can fuse where they pay, else one call.

That every operator compiles without a graph break is tested beside it.
"""

import os
import shutil

import pytest
import torch
from common import leaves

from patternsearch.kernels.linear_attention import linear_attention
from patternsearch.kernels.linear_scan import linear_scan
from patternsearch.kernels.toeplitz_conv import toeplitz_conv

COMPILER = any(name and shutil.which(name) for name in (os.environ.get("CXX"), "g++", "clang++"))
pytestmark = pytest.mark.filterwarnings(  # torch's own
    "ignore:.*should not be instantiated:DeprecationWarning",
)


def conv(x, taps, impl="auto"):
    return toeplitz_conv(x, taps, lower=2, upper=1, impl=impl)


def scan(a, b, impl="auto"):
    return linear_scan(a, b, reverse=True, impl=impl)


def attend(q, k, v, decay=None, impl="auto"):
    return linear_attention(q, k, v, decay=decay, impl=impl)


def rows(length, *rest, count=1, dtype=torch.float32):
    return [torch.rand(2, length, *rest, dtype=dtype) for _ in range(count)]


def filtered(length, taps=4, dtype=torch.float32):
    return [*rows(length, 3, dtype=dtype), torch.rand(taps, 3, dtype=dtype)]


def triple(length, **how):
    return rows(length, 2, 4, count=3, **how)


def decayed(length):
    return [*triple(length), -torch.rand(2, length, 2)]


def traced(run, *inputs, dynamic=None):
    """Output and gradients of `run` as one graph, and that graph's text."""
    seen = []

    def keep(graph, _):
        seen.append(graph.print_readable(print_output=False))
        return graph

    tensors = leaves(*inputs)
    torch.compiler.reset()
    y = torch.compile(run, fullgraph=True, backend=keep, dynamic=dynamic)(*tensors)
    return (y, *torch.autograd.grad(y.square().sum(), tensors)), seen[0]


def expected(run, *inputs):
    tensors = leaves(*inputs)
    y = run(*tensors, impl="kernel")
    return (y, *torch.autograd.grad(y.square().sum(), tensors))


def assert_alike(found, wanted):
    """To the rounding of sums in another order, of numbers as large as the largest."""
    for x, y in zip(found, wanted, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5 * y.abs().max().item())


@pytest.mark.parametrize(
    ("run", "make"),
    [
        (conv, lambda: filtered(40)),
        (scan, lambda: rows(40, 3, count=2)),
        (attend, lambda: triple(40)),
        (attend, lambda: decayed(70)),
    ],
    ids=["conv", "scan", "attend", "decayed"],
)
def test_small_work_is_left_to_the_compiler(unpoisoned, run, make):
    inputs = make()
    found, graph = traced(run, *inputs)
    assert "patternsearch" not in graph
    assert_alike(found, expected(run, *inputs))


def test_the_rest_is_one_call(unpoisoned):
    half = {"dtype": torch.bfloat16}
    cases = [
        (conv, filtered(40, 4, **half), None),
        (lambda *x: toeplitz_conv(*x, lower=32, upper=0), filtered(40, 33), None),
        (lambda *x: conv(*x, impl="kernel"), filtered(40), None),
        (scan, rows(300, 3, count=2), None),
        (scan, rows(40, 3, count=2), True),  # every length would be unrolled anew
        (attend, triple(300), None),
        (attend, triple(40, **half), None),
        (attend, [*triple(40), -torch.rand(2, 40, 2, 4)], None),
        (attend, triple(40), True),
    ]
    for run, inputs, dynamic in cases:
        assert "patternsearch" in traced(run, *inputs, dynamic=dynamic)[1]


def test_sizes_may_be_dynamic(unpoisoned):
    def run(x, taps, a, q, k):
        return attend(q, k, scan(a, conv(x, taps)).unflatten(2, (1, 3)))

    torch.compiler.reset()
    built = torch.compile(run, fullgraph=True, backend="aot_eager", dynamic=True)
    for length in (20, 33, 50):
        inputs = [*filtered(length), *rows(length, 3), *rows(length, 1, 4, count=2)]
        assert_alike([built(*inputs)], [run(*inputs)])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # inductor's own
@pytest.mark.skipif(not COMPILER, reason="inductor needs a C++ compiler")
def test_fused_by_inductor(unpoisoned):
    def run(x, taps, a, q, k, impl="auto"):
        values = scan(a, conv(x, taps, impl), impl).unflatten(2, (1, 3))
        return attend(q, k, values, impl=impl)

    inputs = [*filtered(20), *rows(20, 3), *rows(20, 1, 4, count=2)]
    tensors = leaves(*inputs)
    torch.compiler.reset()
    y = torch.compile(run, fullgraph=True)(*tensors)
    assert_alike((y, *torch.autograd.grad(y.square().sum(), tensors)), expected(run, *inputs))
