"""The nearest matrix of a pattern to a given one: closed forms, and a refinement where none is.

Families give a closed form (`Pattern.project`), optimal or near. What is not optimal is refined by
Levenberg and Marquardt's method on all cores together (Moré 1978, doi 10.1007/BFb0067700), or by
L-BFGS where the Jacobian would be large, from the closed form or from random starts.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import PatternError
from .layers import init_std
from .pattern import Core, Dims, Pattern

STALL = 1e-6  # three steps of so small a share are the end: zero residuals are reached faster
MAX_JACOBIAN = 4_000_000  # numbers, 32 MB; beyond, a step costs more than it gains


@dataclass(frozen=True, slots=True)
class Projection:
    """Cores, their relative error |W - M| / |W| (Frobenius), and whether no others do better.

    steps: of the refinement; 0 for a closed form.
    """

    cores: dict[str, Tensor]
    error: float
    optimal: bool
    steps: int = 0


def from_dense(
    pattern: Pattern,
    dense: Tensor,
    out: Dims | None = None,
    inp: Dims | None = None,
    *,
    tolerance: float = 1e-10,
    steps: int = 200,
    restarts: int = 4,
    seed: int = 0,
) -> Projection:
    """Project `dense`, [prod(out), prod(inp)], on the pattern, resolved for these dims.

    out, inp: the dims, by default ([rows], [columns]). tolerance: a refinement ends where its
    relative error falls below it, or no longer falls. restarts: random starts beyond a closed form
    that is not optimal, or where there is none; of large problems one start is refined.

    A member of the family comes back at float precision where the closed form is exact for members,
    which the family's `project` says. Without such a form the search ends in a local minimum, and
    `error` says how far from it: so for cp of high rank, block_term, blast of a rank above its
    blocks' sides, and sums and products but for those of which their `project` says more.

    Raises PatternError where the matrix does not have these dims, or the pattern cannot stand.
    """
    out, inp = _dims(pattern, dense, out, inp)
    wanted = dense.detach().double()
    closed = pattern.project(wanted, out, inp)
    if closed is not None and (closed.optimal or not closed.cores):
        error = _error(pattern.to_dense(closed.cores, out, inp), wanted)
        return _like(Projection(closed.cores, error, closed.optimal), dense)
    fit = Fit(pattern, wanted, out, inp)
    starts = [closed.cores] if closed else []
    more = restarts if fit.small else 0  # a large one takes seconds a start
    starts += [fit.start(seed + k) for k in range(more if starts else max(1, more))]
    best: Projection | None = None
    for start in starts:
        found = fit.run(start, tolerance, steps)
        best = found if best is None or found.error < best.error else best
        if best.error <= tolerance:
            break
    assert best is not None  # there is a start at least
    return _like(best, dense)


class Fit:
    """The least-squares problem min |M(cores) - W|^2 over all cores that are learned."""

    def __init__(self, pattern: Pattern, wanted: Tensor, out: Dims, inp: Dims) -> None:
        self.pattern, self.wanted, self.out, self.inp = pattern, wanted, out, inp
        self.specs = pattern.cores(out, inp)
        self.eye = torch.eye(math.prod(inp), dtype=wanted.dtype, device=wanted.device)
        self.norm = float(wanted.norm()) or 1.0
        numbers = sum(math.prod(core.shape) for core in self.specs.values())
        self.small = numbers * wanted.numel() <= MAX_JACOBIAN

    def start(self, seed: int) -> dict[str, Tensor]:
        """Random cores whose matrix has the norm of the wanted one."""
        generator = torch.Generator().manual_seed(seed)
        cores = {name: self.random(core, generator) for name, core in self.specs.items()}
        normal = [name for name, core in self.specs.items() if core.kind == "normal"]
        size = float(self.pattern.to_dense(cores, self.out, self.inp).norm())
        for name in normal if size else ():
            cores[name] = cores[name] * (self.norm / size) ** (1 / len(normal))
        return cores

    def random(self, core: Core, generator: torch.Generator) -> Tensor:
        if core.kind == "decay":
            return torch.rand(core.shape, generator=generator).to(self.wanted)
        if core.kind == "bias":
            return self.wanted.new_zeros(core.shape)
        spread = init_std(core) / min(1.0, math.sqrt(core.fan_out / core.fan_in))
        return spread * torch.randn(core.shape, generator=generator).to(self.wanted)

    def cores(self, point: Tensor) -> dict[str, Tensor]:
        """One vector as cores, decays from their logits; biases stay zero."""
        found, at = {}, 0
        for name, core in self.specs.items():
            if core.kind == "bias":
                found[name] = point.new_zeros(core.shape)
                continue
            n = math.prod(core.shape)
            value = point[at : at + n].reshape(core.shape)
            found[name] = value.sigmoid() if core.kind == "decay" else value
            at += n
        return found

    def point(self, cores: dict[str, Tensor]) -> Tensor:
        parts = []
        for name, core in self.specs.items():
            if core.kind != "bias":
                value = cores[name].to(self.wanted.dtype)
                parts.append((value.logit(1e-6) if core.kind == "decay" else value).reshape(-1))
        return torch.cat(parts)

    def residual(self, point: Tensor) -> Tensor:
        rows = self.pattern.matmul(self.cores(point), self.eye.unflatten(-1, self.inp), self.out)
        return (rows.flatten(1).T - self.wanted).reshape(-1)

    def run(self, start: dict[str, Tensor], tolerance: float, steps: int) -> Projection:
        point = self.point(start)
        refine: Callable[[Tensor, float, int], tuple[Tensor, int]]
        refine = self.levenberg if self.small else self.lbfgs
        point, taken = refine(point, tolerance, steps)
        error = float(self.residual(point).norm()) / self.norm
        return Projection(self.cores(point), error, False, taken)

    def jacobian(self, point: Tensor) -> Tensor:
        """[entries of the matrix, numbers of the cores], a column a number.

        J' u is linear in u, so its derivative by u is J': as many passes as there are numbers,
        which are fewer than entries. (Torch's forward derivatives would warn of their own code.)
        """
        point = point.detach().requires_grad_()
        residual = self.residual(point)
        u = torch.zeros_like(residual, requires_grad=True)
        (pulled,) = torch.autograd.grad(residual, point, u, create_graph=True)
        eye = torch.eye(point.numel(), dtype=point.dtype, device=point.device)
        (columns,) = torch.autograd.grad(pulled, u, eye, is_grads_batched=True)
        return columns.T

    def levenberg(self, point: Tensor, tolerance: float, steps: int) -> tuple[Tensor, int]:
        """Damped Gauss-Newton: the damping falls after a step that helps, and grows else."""
        residual, damping, stalled = self.residual(point), 1e-2, 0
        eye = torch.eye(point.numel(), dtype=point.dtype, device=point.device)
        for step in range(steps):
            size = float(residual.norm())
            if size <= tolerance * self.norm or stalled >= 3:
                return point, step
            j = self.jacobian(point)
            normal, slope = j.T @ j, j.T @ residual
            scale = float(normal.diagonal().mean()) or 1.0
            for _ in range(24):  # from the least damping to steps of no length
                moved = point - torch.linalg.solve(normal + damping * scale * eye, slope)
                after = self.residual(moved)
                if float(after.norm()) < size:
                    break
                damping *= 10
            else:
                return point, step
            stalled = stalled + 1 if float(after.norm()) > (1 - STALL) * size else 0
            point, residual, damping = moved, after, max(damping / 10, 1e-12)
        return point, steps

    def lbfgs(self, point: Tensor, tolerance: float, steps: int) -> tuple[Tensor, int]:
        if float(self.residual(point).norm()) <= tolerance * self.norm:
            return point, 0
        point = point.clone().requires_grad_()
        optimizer = torch.optim.LBFGS(
            [point],
            max_iter=5 * steps,
            history_size=20,
            tolerance_grad=0.0,
            tolerance_change=(tolerance * self.norm) ** 2,
            line_search_fn="strong_wolfe",
        )

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = 0.5 * self.residual(point).square().sum()
            loss.backward()
            return loss

        optimizer.step(closure)
        return point.detach(), int(optimizer.state[point]["n_iter"])


def _dims(pattern: Pattern, dense: Tensor, out: Dims | None, inp: Dims | None) -> tuple[Dims, Dims]:
    if dense.dim() != 2:
        raise PatternError(f"from_dense: a matrix has 2 axes, not shape {tuple(dense.shape)}")
    out, inp = out or (dense.shape[0],), inp or (dense.shape[1],)
    if tuple(dense.shape) != (math.prod(out), math.prod(inp)):
        raise PatternError(
            f"from_dense: a matrix {tuple(dense.shape)} does not map {inp} to {out}; give out and "
            "inp whose products are its sides"
        )
    if reason := pattern.unavailable(out, inp):
        raise PatternError(reason)
    return out, inp


def _error(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm()) / (float(wanted.norm()) or 1.0)


def _like(found: Projection, dense: Tensor) -> Projection:
    cores = {name: core.to(dense.dtype) for name, core in found.cores.items()}
    return Projection(cores, found.error, found.optimal, found.steps)
