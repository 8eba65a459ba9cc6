"""The space of two-factor structures (Potapczynski et al. 2024, arXiv 2410.02117, section 3)."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from ..domains import Domain, FloatRange
from ..errors import PatternError
from ..network import Plan, Step, TwoFactorNetwork, sampled_rank, truncated
from ..pattern import Cores, Dims, Projected, divisors


@dataclass(frozen=True, kw_only=True)
class Einsum(TwoFactorNetwork, family="einsum"):
    """W[(e, f, d), (g, b, a)] = sum_r right[f, e, r, g, b] left[f, d, r, g, a].

    The input has d_in = g b a numbers, the output d_out = e f d. alpha, beta, gamma are the
    exponents of a, b, g: a = d_in^alpha and so on; delta, epsilon, phi those of d, e, f in d_out.
    Each three are taken relative to their sum, and the sizes are the divisors nearest to them. rho
    is the exponent of r in min(d_in, d_out).

    Low rank is (1, 0, 0; 0, 1, 0; rho), Kronecker (1/2, 1/2, 0; 1/2, 1/2, 0; 0), a tensor train the
    same with rho > 0, Monarch (1/2, 0, 1/2; 0, 1/2, 1/2; 0), BTT the same with rho > 0, dense
    (1, 0, 0; 0, 0, 1; 0), which holds a second factor of one number a row.
    """

    alpha: float = 0.5
    beta: float = 0.0
    gamma: float = 0.5
    delta: float = 0.0
    epsilon: float = 0.5
    phi: float = 0.5
    rho: float = 0.25

    def check(self) -> None:
        for names in (("alpha", "beta", "gamma"), ("delta", "epsilon", "phi")):
            values = [getattr(self, name) for name in names]
            if min(values) < 0 or not sum(values) > 0:
                raise PatternError(
                    f"einsum: {', '.join(names)} = {values} must be from 0 on, and not all 0"
                )
        if not 0 <= self.rho <= 1:
            raise PatternError(f"einsum: rho={self.rho} must be between 0 and 1")

    def sizes(self, out: Dims, inp: Dims) -> dict[str, int]:
        o, i = math.prod(out), math.prod(inp)
        a, b, g = nearest_factors(i, (self.alpha, self.beta, self.gamma))
        d, e, f = nearest_factors(o, (self.delta, self.epsilon, self.phi))
        r = max(1, min(round(min(o, i) ** self.rho), d * a, e * b))  # full rank for given f and g
        return {"a": a, "b": b, "g": g, "d": d, "e": e, "f": f, "r": r}

    def resolve(self, out: Dims, inp: Dims, causal: bool = False) -> Einsum:
        o, i = math.prod(out), math.prod(inp)
        sizes = self.sizes(out, inp)
        alpha, beta, gamma = exponents(i, [sizes[x] for x in "abg"])
        delta, epsilon, phi = exponents(o, [sizes[x] for x in "def"])
        rho = round(math.log(sizes["r"]) / math.log(min(o, i)), 6) if min(o, i) > 1 else 0.0
        return replace(
            self,
            alpha=alpha,
            beta=beta,
            gamma=gamma,
            delta=delta,
            epsilon=epsilon,
            phi=phi,
            rho=rho,
        )

    def plan(self, out: Dims, inp: Dims) -> Plan:
        steps = (Step("left", "fdrga", "fdrgb"), Step("right", "ferbg", "efd"))
        return Plan(self.sizes(out, inp), "gba", steps)

    def two_factors(self, cores: Cores) -> tuple[Tensor, Tensor]:
        return cores["left"], cores["right"]

    def to_dense(self, cores: Cores, out: Dims, inp: Dims) -> Tensor:
        w_efdgba = torch.einsum("...fdrga,...ferbg->...efdgba", cores["left"], cores["right"])
        return w_efdgba.flatten(-6, -4).flatten(-3)

    def matrix_rank(self, out: Dims, inp: Dims) -> int:
        """The least cut, unless Kronecker products are summed or stacked: their ranges meet."""
        sizes = self.sizes(out, inp)
        if sizes["f"] * sizes["g"] > 1 and sizes["b"] * sizes["d"] > 1:
            return sampled_rank(self, out, inp)
        return super().matrix_rank(out, inp)

    def project(self, dense: Tensor, out: Dims, inp: Dims) -> Projected:
        """For given f and g the rearranged (d a) x (e b) matrix is of rank r: the nearest one."""
        n = self.sizes(out, inp)
        w_efdgba = dense.unflatten(-1, (n["g"], n["b"], n["a"])).unflatten(
            -4, (n["e"], n["f"], n["d"])
        )
        first = w_efdgba.dim() - 6
        order = [first + k for k in (1, 3, 2, 5, 0, 4)]
        pairs = w_efdgba.permute(*range(first), *order).flatten(-2).flatten(-3, -2)
        left, right = truncated(pairs, n["r"])  # [f, g, (d a), r] and [f, g, r, (e b)]
        left_fdrga = left.unflatten(-2, (n["d"], n["a"])).movedim((-4, -2), (-2, -1))
        right_ferbg = right.unflatten(-1, (n["e"], n["b"])).movedim((-4, -2), (-1, -4))
        return Projected({"left": left_fdrga, "right": right_ferbg}, True)

    @classmethod
    def domains(cls) -> dict[str, Domain]:
        found: dict[str, Domain] = {"rho": FloatRange(0.0, 0.5)}
        for name in ("alpha", "beta", "gamma", "delta", "epsilon", "phi"):
            found[name] = FloatRange(0.0, 1.0)
        return found


@lru_cache(maxsize=4096)
def nearest_factors(n: int, weights: tuple[float, float, float]) -> tuple[int, int, int]:
    """Three factors of n whose logarithms are nearest to the weights' shares of log n."""
    total = sum(weights)
    wanted = [w / total * math.log(n) for w in weights]
    triples = [(x, y, n // x // y) for x in divisors(n) for y in divisors(n // x)]
    return min(
        triples,
        key=lambda t: (
            round(sum(abs(math.log(k) - w) for k, w in zip(t, wanted, strict=True)), 9),
            t,
        ),
    )


def exponents(n: int, sizes: list[int]) -> list[float]:
    """Of `sizes` in n, short enough to read and exact enough to give the same sizes again."""
    if n == 1:
        return [1.0, 0.0, 0.0]
    return [round(math.log(size) / math.log(n), 6) for size in sizes]
