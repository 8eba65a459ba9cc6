"""Ctrl-C while a sweep runs: once finishes cleanly, twice stops at once.

A KeyboardInterrupt in the middle of bookkeeping leaves a trial half told, one in the middle of an
import may leave Python's import lock taken, and another thread waiting for it forever. The second
press therefore waits until neither is so.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from queue import SimpleQueue
from types import FrameType
from typing import Concatenate, ParamSpec, Protocol, TypeVar

from rich.console import Console

_PAUSE = 0.05  # seconds until a press that came at a bad moment is tried again
_IMPORTS = "<frozen importlib._bootstrap>"


class Interruptible(Protocol):
    """What Ctrl-C acts upon. depth: of its bookkeeping, 0 when in none."""

    depth: int
    interrupted: bool
    closing: bool

    def interrupt(self) -> None:
        """Begin no more, and end what runs as soon as it can be ended cleanly."""


S = TypeVar("S", bound=Interruptible)
P = ParamSpec("P")
R = TypeVar("R")


def bookkeeping(method: Callable[Concatenate[S, P], R]) -> Callable[Concatenate[S, P], R]:
    """A method that Ctrl-C does not cut."""

    @wraps(method)
    def run(self: S, /, *args: P.args, **keywords: P.kwargs) -> R:
        self.depth += 1
        try:
            return method(self, *args, **keywords)
        finally:
            self.depth -= 1

    return run


@contextmanager
def interrupts(work: Interruptible, console: Console) -> Iterator[None]:
    """Presses of Ctrl-C act on `work`; its record is written unless there are three."""
    main = threading.current_thread()
    if main is not threading.main_thread():
        yield  # signals go to the main thread alone
        return
    presses = 0
    later: SimpleQueue[bool] = SimpleQueue()  # whose `put` is safe in a handler

    def handler(_: int, frame: FrameType | None) -> None:
        nonlocal presses
        presses += 1
        if presses > 2 if work.closing else work.interrupted:
            if not work.depth and not _importing(frame):
                raise KeyboardInterrupt
            presses -= 1
            later.put(True)
        else:
            _answer(work, console)

    def press_again() -> None:
        while later.get():
            time.sleep(_PAUSE)
            signal.pthread_kill(main.ident or 0, signal.SIGINT)

    helper = threading.Thread(target=press_again, name="interrupts", daemon=True)
    helper.start()
    old = signal.signal(signal.SIGINT, handler)
    try:
        yield
    finally:
        later.put(False)
        helper.join()
        signal.signal(signal.SIGINT, old)


def _answer(work: Interruptible, console: Console) -> None:
    work.depth += 1  # the next press may come while this one is answered
    try:
        if work.closing:
            console.print("writing the record; Ctrl-C again leaves it unfinished")
        else:
            work.interrupt()
            console.print("stopping after the next reports; Ctrl-C again stops at once")
    finally:
        work.depth -= 1


def _importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename == _IMPORTS:
            return True
        frame = frame.f_back
    return False
