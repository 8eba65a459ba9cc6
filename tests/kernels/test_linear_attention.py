import pytest
import torch
from common import LOW, assert_within_budget, doubled, launches, leaves, needs_interpreter

from patternsearch.errors import KernelError
from patternsearch.kernels import _linear_attention_cpu as cpu
from patternsearch.kernels.linear_attention import (
    _backward,
    _forward,
    linear_attention,
    status,
    unsupported,
)

# batch, length, heads, channels of k, channels of v
CASES = [
    (2, 7, 2, 3, 5),
    (1, 1, 1, 1, 1),
    (2, 64, 2, 12, 9),
    (1, 101, 3, 5, 2),
    (3, 130, 2, 8, 6),
    (1, 67, 1, 65, 3),
]
NAMES = ("o", "dq", "dk", "dv", "ddecay")
cases = pytest.mark.parametrize("case", CASES, ids=str)
decays = pytest.mark.parametrize("decay", ["none", "head", "channel"])


def naive(q, k, v, decay=None, scale=0.5):
    """Position after position with the state [B, H, K, V], as the docstring says it."""
    state = q.new_zeros(*q.shape[:1], *q.shape[2:], v.shape[-1])
    rows = []
    logs = [None] * q.shape[1] if decay is None else decay.unbind(1)
    for q_t, k_t, v_t, log in zip(*(x.unbind(1) for x in (q, k, v)), logs, strict=True):
        if log is not None:
            kept = log.exp()
            state = state * (kept if kept.dim() == 3 else kept.unsqueeze(-1)).unsqueeze(-1)
        state = state + k_t.unsqueeze(-1) * v_t.unsqueeze(-2)
        rows.append(scale * (q_t.unsqueeze(-1) * state).sum(-2))
    return torch.stack(rows, 1)


def quadratic(q, k, v, decay=None, scale=0.5):
    """All pairs of positions at once: what is run in the same dtype for comparison."""
    length = q.shape[1]
    seen = torch.ones(length, length, dtype=torch.bool, device=q.device).tril()
    seen = seen.view(1, length, length, 1, 1)
    weights = seen.to(q.dtype)
    if decay is not None:
        sums = (decay.unsqueeze(-1) if decay.dim() == 3 else decay).cumsum(1)
        between = sums[:, :, None] - sums[:, None]
        weights = between.masked_fill(~seen, -torch.inf).exp()
    if weights.shape[-1] == 1:
        scores = scale * torch.einsum("bthk,bshk->btsh", q, k) * weights.squeeze(-1)
    else:
        scores = scale * (q[:, :, None] * k[:, None] * weights).sum(-1)
    return torch.einsum("btsh,bshv->bthv", scores, v)


def inputs(case, decay, dtype=torch.float32, device="cpu", strength=0.5):
    batch, length, heads, keys, values = case
    made = [torch.randn(batch, length, heads, n) for n in (keys, keys, values)]
    if decay != "none":
        wide = (keys,) if decay == "channel" else ()
        made.append(-strength * torch.rand(batch, length, heads, *wide))
    return [x.to(device, dtype) for x in made]


def attend(tensors, impl="kernel", scale=0.5):
    q, k, v, decay = [*tensors, None][:4]
    return linear_attention(q, k, v, decay=decay, scale=scale, impl=impl)


def results(fn, tensors, do):
    o = fn(tensors)
    return (o, *torch.autograd.grad(o, tensors, do.to(o.dtype)))


def within_budget(made, got, do, other=quadratic):
    """Output and every gradient against float64, within twice the errors of `other`."""
    reference = results(lambda x: other(*x), leaves(*made), do)
    exact = results(lambda x: naive(*x), doubled(*made), do)
    for name, x, y, z in zip(NAMES, got, reference, exact, strict=False):
        assert_within_budget(name, x.cpu(), y.cpu(), z.cpu())


def compare(case, decay, dtype=torch.float32, device="cpu", strength=0.5, **how):
    made = inputs(case, decay, dtype, device, strength)
    do = torch.randn_like(made[2])
    within_budget(made, results(lambda x: attend(x, **how), leaves(*made), do), do)


