import pytest
import torch
from common import LOW, assert_within_budget, doubled, launches, leaves, needs_interpreter

from patternsearch.errors import KernelError
from patternsearch.kernels import _linear_scan_cpu as cpu
from patternsearch.kernels.linear_scan import (
    MAX_ORDER,
    _backward,
    _forward,
    linear_scan,
    status,
    unsupported,
)

# shape of a, shape of b
CASES = [
    ((2, 17, 3), (2, 17, 3)),
    ((1, 1, 1), (1, 1, 1)),
    ((3, 101, 5), (3, 101, 5)),
    ((67, 4), (2, 67, 4)),
    ((1, 67, 4), (2, 67, 4)),
    ((2, 1, 4), (2, 31, 4)),
    ((4,), (2, 31, 4)),
    ((2, 53, 2, 3), (2, 53, 3)),
    ((2, 2, 3, 4), (2, 2, 4)),
    ((1, 61, 3, 2), (2, 61, 2)),
    ((1, 1, 4, 3), (2, 37, 3)),
    ((2, 23, 1, 3), (2, 23, 3)),
]
NAMES = ("h", "da", "db", "dinitial")
directions = pytest.mark.parametrize("reverse", [False, True], ids=["", "reverse"])
starts = pytest.mark.parametrize("started", [False, True], ids=["", "initial"])
cases = pytest.mark.parametrize("case", CASES, ids=str)


def naive(a, b, initial=None, reverse=False):
    """Position after position, as the docstring of linear_scan says it."""
    batch, length, depth = b.shape
    if a.dim() < 4:
        a = a.expand(batch, length, depth).unsqueeze(2)
        initial = None if initial is None else initial.unsqueeze(1)
    a = a.expand(batch, length, -1, -1)
    order = a.shape[2]
    before = [b.new_zeros(batch, depth)] * order
    if initial is not None:
        before = [initial[:, i] for i in range(order)]
    rows = [None] * length
    decays, given = [x.unbind(1) for x in a.unbind(2)], b.unbind(1)
    for t in reversed(range(length)) if reverse else range(length):
        rows[t] = given[t] + sum(decays[i][t] * before[i] for i in range(order))
        before = [rows[t], *before[:-1]]
    return torch.stack(rows, 1)


def inputs(a, b, started, dtype=torch.float32, device="cpu"):
    order = a[2] if len(a) == 4 else 1
    state = (b[0], order, b[2]) if len(a) == 4 else (b[0], b[2])
    made = [(2 * torch.rand(a) - 1) * 1.2 / order, torch.randn(b)]
    made += [torch.randn(state)] if started else []
    return [x.to(device, dtype) for x in made]


def scan(tensors, reverse=False, impl="kernel"):
    a, b, initial = [*tensors, None][:3]
    return linear_scan(a, b, initial=initial, reverse=reverse, impl=impl)


def results(fn, tensors, dy):
    h = fn(tensors)
    return (h, *torch.autograd.grad(h, tensors, dy.to(h.dtype)))


def compare(device, dtype, case, started, reverse, run=None, **how):
    """Output and every gradient against float64, within twice the errors of naive in this dtype."""
    made = inputs(*case, started, dtype, device)
    dy = torch.randn(case[1]).to(device, dtype)

    def low(tensors):
        return naive(*[*tensors, None][:3], reverse)

    got = run(made, dy) if run else results(lambda x: scan(x, reverse, **how), leaves(*made), dy)
    reference, exact = results(low, leaves(*made), dy), results(low, doubled(*made), dy)
    for name, x, y, z in zip(NAMES, got, reference, exact, strict=False):
        assert_within_budget(name, x.cpu(), y.cpu(), z.cpu())


@pytest.fixture(params=[None, 64], ids=["", "small tiles"])
def tile(request, monkeypatch):
    """Tiles so small that states are handed on between them, with ends that divide nothing."""
    if request.param:
        monkeypatch.setattr(cpu, "TILE", request.param)
        monkeypatch.setattr(cpu, "SHORT", 3)


@pytest.mark.parametrize("dtype", LOW, ids=str)
@starts
@directions
@cases
def test_against_naive(case, reverse, started, dtype, tile):
    compare("cpu", dtype, case, started, reverse)


@pytest.mark.parametrize("impl", ["torch", "auto"])
@directions
@cases
def test_other_impls(case, reverse, impl):
    compare("cpu", torch.float32, case, True, reverse, impl=impl)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("width", [10, 9000])
