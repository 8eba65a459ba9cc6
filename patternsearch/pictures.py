"""Pictures of patterns; those of sweeps are in search/figures.py."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

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
from .patterns.dense import Dense
from .sizes import Place, model_cost, places

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
    return save_figure(figure, path)


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
    if place.shared or place.name == "stem.table":
        table: Any = model.stem.table
        dense = isinstance(place.pattern, Dense)
        shared = {"weight": table.weight} if dense else table.cores()
        return {k: v.detach() for k, v in shared.items()}
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
    return save_figure(figure, path)


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


def _wrap(text: str, width: int = 44) -> str:
    return "\n".join(text[i : i + width] for i in range(0, min(len(text), 3 * width), width))


def _dims(dims: Dims) -> str:
    return "x".join(map(str, dims))


def save_figure(figure: Figure, path: Path) -> Path:
    temporary = path.with_name(f".{path.name}.part")
    try:
        FigureCanvasAgg(figure).print_png(str(temporary))  # type: ignore[no-untyped-call]
        temporary.replace(path)
    except OSError as e:
        temporary.unlink(missing_ok=True)
        raise ConfigError(f"cannot write {path}: {e.strerror}; choose another place") from None
    return path