@pytest.fixture(params=[None, 256], ids=["", "small tiles"])
def tile(request, monkeypatch):
    """Tiles so small that states are handed on between them."""
    if request.param:
        monkeypatch.setattr(cpu, "TILE", request.param)


@pytest.mark.parametrize("dtype", LOW, ids=str)
@decays
@cases
def test_against_naive(case, decay, dtype, tile):
    compare(case, decay, dtype)


@pytest.mark.parametrize("impl", ["torch", "auto"])
@decays
@cases
def test_other_impls(case, decay, impl):
    compare(case, decay, impl=impl)


@decays
def test_scale_is_of_the_keys(decay):
    made = inputs((2, 9, 2, 16, 3), decay)
    assert torch.equal(attend(made, scale=None), attend(made, scale=0.25))


@pytest.mark.parametrize("decay", ["head", "channel"])
@pytest.mark.parametrize("impl", ["torch", "kernel"])
def test_strong_decays(decay, impl):
    """Resets, decays that underflow and none at all, side by side; nothing overflows."""
    made = inputs((1, 150, 2, 4, 3), decay, torch.float64)
    logs = torch.tensor([0.0, -1e-3, -90.0, -800.0, -torch.inf, -0.1, -5.0], dtype=torch.float64)
    made[3] = logs[torch.randint(len(logs), made[3].shape)]
    do = torch.randn_like(made[2])
    got = results(lambda x: attend(x, impl), leaves(*made), do)
    exact = results(lambda x: naive(*x), leaves(*made), do)
    for x, y in zip(got, exact, strict=True):
        # where a decay is 0 its gradient, times 0, is 0; naive multiplies a state by it
        torch.testing.assert_close(x, y.nan_to_num(0), rtol=1e-9, atol=1e-9)


@decays
def test_error_does_not_grow_with_length(decay):
    """The reference walks through all positions in float32."""
    made = inputs((1, 16_384, 1, 3, 2), decay, strength=0.02)
    do = torch.randn_like(made[2])
    within_budget(made, results(attend, leaves(*made), do), do, other=naive)


@pytest.mark.parametrize("decay", ["head", "channel"])
def test_decay_in_float32_beside_half_inputs(decay):
    made = inputs((2, 70, 2, 4, 3), decay, torch.bfloat16)
    made[3] = made[3].float()
    do = torch.randn_like(made[2])
    found = results(attend, leaves(*made), do)
    exact = results(lambda x: naive(*x), doubled(*made), do)
    assert found[4].dtype == torch.float32
    # nothing is rounded to half precision on the way to the gradient of the decay
    torch.testing.assert_close(found[4].double(), exact[4], rtol=1e-4, atol=1e-4)


@decays
@pytest.mark.parametrize(
    "shape", [(0, 4, 2, 3, 3), (2, 0, 2, 3, 3), (2, 4, 0, 3, 3), (2, 4, 2, 3, 0)]
)
def test_empty(shape, decay):
    tensors = leaves(*inputs(shape, decay))
    o = attend(tensors)
    assert o.shape == (*shape[:3], shape[4])
    for grad, of in zip(torch.autograd.grad(o.sum(), tensors), tensors, strict=True):
        assert torch.equal(grad, torch.zeros_like(of))


@decays
def test_strided_inputs(decay):
    made = inputs((2, 90, 3, 10, 10), decay)
    strided = [x[:, ::2, 1:, 2:8] if x.dim() == 4 else x[:, ::2, 1:] for x in made]
    do = torch.randn(6, 2, 45, 2).permute(1, 2, 3, 0)
    found = results(attend, leaves(*strided), do)
    dense = results(attend, leaves(*(x.contiguous() for x in strided)), do)
    for got, expected in zip(found, dense, strict=True):
        assert torch.equal(got, expected)


