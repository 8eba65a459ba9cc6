"""What a search space is made of: the values a parameter may take, as plain data."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol


class Trial(Protocol):
    """What is used of an Optuna trial."""

    def suggest_categorical(self, name: str, choices: Any) -> Any: ...
    def suggest_int(
        self, name: str, low: int, high: int, *, step: int = 1, log: bool = False
    ) -> int: ...
    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float: ...


@dataclass(frozen=True, slots=True)
class Choice:
    """One of `options`, unordered."""

    options: tuple[Any, ...]

    def suggest(self, trial: Trial, name: str) -> Any:
        return trial.suggest_categorical(name, list(self.options))

    def contains(self, value: Any) -> bool:
        return value in self.options

    def size(self) -> float:
        return len(self.options)

    def __str__(self) -> str:
        return "one of " + ", ".join(map(str, self.options))


@dataclass(frozen=True, slots=True)
class IntRange:
    """low, low + step, ... up to high; log-uniform where `log`, which goes with step 1 only."""

    low: int
    high: int
    log: bool = False
    step: int = 1

    def suggest(self, trial: Trial, name: str) -> int:
        return trial.suggest_int(name, self.low, self.high, log=self.log, step=self.step)

    def contains(self, value: Any) -> bool:
        return (
            isinstance(value, int)
            and self.low <= value <= self.high
            and (value - self.low) % self.step == 0
        )

    def size(self) -> float:
        return (self.high - self.low) // self.step + 1

    def __str__(self) -> str:
        by = f" by {self.step}" if self.step > 1 else ""
        return f"{self.low} to {self.high}{by}{' (log)' if self.log else ''}"


@dataclass(frozen=True, slots=True)
class FloatRange:
    """A number in [low, high]; log-uniform where `log`."""

    low: float
    high: float
    log: bool = False

    def suggest(self, trial: Trial, name: str) -> float:
        return trial.suggest_float(name, self.low, self.high, log=self.log)

    def contains(self, value: Any) -> bool:
        return isinstance(value, int | float) and self.low <= value <= self.high

    def size(self) -> float:
        return 1 if self.low == self.high else math.inf

    def __str__(self) -> str:
        return f"{self.low:g} to {self.high:g}{' (log)' if self.log else ''}"


Domain = Choice | IntRange | FloatRange
