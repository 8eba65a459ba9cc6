import logging

import pytest
import torch
from common import LOW, assert_within_budget, doubled, leaves, needs_interpreter

from patternsearch.errors import KernelError
from patternsearch.kernels import _runtime
from patternsearch.kernels import _toeplitz_conv_cpu as cpu
from patternsearch.kernels import _toeplitz_conv_fft as fft
from patternsearch.kernels import _toeplitz_conv_taps as gradient
from patternsearch.kernels._toeplitz_conv_band import Band
from patternsearch.kernels.toeplitz_conv import _backward, _forward, status, toeplitz_conv

# shape of x, lower, upper, dilation; a sequence or a grid
CASES = [
    ((2, 13, 5), 3, 0, 1),
    ((1, 1, 3), 2, 2, 1),
    ((3, 37, 7), 2, 1, 1),
    ((2, 41, 4), 0, 5, 3),
    ((2, 11, 3), 30, 30, 1),
    ((1, 29, 20), 20, 0, 2),
    ((2, 5, 7, 3), 1, 1, 1),
    ((1, 6, 5, 2), (2, 0), (0, 3), (2, 1)),
    ((2, 1, 9, 3), (1, 4), (1, 0), 1),
]
IDS = [f"{c[0]}-{c[1]}-{c[2]}-{c[3]}" for c in CASES]


def pair(value, axes):
    return (value,) * axes if isinstance(value, int) else tuple(value)


