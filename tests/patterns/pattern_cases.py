"""Every pattern at the sizes the contract is checked at, found by the presence of its family."""

import math
import random
from dataclasses import dataclass, fields, replace

import torch

from patternsearch.domains import Choice, FloatRange
from patternsearch.layers import init_std
from patternsearch.pattern import Pattern, families
from patternsearch.patterns.banded import Banded
from patternsearch.patterns.block_diagonal import BlockDiagonal
from patternsearch.patterns.block_sparse import BlockSparse
from patternsearch.patterns.block_term import BlockTerm
from patternsearch.patterns.btt import BlockTensorTrain
from patternsearch.patterns.cp import CanonicalPolyadic
from patternsearch.patterns.dense import Dense
from patternsearch.patterns.diagonal import Diagonal
from patternsearch.patterns.einsum import Einsum
from patternsearch.patterns.kronecker import Kronecker
from patternsearch.patterns.low_rank import LowRank
from patternsearch.patterns.monarch import Monarch
from patternsearch.patterns.product import Product
from patternsearch.patterns.semiseparable import Semiseparable
from patternsearch.patterns.sum import Sum
from patternsearch.patterns.tt import TensorTrain
from patternsearch.patterns.tucker import Tucker

FAMILIES = families()
FEATURES = [((1,), (1,)), ((5,), (1,)), ((1,), (5,)), ((7,), (7,)), ((5,), (3,)), ((3,), (7,))]
FEATURES += [((16,), (16,)), ((12,), (18,)), ((24,), (8,))]
POSITIONS = [((9,), (9,)), ((4,), (12,)), ((4,), (9,))]
GRIDS = [((1, 1), (1, 1)), ((3, 4), (3, 4)), ((2, 3), (4, 6)), ((2, 2), (5, 3))]
CHANNELS = [(4, 4), (4, 6), (1, 3)]

# Families whose matrices exist for some sizes only, as a condition on the positions of (out, inp).
NEEDS = {
    "diagonal": lambda out, inp: out == inp,
    "average": lambda out, inp: all(o <= i for o, i in zip(out, inp, strict=True)),
    "semiseparable": lambda out, inp: all(o <= i for o, i in zip(out, inp, strict=True)),
}

# Settings worth checking that no domain lists.
VARIANTS = {
    "banded": [
        Banded(tie="none"),
        Banded(tie="none", lower="full", upper=0),
        Banded(lower="full", upper="full"),
        Banded(lower=2, upper=0, dilation=2),
        Banded(tie="circulant", lower=1, upper=2),
        Banded(tie="circulant", lower=0, upper="full", dilation=2),
    ],
    "semiseparable": [
        Semiseparable(tie="none"),
        Semiseparable(tie="none", two_sided=True, normalise=False),
        Semiseparable(normalise=False),
        Semiseparable(order=2),
        Semiseparable(order=3, tie="none", two_sided=True),
        Semiseparable(state=3),
        Semiseparable(state=2, order=2, tie="none", normalise=False),
    ],
    "kronecker": [Kronecker(outer_first=False), Kronecker(modes=4), Kronecker(modes=1)],
    "block_sparse": [BlockSparse(mask="random", seed=3), BlockSparse(blocks=4, density=1.0)],
    "block_term": [BlockTerm(terms=1), BlockTerm(modes=1, rank=1, terms=3)],
    "btt": [BlockTensorTrain(rank=1.0)],
    "cp": [CanonicalPolyadic(modes=1), CanonicalPolyadic(rank=3, modes=3)],
    "einsum": [
        Einsum(alpha=1, beta=0, gamma=0, delta=0, epsilon=1, phi=0, rho=0.4),
        Einsum(alpha=0.5, beta=0.5, gamma=0, delta=0.5, epsilon=0.5, phi=0, rho=0.3),
        Einsum(alpha=0.4, beta=0.3, gamma=0.3, delta=0.3, epsilon=0.4, phi=0.3, rho=0.2),
    ],
    "product": [
        Product(factors=(LowRank(), Monarch(), Kronecker())),
        Product(factors=(Banded(), Dense())),
    ],
    "sum": [Sum(terms=(Monarch(),)), Sum(terms=(Kronecker(), Dense(), LowRank(rank=1)))],
    "tt": [TensorTrain(rank=0.5, modes=3), TensorTrain(rank=1)],
    "tucker": [Tucker(modes=1), Tucker(rank=1.0, modes=3), Tucker(rank=2)],
    "low_rank": [LowRank(rank=1), LowRank(rank=1.0), LowRank(rank=3)],
}
# Combinators take an entry where their parts do.
WITH_ENTRY = {
    "sum": [Sum(terms=(Banded(upper=0), Banded(lower=0, dilation=2, tie="none")))],
    "product": [Product(factors=(Banded(upper=0), Banded(lower=2, upper=0)))],
}
ENTRIES = [Dense(), Diagonal(), BlockDiagonal(blocks=2), LowRank(rank=0.5), Kronecker()]


