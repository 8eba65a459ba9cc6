import importlib
import logging

import pytest
import torch
from common import LOW, assert_within_budget, doubled, leaves, needs_interpreter

from patternsearch import ops
from patternsearch.errors import KernelError
from patternsearch.kernels import _runtime, _two_factor_cpu
from patternsearch.kernels._two_factor_cpu import ACTIVATIONS, Sizes, dense
from patternsearch.kernels.two_factor import status, two_factor
from patternsearch.pattern import families

SHAPES = {  # name: rows, f, d, r, g, a, e, b
    "one": (1, 1, 1, 1, 1, 1, 1, 1),
    "low rank": (9, 1, 1, 3, 1, 14, 11, 1),
    "monarch": (70, 4, 1, 1, 4, 5, 3, 1),
    "btt": (37, 3, 1, 5, 7, 4, 2, 1),
    "kronecker": (33, 1, 5, 1, 1, 6, 3, 7),
    "all letters": (21, 2, 3, 2, 3, 4, 5, 2),
    "several blocks of rows": (83, 40, 1, 1, 40, 66, 66, 1),
}
everywhere = pytest.mark.parametrize("case", SHAPES.values(), ids=SHAPES.keys())


@pytest.fixture(params=("factors", "multiplied out"))
def way(request, monkeypatch):
    """Both formulations of the CPU, whatever the rule says; the one to hold errors against."""
    out = request.param != "factors"
    monkeypatch.setattr(Sizes, "dense_for", lambda self, x: out)
    monkeypatch.setattr(Sizes, "multiplied_out", lambda self, *rows: out)
    return naive if out else twice


def make(case, dtype, device="cpu"):
    rows, f, d, r, g, a, e, b = case
    shapes = (
        (rows, g * b * a),
        (f, d, r, g, a),
        (f, e, r, b, g),
        (e * f * d,),
        (rows, e * f * d),
        (rows, e * f * d),
    )
    return [torch.randn(s, device=device).to(dtype) for s in shapes]


def naive(x, left, right, bias, residual, activation):
    """The whole matrix, entry by entry of its definition."""
    w = torch.einsum("fdrga,ferbg->efdgba", left, right)
    u = x @ w.reshape(bias.numel(), x.shape[1]).t()
    return ACTIVATIONS[activation](u + bias) + residual


def twice(x, left, right, bias, residual, activation):
    """Factor after factor in the dtype of the inputs."""
    z = torch.einsum("fdrga,ngba->nfdrbg", left, x.view(len(x), left.shape[3], -1, left.shape[4]))
    u = torch.einsum("ferbg,nfdrbg->nefd", right, z).flatten(1)
    return ACTIVATIONS[activation](u + bias) + residual


def gradients(run, tensors, grad):
    y = run(*tensors)
    return y.detach(), *torch.autograd.grad(y, tensors, grad.to(y.dtype))


def ours(activation, impl="kernel"):
    def run(x, left, right, bias, residual):
        return two_factor(
            x, left, right, bias=bias, activation=activation, residual=residual, impl=impl
        )

    return run


def compare(case, dtype, activation="none", device="cpu", run=None, beside=twice):
    """Output and gradients against naive, beside a formulation in the same dtype."""
    *tensors, grad = make(case, dtype, device)
    got = gradients(run or ours(activation), leaves(*tensors), grad)
    reference = gradients(lambda *t: beside(*t, activation), leaves(*tensors), grad)
    exact = gradients(lambda *t: naive(*t, activation), doubled(*tensors), grad)
    factor = 2.0 if beside is twice else 4.0  # oneDNN adds term after term, MKL block after block
    for name, *values in zip(
        ("y", "dx", "dleft", "dright", "dbias", "dresidual"), got, reference, exact, strict=True
    ):
        assert_within_budget(name, *values, factor)


@everywhere
def test_float32(case, way):
    compare(case, torch.float32, beside=way)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation, way):
    compare(SHAPES["btt"], torch.float32, activation, beside=way)


