import importlib
import logging

import pytest
import torch
from common import LOW, assert_within_budget, doubled, leaves, needs_interpreter

from patternsearch.errors import KernelError
from patternsearch.kernels.banded_matmul import banded_matmul, status

CPU = importlib.import_module("patternsearch.kernels._banded_matmul_cpu")
WIDTHS = {  # name: batch, length, heads, size, lower, upper, dilation
    "one": (1, 1, 1, 1, 0, 0, 1),
    "short": (3, 13, 2, 5, 3, 2, 1),
    "short dilated": (2, 31, 1, 4, 2, 3, 4),
    "causal": (2, 131, 1, 64, 15, 0, 1),
    "anticausal": (2, 149, 2, 7, 0, 40, 1),
    "two-sided": (1, 257, 2, 16, 33, 30, 1),
    "wider than the sequence": (2, 97, 1, 3, 120, 130, 1),
    "few blocks": (9, 101, 1, 5, 9, 11, 1),
    "dilated": (2, 211, 1, 6, 5, 4, 3),
    "dilated past the end": (1, 73, 1, 4, 2, 2, 50),
    "wide": (1, 1201, 1, 3, 300, 280, 1),
    "large batch": (33, 64, 1, 32, 5, 4, 1),
}
everywhere = pytest.mark.parametrize("case", WIDTHS.values(), ids=WIDTHS.keys())
both_ways = pytest.mark.parametrize("transpose", (False, True), ids=("plain", "transposed"))


def matrices(band, lower, dilation):
    """[H, T, T], one diagonal of the band after the other."""
    heads, length, width = band.shape
    full = torch.zeros(heads, length, length, dtype=band.dtype, device=band.device)
    t = torch.arange(length, device=band.device)
    for j in range(width):
        s = t + (j - lower) * dilation
        inside = (s >= 0) & (s < length)
        full[:, t[inside], s[inside]] = band[:, inside, j]
    return full


def naive(x, band, lower, dilation, transpose):
    """Each head's matrix, in the dtype of the inputs."""
    full = matrices(band, lower, dilation)
    full = full.transpose(1, 2) if transpose else full
    return torch.stack([full[h] @ x[:, :, h] for h in range(x.shape[2])], 2)


def make(case, dtype, device="cpu"):
    batch, length, heads, size, lower, upper, _ = case
    x = torch.randn(batch, length, heads, size, device=device).to(dtype)
    band = torch.randn(heads, length, lower + upper + 1, device=device).to(dtype)
    return x, band, torch.randn(batch, length, heads, size, device=device).to(dtype)


def compare(case, dtype, transpose, device="cpu", run=None):
    """Output and gradients against naive, beside naive in the same dtype."""
    lower, upper, dilation = case[4:]
    x, band, grad = make(case, dtype, device)
    how = {"lower": lower, "upper": upper, "dilation": dilation, "transpose": transpose}
    if run is None:
        ours = leaves(x, band)
        y = banded_matmul(*ours, **how, impl="kernel")
        y.backward(grad)
        got = y.detach(), ours[0].grad, ours[1].grad
    else:
        got = run(x, band, grad, lower, upper, dilation, transpose)
    found = []
    for inputs in (leaves(x, band), doubled(x, band)):
        z = naive(*inputs, lower, dilation, transpose)
        z.backward(grad.to(z.dtype))
        found.append((z.detach(), inputs[0].grad, inputs[1].grad))
    for name, *values in zip(("y", "dx", "dband"), got, *found, strict=True):
        assert_within_budget(name, *values)


@everywhere
@both_ways
def test_float32(case, transpose):
    compare(case, torch.float32, transpose)


@everywhere
@both_ways
def test_blocks_of_their_own_at_the_ends(case, transpose, monkeypatch):
    monkeypatch.setattr(CPU, "SHORT", 0)
    compare(case, torch.float32, transpose)


@pytest.mark.parametrize("dtype", LOW[1:], ids=str)
@pytest.mark.parametrize("name", ("short", "two-sided", "dilated", "few blocks"))
def test_half(name, dtype):
    compare(WIDTHS[name], dtype, name == "dilated")