def test_long_rows_are_walked(width, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert (cpu._chunk(40, width) == 0) == (threads == 1 and width == 9000)
        compare("cpu", torch.float32, ((1, 40, width), (1, 40, width)), True, False)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("order", [1, 2])
def test_error_does_not_grow_with_length(order):
    """T = 65,536 with decays so near 1 that thousands of terms stay alive."""
    length, depth = 65_536, 4
    a = 1 - 0.002 * torch.rand(1, length, order, depth)
    if order == 2:  # a pair of poles just inside the unit circle
        a = torch.stack((1.8 * a[:, :, 0], -0.81 * a[:, :, 1]), 2)
    b, dy = torch.randn(1, length, depth), torch.randn(1, length, depth)
    found = [
        results(lambda x: scan(x), leaves(a, b), dy),
        results(lambda x: naive(*x), leaves(a, b), dy),
        results(lambda x: naive(*x), doubled(a, b), dy),
    ]
    for name, got, low, exact in zip(NAMES, *found, strict=False):
        assert_within_budget(name, got, low, exact)


def test_unstable_and_vanishing_decays():
    """Gains above 1, resets and decays that underflow: no logarithm, no division by a product."""
    a = torch.tensor([0.0, 1e-30, 1.5, -2.0, 1.0]).repeat(40)[None, :, None].requires_grad_()
    b = torch.randn(1, 200, 1, requires_grad=True)
    found = [results(f, x, torch.ones(1, 200, 1)) for f, x in ((scan, (a, b)),)]
    for convert in (leaves, doubled):
        tensors = convert(a, b)
        found.append(results(lambda x: naive(*x), tensors, torch.ones(1, 200, 1)))
    for name, got, low, exact in zip(NAMES, *found, strict=False):
        assert_within_budget(name, got, low, exact)


@pytest.mark.parametrize("shape", [(0, 4, 3), (2, 0, 3), (2, 4, 0)])
@pytest.mark.parametrize("impl", ["torch", "kernel"])
def test_empty(shape, impl):
    tensors = leaves(torch.rand(shape), torch.rand(shape), torch.rand(shape[0], shape[2]))
    h = scan(tensors, impl=impl)
    assert h.shape == shape
    found = torch.autograd.grad(h, tensors, torch.ones(shape), allow_unused=impl == "torch")
    for grad, of in zip(found, tensors, strict=True):
        assert grad is None or torch.equal(grad, torch.zeros_like(of))


def test_strided_inputs():
    whole = torch.randn(3, 50, 12)
    a, b = whole[:, 3:43:2, :5], whole[:, 10:50:2, 6:11]
    initial = torch.randn(6, 7)[::2, 1:6]
    dy = torch.randn(3, 5, 20).transpose(1, 2)
    strided = results(scan, leaves(a, b, initial), dy)
    dense = results(scan, leaves(a.contiguous(), b.contiguous(), initial.contiguous()), dy)
    for got, expected in zip(strided, dense, strict=True):
        assert torch.equal(got, expected)


@starts
@directions
@pytest.mark.parametrize("case", [CASES[0], CASES[6], CASES[8], CASES[10]], ids=str)
def test_gradcheck(case, reverse, started):
    tensors = leaves(*inputs(*case, started, torch.float64))
    assert torch.autograd.gradcheck(lambda *x: scan(x, reverse), tensors)


def test_second_derivative():
    tensors = leaves(*inputs((1, 5, 2), (1, 5, 2), True, torch.float64))
    assert torch.autograd.gradgradcheck(lambda *x: scan(x, impl="torch"), tensors)
    (da,) = torch.autograd.grad(scan(tensors).square().sum(), tensors[0], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        da.sum().backward()


@starts
@pytest.mark.parametrize("case", [CASES[0], CASES[6], CASES[9]], ids=str)
def test_opcheck(case, started):
    a, b, initial = [*inputs(*case, started), None][:3]
    torch.library.opcheck(_forward, (a, b, initial, False))
    torch.library.opcheck(_backward, (b, a, b, initial, True))


def test_bitwise_deterministic():
    tensors = inputs((2, 700, 2, 8), (2, 700, 8), True)
    runs = [results(scan, leaves(*tensors), tensors[1]) for _ in range(2)]
    assert all(torch.equal(x, y) for x, y in zip(*runs, strict=True))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's own
@starts
def test_compiles_without_graph_breaks(unpoisoned, started):
    def loss(*tensors):
        return (scan(tensors) ** 2).sum()

    eager = leaves(*inputs((2, 17, 4), (2, 17, 4), started))
    compiled = leaves(*eager)
    loss(*eager).backward()
    torch.compile(loss, fullgraph=True, backend="aot_eager")(*compiled).backward()
    for x, y in zip(eager, compiled, strict=True):
        torch.testing.assert_close(x.grad, y.grad)


@directions
def test_nothing_leaks_against_the_direction(reverse):
    a, b = inputs((1, 90, 4), (1, 90, 4), False)
    h = scan((a, b), reverse)
    seen, hidden = (slice(50, None), slice(50)) if reverse else (slice(50), slice(50, None))
    changed = a.clone(), b.clone()
    for x in changed:
        x[:, hidden] = torch.nan
    got = scan(changed, reverse)
    assert torch.equal(got[:, seen], h[:, seen])
    assert got[:, hidden].isnan().all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"a": torch.zeros(2, 5, 4)},
            r"a of shape \(2, 5, 4\) does not fit b of shape \(2, 5, 3\)",
        ),
        ({"a": torch.zeros(4, 3)}, "does not fit"),
        ({"a": torch.zeros(3, 5, 3)}, "does not fit"),
        ({"a": torch.zeros(2, 5, 0, 3)}, "does not fit"),
        ({"a": torch.tensor(1.0)}, "does not fit"),
        ({"a": torch.zeros(2, 5, 3).double()}, "a is torch.float64"),
        ({"b": torch.zeros(5, 3)}, r"b has shape \(5, 3\)"),
        ({"b": torch.zeros(2, 5, 3).long()}, "b has dtype"),
        ({"initial": torch.zeros(2, 1, 3)}, r"Give it as \(2, 3\)"),
        ({"a": torch.zeros(2, 5, 2, 3), "initial": torch.zeros(2, 3)}, r"Give it as \(2, 2, 3\)"),
        ({"impl": "kernle"}, "Did you mean 'kernel'"),
    ],
)
def test_refusals(change, message):
    arguments = {"a": torch.zeros(2, 5, 3), "b": torch.zeros(2, 5, 3)}
    with pytest.raises(KernelError, match=message):
        linear_scan(**(arguments | change))


