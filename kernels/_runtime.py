"""What every operator shares: the choice of implementation, registration, tables of launches.

An operator registers its forward and its backward as two opaque torch operators under
`patternsearch::` and puts one autograd function on top of them. The CPU implementation is plain
torch; the CUDA one launches Triton, which is imported only when it first runs.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NoReturn

import torch

from patternsearch.errors import KernelError, unknown

Impl = Literal["auto", "torch", "kernel"]
IMPLS: tuple[Impl, ...] = ("auto", "torch", "kernel")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # and float64 on CPU
NAMESPACE = "patternsearch"

_log = logging.getLogger("patternsearch.kernels")
_said: set[str] = set()
_statuses: dict[str, str | None] = {}


def _find_triton() -> str | None:
    try:
        found = importlib.util.find_spec("triton") is not None
    except (ImportError, ValueError):
        found = False
    return None if found else "triton is not installed (pip install triton, Linux only)"


# Found once, as a plain global: a cached function would break the graph under torch.compile.
_NO_TRITON = _find_triton()


def why_no_triton() -> str | None:
    """The reason Triton kernels cannot be built in this process; None where they can."""
    return _NO_TRITON


def _device_status(device: torch.device | str) -> str | None:
    """The reason no kernel of ours runs on `device` at all; None where they do.

    CPU kernels are plain torch and always run; CUDA kernels need Triton and compute capability 8.0.
    Asked at every call on CUDA, so found once a device; a constant to torch.compile.
    """
    key = str(device)
    if key not in _statuses:
        _statuses[key] = _find_status(torch.device(device))
    return _statuses[key]


device_status: Callable[[torch.device | str], str | None]
device_status = torch.compiler.assume_constant_result(_device_status)


def _find_status(device: torch.device) -> str | None:
    if device.type == "cpu":
        return None
    if device.type != "cuda":
        return f"there is no kernel for device type {device.type!r}, only for cpu and cuda"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    if torch.version.hip is not None:
        return "the kernels are tuned and tested for CUDA, this torch is built for ROCm"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return f"compute capability 8.0 is needed, {torch.cuda.get_device_name(device)} has less"
    return _NO_TRITON


def dtype_status(device: torch.device | str, dtype: torch.dtype) -> str | None:
    """The reason no kernel of ours takes tensors of `dtype` on `device`; None where they do."""
    kind = torch.device(device).type
    if dtype in DTYPES or (dtype == torch.float64 and kind == "cpu"):
        return None
    return f"there is no kernel for {dtype} on {kind}"


def refuse(op: str, condition: str, remedy: str) -> NoReturn:
    """Raise the KernelError of a wrong argument: `op: condition. remedy.`"""
    raise KernelError(f"{op}: {condition}. {remedy}.")


def check(holds: bool, op: str, condition: str, remedy: str) -> None:
    """Refuse unless `holds`. Not for hot paths: the two sentences are built either way."""
    if not holds:
        refuse(op, condition, remedy)


def check_tensor(op: str, name: str, x: torch.Tensor, like: torch.Tensor | None = None) -> None:
    """Floating dtype that the kernels know, last stride 1, and device and dtype those of `like`."""
    if x.dtype not in DTYPES and dtype_status(x.device, x.dtype):
        refuse(
            op,
            f"{name} has dtype {x.dtype} on {x.device.type}",
            "Use float32, bfloat16 or float16 (float64 on CPU only)",
        )
    if like is not None and (x.dtype != like.dtype or x.device != like.device):
        refuse(
            op,
            f"{name} is {x.dtype} on {x.device}, the first argument {like.dtype} on {like.device}",
            "Bring both to one dtype and device",
        )


def use_kernel(op: str, impl: Impl, refused: str | None, slower: str | None = None) -> bool:
    """Whether the kernel runs (True) or the plain torch formulation (False).

    `refused` says why the kernel cannot run, `slower` why it would not pay, None that it does.
    "kernel" raises KernelError with `refused`; "auto" logs the reason once a process.
    """
    if impl == "auto":
        reason = refused or slower
        if reason is None:
            return True
        _note(op, reason)
        return False
    if impl == "torch":
        return False
    if impl != "kernel":
        raise KernelError(f"{op}: {unknown('impl', impl, IMPLS)}")
    if refused is not None:
        refuse(op, f"impl='kernel' cannot run here: {refused}", "Use impl='auto' or impl='torch'")
    return True


def fusing(x: torch.Tensor, *, short: Any, small: Any = True) -> str | None:
    """Why torch.compile, tracing a call on CPU, does better with plain operations, which it fuses
    into loops; None where it does not.

    Not in half precision, where a fused loop rounds elsewhere than its operations one by one.
    short: of a length that is unrolled, and so must not be dynamic. small: of sizes that may be.
    """
    wide = x.dtype in (torch.float32, torch.float64)
    if not (torch.compiler.is_compiling() and x.device.type == "cpu" and wide):
        return None
    from torch.fx.experimental.symbolic_shapes import guard_or_false, statically_known_true

    fuses = statically_known_true(short) and guard_or_false(small)
    return "torch.compile fuses so little work" if fuses else None


def _note(op: str, reason: str) -> None:
    if torch.compiler.is_compiling():  # logging would break the graph
        return
    line = f"{op}: impl='auto' takes the plain torch formulation: {reason}"
    if line not in _said:
        _said.add(line)
        _log.info(line)


def register(
    name: str,
    schema: str,
    *,
    cpu: Callable[..., Any],
    cuda: Callable[..., Any],
    fake: Callable[..., Any],
) -> Any:
    """Define `patternsearch::name` with `schema`, and return the callable overload.

    A second import of the same module (a reload, or another path to it) keeps the first definition.
    `cuda` must import Triton inside, and `fake` must give shapes, strides and dtypes of the others.
    """
    qualified = f"{NAMESPACE}::{name}"
    if not torch._C._dispatch_has_kernel(qualified):
        torch.library.define(qualified, schema)
        torch.library.impl(qualified, "CPU", below_autograd(cpu))
        torch.library.impl(qualified, "CUDA", cuda)
        torch.library.register_fake(qualified, fake)
    return getattr(getattr(torch.ops, NAMESPACE), name).default


def below_autograd(cpu: Callable[..., Any]) -> Callable[..., Any]:
    """`cpu` without autograd and its bookkeeping of views and versions, which nothing inside needs.

    Each of its operations then costs a part less. Autocast, too, ends where the operator begins.
    """

    def call(*args: Any) -> Any:
        with torch._C._AutoDispatchBelowADInplaceOrView(), torch._C._DisableAutocast():
            return cpu(*args)

    return call


def eager(op: Any, cpu: Callable[..., Any]) -> Callable[..., Any]:
    """`op`, but its CPU implementation at once where nothing traces: 5 microseconds saved."""
    direct = below_autograd(cpu)

    def call(x: torch.Tensor, *rest: Any) -> Any:
        if x.is_cpu and not torch.compiler.is_compiling():
            return direct(x, *rest)
        return op(x, *rest)

    return call


def once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """torch's decorator of that name, at no cost where nobody asks for a second derivative."""
    guarded = torch.autograd.function.once_differentiable(backward)

    def run(ctx: Any, *grads: torch.Tensor) -> Any:
        return (guarded if torch.is_grad_enabled() else backward)(ctx, *grads)

    return run


def apply_of(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """`function.apply`, without the four microseconds of Python that torch puts before it.

    They serve functions with a `setup_context`, which ours lack, and the transforms of torch.func.
    """
    bare = super(torch.autograd.Function, function).apply  # type: ignore[misc]

    def call(*args: Any) -> Any:
        if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
            return function.apply(*args)
        return bare(*args)

    return call


@dataclass(frozen=True)
class Compiled:
    """One shipped launch of a Triton kernel, as the ahead-of-time test compiles it for sm_90.

    signature     runtime argument -> Triton type, e.g. {"x": "*bf16", "T": "i32"}, in the order of
                  the kernel's parameters or any other; constexprs are left out
    constexprs    compile-time argument -> value; None for an absent pointer
    divisible     names of the runtime arguments that are multiples of 16 (vector loads need it)
    tensor_cores  whether a product is on the hot path, so that mma or wgmma must appear
    """

    kernel: Any
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 2
    divisible: tuple[str, ...] = ()
    tensor_cores: bool = False
    label: str = ""
