import importlib
import logging
import math

import pytest
import torch
from common import LOW, assert_within_budget, doubled, leaves, needs_interpreter

from patternsearch.errors import KernelError
from patternsearch.kernels.window_attention import status, window_attention

CASES = {  # name: batch, length, heads, key heads, size, lower, upper, dilation
    "one": (1, 1, 1, 1, 1, 0, 0, 1),
    "itself only": (2, 71, 1, 1, 3, 0, 0, 1),
    "short": (2, 13, 2, 2, 5, 3, 2, 1),
    "causal": (1, 331, 2, 1, 8, 17, 0, 1),
    "anticausal": (2, 149, 2, 2, 7, 0, 40, 1),
    "two-sided": (1, 257, 4, 2, 16, 33, 30, 1),
    "causal full": (2, 97, 2, 1, 4, None, 0, 1),
    "full": (1, 83, 2, 2, 4, None, None, 1),
    "ahead without end": (1, 131, 1, 1, 4, 5, None, 1),
    "few blocks": (9, 101, 3, 1, 5, 9, 11, 1),
    "dilated": (2, 211, 2, 1, 6, 5, 4, 3),
    "dilated causal full": (1, 83, 1, 1, 4, None, 0, 5),
    "dilated past the end": (1, 73, 1, 1, 4, 2, 2, 50),
    "wide": (1, 577, 1, 1, 3, 150, 120, 1),
}
everywhere = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def naive(q, k, v, lower, upper, dilation, scale=None):
    """All scores in the dtype of the inputs, one softmax over what is visible."""
    length, group = q.shape[1], q.shape[2] // k.shape[2]
    k, v = (t.repeat_interleave(group, 2) for t in (k, v))
    t = torch.arange(length, device=q.device)
    step = t[None, :] - t[:, None]
    seen = step % dilation == 0
    if lower is not None:
        seen &= step >= -lower * dilation
    if upper is not None:
        seen &= step <= upper * dilation
    scores = torch.einsum("bthd,bshd->bhts", q, k)
    scores = scores * (1 / math.sqrt(q.shape[3]) if scale is None else scale)
    weights = torch.softmax(scores.masked_fill(~seen, -math.inf), -1)
    return torch.einsum("bhts,bshd->bthd", weights, v)


def make(case, dtype, device="cpu"):
    batch, length, heads, shared, size = case[:5]
    shapes = [(batch, length, n, size) for n in (heads, shared, shared, heads)]
    return tuple(torch.randn(s, device=device).to(dtype) for s in shapes)


def outcome(run, inputs, grad):
    y = run(*inputs)
    y.backward(grad.to(y.dtype))
    return y.detach(), *(t.grad for t in inputs)


def compare(case, dtype, device="cpu", run=None):
    """Output and gradients against naive, beside naive in the same dtype."""
    lower, upper, dilation = case[5:]
    *inputs, grad = make(case, dtype, device)

    def ours(q, k, v):
        how = {"lower": lower, "upper": upper, "dilation": dilation}
        return window_attention(q, k, v, **how, impl="kernel")

    def reference(q, k, v):
        return naive(q, k, v, lower, upper, dilation)

    got = run(*inputs, grad, case) if run else outcome(ours, leaves(*inputs), grad)
    low = outcome(reference, leaves(*inputs), grad)
    exact = outcome(reference, doubled(*inputs), grad)
    for name, *values in zip(("y", "dq", "dk", "dv"), got, low, exact, strict=True):
        assert_within_budget(name, *values)


@everywhere
def test_float32(case):
    compare(case, torch.float32)


def test_large_blocks_are_taken_singly():
    compare((2, 330, 8, 2, 64, 200, 0, 1), torch.float32)


@pytest.mark.parametrize("dtype", LOW[1:], ids=str)
@pytest.mark.parametrize("name", ("short", "two-sided", "dilated", "few blocks"))
def test_half(name, dtype):
    compare(CASES[name], dtype)


@everywhere
@pytest.mark.parametrize("impl", ("auto", "torch", "kernel"))
def test_float64_is_exact(case, impl):
    lower, upper, dilation = case[5:]
    *inputs, grad = make(case, torch.float64)

    def ours(q, k, v):
        how = {"lower": lower, "upper": upper, "dilation": dilation, "scale": 0.7}
        return window_attention(q, k, v, **how, impl=impl)

    def reference(q, k, v):
        return naive(q, k, v, lower, upper, dilation, 0.7)

    got = outcome(ours, leaves(*inputs), grad)
    expected = outcome(reference, leaves(*inputs), grad)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("length", (6, 70))
