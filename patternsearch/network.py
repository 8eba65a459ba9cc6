"""Families that are a chain of products of small cores (tensor networks), from their plan alone."""

from __future__ import annotations

import dataclasses
import itertools
import math
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor, einsum
from torch.nn.functional import linear
from typing_extensions import Self

from .errors import PatternError
from .pattern import Core, Cores, Cost, Dims, Pattern, divisors, mode_sizes, nearest, sees_future

INPUTS, OUTPUTS = "abcdefgh", "ABCDEFGH"  # letters of the modes, for those split into modes


@dataclass(frozen=True, slots=True)
class Step:
    """One product of a Network: the core `name`, with these letters, leaves `result`."""

    name: str
    core: str
    result: str


@dataclass(frozen=True, slots=True)
class Plan:
    """A matrix as products of small cores, in einsum letters.

    The input is read as an array with letters `inputs`; each step sums over the letters that its
    result drops; the last result is the output.
    """

    sizes: Mapping[str, int]
    inputs: str
    steps: tuple[Step, ...]

    def size(self, letters: Iterable[str]) -> int:
        return math.prod(self.sizes[letter] for letter in letters)

    def shape(self, letters: str) -> Dims:
        return tuple(self.sizes[letter] for letter in letters)

    def walk(self) -> Iterator[tuple[Step, str]]:
        """Every step with the letters it is given."""
        given = self.inputs
        for step in self.steps:
            yield step, given
            given = step.result


@dataclass(frozen=True, kw_only=True)
class Network(Pattern):
    """Base of the families that are a chain of products: they only give a `plan`.

    Cores, their fans, the product, the cost and the rank follow from it.
    """

    @abstractmethod
    def plan(self, out: Dims, inp: Dims) -> Plan:
        """The products for these sizes."""

    def misfit(self, out: Dims, inp: Dims) -> str | None:
        """What `unavailable` says beyond causality."""
        return None

    def unavailable(self, out: Dims, inp: Dims, causal: bool = False) -> str | None:
        return sees_future(self) if causal else self.misfit(out, inp)

    def resolve(self, out: Dims, inp: Dims, causal: bool = False) -> Self:
        return self

    def cores(self, out: Dims, inp: Dims) -> dict[str, Core]:
        plan, found = self.plan(out, inp), {}
        for step, given in plan.walk():
            summed = set(given) - set(step.result)
            made = set(step.core) & set(step.result) - set(given)
            found[step.name] = Core(plan.shape(step.core), plan.size(summed), plan.size(made))
        return found

    def matmul(self, cores: Cores, x: Tensor, out: Dims) -> Tensor:
        plan = self.plan(out, x.shape[x.dim() - len(out) :])
        z = x.flatten(-len(out)).unflatten(-1, plan.shape(plan.inputs))
        for step, given in plan.walk():
            core = cores[step.name]
            if core.dim() == 2 and step.core == step.result + given:
                z = linear(z, core)  # the same product in half the time for small ones
            else:
                z = einsum(f"...{step.core},...{given}->...{step.result}", core, z)
        y: Tensor = z.flatten(-len(plan.steps[-1].result)).unflatten(-1, out)
        return y

    def cost(self, out: Dims, inp: Dims) -> Cost:
        plan = self.plan(out, inp)
        flops = sum(2 * plan.size({*step.core, *given}) for step, given in plan.walk())
        return self.product_cost(
            out, inp, flops, sum(plan.size(step.result) for step in plan.steps[:-1])
        )

    def matrix_rank(self, out: Dims, inp: Dims) -> int:
        """The least cut between input and output, which almost all cores attain.

        (Cui et al. 2015, arXiv 1508.04644; a letter of three tensors is cut once.)
        """
        plan = self.plan(out, inp)
        least = math.prod(out)
        for near in itertools.product((True, False), repeat=len(plan.steps)):
            sides = {True: set(plan.inputs), False: set(plan.steps[-1].result)}
            for step, side in zip(plan.steps, near, strict=True):
                sides[side] |= set(step.core)
            least = min(least, plan.size(sides[True] & sides[False]))
        return least


@dataclass(frozen=True, kw_only=True)
class TwoFactorNetwork(Network):
    """Base of the networks that the operator two_factor computes along features."""

    operators: ClassVar[tuple[str, ...]] = ("two_factor",)

    @abstractmethod
    def two_factors(self, cores: Cores) -> tuple[Tensor, Tensor]:
        """The cores as views [f, d, r, g, a] and [f, e, r, b, g]; see kernels/two_factor.py."""

    def feature_operator(self, out: Dims, inp: Dims, device: torch.device) -> str:
        return "two_factor"

    def run_features(
        self, operator: Callable[..., Tensor], cores: Cores, x: Tensor, out: Dims
    ) -> Tensor:
        return operator(x, *self.two_factors(cores))


