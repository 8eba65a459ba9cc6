"""A sweep from its configuration to its end, as the command line and Python start it."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from ..config import SweepConfig, changes, saved_config
from ..errors import ConfigError
from .folders import CONFIG, SPACE
from .interrupts import interrupts
from .storage import reachable
from .sweep import Sweep

# may differ when a sweep goes on; of the space what it holds is compared, not how it is called
_FREE = ("trials", "time", "workers", "executor", "address", "confirm", "space")
_KEPT = ("objectives", "space", "start_from")  # as they were, where they are not given


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


def resumed(config: SweepConfig, sweep: Path) -> SweepConfig:
    """The configuration to go on with: what it leaves empty is as the sweep in that folder began.

    Raises ConfigError where the rest is not.
    """
    saved = saved_config(sweep / CONFIG)
    left = {key: getattr(saved, key) for key in _KEPT if not getattr(config, key)}
    if saved.space and Path(saved.space).name == SPACE and config.space in (None, saved.space):
        left["space"] = str(sweep / SPACE)  # a sweep's own, whose folder may have moved
    config = config.model_copy(update=left)
    changed = list(changes(saved, config, _FREE))
    if changed:
        raise ConfigError(
            f"{sweep.name} was started with {'; '.join(changed)}; resume it as it was, or start a "
            "new sweep"
        )
    return config
