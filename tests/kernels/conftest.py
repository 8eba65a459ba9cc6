import os
import sys

import pytest
import torch

os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # triton 3.9 warns where it is unset


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


_PLAIN = {
    (torch, "empty"): torch.empty,
    (torch, "empty_like"): torch.empty_like,
    (torch, "empty_strided"): torch.empty_strided,
    (torch.Tensor, "new_empty"): torch.Tensor.new_empty,
}


def _poisoned(make):
    def allocate(*args, **kwargs):
        x = make(*args, **kwargs)
        caller = sys._getframe(1).f_globals.get("__name__", "")
        if caller.startswith("patternsearch.kernels"):
            x.fill_(float("nan") if x.is_floating_point() or x.is_complex() else -1)
        return x

    return allocate


@pytest.fixture(autouse=True)
def poison(request, monkeypatch):
    """Memory that an operator allocates and forgets to write reads as NaN (-1 for integers)."""
    if "unpoisoned" not in request.fixturenames:
        for (owner, name), make in _PLAIN.items():
            monkeypatch.setattr(owner, name, _poisoned(make))


@pytest.fixture
def unpoisoned():
    """Ask for it in tests of torch.compile, which traces through the patched functions."""


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
