"""What there is: tasks, families, mixers, baselines, spaces, configs, kernels."""

from __future__ import annotations

import importlib
import pkgutil

import torch

from .errors import ConfigError, unknown
from .files import shipped
from .mixer import mixer_kinds
from .native import kinds
from .pattern import families
from .task import tasks


def listing(what: str = "") -> str:
    """One section, or all of them, as text."""
    sections = {
        "tasks": _tasks,
        "families": _families,
        "mixers": _mixers,
        "baselines": _baselines,
        "spaces": lambda: _files("spaces"),
        "configs": lambda: _files("configs"),
        "kernels": _kernels,
    }
    if not what:
        return "\n".join(f"{name}\n{section()}\n" for name, section in sections.items()).rstrip()
    if what not in sections:
        raise ConfigError(unknown("list", what, sections))
    return sections[what]()


def _lines(rows: dict[str, str]) -> str:
    width = max(map(len, rows), default=0)
    return "\n".join(f"  {name:<{width}}  {text}".rstrip() for name, text in rows.items())


def _first(doc: str | None) -> str:
    return (doc or "").strip().splitlines()[0] if doc else ""


def _tasks() -> str:
    return _lines({name: _first(task.__doc__) for name, task in tasks().items()})


def _families() -> str:
    rows = {}
    for name, family in families().items():
        searched = ", ".join(f"{k}: {d}" for k, d in family.domains().items())
        rows[name] = _first(family.__doc__) + (f"  [{searched}]" if searched else "")
    return _lines(rows)


def _mixers() -> str:
    return _lines({kind.__name__: _first(kind.__doc__) for kind in mixer_kinds()})


def _baselines() -> str:
    return _lines({name: _first(model.__doc__) for name, model in kinds().items()})


def _files(folder: str) -> str:
    rows = {}
    for name, path in shipped(folder).items():
        first = path.read_text(encoding="utf-8").splitlines()[0]
        rows[name] = first.removeprefix("#").strip()
    return _lines(rows)


def _kernels() -> str:
    """Every operator with what it runs on here, or why it does not."""
    package = importlib.import_module("patternsearch.kernels")
    rows = {}
    for module in pkgutil.iter_modules(package.__path__):
        if module.name.startswith("_"):
            continue
        operator = importlib.import_module(f"patternsearch.kernels.{module.name}")
        devices = []
        for name in ("cuda", "cpu"):
            why = operator.status(torch.device(name))
            devices.append(f"{name}: {why or 'runs'}")
        rows[module.name] = "; ".join(devices)
    return _lines(rows)