@decays
@pytest.mark.parametrize("case", [CASES[0], (1, 70, 1, 2, 2)], ids=str)
def test_gradcheck(case, decay):
    tensors = leaves(*inputs(case, decay, torch.float64))
    assert torch.autograd.gradcheck(lambda *x: attend(x), tensors)


@decays
def test_second_derivative(decay):
    tensors = leaves(*inputs((1, 5, 1, 2, 2), decay, torch.float64))
    assert torch.autograd.gradgradcheck(lambda *x: attend(x, "torch"), tensors)
    (dq,) = torch.autograd.grad(attend(tensors).square().sum(), tensors[0], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dq.sum().backward()


@decays
def test_opcheck(decay):
    q, k, v, decay = [*inputs((2, 9, 2, 3, 4), decay), None][:4]
    torch.library.opcheck(_forward, (q, k, v, decay, 0.5))
    torch.library.opcheck(_backward, (torch.randn_like(v), q, k, v, decay, 0.5))


@decays
def test_bitwise_deterministic(decay):
    made = inputs((2, 700, 2, 16, 16), decay)
    runs = [results(attend, leaves(*made), made[2]) for _ in range(2)]
    assert all(torch.equal(x, y) for x, y in zip(*runs, strict=True))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's own
@decays
def test_compiles_without_graph_breaks(unpoisoned, decay):
    def loss(*tensors):
        return (attend(tensors) ** 2).sum()

    eager = leaves(*inputs((2, 17, 2, 4, 3), decay))
    compiled = leaves(*eager)
    loss(*eager).backward()
    torch.compile(loss, fullgraph=True, backend="aot_eager")(*compiled).backward()
    for x, y in zip(eager, compiled, strict=True):
        torch.testing.assert_close(x.grad, y.grad)


@decays
@pytest.mark.parametrize("impl", ["torch", "kernel"])
def test_nothing_leaks_from_the_future(decay, impl):
    made = inputs((1, 100, 2, 4, 4), decay)
    o = attend(made, impl)
    changed = [torch.cat((x[:, :53], torch.randn_like(x[:, 53:]) - 3), 1) for x in made]
    got = attend(changed, impl)
    assert torch.equal(got[:, :53], o[:, :53])
    assert not torch.equal(got[:, 53], o[:, 53])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(2, 5, 3)}, "q, k and v have shapes"),
        ({"k": torch.zeros(2, 5, 2, 4)}, "q, k and v have shapes"),
        ({"v": torch.zeros(2, 4, 2, 3)}, "q, k and v have shapes"),
        ({"k": torch.zeros(2, 5, 2, 3).double()}, "k is torch.float64"),
        ({"q": torch.zeros(2, 5, 2, 0), "k": torch.zeros(2, 5, 2, 0)}, "no channels"),
        ({"decay": torch.zeros(2, 5)}, r"decay has shape \(2, 5\)"),
        ({"decay": torch.zeros(2, 5, 2).half()}, "decay is torch.float16"),
        ({"impl": "kernle"}, "Did you mean 'kernel'"),
    ],
)
def test_refusals(change, message):
    arguments = {name: torch.zeros(2, 5, 2, 3) for name in "qkv"}
    with pytest.raises(KernelError, match=message):
        linear_attention(**(arguments | change))


def test_what_runs_where():
    cuda = torch.device("cuda")
    assert status("cpu") is None
    assert unsupported(torch.device("cpu"), width=999) is None
    assert "257 channels" in unsupported(cuda, width=257, dtype=torch.bfloat16)
    assert "a decay a channel" in unsupported(cuda, width=65, per_channel=True)
    if not torch.cuda.is_available():
        assert "no CUDA device" in unsupported(cuda, width=64)


@needs_interpreter
@pytest.mark.parametrize("segment", [512, 32])
@decays
@pytest.mark.parametrize("case", [*CASES[:4], (1, 130, 1, 8, 6), (1, 20, 1, 65, 40)], ids=str)
def test_triton_interpreted(case, decay, segment, monkeypatch):
    interpreted(torch.float32, case, decay, segment, monkeypatch)


