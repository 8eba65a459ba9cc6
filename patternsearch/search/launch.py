"""A sweep from its configuration to its end, as the command line and Python start it."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from ..config import SweepConfig, changes, saved_config
from ..errors import ConfigError
from .folders import CONFIG
from .interrupts import interrupts
from .storage import reachable
from .sweep import Sweep

# may differ when a sweep goes on
_FREE = ("trials", "time", "workers", "executor", "address", "confirm")


def terminal(quiet: bool = False) -> Console:
    """Where a sweep shows itself."""
    return Console(quiet=quiet)


def launch(sweep: Sweep) -> None:
    """Prepare, run, conclude and close a sweep. Ctrl-C once finishes cleanly, twice at once."""
    sweep.prepare()
    status, console = "FAILED", sweep.console
    with interrupts(sweep, console), reachable(sweep.config.storage):
        try:
            sweep.run()
            status = "KILLED" if sweep.interrupted else "FINISHED"
            console.print(sweep.conclude(), soft_wrap=True, markup=False, highlight=False)
        except KeyboardInterrupt:
            status = "KILLED"
            raise
        finally:
            sweep.close(status)


def check_same(config: SweepConfig, sweep: Path) -> None:
    """Refuse to go on with another configuration than the sweep in that folder began with."""
    empty = [k for k in ("objectives", "space", "start_from") if not getattr(config, k)]
    changed = list(changes(saved_config(sweep / CONFIG), config, (*_FREE, *empty)))
    if changed:
        raise ConfigError(
            f"{sweep.name} was started with {'; '.join(changed)}; resume it as it was, or start a "
            "new sweep"
        )
