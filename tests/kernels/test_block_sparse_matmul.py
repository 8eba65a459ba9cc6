import importlib

import pytest
import torch
from common import LOW, assert_within_budget, doubled, leaves, needs_interpreter

from patternsearch.errors import KernelError
from patternsearch.kernels import _block_columns_cpu as block_columns
from patternsearch.kernels import _block_sparse_matmul_cpu as plain_torch
from patternsearch.kernels._block_index import index_of
from patternsearch.kernels.block_sparse_matmul import block_sparse_matmul, status, unsupported
from patternsearch.layers import FeatureMap
from patternsearch.ops import implementation
from patternsearch.patterns.block_sparse import BlockSparse

REGULAR = ((0, 2), (1, 2), (0, 1))
RAGGED = ((2,), (), (3, 0, 1), (1,))  # an empty row; column order free
CASES = {  # name: batch, vectors, columns, width, rows and columns of a block
    "one": (1, 1, ((0,),), 1, 16, 16),
    "regular": (2, 19, REGULAR, 3, 16, 24),
    "ragged": (1, 37, RAGGED, 5, 20, 16),  # the last column is empty
    "tall": (3, 70, ((0,), (0,), (0,)), 1, 17, 33),
    "diagonal": (1, 65, ((0,), (1,)), 2, 48, 16),
    "large": (1, 140, ((1, 0), ()), 2, 130, 70),
}
everywhere = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
both_orders = pytest.mark.parametrize("first", (False, True), ids=("x W^T", "W x"))


def naive(x, values, columns, width, first):
    o, i = values.shape[1:]
    dense = x.new_zeros(len(columns) * o, width * i)
    held = iter(values)
    for row, across in enumerate(columns):
        for column in across:
            dense[row * o : (row + 1) * o, column * i : (column + 1) * i] = next(held)
    return dense @ x if first else x @ dense.t()


def make(case, dtype, first, device="cpu"):
    batch, n, columns, width, o, i = case
    shapes = [(batch, n, width * i), (batch, n, len(columns) * o)]
    x, grad = (torch.randn(s, device=device).to(dtype) for s in shapes)
    if first:
        x, grad = x.transpose(1, 2).contiguous(), grad.transpose(1, 2).contiguous()
    return x, torch.randn(sum(map(len, columns)), o, i, device=device).to(dtype), grad


def registered(x, values, grad, columns, width, first):
    ours = leaves(x, values)
    y = block_sparse_matmul(*ours, columns, sparse_first=first, impl="kernel")
    y.backward(grad)
    return y.detach(), ours[0].grad, ours[1].grad


def launched(x, values, grad, columns, width, first):
    """Forward and backward through the Triton kernels, whatever the device."""
    module = importlib.import_module("patternsearch.kernels._block_sparse_matmul_triton")
    index, rows = index_of(columns, width, x.device), len(columns)
    y = module.forward(x, values, index, rows, first)
    return y, *module.backward(grad, x, values, index, rows, first, True, True)


def compare(case, dtype, first, device="cpu", run=registered):
    """Output and gradients against naive, beside naive in the same dtype."""
    columns, width = case[2:4]
    x, values, grad = make(case, dtype, first, device)
    got = run(x, values, grad, columns, width, first)
    found = []
    for inputs in (leaves(x, values), doubled(x, values)):
        z = naive(*inputs, columns, width, first)
        z.backward(grad.to(z.dtype))
        found.append((z.detach(), inputs[0].grad, inputs[1].grad))
    for name, *results in zip(("y", "dx", "dvalues"), got, *found, strict=True):
        assert_within_budget(name, *results)


@everywhere
@both_orders
@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_cpu(case, first, dtype):
    compare(case, dtype, first)


@everywhere
@both_orders
@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_vectors_as_columns(case, first, dtype, monkeypatch):
    monkeypatch.setattr(block_columns, "threads", lambda: 2)
    for name, value in (("NARROW", 200), ("WIDE", 0), ("TILE", 1), ("LEAST", 16), ("PANEL", 1)):
        monkeypatch.setattr(block_columns, name, value)  # several pieces, batches of two lines
    compare(case, dtype, first)


