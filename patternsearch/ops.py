"""Which implementation runs a pattern: an operator of kernels/, found by name, or the reference."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Literal, get_args

import torch
from torch import Tensor

from .errors import KernelError, unknown
from .pattern import Cores, Dims, Pattern

Impl = Literal["auto", "reference", "kernel"]

_log = logging.getLogger(__name__)
_impl: Impl = "auto"
_said: set[str] = set()


@contextmanager
def implementation(impl: Impl) -> Iterator[None]:
    """Run patterns by `impl` inside: 'auto' picks the kernel where there is one for the case and
    notes once where not, 'reference' never uses one, 'kernel' raises KernelError with the reason.
    """
    global _impl
    if impl not in get_args(Impl):
        raise KernelError(unknown("implementation", impl, get_args(Impl)))
    before, _impl = _impl, impl
    try:
        yield
    finally:
        _impl = before


@cache
def load(name: str) -> tuple[Callable[..., Tensor] | None, str]:
    """An operator of kernels/ by name, or None and why it cannot be loaded."""
    module = f"patternsearch.kernels.{name}"
    try:
        found: Callable[..., Tensor] = getattr(importlib.import_module(module), name)
    except ModuleNotFoundError as e:
        if e.name == module:
            return None, f"kernels/{name}.py does not exist"
        return None, f"kernels/{name}.py needs {e.name!r}, which is not installed"
    return found, ""


@cache
def _status(name: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why an operator cannot run on a device in this dtype; None where it can."""
    module = importlib.import_module(f"patternsearch.kernels.{name}")
    why: str | None = module.status(device, dtype)
    return why


def pick(name: str, why: str, what: str, x: Tensor) -> tuple[Callable[..., Tensor] | None, str]:
    """The operator `name` as the current implementation asks for it; None for the reference.

    `why` is the reason where no operator fits `what`. x: what it is to run on. Returns with it the
    operator's own impl.
    """
    if _impl == "reference":
        return None, ""
    operator: Callable[..., Tensor] | None = None
    if name:
        operator, why = load(name)
        if operator is not None:
            why = _status(name, x.device, x.dtype) or ""
    if operator is not None and not why:
        return operator, _impl
    if _impl == "kernel":
        raise KernelError(f"{what}: {why}; use implementation('auto') to allow the reference")
    if not torch.compiler.is_compiling() and why not in _said:
        _said.add(why)
        _log.info("%s runs by its reference: %s", what, why)
    return None, ""


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """What autocast lowers the inputs of a product to; None where it leaves them."""
    kind = x.device.type
    if not torch.is_autocast_enabled(kind) or not x.is_floating_point():
        return None
    return torch.get_autocast_dtype(kind)


def lowered(cores: Cores, x: Tensor) -> tuple[Cores, Tensor]:
    """As autocast lowers the inputs of a product; operators of ours are none that it knows.

    What it leaves in float32 before them (exponentials, on CUDA) would not fit the rest.
    """
    dtype = autocast_dtype(x)
    return (cores, x) if dtype is None else _cast(cores, x, dtype)


def _cast(cores: Cores, x: Tensor, dtype: torch.dtype) -> tuple[Cores, Tensor]:
    return {name: core.to(dtype) for name, core in cores.items()}, x.to(dtype)


def _under_autocast(
    product: Callable[[Cores, Tensor], Tensor], cores: Cores, x: Tensor, remembers: bool
) -> Tensor:
    """product(cores, x) in the dtype of autocast; inside in float32 where numbers are decays.

    bfloat16 rounds a decay above 0.998 to 1 and its sqrt(1 - a^2) to 0: a long memory is lost.
    """
    dtype = autocast_dtype(x)
    if dtype is None:
        return product(cores, x)
    if not remembers:
        return product(*_cast(cores, x, dtype))
    with torch.autocast(x.device.type, enabled=False):
        return product(*_cast(cores, x, torch.float32)).to(dtype)


def along_features(
    pattern: Pattern, cores: Cores, x: Tensor, out: int, remembers: bool = False
) -> Tensor:
    """[*, d_in] -> [*, out]. remembers: whether numbers among the cores are decays."""

    def product(cores: Cores, x: Tensor) -> Tensor:
        name = pattern.feature_operator((out,), x.shape[-1:], x.device)
        operator, impl = pick(name, "", str(pattern), x) if name else (None, "")
        if operator is None:
            return pattern.matmul(cores, x, (out,))
        return pattern.run_features(lambda *a, **k: operator(*a, **k, impl=impl), cores, x, (out,))

    return _under_autocast(product, cores, x, remembers)


def along_positions(
    pattern: Pattern, cores: Cores, x: Tensor, out: Dims, d_out: int, remembers: bool = False
) -> Tensor:
    """[B, *positions, d_in] -> [B, *out, d_out]. remembers: see `along_features`.

    With an entry the pattern maps channels too. Else cores are [heads, ...] and a head's matrix is
    shared by d_out / heads channels.
    """
    lead: Dims = () if pattern.entry is None else (x.shape[-1],)
    o, inp = (*out, d_out) if lead else out, (*x.shape[1:-1], *lead)

    def product(cores: Cores, x: Tensor) -> Tensor:
        name, why = pattern.operator(o, inp)
        operator, impl = pick(name, why, str(pattern), x)
        if operator is not None:
            return pattern.run(lambda *a, **k: operator(*a, **k, impl=impl), cores, x, out)
        if pattern.entry is not None:
            return pattern.matmul(cores, x, o)
        heads = {key: core.unsqueeze(1) for key, core in cores.items()}
        h = next(iter(heads.values())).shape[0] if heads else 1
        y = x.movedim(-1, 1).unflatten(1, (h, -1))  # [B, h, channels, *positions]
        return pattern.matmul(heads, y, out).flatten(1, 2).movedim(1, -1)

    return _under_autocast(product, cores, x, remembers)


def scan_along_positions(pattern: Pattern, decay: Tensor, x: Tensor, out: Dims) -> Tensor:
    """A semiseparable pattern whose decays were computed: both [B, *inp, d] -> [B, *out, d]."""
    inp = tuple(x.shape[1:-1])

    def product(cores: Cores, x: Tensor) -> Tensor:
        name, why = pattern.operator(out, inp)
        operator, impl = pick(name, why, str(pattern), x)
        if operator is not None:
            return pattern.run(lambda *a, **k: operator(*a, **k, impl=impl), cores, x, out)
        flat = {"decay": cores["decay"].flatten(1, -2).movedim(-1, 1)}  # [B, d, n]
        return pattern.matmul(flat, x.movedim(-1, 1), out).movedim(1, -1)

    return _under_autocast(product, {"decay": decay}, x, remembers=True)