@pytest.mark.parametrize("dtype", LOW[1:], ids=str)
@pytest.mark.parametrize("name", ("monarch", "all letters"))
def test_half(name, dtype, way):
    compare(SHAPES[name], dtype, "gelu", beside=way)


@everywhere
@pytest.mark.parametrize("impl", ("kernel", "torch", "auto"))
def test_float64_is_exact(case, impl):
    *tensors, grad = make(case, torch.float64)
    for a, b in zip(
        gradients(ours("silu", impl), leaves(*tensors), grad),
        gradients(lambda *t: naive(*t, "silu"), leaves(*tensors), grad),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("activation", ("none", "gelu"))
def test_gradcheck(activation, way):
    *tensors, _ = make((3, 2, 1, 2, 2, 2, 3, 1), torch.float64)
    assert torch.autograd.gradcheck(ours(activation), leaves(*tensors), fast_mode=True)


@pytest.mark.parametrize("keep", (False, True))
def test_opcheck(keep, unpoisoned):
    x, left, right, bias, residual, grad = make(SHAPES["all letters"], torch.float32)
    forward = torch.ops.patternsearch.two_factor.default
    backward = torch.ops.patternsearch.two_factor_backward.default
    given = (bias, residual) if keep else (None, None)
    torch.library.opcheck(forward, (x, left, right, *given, "relu", keep))
    for data, weights in ((True, keep), (keep, True)):
        torch.library.opcheck(backward, (grad, x, left, right, data, weights))


@pytest.mark.parametrize("impl", ("kernel", "torch"))
def test_no_rows(impl, way):
    *tensors, _ = make((0, *SHAPES["monarch"][1:]), torch.float32)
    tensors = leaves(*tensors)
    y = ours("relu", impl)(*tensors)
    assert y.shape == (0, 12)
    y.sum().backward()
    assert all(torch.equal(t.grad, torch.zeros_like(t)) for t in tensors)


def test_strides_and_leading_axes(way):
    x, left, right, bias, residual, _ = make(SHAPES["all letters"], torch.float64)
    expected = naive(x, left, right, bias, residual, "none")
    turned = [t.movedim(0, -1).contiguous().movedim(-1, 0) for t in (x, left, right)]
    y = two_factor(*turned, bias=bias, residual=residual, impl="kernel")
    torch.testing.assert_close(y, expected)
    y = two_factor(x.view(7, 3, -1), left, right, impl="kernel")
    torch.testing.assert_close(y.flatten(0, 1), expected - bias - residual)
    tensors = leaves(*turned)
    two_factor(*tensors, impl="kernel").sum().backward()  # a gradient without strides
    others = leaves(x, left, right)
    twice(*others, bias, residual, "none").sum().backward()
    torch.testing.assert_close([t.grad for t in tensors], [t.grad for t in others])


@pytest.mark.parametrize("which", range(5))
def test_one_gradient_alone(which, way):
    *tensors, grad = make(SHAPES["btt"], torch.float32)
    full = gradients(ours("relu"), leaves(*tensors), grad)
    alone = [t.clone().requires_grad_() if i == which else t for i, t in enumerate(tensors)]
    found = torch.autograd.grad(ours("relu")(*alone), alone[which], grad)
    assert torch.equal(found[0], full[1 + which])


def test_bitwise_repeatable():
    runs = []
    for _ in range(2):
        torch.manual_seed(1)
        *tensors, grad = make(SHAPES["several blocks of rows"], torch.float32)
        runs.append(gradients(ours("gelu"), leaves(*tensors), grad))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


# torch's own tracing of an autograd function warns in the name of its user
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiles_whole(unpoisoned):
    *tensors, grad = make(SHAPES["monarch"], torch.float32)

    def run(*t):
        return ours("gelu")(*t) * 2

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    results = [gradients(f, leaves(*tensors), grad) for f in (run, compiled)]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_wrong_arguments():
    x, left, right, bias, residual, _ = make(SHAPES["all letters"], torch.float32)
    for arguments, options, message in (
        ((x, left[0], right), {}, r"Give x as \[\*, g b a\]"),
        ((x, left, right[:, :, :1]), {}, r"Give right as .* f=2, r=2, g=3"),
        ((x[:, 1:], left, right), {}, "Give 24 features"),
        ((x, left.double(), right), {}, "left is torch.float64"),
        ((x, left, right), {"bias": bias[1:]}, r"bias has shape \(29,\). Give \(30,\)"),
        ((x, left, right), {"residual": residual[1:]}, r"Give \(21, 30\)"),
        ((x, left, right), {"activation": "glue"}, "Did you mean 'gelu'"),
        ((x, left, right), {"impl": "torhc"}, "Did you mean 'torch'"),
    ):
        with pytest.raises(KernelError, match=message):
            two_factor(*arguments, **options)


def test_status():
    assert status("cpu") is None
    assert "meta" in status("meta")


def test_dense_matrix_is_made_only_where_it_is_cheaper(monkeypatch):
    """Work as the docstring counts it: multiplications, more of them for short sides."""
    assert not Sizes(32, 1, 1, 32, 32, 32, 1).multiplied_out(2048)  # monarch, 1/16 of dense
    assert not Sizes(32, 1, 4, 32, 32, 32, 1).multiplied_out(2048)  # btt of rank 4, 1/4
    assert not Sizes(128, 1, 1, 128, 8, 8, 1).multiplied_out(2048)  # 1/4, in products of sides of 8
    assert Sizes(128, 1, 1, 128, 8, 8, 1).multiplied_out(2048, price=0.5)  # by oneDNN
    assert not Sizes(32, 1, 1, 32, 32, 32, 1).multiplied_out(2048, price=0.5)
    assert Sizes(128, 1, 1, 128, 8, 8, 1).multiplied_out(2048, True)  # too short on CUDA
    assert Sizes(256, 1, 1, 256, 4, 4, 1).multiplied_out(2048)  # 1/2, of sides of 4
    assert Sizes(8, 1, 64, 8, 64, 64, 1).multiplied_out(2048)  # as much work as dense
    assert not Sizes(8, 1, 64, 8, 64, 64, 1).multiplied_out(4)  # making it does not pay


def test_auto_says_where_plain_products_are_faster(caplog, monkeypatch):
    monkeypatch.setattr(_runtime, "_said", set())
    x, left, right, *_ = make(SHAPES["monarch"], torch.float32)
    with caplog.at_level(logging.INFO, "patternsearch.kernels"):
        two_factor(x, left, right)
    assert Sizes.of(left, right).slower(len(x)) in caplog.text


@pytest.mark.parametrize(
    ("family", "fields", "inp", "out"),
    (
        ("monarch", {"blocks": 4}, 24, 32),
        ("btt", {"rank": 2}, 24, 36),
        ("einsum", {"beta": 0.3, "delta": 0.3, "rho": 0.3}, 64, 36),
        ("kronecker", {}, 24, 24),
        ("blast", {"rank": 5, "blocks": 16}, 48, 32),
    ),
)
def test_patterns_run_on_it(family, fields, inp, out):
    pattern = families()[family](**fields).resolve((out,), (inp,))
    cores = {
        k: torch.randn(c.shape, dtype=torch.float64, requires_grad=True)
        for k, c in pattern.cores((out,), (inp,)).items()
    }
    x = torch.randn(2, 5, inp, dtype=torch.float64, requires_grad=True)
    assert pattern.feature_operator((out,), (inp,), x.device) == "two_factor"
    found = []
    for impl in ("reference", "kernel"):
        with ops.implementation(impl):
            y = ops.along_features(pattern, cores, x, out)
        found.append((y, *torch.autograd.grad(y.sin().sum(), (x, *cores.values()))))
    torch.testing.assert_close(*found)


def test_matrix():
    _, left, right, *_ = make(SHAPES["kronecker"], torch.float64)
    expected = torch.kron(right[0, :, 0, :, 0], left[0, :, 0, 0])
    torch.testing.assert_close(dense(left, right), expected)


TRITON = {
    "one": (1, 1, 1, 1, 1, 1, 1, 1),
    "monarch": (37, 5, 1, 1, 3, 20, 18, 1),
    "btt": (70, 3, 1, 2, 4, 5, 7, 1),
    "kronecker": (33, 1, 5, 1, 1, 6, 3, 7),
    "all letters": (21, 2, 3, 2, 3, 4, 5, 2),
}


def launched(activation):
    """Forward and backward through the Triton kernels, whatever the device."""
    module = importlib.import_module("patternsearch.kernels._two_factor_triton")

    class Launched(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, left, right, bias, residual):
            plain, _ = module.apply(x, left, right, bias, residual, activation, False)
            y, given = module.apply(x, left, right, bias, residual, activation, True)
            assert torch.equal(plain, y)
            ctx.save_for_backward(x, left, right, given)
            return y

        @staticmethod
        def backward(ctx, grad):
            x, left, right, given = ctx.saved_tensors
            du = grad
            if activation != "none":
                with torch.enable_grad():
                    leaf = given.detach().requires_grad_()
                    (du,) = torch.autograd.grad(ACTIVATIONS[activation](leaf), leaf, grad)
            found = module.backward(du, x, left, right, True, True)
            alone = module.backward(du, x, left, right, True, False)[0]
            assert torch.equal(alone, found[0])
            return *found, du.sum(0), grad

    return Launched.apply


@needs_interpreter
@pytest.mark.parametrize("case", TRITON.values(), ids=TRITON.keys())
def test_triton_interpreted(case):
    compare(case, torch.float32, run=launched("none"))


@needs_interpreter
@pytest.mark.parametrize("dtype", LOW[1:], ids=str)
def test_triton_interpreted_half(dtype):
    compare(TRITON["all letters"], dtype, run=launched("none"))


@needs_interpreter
@pytest.mark.parametrize("activation", ("relu", "gelu", "silu", "tanh"))
def test_triton_interpreted_activations(activation):
    compare(TRITON["kronecker"], torch.float32, activation, run=launched(activation))


@needs_interpreter
def test_triton_interpreted_in_one_launch(monkeypatch):
    """As with many rows: a program keeps its memory between from tile to tile."""
    module = importlib.import_module("patternsearch.kernels._two_factor_triton")
    monkeypatch.setattr(module, "ENOUGH", 2)
    compare((100, *TRITON["btt"][1:]), torch.float32, run=launched("none"))


@pytest.mark.gpu
@pytest.mark.parametrize("activation", ("none", "gelu"))
@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("case", (SHAPES | TRITON).values(), ids=(SHAPES | TRITON).keys())
def test_cuda(case, dtype, activation, way):
    compare(case, dtype, activation, device="cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("rows", (100, 20000))
def test_cuda_is_bitwise_repeatable(rows):
    *tensors, grad = make((rows, 32, 1, 1, 32, 32, 32, 1), torch.bfloat16, "cuda")
    runs = [gradients(ours("none"), leaves(*tensors), grad) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.gpu
def test_cuda_graph():
    x, left, right, *_ = make((500, 32, 1, 1, 32, 32, 32, 1), torch.bfloat16, "cuda")
    expected = two_factor(x, left, right)  # compiles before the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = two_factor(x, left, right)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(y, expected)


@pytest.mark.parametrize("threads", (1, 2))
def test_kronecker_products_on_several_cores_are_two_plain_ones(threads, monkeypatch):
    monkeypatch.setattr(_two_factor_cpu, "threads", lambda: threads)
    kronecker = Sizes(1, 16, 1, 1, 16, 16, 16)
    assert (kronecker.slower(2048) is None) == (threads == 1)
    assert kronecker.slower(1 << 14) is None  # too many numbers to keep
    assert Sizes(1, 8, 1, 1, 8, 8, 8).slower(2048) is None  # multiplied out
