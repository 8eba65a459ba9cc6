"""Every error raised on a user's mistake.

PatternSearchError(ValueError)
├── PatternError   a pattern or an assignment that cannot stand where it is put
├── SpaceError     a search space that says something impossible
├── ConfigError    a sweep configuration, a file or an option that cannot be used
├── TaskError      a task or its data
├── TrackingError  a tracking store that cannot be reached or written
└── KernelError    an operator asked for something it cannot run

A message says the condition with names and values, then the remedy. The command line prints it
without a traceback and exits with status 2.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class PatternSearchError(ValueError):
    """Base class of every error here; a ValueError, so callers may catch either."""


class PatternError(PatternSearchError):
    """A pattern or an assignment that cannot stand where it is put."""


class SpaceError(PatternSearchError):
    """A search space that says something impossible."""


class ConfigError(PatternSearchError):
    """A sweep configuration, a file or an option that cannot be used."""


class TaskError(PatternSearchError):
    """A task or its data."""


class TrackingError(PatternSearchError):
    """A tracking store that cannot be reached or written."""


class KernelError(PatternSearchError):
    """An operator asked for something it cannot run."""


def unknown(kind: str, name: object, known: Iterable[str]) -> str:
    """`no KIND 'nmae'. Did you mean 'name'? Known: ...` as one line."""
    names = sorted(known)
    near = difflib.get_close_matches(str(name), names, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return f"no {kind} {str(name)!r}.{hint} Known: {', '.join(names) or 'none'}."