def naive(x, taps, lower, upper, dilation, gate=None):
    """Entry by entry of the dense matrix of each channel."""
    axes = x.dim() - 2
    lower, dilation = pair(lower, axes), pair(dilation, axes)
    grid = [range(n) for n in x.shape[1:-1]]
    places = list(torch.cartesian_prod(*[torch.tensor(list(g)) for g in grid]).view(-1, axes))
    flat = x.flatten(1, -2)
    rows = []
    for out in places:
        row = torch.zeros_like(flat[:, 0])
        for column, inp in enumerate(places):
            steps = [int(i - o) for i, o in zip(inp, out, strict=True)]
            if any(s % d for s, d in zip(steps, dilation, strict=True)):
                continue
            index = [s // d + low for s, d, low in zip(steps, dilation, lower, strict=True)]
            if all(0 <= i < n for i, n in zip(index, taps.shape[:-1], strict=True)):
                row = row + taps[tuple(index)] * flat[:, column]
        rows.append(row)
    y = torch.stack(rows, 1).view(x.shape)
    return y if gate is None else y * gate


def inputs(shape, lower, upper, dtype=torch.float32, gated=False, device="cpu"):
    axes = len(shape) - 2
    widths = [a + b + 1 for a, b in zip(pair(lower, axes), pair(upper, axes), strict=True)]
    made = [torch.randn(shape), torch.randn(*widths, shape[-1])]
    made += [torch.randn(shape)] if gated else []
    return [t.to(device, dtype) for t in made]


def call(tensors, lower, upper, dilation, **how):
    x, taps, gate = [*tensors, None][:3]
    return toeplitz_conv(x, taps, lower=lower, upper=upper, dilation=dilation, gate=gate, **how)


def gradients(y, tensors, dy):
    return torch.autograd.grad(y, tensors, dy.to(y.dtype))


def band(axes, lower, upper, dilation):
    lower, upper, dilation = (pair(v, axes) for v in (lower, upper, dilation))
    if axes == 1:
        lower, upper, dilation = (0, *lower), (0, *upper), (1, *dilation)
    return Band(lower, upper, dilation)


def compare(device, dtype, shape, lower, upper, dilation, gated, factor=2, **how):
    """Output and every gradient against float64, within `factor` naive errors in this dtype."""
    made = inputs(shape, lower, upper, dtype, gated, device)
    dy = torch.randn(shape).to(device, dtype)
    found = []
    for tensors, fn in (
        (leaves(*made), lambda t: call(t, lower, upper, dilation, **how)),
        (leaves(*made), lambda t: naive(t[0], t[1], lower, upper, dilation, *t[2:])),
        (doubled(*made), lambda t: naive(t[0], t[1], lower, upper, dilation, *t[2:])),
    ):
        y = fn(tensors)
        found.append((y, *gradients(y, tensors, dy)))
    for name, got, low, exact in zip(("y", "dx", "dtaps", "dgate"), *found, strict=False):
        assert_within_budget(name, got.cpu(), low.cpu(), exact.cpu(), factor)


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("gated", [False, True], ids=["", "gated"])
@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_against_naive(case, gated, dtype):
    compare("cpu", dtype, *case, gated, impl="kernel")


@pytest.mark.parametrize("impl", ["torch", "auto"])
@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_plain_formulation(case, impl):
    compare("cpu", torch.float32, *case, impl == "torch", impl=impl)


def test_plain_formulation_transforms_long_bands():
    # A transform rounds against the largest entry, the naive sum against each of its own.
    compare("cpu", torch.float32, (2, 90, 3), 70, 3, 1, True, factor=4, impl="torch")
    compare("cpu", torch.float32, (1, 9, 10, 2), 4, 4, 1, False, factor=4, impl="torch")


def ways(g, x, taps, b):
    """Every way to each result, called directly: the cost model takes only one of them."""
    for name, direct in cpu.DIRECT.items():
        if name != "convolution" or x.dtype == torch.float32:
            yield name, direct(x, taps, b), "y"
    yield "fft", fft.forward(x, taps, b), "y"
    yield "fft", fft.backward(g, x, taps, b, True, True)[0], "dx"
    yield "fft", fft.backward(g, x, taps, b, True, True)[1], "dtaps"
    for name, way in gradient.WAYS.items():
        long = g.shape[1] == 1 and g.shape[2] - b.before[1] - b.after[1] >= gradient.BLOCK
        if (name != "blocks" or long) and (name != "onednn" or b.dilation == (1, 1)):
            yield name, way(g, x, b), "dtaps"


@pytest.mark.parametrize(
    "case",
    [*CASES, ((2, 150, 3), 5, 2, 3), ((1, 600, 2), 4, 0, 1), ((2, 6, 9, 3), 2, (1, 2), 1)],
    ids=str,
)
def test_every_cpu_way(case):
    shape, lower, upper, dilation = case
    x, taps = inputs(shape, lower, upper, torch.float32)
    dy, axes = torch.randn(shape), len(shape) - 2
    found = []
    for convert in (leaves, doubled):
        tensors = convert(x, taps)
        y = call(tensors, lower, upper, dilation, impl="torch")
        found.append(dict(zip(("y", "dx", "dtaps"), (y, *gradients(y, tensors, dy)), strict=True)))
    low, exact = found
    grid = (lambda t: t) if axes == 2 else (lambda t: t.unsqueeze(1))
    kernel = (lambda t: t) if axes == 2 else (lambda t: t.unsqueeze(0))
    whole = band(axes, lower, upper, dilation)
    b = whole.within(*grid(x).shape[1:3])
    for found in (low, exact):
        found["dtaps"] = whole.inner(kernel(found["dtaps"]), b)
        found["y"], found["dx"] = grid(found["y"]), grid(found["dx"])
    for name, got, what in ways(grid(dy), grid(x), whole.inner(kernel(taps), b), b):
        assert_within_budget(f"{name} {what}", got, low[what], exact[what], factor=4)


@pytest.mark.parametrize("length", [1031, 1500])
def test_long_band(length):
    """A band that goes through FFT, both ways; the reference is the plain sum over taps."""
    lower, upper, shape = 700, 200, (4, length, 48)
    x, taps = inputs(shape, lower, upper)
    dy, b = torch.randn_like(x), band(1, lower, upper, 1)
    assert cpu.choose((4, 1, length, 48), b, True, True, False).transform
    found = []
    for convert, how in ((leaves, "kernel"), (leaves, "shifts"), (doubled, "torch")):
        tensors = convert(x, taps)
        if how == "shifts":
            padded = torch.nn.functional.pad(tensors[0], (0, 0, lower, upper))
            y = sum(padded[:, j : j + length] * tensors[1][j] for j in range(lower + upper + 1))
        else:
            y = call(tensors, lower, upper, 1, impl=how)
        found.append((y, *gradients(y, tensors, dy)))
    for name, got, low, exact in zip(("y", "dx", "dtaps"), *found, strict=True):
        assert_within_budget(name, got, low, exact)


@pytest.mark.parametrize("shape", [(0, 4, 3), (2, 0, 3), (2, 4, 0), (0, 2, 3, 1), (2, 0, 3, 1)])
def test_empty(shape):
    x, taps, gate = leaves(*inputs(shape, 1, 1, gated=True))
    y = toeplitz_conv(x, taps, lower=1, upper=1, gate=gate)
    assert y.shape == shape
    for grad, of in zip(gradients(y, (x, taps, gate), y), (x, taps, gate), strict=True):
        assert torch.equal(grad, torch.zeros_like(of))


def test_strided_inputs():
    whole = torch.randn(3, 40, 12)
    x, gate = whole[:, 3:33:2, :5], whole[:, 10:40:2, 6:11]
    taps = torch.randn(6, 7)[::2, 1:6]
    dense = [t.contiguous() for t in (x, taps, gate)]
    dy = torch.randn(3, 5, 15).transpose(1, 2)
    found = []
    for tensors in (leaves(x, taps, gate), leaves(*dense)):
        y = call(tensors, 2, 0, 1)
        found.append((y, *gradients(y, tensors, dy)))
    for got, expected in zip(*found, strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("case", [CASES[2], CASES[3], CASES[7]], ids=str)
def test_gradcheck(case, gated):
    shape, lower, upper, dilation = case
    tensors = leaves(*inputs(shape, lower, upper, torch.float64, gated))
    assert torch.autograd.gradcheck(
        lambda *t: call(t, lower, upper, dilation, impl="kernel"), tensors
    )


def test_only_the_needed_gradients():
    for needed in range(3):
        tensors = inputs((2, 9, 3), 1, 1, gated=True)
        tensors[needed].requires_grad_()
        call(tensors, 1, 1, 1).sum().backward()
        assert [t.grad is not None for t in tensors] == [i == needed for i in range(3)]


def test_twice_differentiated_is_refused():
    x, taps = leaves(*inputs((1, 5, 2), 1, 0))
    loss = call((x, taps), 1, 0, 1).square().sum()
    (dx,) = torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


@pytest.mark.parametrize("gated", [False, True])
def test_opcheck(gated):
    x, taps, *gate = inputs((2, 9, 3), 2, 1, gated=gated)
    arguments = (x, taps, gate[0] if gated else None, (0, 2, 0, 1, 1, 1))
    torch.library.opcheck(_forward, arguments)
    for need in ((True, True), (True, False), (False, True)):
        torch.library.opcheck(_backward, (torch.randn_like(x), *arguments, *need))


def test_bitwise_deterministic():
    x, taps = inputs((2, 300, 8), 20, 3)
    runs = []
    for _ in range(2):
        tensors = leaves(x, taps)
        y = call(tensors, 20, 3, 1)
        runs.append((y, *gradients(y, tensors, x)))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's own
@pytest.mark.parametrize(("upper", "gated"), [(3, True), (1, False)])
def test_compiles_without_graph_breaks(unpoisoned, upper, gated):
    def loss(*tensors):
        return (call(tensors, 1, upper, 1) ** 2).sum()

    eager = leaves(*inputs((2, 17, 4), 1, upper, gated=gated))
    compiled = leaves(*eager)
    loss(*eager).backward()
    torch.compile(loss, fullgraph=True, backend="aot_eager")(*compiled).backward()
    for a, b in zip(eager, compiled, strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_nothing_leaks_from_the_future():
    x, taps = inputs((1, 64, 4), 7, 0)
    y = call((x, taps), 7, 0, 1)
    changed = x.clone()
    changed[:, 40:] = torch.nan
    assert torch.equal(call((changed, taps), 7, 0, 1)[:, :40], y[:, :40])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(3, 4)}, "x has shape"),
        ({"taps": torch.zeros(4, 3)}, r"taps has shape \(4, 3\), lower=1, upper=1, D=3"),
        ({"taps": torch.zeros(3, 3).double()}, "taps is torch.float64"),
        ({"gate": torch.zeros(2, 4, 3)}, "gate has shape"),
        ({"lower": -1}, "lower=-1"),
        ({"dilation": 0}, "dilation=0"),
        ({"upper": (1, 1)}, "for 1 axes"),
        ({"impl": "kernle"}, "Did you mean 'kernel'"),
        ({"x": torch.zeros(2, 5, 3, dtype=torch.int64)}, "x has dtype"),
    ],
)
def test_refusals(change, message):
    arguments = {"x": torch.zeros(2, 5, 3), "taps": torch.zeros(3, 3), "lower": 1, "upper": 1}
    with pytest.raises(KernelError, match=message):
        toeplitz_conv(**(arguments | change))


