"""Files that ship with the package, found by name as well as by path."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from .errors import PatternSearchError, unknown


def shipped(folder: str) -> dict[str, Path]:
    """Name -> YAML file of patternsearch.<folder> (`spaces` or `configs`)."""
    found: dict[str, Path] = {}
    for path in resources.files(f"patternsearch.{folder}").iterdir():
        if path.name.endswith(".yaml"):
            found[path.name.removesuffix(".yaml")] = Path(str(path))
    return dict(sorted(found.items()))


def find(folder: str, name: str | Path, error: type[PatternSearchError]) -> Path:
    """The file of that name in `folder`, or at that path."""
    path = Path(name)
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise error(
                f"no file {path}; give an existing YAML file or one of {list(shipped(folder))}"
            )
        return path
    if (found := shipped(folder).get(str(name))) is None:
        raise error(unknown(f"file in {folder}/", name, shipped(folder)) + " Or give a path.")
    return found
