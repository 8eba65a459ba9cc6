"""Design neural architectures by searching over sparse matrix patterns."""

from pathlib import Path as _Path

_root = _Path(__file__).resolve().parent.parent
if (_root / "pyproject.toml").is_file() and (_root / "kernels").is_dir():
    __path__.append(str(_root))  # a checkout: kernels/, spaces/, configs/ lie beside this folder