def test_auto_on_cpu_says_when_it_leaves_the_kernel(caplog):
    assert status("cpu") is None
    caplog.set_level(logging.INFO, "patternsearch.kernels")
    call(inputs((1, 5, 2), 1, 0), 1, 0, 1)
    assert caplog.records == []
    _runtime._said.clear()
    for _ in range(2):
        call(inputs((1, 5, 2), 1, 1), 1, 1, 1)
    assert ["own convolution" in r.message for r in caplog.records] == [True]


KERNEL_CASES = [
    *CASES[:5],
    *CASES[6:],
    ((1, 40, 70), 2, 1, 1),
    ((1, 29, 3), 20, 7, 1),
    ((2, 70, 2), 3, 0, 1),
]


@needs_interpreter
@pytest.mark.parametrize("gated", [False, True], ids=["", "gated"])
@pytest.mark.parametrize("case", KERNEL_CASES, ids=str)
def test_triton_interpreted(case, gated):
    triton_within_budget(torch.float32, case, gated)


@needs_interpreter
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_triton_interpreted_in_half_precision(dtype):
    triton_within_budget(dtype, CASES[2], True)
    triton_within_budget(dtype, CASES[6], False)


def triton_within_budget(dtype, case, gated):
    from patternsearch.kernels import _toeplitz_conv_triton as kernels

    shape, lower, upper, dilation = case
    axes = len(shape) - 2
    made, dy = inputs(shape, lower, upper, dtype, gated), torch.randn(shape).to(dtype)
    found = []
    for convert in (leaves, doubled):
        tensors = convert(*made)
        y = naive(tensors[0], tensors[1], lower, upper, dilation, *tensors[2:])
        found.append((y, *gradients(y, tensors, dy)))
    grid = (lambda t: t) if axes == 2 else (lambda t: t.unsqueeze(1))
    x, taps, gate = grid(made[0]), made[1] if axes == 2 else made[1][None], None
    if gated:
        gate = grid(made[2])
    b = band(axes, lower, upper, dilation)
    got = [kernels.forward(x, taps, gate, b)]
    got += kernels.backward(grid(dy), x, taps, gate, b, True, True)
    for name, mine, low, exact in zip(("y", "dx", "dtaps", "dgate"), got, *found, strict=False):
        assert_within_budget(name, mine.reshape(exact.shape), low, exact)


