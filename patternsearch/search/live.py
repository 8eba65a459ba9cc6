"""What a sweep shows while it runs: a live table on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

_ROWS = 12


@dataclass
class Row:
    """One trial as the table shows it."""

    number: int
    origin: str
    pattern: str
    parameters: int
    flops: int
    value: float | None = None
    epoch: int = 0
    state: str = "running"


class LiveView:
    """Rows of trials, the best so far, the pace and the time left."""

    def __init__(self, console: Console, title: str, metric: str, target: int, done: int) -> None:
        self.console, self.title, self.metric = console, title, metric
        self.target, self.done, self.first = target, done, done
        self.started = time.monotonic()
        self.running: dict[int, Row] = {}
        self.ended: deque[Row] = deque(maxlen=_ROWS)
        self.best: Row | None = None
        self.live: Live | None = None

    def __enter__(self) -> LiveView:
        if self.console.is_terminal:
            self.live = Live(console=self.console, refresh_per_second=4, get_renderable=self.render)
            self.live.start()
        else:
            self.console.print(self.title, soft_wrap=True, markup=False)
        return self

    def __exit__(self, *_: object) -> None:
        if self.live is not None:
            self.live.stop()

    def start(self, row: Row) -> None:
        self.running[row.number] = row

    def update(self, number: int, epoch: int, value: float | None) -> None:
        row = self.running[number]
        row.epoch, row.value = epoch, value

    def end(self, number: int, state: str, best: bool, counts: bool = True) -> None:
        row = self.running.pop(number)
        row.state = state
        self.done += counts
        self.ended.append(row)
        if best:
            self.best = row
        if self.live is None:
            mark = " *best*" if best else ""
            self.console.print(
                f"trial {row.number} {state} {self._value(row)} {row.parameters:,} params "
                f"{row.flops:,} FLOPs {row.origin}: {row.pattern}{mark} [{self.pace()}]",
                soft_wrap=True,
                markup=False,
                highlight=False,
            )

    def pace(self) -> str:
        """`7/24 trials, 1,200 an hour, 0:45 left`."""
        elapsed = time.monotonic() - self.started
        here = self.done - self.first
        text = f"{self.done}/{self.target} trials"
        if here == 0:
            return text
        left = max(self.target - self.done, 0) * elapsed / here
        return f"{text}, {3600 * here / elapsed:,.0f} an hour, {_clock(left)} left"

    def _value(self, row: Row) -> str:
        return "-" if row.value is None else f"{self.metric}={row.value:.4f}"

    def render(self) -> Group:
        table = Table(title=Text(self.title), title_justify="left", expand=False)
        for name in ("trial", "pattern", self.metric, "params", "FLOPs", "from", "state"):
            right = name in ("trial", self.metric, "params", "FLOPs")
            table.add_column(name, justify="right" if right else "left", no_wrap=name != "pattern")
        for row in [*self.ended, *self.running.values()]:
            value = "" if row.value is None else f"{row.value:.4f}"
            state = f"epoch {row.epoch}" if row.state == "running" else row.state
            style = "bold green" if row is self.best else None
            cells = (str(row.number), row.pattern, value, f"{row.parameters:,}", f"{row.flops:,}")
            table.add_row(*cells, Text(row.origin), state, style=style)
        best = ""
        if self.best is not None:
            best = f"best so far: trial {self.best.number}, {self._value(self.best)}   "
        return Group(table, Text(best + self.pace()))


def _clock(seconds: float) -> str:
    whole = int(seconds)
    hours, rest = divmod(whole, 3600)
    return f"{hours}:{rest // 60:02}:{rest % 60:02}" if hours else f"{rest // 60}:{rest % 60:02}"
