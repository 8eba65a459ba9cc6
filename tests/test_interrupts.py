import importlib
import io
import os
import signal
import sys
import threading
import time

import pytest
from rich.console import Console

from patternsearch.search.interrupts import bookkeeping, interrupts


class Work:
    """Something to interrupt."""

    def __init__(self):
        self.depth, self.interrupted, self.closing = 0, False, False
        self.done: list[str] = []

    def interrupt(self):
        self.interrupted = True

    @bookkeeping
    def book(self, presses: int):
        for _ in range(presses):
            press()
        self.done.append("booked")


def press():
    os.kill(os.getpid(), signal.SIGINT)


@pytest.fixture
def work():
    before, work = signal.getsignal(signal.SIGINT), Work()
    with interrupts(work, Console(file=io.StringIO())):
        yield work
    assert signal.getsignal(signal.SIGINT) is before


def go_on(seconds: float = 5) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        time.sleep(0.01)


def test_once_asks_twice_cuts(work):
    press()
    assert work.interrupted
    with pytest.raises(KeyboardInterrupt):
        press()
        go_on()


def test_bookkeeping_is_not_cut(work):
    with pytest.raises(KeyboardInterrupt):
        work.book(presses=2)
        assert work.done == ["booked"]
        go_on()
    assert work.done == ["booked"] and work.depth == 0


def test_bookkeeping_that_fails_ends(work):
    with pytest.raises(TypeError):
        work.book(None)
    assert work.depth == 0


def test_an_import_is_not_cut(work, tmp_path, monkeypatch):
    """Else its lock may stay taken, and another thread that imports waits for it forever."""
    text = "import os, signal\n" + "os.kill(os.getpid(), signal.SIGINT)\n" * 2 + "whole = True\n"
    (tmp_path / "interrupted_module.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        importlib.import_module("interrupted_module")
        work.done.append("imported")
        go_on()
    assert sys.modules.pop("interrupted_module").whole and work.done == ["imported"]


def test_the_record_is_written_unless_thrice(work):
    work.closing = True
    press()
    press()
    assert not work.interrupted
    with pytest.raises(KeyboardInterrupt):
        press()
        go_on()


def test_other_threads_leave_signals_alone():
    before, seen = signal.getsignal(signal.SIGINT), []

    def elsewhere():
        with interrupts(Work(), Console(file=io.StringIO())):
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert seen == [before]
