"""The central abstraction: a Pattern is the structure of one matrix.

A pattern is a frozen dataclass of numbers and strings: no tensors and no sizes. Sizes (`out`,
`inp`) are arguments of every method, tensors (`cores`) are arguments of the two that compute, so a
pattern is hashable, comparable, readable in YAML, and stands at every length and width.

Shapes. `out` and `inp` are the dims a matrix maps between, positions `(T,)` or `(H, W)` or features
`(d,)`. A pattern with `entry` has a pattern along features where another has a number, and then its
dims end with the channels: `(*positions, channels)`. `x` is [*batch, *inp], the result [*batch,
*out], and the dense matrix is [prod(out), prod(inp)] in row-major order. Cores may carry leading
batch axes that broadcast against those of x (one matrix a head, say).
"""

from __future__ import annotations

import dataclasses
import importlib
import math
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from typing_extensions import Self

from .domains import Domain
from .errors import PatternError, unknown

Dims = tuple[int, ...]
Cores = Mapping[str, Tensor]
Kind = Literal["normal", "decay", "zero", "bias"]

MAX_MODES = 8  # letters for a plan run out beyond; 8 modes of 2 are already a width of 256

_FAMILIES: dict[str, type[Pattern]] = {}


@dataclass(frozen=True, slots=True)
class Core:
    """One tensor of a pattern.

    `fan_in` counts the inputs one output of this core sums over, `fan_out` the outputs one input
    goes to; initialisation and learning rate follow from them alone. `taps` of the fan-in are
    positions, whose number does not grow with the width of a model. `decay` marks a number in
    (0, 1), which a layer keeps as its logit.
    """

    shape: Dims
    fan_in: int
    fan_out: int
    kind: Kind = "normal"
    taps: int = 1

    def among(self, fan_in: int, fan_out: int) -> Core:
        """The same, where the results of `fan_in` such are summed; they are no width of a model."""
        return dataclasses.replace(
            self,
            fan_in=self.fan_in * fan_in,
            fan_out=self.fan_out * fan_out,
            taps=self.taps * fan_in,
        )


@dataclass(frozen=True, slots=True)
class Cost:
    """What a pattern or a model needs, for one example in float32.

    parameters: numbers learned. flops: floating-point operations of the forward pass's products, a
    multiply-add counted as 2. bytes: moved at least, each operand once. activations: bytes kept for
    the backward pass.
    """

    parameters: int = 0
    flops: int = 0
    bytes: int = 0
    activations: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(*(a + b for a, b in zip(self.astuple(), other.astuple(), strict=True)))

    def repeat(self, matrices: int, vectors: int) -> Cost:
        """`matrices` such matrices, and `vectors` vectors through each."""
        work = matrices * vectors
        weights = 4 * self.parameters
        moved = matrices * weights + work * (self.bytes - weights)
        return Cost(self.parameters * matrices, self.flops * work, moved, self.activations * work)

    def astuple(self) -> tuple[int, int, int, int]:
        return self.parameters, self.flops, self.bytes, self.activations


@dataclass(frozen=True, slots=True)
class Projected:
    """Cores near a given matrix; `optimal` where no others are nearer in the Frobenius norm."""

    cores: dict[str, Tensor]
    optimal: bool

    def named(self, name: str) -> Projected:
        """The cores of an entry under the names that `with_entry` gives them."""
        return Projected({f"{name}_{k}": v for k, v in self.cores.items()}, self.optimal)


