"""What the operator tests share: dtypes, devices, the error budget."""

import pytest
import torch

LOW = (torch.float32, torch.bfloat16, torch.float16)
INTERPRETED = not torch.cuda.is_available()  # tests/conftest.py then sets TRITON_INTERPRET
needs_interpreter = pytest.mark.skipif(not INTERPRETED, reason="kernels are compiled here")


def rms(x):
    return x.double().square().mean().sqrt().item() if x.numel() else 0.0


def largest(x):
    return x.double().abs().max().item() if x.numel() else 0.0


def assert_within_budget(name, got, reference, exact, factor=2.0):
    """`got` is at most `factor` times as wrong as an independent reference of the same dtype.

    `exact` is the float64 result from the same (already rounded) inputs. One rounding is granted
    to the reference, so that one that happens to be exact leaves a budget.
    """
    assert got.shape == exact.shape, f"{name}: shape {tuple(got.shape)}, not {tuple(exact.shape)}"
    assert got.dtype == reference.dtype, f"{name}: {got.dtype}, not {reference.dtype}"
    assert not got.isnan().any(), f"{name}: NaN, so memory that was never written"
    unit = torch.finfo(got.dtype).eps / 2
    for what, size in (("largest", largest), ("rms", rms)):
        error, allowed = size(got.double() - exact), size(reference.double() - exact)
        budget = factor * (allowed + unit * size(exact))
        assert error <= budget, f"{name}: {what} error {error:.3g}, budget {budget:.3g}"


def leaves(*tensors):
    """Copies that require a gradient and keep the strides."""
    return tuple(t.detach().requires_grad_() for t in tensors)


def doubled(*tensors):
    return tuple(t.detach().double().requires_grad_() for t in tensors)


def launches(module, names, monkeypatch):
    """The grids that `module` asks of these kernels from now on; nothing is computed."""
    grids = []

    class Recorder:
        def __getitem__(self, grid):
            grids.append(grid)
            return lambda *args, **kwargs: None

    for name in names:
        monkeypatch.setattr(module, name, Recorder())
    return grids
