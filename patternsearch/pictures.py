"""Pictures of patterns and of sweeps. The one module that draws."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from . import describe
from .errors import ConfigError
from .export import build, load
from .layers import init_std
from .model import Model
from .pattern import Core, Dims, Pattern, families, get_family
from .sizes import Place, model_cost, places

if TYPE_CHECKING:
    from .search.results import Results, TrialRecord

matplotlib.use("Agg")

_MOST = 1024  # rows or columns of a matrix that is drawn at its own size


def show(name: str, output: Path | None) -> str:
    """Describe and draw an exported YAML or a family; the text for the terminal."""
    if Path(name).suffix in (".yaml", ".yml"):
        path = Path(name)
        export = load(path)
        model = build(path)
        target = output or path.with_suffix(".png")
        draw_model(model, target, describe.short(export.assignment))
        cost = model_cost(export.assignment, export.spec)
        lines = describe.sentences(export.assignment, export.spec)
        total = f"total: {cost.parameters:,} parameters, {cost.flops:,} FLOPs an example"
        return "\n".join([*lines, total, f"picture: {target}"])
    target = output or Path(f"{name}.png")
    if name == "families":
        draw_families(families(), target)
        return f"{', '.join(families())}\npicture: {target}"
    family = get_family(name)
    draw_families({name: family}, target)
    return f"{name}: {inspect.cleandoc(family.__doc__ or '')}\npicture: {target}"


def draw_model(model: Model, path: Path, title: str) -> Path:
    """Every matrix of a model as it is, place by place; white is zero."""
    found = list(places(model.assignment, model.spec))
    columns = min(4, len(found))
    rows = -(-len(found) // columns)
    figure = Figure(figsize=(3.2 * columns, 3.4 * rows), layout="constrained")
    figure.suptitle(title, fontsize=10)
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for axis, place in zip(axes, found, strict=False):
        _draw_matrix(axis, matrix(model, place))
        axis.set_title(f"{place.name}\n{_wrap(str(place.pattern))}", fontsize=7)
        axis.set_xlabel(f"{_dims(place.inp)} in", fontsize=7)
        axis.set_ylabel(f"{_dims(place.out)} out", fontsize=7)
    for axis in axes[len(found) :]:
        axis.axis("off")
    return _save(figure, path)


def matrix(model: Model, place: Place) -> Tensor:
    """The matrix at a place: of the first head, of blocks by their norm, or a support of ones."""
    pattern, out, inp = place.pattern, place.out, place.inp
    if place.computed:
        return _support(pattern, out, inp)
    cores = _cores(model, place)
    if pattern.entry is not None:
        positions = math.prod(out[:-1]), math.prod(inp[:-1])
        if max(positions) > _MOST:
            return torch.zeros(1, 1)
        dense = pattern.to_dense(cores, out, inp)
        blocks = dense.reshape(positions[0], out[-1], positions[1], inp[-1])
        return blocks.square().sum((1, 3)).sqrt()
    return pattern.to_dense(cores, out, inp)


def _support(pattern: Pattern, out: Dims, inp: Dims) -> Tensor:
    cores = {name: torch.ones(core.shape) for name, core in pattern.cores(out, inp).items()}
    return (pattern.to_dense(cores, out, inp) != 0).float()


def _cores(model: Model, place: Place) -> dict[str, Tensor]:
    """The trained cores of a place, those of the first head where there are several."""
    head, _, last = place.name.replace("block", "blocks.").rpartition(".")
    names = {
        "head.positions": "readout",
        "head.map": "head",
        "positions": f"{head}.matrix",
    }
    chain = f"{head}.channel.{last.removeprefix('channel')}"
    maps = chain if last.startswith("channel") else f"{head}.maps.{last}"
    module_name = names.get(place.name) or names.get(last) or maps
    module: Any = model.get_submodule(module_name)
    cores: dict[str, Tensor] = {k: v.detach() for k, v in module.cores().items()}
    lead = place.pattern.entry is None and last == "positions"
    return {k: v[0] for k, v in cores.items()} if lead else cores


def draw_families(named: Mapping[str, type[Pattern]], path: Path) -> Path:
    """A 16 x 16 matrix of each: entries that share a number share a colour, zeros are white."""
    columns = min(6, len(named))
    rows = -(-len(named) // columns)
    figure = Figure(figsize=(2.2 * columns, 2.6 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for axis, (name, family) in zip(axes, named.items(), strict=False):
        _draw_matrix(axis, _example(family))
        axis.set_title(name, fontsize=9)
    for axis in axes[len(named) :]:
        axis.axis("off")
    return _save(figure, path)


def _example(family: type[Pattern]) -> Tensor:
    """The family with its default fields, its numbers drawn from one seed."""
    pattern = family().resolve((16,), (16,))
    generator = torch.Generator().manual_seed(0)
    cores = {
        name: torch.rand(core.shape, generator=generator) * _scale(core) + 0.1
        for name, core in pattern.cores((16,), (16,)).items()
    }
    return pattern.to_dense(cores, (16,), (16,))


def _scale(core: Core) -> float:
    return 0.8 if core.kind == "decay" else max(init_std(core), 0.5)


def _draw_matrix(axis: Any, dense: Tensor) -> None:
    values = dense.float()
    size = float(values.abs().max()) or 1.0
    signed = bool((values < 0).any())
    colours, low = ("RdBu_r", -size) if signed else ("viridis", 0.0)
    shown = torch.where(values == 0, torch.full_like(values, float("nan")), values)
    axis.imshow(shown.numpy(), cmap=colours, vmin=low, vmax=size, interpolation="nearest")
    axis.set_xticks([])
    axis.set_yticks([])


def draw_sweep(results: Results, folder: Path) -> list[Path]:
    """best.png, history.png, front.png and importances.png of a sweep that has a best trial."""
    best = results.best()
    assert best is not None
    model = build(folder / "best.yaml")
    drawn = [draw_model(model, folder / "best.png", f"trial {best.number}: {best.pattern}")]
    drawn.append(_history(results, folder / "history.png"))
    drawn.append(_front(results, folder / "front.png"))
    if results.importances:
        drawn.append(_importances(results, folder / "importances.png"))
    return drawn


def _importances(results: Results, path: Path) -> Path:
    """How much of the first objective's spread each parameter that every trial has explains."""
    shown = sorted(results.importances.items(), key=lambda item: item[1])[-12:]
    figure = Figure(figsize=(7, 0.8 + 0.35 * len(shown)), layout="constrained")
    axis = figure.subplots()
    axis.barh([name for name, _ in shown], [value for _, value in shown])
    axis.set_xlabel(f"importance for {next(iter(results.config.objectives))} (PED-ANOVA)")
    return _save(figure, path)