@needs_interpreter
def test_triton_steps_within_a_program(monkeypatch):
    """Long rows make a program take several steps, which small tests would not reach."""
    from patternsearch.kernels import _toeplitz_conv_triton as kernels

    monkeypatch.setattr(kernels, "PROGRAMS", 2)
    triton_within_budget(torch.float32, ((1, 60, 3), 3, 1, 1), False)
    triton_within_budget(torch.float32, ((2, 45, 3), 2, 0, 2), True)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("gated", [False, True], ids=["", "gated"])
@pytest.mark.parametrize("case", [*CASES, *KERNEL_CASES[-3:]], ids=str)
def test_on_cuda(case, gated, dtype):
    compare("cuda", dtype, *case, gated, impl="kernel")


@pytest.mark.gpu
def test_cuda_is_bitwise_deterministic():
    x, taps = inputs((4, 3000, 96), 9, 2, torch.bfloat16, device="cuda")
    runs = []
    for _ in range(2):
        tensors = leaves(x, taps)
        y = call(tensors, 9, 2, 1, impl="kernel")
        runs.append((y, *gradients(y, tensors, x)))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.gpu
def test_cuda_graph():
    x, taps = leaves(*inputs((2, 100, 64), 3, 0, torch.bfloat16, device="cuda"))

    def step():
        y = call((x, taps), 3, 0, 1, impl="kernel")
        return (y, *gradients(y, (x, taps), x))

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        x.copy_(torch.randn_like(x))
    graph.replay()
    for got, expected in zip(captured, step(), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.gpu
def test_64_bit_addresses():
    x = torch.randn(1, 2**16 + 3, 2**15 + 64, device="cuda", dtype=torch.bfloat16)
    taps = torch.randn(2, x.shape[-1], device="cuda", dtype=torch.bfloat16)
    y = toeplitz_conv(x, taps, lower=1, upper=0, impl="kernel")
    tail = x[:, -3:].float()
    expected = taps[0].float() * tail[:, :-1] + taps[1].float() * tail[:, 1:]
    torch.testing.assert_close(y[:, -2:], expected.to(y.dtype))
