"""YAML files read as plain data, and files written whole or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from .errors import ConfigError


def read_yaml(path: Path) -> Any:
    """The plain data in a YAML file. Tags that would build objects are refused."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        reason = e.strerror if isinstance(e, OSError) else "it is not UTF-8 text"
        raise ConfigError(f"cannot read {path}: {reason}; give the path of a YAML file") from None
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as e:
        mark = getattr(e, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        problem = getattr(e, "problem", None) or "it is not YAML"
        raise ConfigError(
            f"{path}{line}: {problem}; only plain YAML is read, without tags such as !!python"
        ) from None


class _Loader(yaml.SafeLoader):
    """Plain YAML in which no key stands twice: the first would be lost without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> Any:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.value in seen and isinstance(key, yaml.ScalarNode):
                problem = f"the key {key.value!r} stands twice"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            seen |= {key.value} if isinstance(key, yaml.ScalarNode) else set()
        return super().construct_mapping(node, deep)


def write_yaml(path: Path, data: Any, header: str = "") -> None:
    """Write through a temporary file and a rename, so that no half-written file is ever seen."""
    comment = "".join(f"# {line}\n" for line in header.splitlines())
    text = yaml.dump(data, Dumper=_Dumper, sort_keys=False, width=100)
    write_text(path, comment + text)


class _Dumper(yaml.SafeDumper):
    """Plain YAML with lists of numbers on one line."""


def _list(dumper: yaml.SafeDumper, data: list[Any]) -> yaml.Node:
    short = all(isinstance(v, int | float | str) for v in data)
    return dumper.represent_sequence("tag:yaml.org,2002:seq", data, flow_style=short)


_Dumper.add_representer(list, _list)


def write_text(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.part")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except OSError as e:
        temporary.unlink(missing_ok=True)
        raise ConfigError(f"cannot write {path}: {e.strerror}; choose another place") from None