def _history(results: Results, path: Path) -> Path:
    """Value of every trial in order, and the best so far."""
    name, direction = next(iter(results.config.objectives.items()))
    figure = Figure(figsize=(7, 4), layout="constrained")
    axis = figure.subplots()
    done = sorted(results.complete(), key=lambda t: t.number)
    _scatter(axis, done, [t.number for t in done], [t.objectives[0] for t in done])
    pick = max if direction == "maximize" else min
    best = [pick(t.objectives[0] for t in done[: i + 1]) for i in range(len(done))]
    axis.step([t.number for t in done], best, where="post", color="black", label="best so far")
    pruned = [t for t in results.trials if t.state == "PRUNED" and name in (t.curve or ({},))[-1]]
    axis.scatter(
        [t.number for t in pruned],
        [t.curve[-1][name] for t in pruned],
        marker="x",
        color="grey",
        label="pruned, last value",
    )
    axis.set_xlabel("trial")
    axis.set_ylabel(name)
    axis.legend(fontsize=8)
    return _save(figure, path)


def _front(results: Results, path: Path) -> Path:
    """First objective against parameters and against FLOPs, the fronts joined."""
    name = next(iter(results.config.objectives))
    figure = Figure(figsize=(10, 4), layout="constrained")
    for axis, cost in zip(figure.subplots(1, 2), ("parameters", "flops"), strict=True):
        done = results.complete()
        values = [t.objectives[0] for t in done]
        _scatter(axis, done, [t.values[cost] for t in done], values)
        front = results.front(name, cost)[::-1]
        axis.step(
            [t.values[cost] for t in front],
            [t.objectives[0] for t in front],
            where="post",
            color="black",
            label="front",
        )
        axis.set_xscale("log")
        axis.set_xlabel(cost)
        axis.set_ylabel(name)
        axis.legend(fontsize=8)
    return _save(figure, path)


def _scatter(axis: Any, trials: Iterable[TrialRecord], x: list[float], y: list[float]) -> None:
    """Experts by name in colour, what the search found in blue."""
    expert = [t.expert for t in trials]
    for kind, colour, label in ((False, "tab:blue", "search"), (True, "tab:red", "expert designs")):
        chosen = [i for i, e in enumerate(expert) if e is kind]
        axis.scatter([x[i] for i in chosen], [y[i] for i in chosen], color=colour, label=label)


def _wrap(text: str, width: int = 44) -> str:
    return "\n".join(text[i : i + width] for i in range(0, min(len(text), 3 * width), width))


def _dims(dims: Dims) -> str:
    return "x".join(map(str, dims))


def _save(figure: Figure, path: Path) -> Path:
    temporary = path.with_name(f".{path.name}.part")
    try:
        FigureCanvasAgg(figure).print_png(str(temporary))  # type: ignore[no-untyped-call]
        temporary.replace(path)
    except OSError as e:
        temporary.unlink(missing_ok=True)
        raise ConfigError(f"cannot write {path}: {e.strerror}; choose another place") from None
    return path
