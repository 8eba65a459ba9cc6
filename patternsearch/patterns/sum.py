"""Sum of patterns: low rank plus block-sparse (Chen et al. 2022, arXiv 2112.00029), say."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from ..completion import complete
from ..domains import Domain
from ..errors import PatternError
from ..pattern import Core, Cores, Cost, Dims, Pattern, Projected
from .block_sparse import BlockSparse
from .low_rank import LowRank

ROUNDS = 30  # of alternating projections, before a refinement of all terms together
MOST = 2048  # numbers of a left factor, up to which a low-rank term is completed


@dataclass(frozen=True, kw_only=True)
class Sum(Pattern, family="sum"):
    """W = W_1 + ... + W_n, one a term.

    With an entry, terms that have none of their own get it: a sum of convolutions, say.
    """

    takes_entry: ClassVar[bool] = True

    terms: tuple[Pattern, ...] = (LowRank(), BlockSparse())

    def check(self) -> None:
        self.parts()

    def parts(self) -> tuple[Pattern, ...]:
        return filled(self, "terms", self.terms)

    def unavailable(self, out: Dims, inp: Dims, causal: bool = False) -> str | None:
        for k, term in enumerate(self.parts()):
            if reason := term.unavailable(out, inp, causal):
                return f"sum: term {k}: {reason}"
        return None

    def resolve(self, out: Dims, inp: Dims, causal: bool = False) -> Sum:
        terms = tuple(term.resolve(out, inp, causal) for term in self.parts())
        entry = self.entry.resolve(out[-1:], inp[-1:]) if self.entry else None
        return replace(self, terms=terms, entry=entry)

    def cores(self, out: Dims, inp: Dims) -> dict[str, Core]:
        """Every term's; one core of each counts the inputs of all terms, so that variances add up.

        So each term has its share of the output's variance, 1 / n.
        """
        found, n = {}, len(self.terms)
        for k, term in enumerate(self.parts()):
            shared = {one[0] for one in term.chains(out, inp)}
            for name, core in term.cores(out, inp).items():
                found[f"term{k}_{name}"] = core.among(n, n) if name in shared else core
        return found

    def chains(self, out: Dims, inp: Dims) -> list[list[str]]:
        return [
            [f"term{k}_{name}" for name in one]
            for k, term in enumerate(self.parts())
            for one in term.chains(out, inp)
        ]

    def matmul(self, cores: Cores, x: Tensor, out: Dims) -> Tensor:
        first, *rest = (
            term.matmul(self.entry_cores(f"term{k}", cores), x, out)
            for k, term in enumerate(self.parts())
        )
        for y in rest:
            first = first + y
        return first

    def to_dense(self, cores: Cores, out: Dims, inp: Dims) -> Tensor:
        first, *rest = (
            term.to_dense(self.entry_cores(f"term{k}", cores), out, inp)
            for k, term in enumerate(self.parts())
        )
        for dense in rest:
            first = first + dense
        return first

    def cost(self, out: Dims, inp: Dims) -> Cost:
        costs = [term.cost(out, inp) for term in self.parts()]
        between = sum(c.activations // 4 - math.prod(inp) for c in costs)
        return self.product_cost(out, inp, sum(c.flops for c in costs), between)

    def matrix_rank(self, out: Dims, inp: Dims) -> int:
        ranks = (term.matrix_rank(out, inp) for term in self.parts())
        return min(math.prod(out), math.prod(inp), sum(ranks))

    def project(self, dense: Tensor, out: Dims, inp: Dims) -> Projected | None:
        """Each term in turn is projected on what the others leave, or see `_beside_low_rank`."""
        if (whole := self._beside_low_rank(dense, out, inp)) is not None:
            return whole
        terms = self.parts()
        parts = [torch.zeros_like(dense) for _ in terms]
        found: list[Projected] = [Projected({}, False) for _ in terms]
        for _ in range(1 if len(terms) == 1 else ROUNDS):
            left = dense - sum(parts)
            for k, term in enumerate(terms):
                left = left + parts[k]
                if (one := term.project(left, out, inp)) is None:
                    return None
                found[k] = one
                parts[k] = term.to_dense(one.cores, out, inp).to(dense.dtype)
                left = left - parts[k]
        cores: dict[str, Tensor] = {}
        for k, last in enumerate(found):
            cores |= last.named(f"term{k}").cores
        return Projected(cores, len(terms) == 1 and found[0].optimal)

    def _beside_low_rank(self, dense: Tensor, out: Dims, inp: Dims) -> Projected | None:
        """One low-rank term, completed from what lies outside of the others' fixed supports.

        Members came back exactly wherever the entries outside outnumber the term's own freedom.
        """
        parts = dict(enumerate(self.parts()))
        low = [k for k, term in parts.items() if isinstance(term, LowRank)]
        if len(low) != 1 or len(parts) == 1 or dense.dim() > 2:
            return None
        term = parts.pop(low[0])
        assert isinstance(term, LowRank)
        rank = term.whole_rank(out, inp)
        supports = [own_support(part, out, inp, dense) for part in parts.values()]
        if rank * min(dense.shape) > MOST or any(support is None for support in supports):
            return None
        covered = torch.stack([s for s in supports if s is not None]).any(0)
        smooth = complete(dense, ~covered, rank)
        cores = term.project(smooth, out, inp).named(f"term{low[0]}").cores
        rest = dense - smooth
        for k, part in parts.items():
            one = part.project(rest, out, inp)
            assert one is not None  # a mean of single entries is themselves
            cores |= one.named(f"term{k}").cores
            rest = rest - part.to_dense(one.cores, out, inp)
        return Projected(cores, False)

    @classmethod
    def domains(cls) -> dict[str, Domain]:
        return {}


def filled(pattern: Pattern, field: str, parts: tuple[Pattern, ...]) -> tuple[Pattern, ...]:
    """`parts`, those without an entry given that of `pattern`."""
    if not parts:
        raise PatternError(f"{pattern.family}: {field} is empty; give at least one pattern")
    if pattern.entry is None:
        if any(part.entry is not None for part in parts):
            raise PatternError(
                f"{pattern.family}: {field} have entries; give the {pattern.family} an 'entry' too"
            )
        return parts
    for part in parts:
        if not part.takes_entry:
            raise PatternError(
                f"{pattern.family}: entry={pattern.entry.family!r}, but {part.family} of its "
                f"{field} takes none; remove 'entry' or use others such as banded"
            )
    return tuple(part if part.entry else replace(part, entry=pattern.entry) for part in parts)


def own_support(pattern: Pattern, out: Dims, inp: Dims, like: Tensor) -> Tensor | None:
    """Where a matrix of the pattern may be non-zero, if each entry is a number of its own."""
    specs = pattern.cores(out, inp)
    ones = {name: like.new_ones(core.shape) for name, core in specs.items()}
    support = pattern.to_dense(ones, out, inp) != 0
    free = len(specs) == 1 and pattern.parameters(out, inp) >= support.sum()
    return support if free else None
