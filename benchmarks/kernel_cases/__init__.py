"""What is measured: one file an operator, each a declarative list. `kernels.py` does the measuring.

A file named after its operator offers

    cases(device)           at least five Case, from small (B 64, T 64, width 64) to large
    growth(device, length)  one Case of fixed band and the given length, for the slope over T
    overhead()              an Overhead: the call beside the bare work it does, on CPU
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import pkgutil
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from types import ModuleType

import torch

Tensors = tuple[torch.Tensor, ...]
OURS, COMPILED = "ours", "ours, compiled"  # as anybody calls it, and under torch.compile
PLAIN = "impl='torch'"  # the way a small case is held against: at most 1.5 times its cost
SMALL = {PLAIN: 1 / 1.5}


def unchanged(*x: torch.Tensor) -> Tensors:
    return x


@dataclass(frozen=True)
class Way:
    """One way to compute the operator.

    run      the inputs to the output; differentiated by autograd in every floating input
    prepare  untimed: the case's inputs in the layout this way likes best, as fresh tensors
    restore  untimed: its output in the case's layout
    missing  why it cannot run here (no compiler, not installed); None where it can
    forward_only  why it has no backward; None where it has one
    compiled  by torch.compile: beside ours compiled. The graph made for training serves the forward
              time and the error as well, since compiling takes longer than measuring
    """

    run: Callable[..., torch.Tensor]
    prepare: Callable[..., Tensors] = unchanged
    restore: Callable[[torch.Tensor], torch.Tensor] | None = None
    missing: str | None = None
    forward_only: str | None = None
    compiled: bool = False


@dataclass(frozen=True)
class Case:
    """One shape of one operator, with everything a user could run instead.

    make     (device, dtype) to the inputs, random data
    exact    float64 inputs to the output, naive; the error column is against it
    moved    elements read and written at least, (forward, forward+backward)
    flops    useful operations, (forward, forward+backward)
    goals    other way -> how many times faster ours must be, forward+backward
    scale    (structure, width) where the table of structures over widths holds it
    """

    name: str
    make: Callable[[torch.device, torch.dtype], Tensors]
    ours: Way
    others: Mapping[str, Way]
    exact: Callable[..., torch.Tensor]
    moved: tuple[float, float]
    flops: tuple[float, float]
    goals: Mapping[str, float] = field(default_factory=dict)
    scale: tuple[str, int] | None = None

    def ways(self) -> dict[str, Way]:
        """Ours first; compiled as well where that is what an alternative is."""
        found = {OURS: self.ours}
        if any(way.compiled and way.missing is None for way in self.others.values()):
            built = torch.compile(self.ours.run, dynamic=False)
            found[COMPILED] = replace(self.ours, run=built, compiled=True)
        return found | dict(self.others)

    def beside(self, name: str) -> str:
        """Which of ours the way `name` is compared with: a compiler is granted to both or none."""
        compiled = name == COMPILED or (name in self.others and self.others[name].compiled)
        return COMPILED if compiled else OURS


@dataclass(frozen=True)
class Overhead:
    """A tiny call beside its bare work: forward(*inputs) -> y, backward(dy, *inputs)."""

    make: Callable[[], Tensors]
    call: Callable[..., torch.Tensor]
    forward: Callable[..., torch.Tensor]
    backward: Callable[..., object]


def no_compiler(device: torch.device) -> str | None:
    """Why torch.compile cannot generate code for `device`; None where it can."""
    if device.type == "cuda":
        return None if importlib.util.find_spec("triton") else "triton is not installed"
    names = (os.environ.get("CXX"), "g++", "clang++")
    return None if any(n and shutil.which(n) for n in names) else "no C++ compiler"


def operators() -> dict[str, ModuleType]:
    """Operator -> its module of cases, by presence."""
    names = sorted(m.name for m in pkgutil.iter_modules(__path__))
    return {name: importlib.import_module(f"{__name__}.{name}") for name in names}
