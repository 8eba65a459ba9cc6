"""Design neural architectures by searching over sparse matrix patterns."""

from __future__ import annotations

import importlib
from pathlib import Path as _Path
from typing import TYPE_CHECKING, Any

_root = _Path(__file__).resolve().parent.parent
if (_root / "pyproject.toml").is_file() and (_root / "kernels").is_dir():
    __path__.append(str(_root))  # a checkout: kernels/, spaces/, configs/ lie beside this folder

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .api import sweep
    from .assignment import Assignment, Block, Head, Mixer, Stem
    from .convert import from_torch, to_torch
    from .errors import PatternSearchError
    from .export import build
    from .model import Model, build_model
    from .pattern import Pattern, families
    from .project import from_dense
    from .sizes import Spec
    from .task import Data, Task

# Names load when they are used, so that `patternsearch --help` needs no torch.
_WHERE = {
    "Assignment": "assignment",
    "Block": "assignment",
    "Data": "task",
    "Head": "assignment",
    "Mixer": "assignment",
    "Model": "model",
    "Pattern": "pattern",
    "PatternSearchError": "errors",
    "Spec": "sizes",
    "Stem": "assignment",
    "Task": "task",
    "build": "export",
    "build_model": "model",
    "families": "pattern",
    "from_dense": "project",
    "from_torch": "convert",
    "sweep": "api",
    "to_torch": "convert",
}

__all__ = [
    "Assignment",
    "Block",
    "Data",
    "Head",
    "Mixer",
    "Model",
    "Pattern",
    "PatternSearchError",
    "Spec",
    "Stem",
    "Task",
    "build",
    "build_model",
    "families",
    "from_dense",
    "from_torch",
    "sweep",
    "to_torch",
]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_WHERE[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_WHERE})