@dataclass(frozen=True, kw_only=True)
class Pattern(ABC):
    """Structure of a matrix from `inp` to `out`. One subclass a family; subclasses are final."""

    entry: Pattern | None = None
    family: ClassVar[str]
    operators: ClassVar[tuple[str, ...]] = ()  # the modules of kernels/ it can run on
    takes_entry: ClassVar[bool] = False

    def __init_subclass__(cls, *, family: str | None = None) -> None:
        if family is None:  # a base of families, such as Network
            return
        if (old := _FAMILIES.get(family)) is not None and old.__qualname__ != cls.__qualname__:
            raise TypeError(
                f"family {family!r} is defined in {old.__module__} and {cls.__module__}"
            )
        cls.family = family
        _FAMILIES[family] = cls

    def __post_init__(self) -> None:
        if self.entry is not None and not self.takes_entry:
            raise PatternError(
                f"{self.family}: entry={self.entry.family!r}, but its entries are numbers; remove "
                f"'entry' or use {' or '.join(n for n, f in families().items() if f.takes_entry)}"
            )
        self.check()

    def check(self) -> None:  # noqa: B027 - optional
        """Raise PatternError where fields do not fit together, whatever the sizes."""

    @abstractmethod
    def unavailable(self, out: Dims, inp: Dims, causal: bool = False) -> str | None:
        """Why it cannot stand here, as a sentence with the remedy; None where it can."""

    @abstractmethod
    def resolve(self, out: Dims, inp: Dims, causal: bool = False) -> Self:
        """The same pattern with every field at its nearest valid value for these dims.

        Patterns that resolve alike are the same structure: a trial is identified by this.
        """

    @abstractmethod
    def cores(self, out: Dims, inp: Dims) -> dict[str, Core]:
        """Name -> the tensors it is made of."""

    @abstractmethod
    def matmul(self, cores: Cores, x: Tensor, out: Dims) -> Tensor:
        """Reference product in plain torch, differentiable: [*batch, *inp] -> [*batch, *out]."""

    @abstractmethod
    def to_dense(self, cores: Cores, out: Dims, inp: Dims) -> Tensor:
        """The matrix, [*cores' batch, prod(out), prod(inp)], written without `matmul`."""

    @abstractmethod
    def cost(self, out: Dims, inp: Dims) -> Cost:
        """Cost of one matrix on one vector."""

    @abstractmethod
    def matrix_rank(self, out: Dims, inp: Dims) -> int:
        """The rank of almost every matrix of this structure."""

    def operator(self, out: Dims, inp: Dims) -> tuple[str, str]:
        """(operator of kernels/ for its product along positions, ""), or ("", why none fits)."""
        return "", f"no operator of kernels/ computes a {self.family} pattern"

    def run(self, operator: Callable[..., Tensor], cores: Cores, x: Tensor, out: Dims) -> Tensor:
        """Its product by that operator: x [B, *positions, channels], cores [heads, *core].

        With an entry, cores are [*core] as always.
        """
        raise PatternError(self.operator(out, x.shape[1:-1])[1])

    def feature_operator(self, out: Dims, inp: Dims, device: torch.device) -> str:
        """The operator of kernels/ for its product along features on `device`; "" where none is.

        Whether it pays at this shape is the operator's own rule, under impl="auto".
        """
        return ""

    def run_features(
        self, operator: Callable[..., Tensor], cores: Cores, x: Tensor, out: Dims
    ) -> Tensor:
        """Its product by that operator: x [*, *inp] -> [*, *out], cores without batch axes."""
        raise PatternError(f"no operator of kernels/ computes {self.family} along features")

    @classmethod
    @abstractmethod
    def domains(cls) -> dict[str, Domain]:
        """Field -> what may be searched, free of sizes. {} where nothing is worth searching."""

    def chains(self, out: Dims, inp: Dims) -> list[list[str]]:
        """For each term of the matrix that is a product, the names of the cores it is linear in.

        So one core of every list scales the whole matrix. A recurrence alone is no such term.
        """
        cores = self.cores(out, inp)
        if self.entry is None:
            normal = [name for name, core in cores.items() if core.kind == "normal"]
            return [normal] if normal else []
        names = {name.partition("_")[2]: name for name in cores}  # those of `with_entry`
        return [[names[key] for key in one] for one in self.entry.chains(out[-1:], inp[-1:])]

    def features(self, out: Dims, inp: Dims) -> int | None:
        """Numbers a query and a key have each at order 3; None: as many as a value."""
        return None

    def attention_cost(self, out: Dims, inp: Dims, channels: int) -> Cost:
        """Cost of one matrix whose entries are made of queries and keys, on `channels` vectors.

        Entry by entry: once to make it, once to apply it.
        """
        cost = self.cost(out, inp).repeat(1, channels)
        return dataclasses.replace(cost, parameters=0, flops=2 * cost.flops)

    def project(self, dense: Tensor, out: Dims, inp: Dims) -> Projected | None:
        """Cores of the nearest matrix, or of one near enough to refine, in closed form.

        `dense` is [*batch, prod(out), prod(inp)]. None where no closed form is known; `from_dense`
        of project.py then searches.
        """
        return None

    # What follows is final: families do not override it.

    @property
    def lead(self) -> int:
        """How many trailing dims are channels: 1 with an entry, else 0."""
        return int(self.entry is not None)

    def split(self, dims: Dims) -> tuple[Dims, Dims]:
        """Positions and channels of `dims`; channels are () where entries are numbers."""
        return (dims[:-1], dims[-1:]) if self.entry else (dims, ())

    def with_entry(self, name: str, number: Core, out: Dims, inp: Dims) -> dict[str, Core]:
        """`number`, each of its numbers replaced by the cores of the entry where there is one.

        One core of each of the entry's terms sums over the number's inputs, so that the output has
        the variance that the entry has along features.
        """
        if self.entry is None:
            return {name: number}
        c_out, c_in = out[-1:], inp[-1:]
        summing, found = {one[0] for one in self.entry.chains(c_out, c_in)}, {}
        for key, core in self.entry.cores(c_out, c_in).items():
            core = core.among(number.fan_in, number.fan_out) if key in summing else core
            found[f"{name}_{key}"] = dataclasses.replace(core, shape=number.shape + core.shape)
        return found

    def entry_cores(self, name: str, cores: Cores) -> dict[str, Tensor]:
        """The entry's own cores, [*batch, *number's shape, *entry's shape], from `with_entry`'s."""
        return {k.removeprefix(f"{name}_"): v for k, v in cores.items() if k.startswith(f"{name}_")}

    def parameters(self, out: Dims, inp: Dims) -> int:
        return sum(math.prod(core.shape) for core in self.cores(out, inp).values())

    def product_cost(self, out: Dims, inp: Dims, flops: int, between: int = 0) -> Cost:
        """Cost from `flops` and the number of elements `between` its factors."""
        n, o, i = self.parameters(out, inp), math.prod(out), math.prod(inp)
        return Cost(n, flops, 4 * (n + o + i + 2 * between), 4 * (i + between))

    def omega(self, out: Dims, inp: Dims) -> float | None:
        """Parameter sharing: products per parameter = d^omega, d = sqrt(out inp).

        The exponents of Potapczynski et al. 2024 (arXiv 2410.02117), from this structure's own
        counts at these sizes; None where they are undefined, as at size 1.
        """
        products, n = self.cost(out, inp).flops // 2, self.parameters(out, inp)
        size = math.prod(out) * math.prod(inp)
        return 2 * math.log(products / n) / math.log(size) if size > 1 and products and n else None

    def psi(self, out: Dims, inp: Dims) -> float | None:
        """Rank exponent: rank = min(out, inp)^psi; 1 is full rank. See `omega`."""
        full = min(math.prod(out), math.prod(inp))
        return math.log(self.matrix_rank(out, inp)) / math.log(full) if full > 1 else None

    def nu(self, out: Dims, inp: Dims) -> float | None:
        """Compute intensity: products = d^(1 + nu); 1 is that of a dense matrix. See `omega`."""
        products = self.cost(out, inp).flops // 2
        size = math.prod(out) * math.prod(inp)
        return 2 * math.log(products) / math.log(size) - 1 if size > 1 and products else None

    def __str__(self) -> str:
        """Short form, such as `banded(lower=1, upper=1, entry=dense)`."""
        shown = [
            f"{f.name}={_short(getattr(self, f.name))}"
            for f in dataclasses.fields(self)
            if getattr(self, f.name) != f.default
        ]
        return f"{self.family}({', '.join(shown)})" if shown else self.family


