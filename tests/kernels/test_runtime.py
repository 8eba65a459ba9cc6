import importlib
import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from patternsearch.errors import KernelError
from patternsearch.kernels import _runtime

ROOT = Path(__file__).resolve().parents[2]


def test_explicit_kernel_raises_the_reason():
    with pytest.raises(KernelError, match=r"op: impl='kernel' cannot run here: too small\. Use"):
        _runtime.use_kernel("op", "kernel", "too small")
    assert _runtime.use_kernel("op", "kernel", None, slower="it is slow")
    assert not _runtime.use_kernel("op", "torch", None)


def test_misspelt_impl_names_the_nearest():
    with pytest.raises(KernelError, match="Did you mean 'kernel'"):
        _runtime.use_kernel("op", "kernal", None)  # type: ignore[arg-type]


def test_auto_logs_each_reason_once(caplog):
    caplog.set_level(logging.INFO, "patternsearch.kernels")
    for reason in ("log once a", "log once a", "log once b"):
        assert not _runtime.use_kernel("op", "auto", reason)
    assert [r.message[-1] for r in caplog.records] == ["a", "b"]
    assert _runtime.use_kernel("op", "auto", None)


def test_check_tensor():
    x = torch.zeros(2, dtype=torch.float64)
    _runtime.check_tensor("op", "x", x)
    with pytest.raises(KernelError, match=r"y is torch.float32 on cpu, the first argument"):
        _runtime.check_tensor("op", "y", x.float(), x)
    with pytest.raises(KernelError, match="n has dtype"):
        _runtime.check_tensor("op", "n", x.long())


def test_register_twice_keeps_the_first():
    for factor in (2, 3):
        op = _runtime.register(
            "runtime_test",
            "(Tensor x) -> Tensor",
            cpu=lambda x, f=factor: x * f,
            cuda=lambda x: x,
            fake=torch.empty_like,
        )
    assert op(torch.ones(1)).item() == 2
    torch.library.opcheck(op, (torch.ones(3),))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's own
def test_only_what_is_traced_goes_through_the_dispatcher(unpoisoned):
    op = _runtime.register(
        "runtime_test_eager",
        "(Tensor x) -> Tensor",
        cpu=lambda x: x * 2,
        cuda=lambda x: x,
        fake=torch.empty_like,
    )
    run = _runtime.eager(op, lambda x: x * 3)
    assert run(torch.ones(1)).item() == 3
    assert torch.compile(run, fullgraph=True, backend="aot_eager")(torch.ones(1)).item() == 2


def test_device_status():
    assert _runtime.device_status("cpu") is None
    assert "device type 'meta'" in _runtime.device_status("meta")


def test_every_operator_says_which_dtypes_a_device_lacks():
    for path in (ROOT / "kernels").glob("[a-z]*.py"):
        status = importlib.import_module(f"patternsearch.kernels.{path.stem}").status
        assert status("cpu") is status("cpu", torch.float64) is None
        assert status("cuda", torch.float64) == "there is no kernel for torch.float64 on cuda"
        assert "torch.complex64" in status("cpu", torch.complex64)


def test_triton_is_imported_by_no_public_module():
    names = sorted(p.stem for p in (ROOT / "kernels").glob("*.py") if "_triton" not in p.stem)
    code = "import sys\nsys.modules['triton'] = None\n"
    code += "".join(f"import patternsearch.kernels.{n}\n" for n in names)
    code += "from patternsearch.kernels import _runtime\nprint(_runtime.why_no_triton())"
    out = subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True)
    assert "triton is not installed" in out
    assert importlib.util.find_spec("triton") is None or _runtime.why_no_triton() is None


def test_the_precision_of_float32_products_is_read_whoever_set_it():
    from patternsearch.kernels._rows_triton import numerics

    x, product = torch.zeros(1), torch.backends.cuda.matmul
    try:
        assert numerics(x)["PRECISION"] == "ieee"
        torch.set_float32_matmul_precision("high")
        assert numerics(x)["PRECISION"] == "tf32"
        product.fp32_precision = "ieee"
        assert numerics(x)["PRECISION"] == "ieee"
        product.fp32_precision = "tf32"
        assert numerics(x)["PRECISION"] == "tf32"
        assert numerics(x.half())["PRECISION"] == "tf32"
    finally:
        torch.set_float32_matmul_precision("highest")
        product.fp32_precision = "none"
