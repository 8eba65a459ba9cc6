import pytest
import torch

from patternsearch.kernels import _matmul_cpu as matmul

SHAPES = ((0, 5, 3), (7, 5, 3), (300, 90, 70), (500, 130, 140))  # the last two by oneDNN


def layouts(rows, columns):
    """A matrix in every layout that callers give."""
    x = torch.randn(rows, columns)
    yield x
    yield x.t().contiguous().t()
    yield torch.cat([x, x], 1)[:, :columns]
    yield x[:1].expand(rows, columns) if rows else x


def close(got, exact):
    torch.testing.assert_close(got.double(), exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
def test_every_layout(shape):
    n, i, o = shape
    bias = torch.randn(o)
    for x in layouts(n, i):
        for w in layouts(o, i):
            exact = x.double() @ w.double().t()
            close(matmul.linear(x, w), exact)
            close(matmul.linear(x, w, bias), exact + bias)
        for g in layouts(n, o):
            close(matmul.outer(g, x), g.double().t() @ x.double())


def test_the_switch_of_torch_is_obeyed(monkeypatch):
    assert not matmul.fast(torch.float64)
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    assert not matmul.fast(torch.float32)
    x, w = torch.randn(300, 90), torch.randn(70, 90)
    assert torch.equal(matmul.linear(x, w), torch.nn.functional.linear(x, w))