def test_what_runs_where():
    assert status("cpu") is None
    assert unsupported(torch.device("cpu"), order=99) is None
    assert "order 17 is above 16" in unsupported(torch.device("cuda"), order=MAX_ORDER + 1)
    if not torch.cuda.is_available():
        assert "no CUDA device" in unsupported(torch.device("cuda"), order=1)


@needs_interpreter
@pytest.mark.parametrize("segment", [512, 16])
@pytest.mark.parametrize(("reverse", "started"), [(False, True), (True, False)])
@pytest.mark.parametrize("case", [*CASES[:9], ((1, 37, 3, 2), (2, 37, 2)), *CASES[10:]], ids=str)
def test_triton_interpreted(case, reverse, started, segment, monkeypatch):
    interpreted(torch.float32, case, reverse, started, segment, monkeypatch)


@needs_interpreter
@pytest.mark.parametrize("dtype", LOW[1:], ids=str)
@pytest.mark.parametrize("case", [CASES[2], CASES[7]], ids=str)
def test_triton_interpreted_in_half_precision(case, dtype, monkeypatch):
    interpreted(dtype, case, False, True, 512, monkeypatch)


@needs_interpreter
@pytest.mark.parametrize("order", [1, 2])
def test_triton_interpreted_over_tiles_of_channels(order, monkeypatch):
    shape = ((2, 9, 70), (2, 9, 70)) if order == 1 else ((2, 9, 2, 70), (2, 9, 70))
    interpreted(torch.float32, shape, False, True, 4, monkeypatch)


@pytest.mark.parametrize("order", [1, 2])
def test_triton_grids_take_many_sequences(order, monkeypatch):
    """Only axis x of a CUDA grid goes beyond 65,535."""
    from patternsearch.kernels import _linear_scan_triton as kernels

    names = ("first_order_kernel", "order_kernel", "carry_kernel")
    grids = launches(kernels, names, monkeypatch)
    for batch, length in ((70_000, 1), (1, 2048)):
        a, b = torch.zeros(batch, length, order, 1), torch.zeros(batch, length, 1)
        kernels.forward(a, b, None, False)
        kernels.backward(b, a, b, None, False)
    assert max(grid[0] for grid in grids) == 70_000
    summaries = 1 if order == 1 else 3
    assert max(n for grid in grids for n in grid[1:]) == 4 * summaries  # segments of 512 rows


def interpreted(dtype, case, reverse, started, segment, monkeypatch):
    from patternsearch.kernels import _linear_scan_triton as kernels

    monkeypatch.setattr(kernels, "SEGMENT", segment)
    monkeypatch.setattr(kernels, "ROWS", 16)

    def run(made, dy):
        a, b, initial = [*made, None][:3]
        lifted = a if a.dim() == 4 else a.expand(*[1] * (3 - a.dim()), *a.shape).unsqueeze(2)
        state = initial if initial is None or a.dim() == 4 else initial.unsqueeze(1)
        h = kernels.forward(lifted, b, state, reverse)
        da, db, di = kernels.backward(dy, lifted, h, state, reverse)
        return (h, da.view(a.shape), db, di if a.dim() == 4 else di[:, 0])[: len(made) + 1]

    compare("cpu", dtype, case, started, reverse, run)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", LOW, ids=str)
@starts
@directions
@pytest.mark.parametrize("case", [*CASES, ((3, 1500, 70), (3, 1500, 70))], ids=str)
def test_cuda(case, reverse, started, dtype):
    compare("cuda", dtype, case, started, reverse)


@pytest.mark.gpu
def test_cuda_many_segments_and_wide_tiles():
    for batch, length, depth in ((1, 20_011, 40), (300, 130, 200)):
        shape = batch, length, depth
        compare("cuda", torch.bfloat16, (shape, shape), True, False)
    compare("cuda", torch.float32, ((1, 3000, 3, 40), (1, 3000, 40)), True, True)


@pytest.mark.gpu
def test_cuda_repeats_bitwise_and_in_a_graph():
    tensors = inputs((2, 3000, 64), (2, 3000, 64), True, torch.bfloat16, "cuda")
    first = results(scan, leaves(*tensors), tensors[1])
    still = leaves(*tensors)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        results(scan, still, tensors[1])
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = results(scan, still, tensors[1])
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(x, y) for x, y in zip(first, captured, strict=True))