@dataclass(frozen=True, kw_only=True)
class BlockedNetwork(Network):
    """Base of the networks that cut both sides into `blocks` equal blocks."""

    blocks: int = 4

    def check(self) -> None:
        super().check()
        if self.blocks < 1:
            raise PatternError(f"{self.family}: blocks={self.blocks} must be at least 1")

    def valid_blocks(self, out: Dims, inp: Dims) -> list[int]:
        return divisors(math.gcd(math.prod(out), math.prod(inp)))

    def misfit(self, out: Dims, inp: Dims) -> str | None:
        if self.blocks not in (valid := self.valid_blocks(out, inp)):
            return (
                f"{self.family}: blocks={self.blocks} does not cut {math.prod(out)} and "
                f"{math.prod(inp)} into equal blocks; choose one of {valid}"
            )
        return super().misfit(out, inp)

    def resolve(self, out: Dims, inp: Dims, causal: bool = False) -> Self:
        blocks = nearest(self.blocks, self.valid_blocks(out, inp))
        return dataclasses.replace(super().resolve(out, inp, causal), blocks=blocks)


@dataclass(frozen=True, kw_only=True)
class ModalNetwork(Network):
    """Base of the networks that read both sides as arrays of `modes` axes.

    modes: at most how many; a side is split into factors as equal as its divisors allow.
    """

    modes: int = 2

    def check(self) -> None:
        super().check()
        if self.modes < 1:
            raise PatternError(f"{self.family}: modes={self.modes} must be at least 1")

    def factors(self, out: Dims, inp: Dims) -> tuple[Dims, Dims]:
        """The sizes of the modes of both sides."""
        return mode_sizes(out, inp, self.modes)

    def resolve(self, out: Dims, inp: Dims, causal: bool = False) -> Self:
        modes = len(self.factors(out, inp)[0])
        return dataclasses.replace(super().resolve(out, inp, causal), modes=modes)


@dataclass(frozen=True, kw_only=True)
class RankedNetwork(Network):
    """Base of the networks with a rank.

    rank: an integer, or a float in (0, 1] as the fraction of `full_rank`.
    """

    rank: int | float = 0.25

    @abstractmethod
    def full_rank(self, out: Dims, inp: Dims) -> int:
        """What a fraction is taken of."""

    def most_rank(self, out: Dims, inp: Dims) -> int:
        """The rank beyond which no new matrices are reached."""
        return self.full_rank(out, inp)

    def check(self) -> None:
        super().check()
        whole = isinstance(self.rank, int)
        if not (self.rank >= 1 if whole else 0 < self.rank <= 1):
            raise PatternError(
                f"{self.family}: rank={self.rank} must be an integer from 1, or a fraction in "
                "(0, 1]"
            )

    def whole_rank(self, out: Dims, inp: Dims) -> int:
        """`rank` as a number between 1 and `most_rank`."""
        full = self.full_rank(out, inp)
        wanted = self.rank if isinstance(self.rank, int) else round(self.rank * full)
        return max(1, min(self.most_rank(out, inp), wanted))

    def misfit(self, out: Dims, inp: Dims) -> str | None:
        if self.rank > (most := self.most_rank(out, inp)):
            return f"{self.family}: rank={self.rank} is above full rank {most}; use at most {most}"
        return super().misfit(out, inp)

    def resolve(self, out: Dims, inp: Dims, causal: bool = False) -> Self:
        fitting = super().resolve(out, inp, causal)
        return dataclasses.replace(fitting, rank=fitting.whole_rank(out, inp))


@lru_cache(maxsize=4096)
def sampled_rank(pattern: Pattern, out: Dims, inp: Dims) -> int:
    """The rank of one random matrix, which is that of almost every one."""
    generator = torch.Generator().manual_seed(0)
    cores = {
        name: (torch.rand if core.kind == "decay" else torch.randn)(
            core.shape, generator=generator, dtype=torch.float64
        )
        for name, core in pattern.cores(out, inp).items()
    }
    return int(torch.linalg.matrix_rank(pattern.to_dense(cores, out, inp)))


def truncated(dense: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """[*, m, n] -> [*, m, rank] and [*, rank, n]: the nearest product (Eckart and Young 1936).

    Where rank > min(m, n) the rest is zeros.
    """
    u, s, v = torch.linalg.svd(dense, full_matrices=False)
    short = max(0, rank - s.shape[-1])
    root = s[..., :rank].sqrt()
    left, right = u[..., :rank] * root[..., None, :], root[..., None] * v[..., :rank, :]
    return torch.nn.functional.pad(left, (0, short)), torch.nn.functional.pad(
        right, (0, 0, 0, short)
    )


def tensor_train(dense: Tensor, outs: Dims, inps: Dims, bonds: Sequence[int]) -> list[Tensor]:
    """[*batch, prod(outs), prod(inps)] -> cores [*batch, bond, o, i, bond] by successive SVDs.

    (Oseledets 2011, algorithm 1.) Optimal with one bond, and within sqrt(bonds) of it with more.
    """
    batch, n = dense.shape[:-2], len(outs)
    rest = dense.reshape(*batch, *outs, *inps)
    order = [len(batch) + k + side for k in range(n) for side in (0, n)]
    rest = rest.permute(*range(len(batch)), *order).reshape(*batch, 1, -1)
    cores: list[Tensor] = []
    for o, i, bond in zip(outs, inps, (*bonds, 1), strict=True):
        before = rest.shape[-2]
        rest = rest.reshape(*batch, before * o * i, -1)
        if len(cores) == n - 1:
            left = rest
        else:
            left, rest = truncated(rest, bond)
        cores.append(left.reshape(*batch, before, o, i, -1))
    return cores
