"""How trials are run: one interface, and the executor that runs them in this very process."""

from __future__ import annotations

from typing import Protocol

import torch

from .worker import Job, Step, Worker


class Source(Protocol):
    """Where an executor gets jobs and brings what became of them."""

    def next(self) -> Job | None:
        """The next trial to run; None when there is none."""

    def handle(self, step: Step) -> bool:
        """Take one report of a trial; whether the trial should be stopped."""

    def lost(self, number: int, why: str, memory: bool = False) -> None:
        """A trial ended without a report, because its worker did; whether for want of memory."""


class Executor(Protocol):
    """Runs jobs until there are no more."""

    def start(self) -> None:
        """Get ready; may run beside other preparations."""

    def run(self, source: Source) -> None:
        """Run every job of the source."""

    def stop(self) -> None:
        """Let go of what `start` took."""


class InlineExecutor:
    """One trial after another in this process: for tests, debugging, machines without Ray."""

    def start(self) -> None:
        """Nothing to get ready."""

    def stop(self) -> None:
        """Nothing to let go of."""

    def run(self, source: Source) -> None:
        threads = torch.get_num_threads()  # a worker takes one; the caller's are given back
        try:
            self._run(source, Worker())
        finally:
            torch.set_num_threads(threads)

    def _run(self, source: Source, worker: Worker) -> None:
        while (job := source.next()) is not None:
            worker.start(job)
            while True:
                step = worker.step()
                if source.handle(step) or step.done:
                    worker.stop()
                    break