@dataclass(frozen=True)
class Case:
    """A resolved pattern at sizes where it can stand."""

    pattern: Pattern
    out: tuple[int, ...]
    inp: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.pattern!r} {self.inp} -> {self.out}"


def possible(family: str, out: tuple[int, ...], inp: tuple[int, ...]) -> bool:
    return family not in NEEDS or NEEDS[family](out, inp)


def options(family: str) -> list[Pattern]:
    """The defaults, every end of every domain, and the variants."""
    default = FAMILIES[family]()
    found = [default]
    for name, domain in default.domains().items():
        ends = domain.options if isinstance(domain, Choice) else (domain.low, domain.high)
        found += [replace(default, **{name: value}) for value in ends]
    return list(dict.fromkeys(found + VARIANTS.get(family, [])))


def cases(family: str, sizes: list | None = None) -> list[Case]:
    """Every option at every size, each resolved structure once, entries included."""
    found = []
    for pattern in options(family):
        for out, inp in sizes or FEATURES + POSITIONS + GRIDS:
            if possible(family, out, inp):
                found.append(Case(pattern.resolve(out, inp), out, inp))
    if FAMILIES[family].takes_entry and sizes is None:
        found += entry_cases(family)
    return list(dict.fromkeys(found))


def entry_cases(family: str) -> list[Case]:
    found = []
    for pattern in WITH_ENTRY.get(family) or options(family):
        for entry in ENTRIES:
            for out, inp in [((6,), (6,)), ((3,), (6,)), ((2, 3), (2, 3)), ((2, 2), (4, 3))]:
                for c_out, c_in in CHANNELS:
                    whole = (*out, c_out), (*inp, c_in)
                    nested = replace(pattern, entry=entry)
                    resolved = resolve_if_possible(nested, *whole)
                    found += [Case(resolved, *whole)] if resolved else []
    return random.Random(0).sample(found, min(len(found), 60))


def resolve_if_possible(pattern: Pattern, out, inp) -> Pattern | None:
    """Entries narrow what can stand where; the reason is then about sizes, not about fields."""
    resolved = pattern.resolve(out, inp)
    return None if resolved.unavailable(out, inp) else resolved


def draw(case: Case, lead=(), seed: int = 0, dtype=torch.float64) -> dict[str, torch.Tensor]:
    """Cores of about unit output; decays well inside of (0, 1)."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, core in case.pattern.cores(case.out, case.inp).items():
        shape = (*lead, *core.shape)
        if core.kind == "zero":
            value = torch.randn(shape, generator=generator, dtype=torch.float64)
        elif core.kind == "decay":
            value = 0.2 + 0.7 * torch.rand(shape, generator=generator, dtype=torch.float64)
        else:
            value = torch.randn(shape, generator=generator, dtype=torch.float64)
            value *= init_std(core) / min(1.0, math.sqrt(core.fan_out / core.fan_in))
        found[name] = value.to(dtype)
    return found


def draw_input(case: Case, batch=(2,), seed: int = 1, dtype=torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*batch, *case.inp, generator=generator, dtype=torch.float64).to(dtype)


def random_option(family: str, rng: random.Random) -> Pattern:
    """A member of the family's search space, every field drawn."""
    values = {}
    for name, domain in FAMILIES[family].domains().items():
        if isinstance(domain, Choice):
            values[name] = rng.choice(domain.options)
        elif isinstance(domain, FloatRange):
            values[name] = rng.uniform(domain.low, domain.high)
        else:
            values[name] = rng.randint(domain.low, domain.high)
    return FAMILIES[family](**values)


def field_names(family: str) -> list[str]:
    return [f.name for f in fields(FAMILIES[family]) if f.name != "entry"]
