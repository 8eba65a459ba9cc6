"""Every shipped Triton launch compiles for sm_90 without a GPU, fits, and does not spill.

The compiler needs a process without TRITON_INTERPRET, so this file is also the script that runs
there: `python test_aot.py MODULE` prints one JSON line a launch.
"""

import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

KERNELS = Path(__file__).resolve().parents[2] / "kernels"
MODULES = sorted(
    p.stem for p in KERNELS.glob("_*_triton*.py") if re.search(r"^CONFIGS\b", p.read_text(), re.M)
)
SHARED_LIMIT = 232448  # bytes a block may use on sm_90


def compile_for_hopper(launch):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = launch.kernel.arg_names
    signature = {n: launch.signature.get(n, "constexpr") for n in names}
    unset = [n for n in names if n not in launch.signature and n not in launch.constexprs]
    assert not unset, f"{launch.label}: no type and no value for {unset}"
    attrs = {(names.index(n),): [["tt.divisibility", 16]] for n in launch.divisible}
    source = ASTSource(launch.kernel, signature, dict(launch.constexprs), attrs)
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    built = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(built.asm["cubin"])
        usage = subprocess.check_output([tool, "-res-usage", cubin], text=True)
    found = {k: int(n) for k, n in re.findall(r"(REG|STACK):(\d+)", usage)}
    mma = bool(re.search(r"\bwgmma\.mma_async|\bmma\.sync", built.asm["ptx"]))
    return {"label": launch.label, "shared": built.metadata.shared, "mma": mma, **found}


def report(module):
    for launch in importlib.import_module(f"patternsearch.kernels.{module}").CONFIGS:
        print(json.dumps(compile_for_hopper(launch) | {"wanted": launch.tensor_cores}), flush=True)


def pytest_generate_tests(metafunc):
    if "module" in metafunc.fixturenames:
        metafunc.parametrize("module", MODULES)


def test_compiles_for_hopper(module):
    env = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": str(KERNELS.parent)}
    command = [sys.executable, __file__, module]
    run = subprocess.run(command, env=env, capture_output=True, text=True, timeout=500)
    assert run.returncode == 0, run.stderr[-4000:]
    rows = [json.loads(line) for line in run.stdout.splitlines()]
    assert rows, f"{module}.CONFIGS is empty"
    assert [r for r in rows if r["shared"] > SHARED_LIMIT] == []
    assert [r for r in rows if r["STACK"] != 0] == []
    assert [r for r in rows if r["wanted"] and not r["mma"]] == []


if __name__ == "__main__":
    report(sys.argv[1])