@everywhere
@both_ways
def test_float64_is_exact(case, transpose):
    lower, upper, dilation = case[4:]
    x, band, grad = make(case, torch.float64)
    pairs = []
    for run in (
        lambda a, b: banded_matmul(
            a, b, lower=lower, upper=upper, dilation=dilation, transpose=transpose
        ),
        lambda a, b: naive(a, b, lower, dilation, transpose),
    ):
        ours = leaves(x, band)
        y = run(*ours)
        y.backward(grad)
        pairs.append((y, ours[0].grad, ours[1].grad))
    for a, b in zip(*pairs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@both_ways
@pytest.mark.parametrize("dilation", (1, 3))
def test_plain_torch_formulation(transpose, dilation):
    x, band, _ = make((2, 11, 3, 4, 2, 4, dilation), torch.float64)
    how = {"lower": 2, "upper": 4, "dilation": dilation, "transpose": transpose}
    y = banded_matmul(x, band, **how, impl="torch")
    torch.testing.assert_close(y, naive(x, band, 2, dilation, transpose))


@both_ways
@pytest.mark.parametrize("length", (7, 70))
def test_gradcheck(length, transpose):
    x, band, _ = make((2, length, 1, 2, 2, 1, 1), torch.float64)

    def run(a, b):
        return banded_matmul(a, b, lower=2, upper=1, transpose=transpose, impl="kernel")

    assert torch.autograd.gradcheck(run, leaves(x, band), fast_mode=length > 10)


@pytest.mark.parametrize("length", (9, 80))
def test_opcheck(length, unpoisoned):
    x, band, grad = make((2, length, 2, 3, 4, 2, 1), torch.float32)
    ops = torch.ops.patternsearch
    how = 4, 2, 1, False
    torch.library.opcheck(ops.banded_matmul.default, (x, band, *how))
    torch.library.opcheck(ops.banded_matmul_backward.default, (grad, x, band, *how))
    torch.library.opcheck(ops.banded_matmul_band_backward.default, (grad, x, band, *how))


@pytest.mark.parametrize("shape", ((0, 5, 2, 3), (2, 0, 2, 3), (2, 5, 0, 3), (2, 5, 2, 0)))
def test_empty(shape):
    x = torch.randn(shape).requires_grad_()
    band = torch.randn(shape[2], shape[1], 4).requires_grad_()
    y = banded_matmul(x, band, lower=2, upper=1)
    assert y.shape == shape
    y.sum().backward()
    assert x.grad.shape == x.shape
    assert torch.equal(band.grad, torch.zeros_like(band))


@pytest.mark.parametrize("length", (20, 150))
def test_strided_inputs(length):
    x, band, _ = make((2, length, 2, 4, 3, 2, 1), torch.float64)
    wide = torch.zeros(2, length, 2, 9, dtype=x.dtype)
    wide[..., 3:7] = x
    turned = band.transpose(0, 1).contiguous().transpose(0, 1)
    expected = naive(x, band, 3, 1, False)
    for a, b in ((wide[..., 3:7], turned), (x.transpose(2, 3).contiguous().transpose(2, 3), band)):
        torch.testing.assert_close(banded_matmul(a, b, lower=3, upper=2), expected)
    ours = leaves(x, band)
    banded_matmul(*ours, lower=3, upper=2).sum().backward()  # a gradient without strides
    theirs = leaves(x, band)
    naive(*theirs, 3, 1, False).sum().backward()
    torch.testing.assert_close([t.grad for t in ours], [t.grad for t in theirs])


@pytest.mark.parametrize("length", (20, 150))
def test_one_gradient_alone(length):
    x, band, grad = make((2, length, 2, 4, 3, 2, 1), torch.float32)
    full = leaves(x, band)
    banded_matmul(*full, lower=3, upper=2).backward(grad)
    for i in range(2):
        one = [x, band]
        one[i] = one[i].clone().requires_grad_()
        banded_matmul(*one, lower=3, upper=2).backward(grad)
        assert torch.equal(one[i].grad, full[i].grad)


def test_bitwise_repeatable():
    runs = []
    for _ in range(2):
        torch.manual_seed(1)
        x, band, grad = make((3, 300, 2, 8, 20, 20, 1), torch.float32)
        ours = leaves(x, band)
        y = banded_matmul(*ours, lower=20, upper=20)
        y.backward(grad)
        runs.append((y, ours[0].grad, ours[1].grad))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


# torch's own tracing of an autograd function warns in the name of its user
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiles_whole(unpoisoned):
    x, band, grad = make((2, 90, 1, 4, 3, 2, 1), torch.float32)

    def run(a, b):
        return banded_matmul(a, b, lower=3, upper=2) * 2

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    results = []
    for f in (run, compiled):
        ours = leaves(x, band)
        y = f(*ours)
        y.backward(grad)
        results.append((y, ours[0].grad, ours[1].grad))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_wrong_arguments():
    x, band = torch.randn(2, 5, 1, 3), torch.randn(1, 5, 4)
    with pytest.raises(KernelError, match=r"Give x as \[B, T, H, D\]"):
        banded_matmul(x[0], band, lower=2, upper=1)
    with pytest.raises(KernelError, match=r"= \(1, 5, 5\)"):
        banded_matmul(x, band, lower=2, upper=2)
    with pytest.raises(KernelError, match="lower=-1"):
        banded_matmul(x, band, lower=-1, upper=4)
    with pytest.raises(KernelError, match=r"torch\.float64"):
        banded_matmul(x, band.double(), lower=2, upper=1)
    with pytest.raises(KernelError, match="Did you mean 'torch'"):
        banded_matmul(x, band, lower=2, upper=1, impl="torhc")


def test_status():
    assert status("cpu") is None
    assert "meta" in status("meta")


def test_no_matrix_is_built(monkeypatch, caplog):
    """Long sequences never hold T x T numbers, and the choice is not announced as a fallback."""
    monkeypatch.setattr(CPU, "shear", None)
    x, band, _ = make((1, 65, 1, 4, 3, 2, 1), torch.float32)
    with caplog.at_level(logging.INFO):
        banded_matmul(x, band, lower=3, upper=2)
    assert not caplog.records


TRITON = {
    "tiny": (1, 1, 1, 1, 0, 0, 1),
    "causal": (2, 67, 2, 17, 6, 0, 1),
    "two-sided": (3, 70, 1, 33, 40, 33, 1),
    "dilated": (2, 53, 1, 5, 2, 3, 3),
    "wider than the sequence": (1, 19, 1, 4, 23, 25, 1),
    "wide": (1, 230, 1, 3, 210, 0, 1),
}


def launched(*args):
    """Forward and backward through the Triton kernels, whatever the device."""
    x, band, grad, *how = args
    module = importlib.import_module("patternsearch.kernels._banded_matmul_triton")
    y = module.apply(x, band, *how)
    dx, dband = module.backward(grad, x, band, *how)
    assert torch.equal(module.band_backward(grad, x, band, *how), dband)
    return y, dx, dband


@needs_interpreter
@both_ways
@pytest.mark.parametrize("case", TRITON.values(), ids=TRITON.keys())
def test_triton_interpreted(case, transpose):
    compare(case, torch.float32, transpose, run=launched)


@needs_interpreter
@pytest.mark.parametrize("dtype", LOW[1:], ids=str)
def test_triton_interpreted_half(dtype):
    compare(TRITON["causal"], dtype, False, run=launched)


@pytest.mark.gpu
@both_ways
@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("case", (WIDTHS | TRITON).values(), ids=(WIDTHS | TRITON).keys())
def test_cuda(case, dtype, transpose):
    compare(case, dtype, transpose, device="cuda")


@pytest.mark.gpu
def test_cuda_is_bitwise_repeatable():
    args = make((4, 1000, 2, 64, 30, 30, 1), torch.bfloat16, "cuda")
    how = 30, 30, 1, False
    for a, b in zip(launched(*args, *how), launched(*args, *how), strict=True):
        assert torch.equal(a, b)


@pytest.mark.gpu
def test_cuda_graph():
    x, band, grad = make((2, 500, 2, 64, 30, 30, 1), torch.bfloat16, "cuda")
    how = 30, 30, 1, False
    expected = launched(x, band, grad, *how)  # compiles before the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = launched_without_checks(x, band, grad, *how)
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def launched_without_checks(x, band, grad, *how):
    module = importlib.import_module("patternsearch.kernels._banded_matmul_triton")
    return module.apply(x, band, *how), *module.backward(grad, x, band, *how)