@needs_interpreter
@pytest.mark.parametrize("dtype", LOW[1:], ids=str)
@decays
def test_triton_interpreted_in_half_precision(decay, dtype, monkeypatch):
    interpreted(dtype, (1, 130, 2, 8, 6), decay, 512, monkeypatch)


@needs_interpreter
@pytest.mark.parametrize("decay", ["head", "channel"])
def test_triton_forgets_everything(decay, monkeypatch):
    """-inf as the logarithm of a decay: no NaN, and exactly what stood before is gone."""
    from patternsearch.kernels import _linear_attention_triton as kernels

    q, k, v, logs = inputs((1, 40, 1, 4, 3), decay)
    logs[:, 21] = -torch.inf
    o = kernels.forward(q, k, v, logs, 0.5)
    alone = kernels.forward(*(x[:, 21:].contiguous() for x in (q, k, v, logs)), 0.5)
    torch.testing.assert_close(o[:, 21:], alone, rtol=1e-4, atol=1e-4)


@needs_interpreter
@pytest.mark.parametrize("decay", ["head", "channel"])
def test_triton_states_beyond_float16(decay):
    """Sums over T above 65,504 in a float16 run whose every result is small."""
    from patternsearch.kernels import _linear_attention_triton as kernels

    q, k, v, logs = inputs((1, 200, 1, 4, 3), decay, strength=1e-4)
    made = [x.half() for x in (q / 1000, k + 40, v + 40)] + [logs]
    do = torch.randn_like(v).half() / 1000
    got = kernels.backward(do, *made, 0.5)
    exact = results(lambda x: naive(*x), doubled(*made), do)[1:]
    for name, x, y in zip(NAMES[1:], got, exact, strict=True):
        assert (x.double() - y).abs().max() < 0.02 * y.abs().max(), name


def test_triton_grids_take_many_lanes(monkeypatch):
    """Only axis x of a CUDA grid goes beyond 65,535."""
    from patternsearch.kernels import _linear_attention_triton as kernels

    grids = launches(kernels, ("chunk_kernel", "carry_kernel"), monkeypatch)
    for shape in ((70_000, 1, 1, 1), (1, 2048, 2, 1)):
        q = torch.zeros(shape)
        decay = torch.zeros(shape[:3])
        kernels.forward(q, q, q, decay, 1.0)
        kernels.backward(q, q, q, q, decay, 1.0)
    assert max(grid[0] for grid in grids) == 70_000
    assert max(n for grid in grids for n in grid[1:]) == 4  # segments of 512 positions


def interpreted(dtype, case, decay, segment, monkeypatch):
    from patternsearch.kernels import _linear_attention_triton as kernels

    monkeypatch.setattr(kernels, "SEGMENT", segment)
    made = inputs(case, decay, dtype)
    do = torch.randn_like(made[2])
    q, k, v, logs = [*made, None][:4]
    got = (kernels.forward(q, k, v, logs, 0.5), *kernels.backward(do, q, k, v, logs, 0.5))
    within_budget(made, got, do)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", LOW, ids=str)
@decays
@pytest.mark.parametrize("case", [*CASES, (2, 300, 2, 64, 64), (1, 200, 2, 128, 100)], ids=str)
def test_cuda(case, decay, dtype):
    compare(case, decay, dtype, "cuda", impl="auto")


@pytest.mark.gpu
@decays
def test_cuda_many_segments_and_wide_heads(decay):
    compare((1, 5000, 1, 64, 64), decay, torch.bfloat16, "cuda", strength=0.05)
    compare((1, 700, 1, 256, 256), decay, torch.bfloat16, "cuda", strength=0.05)


@pytest.mark.gpu
@decays
def test_cuda_repeats_bitwise_and_in_a_graph(decay):
    made = inputs((2, 3000, 2, 64, 64), decay, torch.bfloat16, "cuda")
    first = results(attend, leaves(*made), made[2])
    still = leaves(*made)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        results(attend, still, made[2])
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = results(attend, still, made[2])
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(x, y) for x, y in zip(first, captured, strict=True))