def test_gradcheck(length):
    q, k, v, _ = make((1, length, 2, 1, 2, 3, 1, 1), torch.float64)

    def run(*inputs):
        return window_attention(*inputs, lower=3, upper=1, impl="kernel")

    assert torch.autograd.gradcheck(run, leaves(q, k, v), fast_mode=length > 10)


def test_opcheck(unpoisoned):
    *inputs, grad = make((2, 40, 4, 2, 3, 4, 2, 1), torch.float32)
    ops = torch.ops.patternsearch
    how = 4, 2, 1, 0.5
    torch.library.opcheck(ops.window_attention.default, (*inputs, *how))
    kept = ops.window_attention(*inputs, *how)
    torch.library.opcheck(ops.window_attention_backward.default, (grad, *inputs, *kept, *how))


@pytest.mark.parametrize("impl", ("auto", "kernel"))
@pytest.mark.parametrize("shape", ((0, 5, 2, 3), (2, 0, 2, 3), (2, 5, 0, 3), (2, 5, 2, 0)))
def test_empty(shape, impl):
    inputs = [torch.randn(shape).requires_grad_() for _ in range(3)]
    y = window_attention(*inputs, lower=2, upper=1, impl=impl)
    assert y.shape == shape
    y.sum().backward()
    assert all(t.grad.shape == shape for t in inputs)


def test_strided_inputs():
    *inputs, _ = make((2, 150, 2, 2, 4, 9, 5, 1), torch.float64)
    packed = torch.stack(inputs, 3).reshape(2, 150, 2, 12)
    q, k, v = packed[..., :4], packed[..., 4:8], packed[..., 8:]
    q, k, v = inputs[0].transpose(1, 2).contiguous().transpose(1, 2), packed[..., 4:8], inputs[2]
    v = v.transpose(2, 3).contiguous().transpose(2, 3)  # not even the last stride is 1
    ours, theirs = leaves(q, k, v), leaves(*inputs)
    y = window_attention(*ours, lower=9, upper=5, impl="kernel")
    z = naive(*theirs, 9, 5, 1)
    torch.testing.assert_close(y, z)
    y.sum().backward()  # a gradient without strides
    z.sum().backward()
    torch.testing.assert_close([t.grad for t in ours], [t.grad for t in theirs])


def test_large_scores_stay_finite():
    q, k, v, grad = make((1, 100, 1, 1, 4, 9, 5, 1), torch.float32)
    got = outcome(
        lambda *t: window_attention(*t, lower=9, upper=5, scale=1e4, impl="kernel"),
        leaves(q, k, v),
        grad,
    )
    assert all(t.isfinite().all() for t in got)


def test_the_future_does_not_leak():
    q, k, v, _ = make((1, 200, 1, 1, 4, 20, 0, 1), torch.float32)
    y = window_attention(q, k, v, lower=20, upper=0, impl="kernel")
    k[:, 150:] += 1
    v[:, 150:] += 1
    z = window_attention(q, k, v, lower=20, upper=0, impl="kernel")
    assert torch.equal(y[:, :150], z[:, :150])
    assert not torch.equal(y[:, 150:], z[:, 150:])


def test_bitwise_repeatable():
    runs = []
    for _ in range(2):
        torch.manual_seed(1)
        *inputs, grad = make((3, 300, 2, 1, 8, 20, 20, 1), torch.float32)
        runs.append(
            outcome(lambda *t: window_attention(*t, lower=20, upper=20), leaves(*inputs), grad)
        )
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_memory_grows_with_length_only():
    """The largest tensor that the operator makes grows no faster than T."""
    peaks = []
    for length in (2048, 8192):
        *inputs, grad = make((1, length, 1, 1, 8, 32, 0, 1), torch.float32)
        with torch.profiler.profile(profile_memory=True) as seen:
            outcome(lambda *t: window_attention(*t, lower=32, upper=0), leaves(*inputs), grad)
        peaks.append(max(e.self_cpu_memory_usage for e in seen.events()))
    assert 0 < peaks[1] <= 4.5 * peaks[0]  # T * T would be 16 times as much