@everywhere
@both_orders
@pytest.mark.parametrize("impl", ("auto", "torch", "kernel"))
def test_float64_is_exact(case, first, impl):
    columns, width = case[2:4]
    x, values, grad = make(case, torch.float64, first)
    pairs = []
    for run in (
        lambda a, b: block_sparse_matmul(a, b, columns, sparse_first=first, impl=impl),
        lambda a, b: naive(a, b, columns, width, first),
    ):
        ours = leaves(x, values)
        y = run(*ours)
        y.backward(grad)
        pairs.append((y, ours[0].grad, ours[1].grad))
    for a, b in zip(*pairs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@both_orders
def test_gradcheck(first):
    x, values, _ = make((2, 3, RAGGED, 4, 2, 3), torch.float64, first)

    def run(a, b):
        return block_sparse_matmul(a, b, RAGGED, sparse_first=first, impl="kernel")

    assert torch.autograd.gradcheck(run, leaves(x, values))


@both_orders
def test_opcheck(first, unpoisoned):
    case = (2, 5, RAGGED, 4, 3, 2)
    x, values, grad = make(case, torch.float32, first)
    index = index_of(RAGGED, 4, x.device)
    ops = torch.ops.patternsearch
    torch.library.opcheck(ops.block_sparse_matmul.default, (x, values, index, 4, first))
    args = grad, x, values, index, 4, first, True, True
    torch.library.opcheck(ops.block_sparse_matmul_backward.default, args)


@pytest.mark.parametrize("shape", ((0, 6), (2, 0, 6), (0, 3, 6)))
def test_no_vectors(shape):
    x, values = leaves(torch.randn(shape), torch.randn(4, 3, 2))
    y = block_sparse_matmul(x, values, ((0, 1), (1, 2)), impl="kernel")
    assert y.shape == (*shape[:-1], 6)
    y.sum().backward()
    assert torch.equal(values.grad, torch.zeros_like(values))


@both_orders
def test_strided_inputs(first):
    """Operands and gradients of any strides, those of an expanded one included."""
    x, values, _ = make((2, 9, REGULAR, 3, 4, 2), torch.float64, first)
    x = x.transpose(1, 2).contiguous().transpose(1, 2)
    values = values.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    found = []
    for impl in ("kernel", "torch"):
        ours = leaves(x, values)
        block_sparse_matmul(*ours, REGULAR, sparse_first=first, impl=impl).sum().backward()
        found.append([t.grad for t in ours])
    torch.testing.assert_close(*found)


def test_one_gradient_alone():
    x, values, grad = make(CASES["ragged"], torch.float32, False)
    full = leaves(x, values)
    block_sparse_matmul(*full, RAGGED).backward(grad)
    for i in range(2):
        one = [x, values]
        one[i] = one[i].clone().requires_grad_()
        block_sparse_matmul(*one, RAGGED).backward(grad)
        assert torch.equal(one[i].grad, full[i].grad)


# torch's own tracing of an autograd function warns in the name of its user
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiles_whole(unpoisoned):
    x, values, grad = make((1, 11, REGULAR, 3, 4, 2), torch.float32, False)

    def run(a, b):
        return block_sparse_matmul(a, b, REGULAR, impl="kernel") * 2

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    results = []
    for f in (run, compiled):
        ours = leaves(x, values)
        y = f(*ours)
        y.backward(grad)
        results.append((y, ours[0].grad, ours[1].grad))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_choice_is_by_what_rows_see(monkeypatch):
    taken = []
    module = importlib.import_module("patternsearch.kernels.block_sparse_matmul")
    monkeypatch.setattr(module, "_formula", lambda x, *rest: taken.append(len(x)))
    for vectors in (4095, 4096):
        block_sparse_matmul(torch.randn(vectors, 128), torch.randn(2, 64, 64), ((0,), (1,)))
    for vectors in (255, 256):
        block_sparse_matmul(torch.randn(vectors, 128), torch.randn(256, 8, 8), [range(16)] * 16)
    assert taken == [4095, 255]


@both_orders
@pytest.mark.parametrize("dtype", LOW[:2], ids=str)
def test_many_pieces(monkeypatch, first, dtype):
    """More vectors than are multiplied at a time, the last fewer."""
    monkeypatch.setattr(plain_torch, "LEAST", 64)
    monkeypatch.setattr(plain_torch, "CHUNK", 4096)
    columns = tuple((r, (r + 3) % 11) for r in range(11))
    compare((2, 300, columns, 11, 7, 8), dtype, first)


def test_wrong_arguments():
    x, values = torch.randn(5, 6), torch.randn(2, 4, 3)
    with pytest.raises(KernelError, match="2 rows, 3 blocks"):
        block_sparse_matmul(x, values, ((0, 1), (1,)))
    with pytest.raises(KernelError, match=r"Give x as \[\*, C \* i, n\]"):
        block_sparse_matmul(x, values, ((0,), (1,)), sparse_first=True)
    for wrong in (((0,), (2,)), ((1, 1), ())):
        with pytest.raises(KernelError, match="Name each column once, from 0 to 1"):
            block_sparse_matmul(x, values, wrong)
    with pytest.raises(KernelError, match=r"torch\.float64"):
        block_sparse_matmul(x, values.double(), ((0,), (1,)))


def test_status():
    assert status("cpu") is None
    assert "meta" in status("meta")
    assert "at least 16 x 16" in unsupported(torch.device("cuda"), (8, 64))


@needs_interpreter
@everywhere
@both_orders
def test_triton_interpreted(case, first):
    compare(case, torch.float32, first, run=launched)


@needs_interpreter
@pytest.mark.parametrize("dtype", LOW[1:], ids=str)
def test_triton_interpreted_half(dtype):
    compare(CASES["ragged"], dtype, False, run=launched)


@needs_interpreter
def test_triton_adds_parts_in_order():
    """Many vectors and one block: the sum over vectors is split, and repeatable."""
    case = (2, 100, ((0,),), 1, 16, 16)
    args = *make(case, torch.float32, False), *case[2:4], False
    compare(case, torch.float32, False, run=launched)
    assert torch.equal(launched(*args)[2], launched(*args)[2])


@pytest.mark.gpu
@everywhere
@both_orders
@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_cuda(case, first, dtype):
    compare(case, dtype, first, device="cuda")


@pytest.mark.gpu
def test_cuda_is_bitwise_repeatable():
    case = (1, 4096, REGULAR, 3, 64, 64)
    args = *make(case, torch.bfloat16, False, "cuda"), *case[2:4], False
    for a, b in zip(launched(*args), launched(*args), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("mask", ("random", "butterfly"))
def test_the_pattern_runs_by_it(mask):
    pattern = BlockSparse(blocks=8, density=0.375, mask=mask)
    layer = FeatureMap(pattern, 64, 32)
    x = torch.randn(2, 5, 64)
    with implementation("reference"):
        expected = layer(x)
    for impl in ("auto", "kernel"):
        with implementation(impl):
            torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("threads", (1, 2))
def test_few_seen_numbers_are_one_batched_product(threads, monkeypatch):
    module = importlib.import_module("patternsearch.kernels.block_sparse_matmul")
    monkeypatch.setattr(module, "threads", lambda: threads)
    values, columns = torch.randn(8, 64, 64), tuple((k,) for k in range(8))
    for vectors, seen in ((512, 1 << 18), (2048, 1 << 20), (4096, 1 << 21)):
        slower = module._slower(torch.randn(vectors, 512), values, columns, 8)
        assert (slower is None) == (seen >= (1 << 19 if threads == 1 else 1 << 21))
