"""Patterns as torch modules: parameters, their initialisation and their learning rates.

One rule of `Core` serves every family (Qiu et al. 2024, arXiv 2406.06248, and Yang et al. 2022,
arXiv 2203.03466): std = sqrt(1 / fan_in) min(1, sqrt(fan_out / fan_in)), and under Adam the rate of
a core is base * kappa * base_width / d_in with kappa = d_in / (fan_in m) in a layer of m cores.
Of the fan-in of a convolution only the channels count: its taps do not grow with the width.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from . import ops
from .errors import PatternError
from .pattern import Core, Dims, Pattern

BASE_WIDTH = 32  # the width at which a task's base rate was scanned
MAX_RATE = (
    4.0  # a core of few inputs (a short filter) does not grow with width: its rate is bounded
)

Role = Literal["input", "hidden", "head"]


def init_std(core: Core) -> float:
    """Standard deviation at which unit-variance inputs give outputs of at most unit variance."""
    return math.sqrt(1 / core.fan_in) * min(1.0, math.sqrt(core.fan_out / core.fan_in))


def rate(core: Core, cores: int, role: Role) -> float:
    """Learning rate of a core over the base rate, in a layer of so many cores."""
    if core.kind != "normal":
        return 1.0
    if role == "input":
        return 1.0 / cores
    return min(BASE_WIDTH * core.taps / (core.fan_in * cores), MAX_RATE)


class Matrix(nn.Module):
    """The parameters of `matrices` matrices of one pattern, [matrices, *core] (or [*core]).

    Raises PatternError where the pattern cannot stand at these sizes; `resolve` finds the nearest.
    """

    def __init__(
        self,
        pattern: Pattern,
        out: Dims,
        inp: Dims,
        matrices: int | None = None,
        role: Role = "hidden",
    ) -> None:
        super().__init__()
        if reason := pattern.unavailable(out, inp):
            raise PatternError(reason)
        self.pattern, self.out, self.inp, self.role = pattern, out, inp, role
        self.specs = pattern.cores(out, inp)
        self.remembers = any(core.kind == "decay" for core in self.specs.values())
        lead = () if matrices is None else (matrices,)
        self.numbers = nn.ParameterDict(
            {name: torch.empty(*lead, *core.shape) for name, core in self.specs.items()}
        )
        self.reset()

    def reset(self) -> None:
        """Draw all numbers anew.

        A head starts at zero: by the last core of each term, so that all can learn. (One made of
        decays alone does not: no core scales it.)
        """
        chains = self.pattern.chains(self.out, self.inp) if self.role == "head" else []
        last = {one[-1] for one in chains}
        for name, core in self.specs.items():
            value = self.numbers[name].data
            if core.kind in ("zero", "bias") or name in last:
                value.zero_()
            elif core.kind == "decay":  # 1 - a log-uniform from 1/n to 1/2: memories of all lengths
                forget = torch.rand(value.shape) * math.log(max(math.prod(self.inp), 3) / 2)
                value.copy_(torch.logit(1 - 0.5 * torch.exp(-forget)))
            else:
                value.copy_(torch.randn(value.shape) * init_std(core))

    def cores(self) -> dict[str, Tensor]:
        """The numbers as the pattern takes them: decays in (0, 1)."""
        return {
            name: self.numbers[name].sigmoid() if core.kind == "decay" else self.numbers[name]
            for name, core in self.specs.items()
        }

    def rates(self) -> dict[str, float]:
        """Parameter name -> learning rate over the base rate."""
        normal = sum(core.kind == "normal" for core in self.specs.values())
        return {f"numbers.{n}": rate(core, normal, self.role) for n, core in self.specs.items()}

    def decayed(self) -> set[str]:
        """Names of the matrices among the parameters: no decays, diagonals or single vectors."""
        return {
            f"numbers.{name}"
            for name, core in self.specs.items()
            if core.kind == "normal" and core.fan_in > 1 and self.numbers[name].dim() > 1
        }

    def extra_repr(self) -> str:
        return f"{self.pattern}, {self.inp} -> {self.out}"


class FeatureMap(Matrix):
    """A pattern along features with a bias: [*, d_in] -> [*, d_out]."""

    def __init__(
        self, pattern: Pattern, d_in: int, d_out: int, bias: bool = True, role: Role = "hidden"
    ) -> None:
        super().__init__(pattern, (d_out,), (d_in,), role=role)
        self.bias = nn.Parameter(torch.zeros(d_out)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        y = ops.along_features(self.pattern, self.cores(), x, self.out[0], self.remembers)
        return y if self.bias is None else y + self.bias.to(y.dtype)


class PositionMap(Matrix):
    """A pattern along positions: [B, *inp, d_in] -> [B, *out, d_out]."""

    def __init__(
        self,
        pattern: Pattern,
        out: Dims,
        inp: Dims,
        d_in: int,
        d_out: int,
        heads: int = 1,
        bias: bool = False,
        role: Role = "hidden",
    ) -> None:
        self.grid, self.d_out = out, d_out
        if pattern.entry is not None:
            super().__init__(pattern, (*out, d_out), (*inp, d_in), role=role)
        else:
            super().__init__(pattern, out, inp, heads, role=role)
        self.bias = nn.Parameter(torch.zeros(d_out)) if bias and pattern.entry else None

    def forward(self, x: Tensor) -> Tensor:
        y = ops.along_positions(
            self.pattern, self.cores(), x, self.grid, self.d_out, self.remembers
        )
        return y if self.bias is None else y + self.bias.to(y.dtype)