def _short(value: Any) -> str:
    if isinstance(value, tuple):
        return f"({', '.join(map(_short, value))})"
    return f"{value:.3g}" if isinstance(value, float) else str(value).replace("toeplitz", "toep")


def families() -> dict[str, type[Pattern]]:
    """Family name -> class, for every module in patternsearch/patterns/."""
    _import_all()
    return dict(sorted(_FAMILIES.items()))


@cache
def _import_all() -> None:
    from . import patterns

    for module in pkgutil.iter_modules(patterns.__path__):
        importlib.import_module(f"{patterns.__name__}.{module.name}")


def get_family(name: Any) -> type[Pattern]:
    _import_all()
    if (found := _FAMILIES.get(str(name))) is None:
        raise PatternError(unknown("pattern family", name, _FAMILIES))
    return found


def divisors(n: int) -> list[int]:
    low = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
    return low + [n // d for d in reversed(low) if d * d < n]


def nearest(value: float, valid: list[int]) -> int:
    """The member of `valid` nearest to `value` in ratio; the smaller one of two as near."""
    return min(valid, key=lambda v: (abs(math.log(max(value, 1) / v)), v))


def linear_attention_cost(queries: int, keys: int, features: int, channels: int) -> Cost:
    """Of one state of features x channels numbers, to which every key adds and every query asks."""
    numbers = (features + channels) * (queries + keys)
    kept = numbers - channels * queries
    return Cost(
        flops=2 * features * channels * (queries + keys), bytes=4 * numbers, activations=4 * kept
    )


def sees_future(pattern: Pattern) -> str:
    return f"{pattern.family}: every row sees the future; use banded or semiseparable"


@lru_cache(maxsize=4096)
def balanced(n: int, modes: int) -> Dims:
    """`modes` factors of n, as equal as its divisors allow, ascending: 64, 3 -> (4, 4, 4)."""
    factors = []
    for left in range(modes, 0, -1):
        root = n ** (1 / left)
        factor = max(d for d in divisors(n) if d <= root + 1e-9)
        factors.append(factor if left > 1 else n)
        n //= factors[-1]
    return tuple(sorted(factors))


@lru_cache(maxsize=4096)
def mode_sizes(out: Dims, inp: Dims, modes: int) -> tuple[Dims, Dims]:
    """Factors of both sides, one a mode; fewer than `modes` where neither side has so many.

    A grid brings its own modes, and MAX_MODES is the most there are.
    """
    if len(out) == len(inp) > 1:
        return out, inp
    o, i = math.prod(out), math.prod(inp)
    most = min(max(prime_factors(o), prime_factors(i), 1), MAX_MODES)
    return balanced(o, min(modes, most)), balanced(i, min(modes, most))


def prime_factors(n: int) -> int:
    """How many, each as often as it divides: 12 -> 3."""
    count, factor = 0, 2
    while n > 1:
        while n % factor == 0:
            n, count = n // factor, count + 1
        factor = factor + 1 if factor * factor < n else n
    return count