# torch's own tracing of an autograd function warns in the name of its user
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiles_whole(unpoisoned):
    *inputs, grad = make((2, 400, 2, 1, 4, 9, 5, 1), torch.float32)

    def run(*t):
        return window_attention(*t, lower=9, upper=5) * 2

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    a, b = (outcome(f, leaves(*inputs), grad) for f in (run, compiled))
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_choice_is_logged_once(caplog):
    q, k, v, _ = make((1, 20, 1, 1, 4, 2, 0, 1), torch.float32)
    importlib.import_module("patternsearch.kernels._runtime")._said.clear()
    with caplog.at_level(logging.INFO, "patternsearch.kernels"):
        window_attention(q, k, v, lower=2, upper=0)
        window_attention(q, k, v, lower=2, upper=0)
    (record,) = caplog.records
    assert record.message.endswith("short sequences cost less in one piece")


def test_wrong_arguments():
    q, k, v, _ = make((2, 5, 4, 2, 3, 2, 0, 1), torch.float32)
    with pytest.raises(KernelError, match=r"Give q as \[B, T, H, D\]"):
        window_attention(q[0], k, v)
    with pytest.raises(KernelError, match="Hk a divisor"):
        window_attention(q[:, :, :3], k, v)
    with pytest.raises(KernelError, match=r"v \(2, 4, 2, 3\)"):
        window_attention(q, k, v[:, :4])
    with pytest.raises(KernelError, match="dilation=0"):
        window_attention(q, k, v, dilation=0)
    with pytest.raises(KernelError, match="lower=-2"):
        window_attention(q, k, v, lower=-2)
    with pytest.raises(KernelError, match=r"torch\.float64"):
        window_attention(q, k.double(), v)


def test_status():
    assert status("cpu") is None
    assert "meta" in status("meta")


TRITON = {
    "tiny": (1, 1, 1, 1, 1, 0, 0, 1),
    "causal": (2, 131, 2, 1, 17, 20, 0, 1),
    "two-sided": (1, 150, 1, 1, 16, 60, 50, 1),
    "all of it": (1, 70, 1, 1, 4, 69, 69, 1),
    "dilated": (1, 101, 2, 2, 5, 2, 3, 3),
}


def launched(q, k, v, grad, case):
    """Forward and backward through the Triton kernels, whatever the device."""
    module = importlib.import_module("patternsearch.kernels._window_attention_triton")
    plain = importlib.import_module("patternsearch.kernels._window_attention_cpu")
    how = *plain.reach(q.shape[1], *case[5:]), case[7], 1 / math.sqrt(q.shape[3])
    out, lse = module.forward(q, k, v, *how)
    return out, *module.backward(grad, q, k, v, out, lse, *how)


@needs_interpreter
@pytest.mark.parametrize("case", TRITON.values(), ids=TRITON.keys())
def test_triton_interpreted(case):
    compare(case, torch.float32, run=launched)


@needs_interpreter
@pytest.mark.parametrize("dtype", LOW[1:], ids=str)
@pytest.mark.parametrize("name", ("causal", "two-sided"))
def test_triton_interpreted_half(name, dtype):
    compare(TRITON[name], dtype, run=launched)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("case", (CASES | TRITON).values(), ids=(CASES | TRITON).keys())
def test_cuda(case, dtype):
    compare(case, dtype, device="cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("size", (64, 128, 256))
def test_cuda_is_bitwise_repeatable(size):
    case = (2, 1000, 4, 2, size, 255, 0, 1)
    inputs = make(case, torch.bfloat16, "cuda")
    for a, b in zip(launched(*inputs, case), launched(*inputs, case), strict=True):
        assert torch.equal(a, b)


@pytest.mark.gpu
def test_cuda_graph():
    case = (2, 500, 4, 2, 64, 100, 0, 1)
    inputs = make(case, torch.bfloat16, "cuda")
    expected = launched(*inputs, case)  # compiles before the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = launched(*inputs, case)
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.gpu
def test_cuda_heads_too_large():
    q = torch.randn(1, 8, 1, 512, device="cuda", dtype=torch.bfloat16)
    with pytest.raises(KernelError, match="above 256"):
        window_attention(q, q, q, impl="kernel")
