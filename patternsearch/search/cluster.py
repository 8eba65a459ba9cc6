"""Ray, started here or joined: early, beside the slow imports of everything else."""

from __future__ import annotations

import importlib.util
import logging
import math
import os
import threading
from concurrent.futures import Future
from typing import Any

from ..config import SweepConfig
from ..errors import ConfigError

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # silences a warning on CPUs


class Cluster:
    """A connection to Ray that a thread of its own holds from `start` to `stop`.

    Ray's processes die with the thread that started them (PR_SET_PDEATHSIG). address: of a running
    cluster; None starts Ray on this machine with so many cpus. What was connected before stays.
    """

    def __init__(self, address: str | None, cpus: float) -> None:
        self.address, self.cpus = address, max(1, math.ceil(cpus))
        self.ready: Future[None] = Future()
        self.over = threading.Event()
        self.keeper: threading.Thread | None = None

    def start(self) -> None:
        """Begin to start or join Ray; once."""
        if self.keeper is None:
            self.keeper = threading.Thread(target=self._keep, name="ray", daemon=True)
            self.keeper.start()

    def stop(self) -> None:
        """Disconnect, and end what was started; waits for it."""
        self.over.set()
        if self.keeper is not None:
            self.keeper.join()

    def _keep(self) -> None:
        options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
        if self.address is None:
            options |= {"num_cpus": self.cpus, "include_dashboard": False}
        try:
            import ray

            if ray.is_initialized():
                self.ready.set_result(None)
                return
            ray.init(address=self.address or "local", **options)  # none joins what runs here
        except ConnectionError as e:
            said = str(e).strip().partition("\n")[0]
            why = (
                f"cannot join a Ray cluster at {self.address}: {said}; start one: ray start --head"
            )
            self.ready.set_exception(ConfigError(why))
            return
        except Exception as e:  # handed to whoever waits
            self.ready.set_exception(e)
            return
        self.ready.set_result(None)
        self.over.wait()
        ray.shutdown()


def early(config: SweepConfig) -> Cluster | None:
    """Ray for this sweep, begun at once where nothing else must be known before."""
    unknown = config.executor != "ray" or (config.address is None and config.resources.gpu)
    if unknown or importlib.util.find_spec("ray") is None:
        return None
    workers = config.workers or cpu_workers(config.resources.cpu)
    cluster = Cluster(config.address, workers * config.resources.cpu)
    cluster.start()
    return cluster


def cpu_workers(cpu: float) -> int:
    """How many workers of so many cores this machine has room for."""
    return max(1, int((os.cpu_count() or 1) / max(cpu, 1e-9)))
