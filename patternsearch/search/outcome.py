"""What a sweep gives back in Python."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pandas

from ..config import SweepConfig
from .results import Results, TrialRecord, conclusion, export_trial, read_results


@dataclass(frozen=True)
class SweepResult:
    """The trials of a sweep as they stand in its folder.

    best: the trial that is best by the first objective, by its mean over fresh seeds where those
    were trained, None where none finished. front: the trials
    that none beats, the best by the first objective first. A trial has number, state, origin,
    params, assignment, train, values, objectives, curve, reason and pattern (a line on what it is).
    """

    folder: Path
    results: Results

    @staticmethod
    def read(folder: str | Path) -> SweepResult:
        """The result of a sweep by its folder. Raises ConfigError where there is none."""
        return SweepResult(Path(folder), read_results(Path(folder)))

    @property
    def name(self) -> str:
        return self.results.name

    @property
    def config(self) -> SweepConfig:
        return self.results.config

    @property
    def best(self) -> TrialRecord | None:
        return self.results.winner()

    @property
    def front(self) -> list[TrialRecord]:
        return self.results.front()

    @property
    def trials(self) -> pandas.DataFrame:
        """A row a trial that took a worker, by number: what it is, its values, its parameters."""
        rows = [
            {
                "number": t.number,
                "state": t.state,
                "origin": t.origin,
                "pattern": t.pattern,
                **t.values,
                **t.params,
                "reason": t.reason,
            }
            for t in self.results.trials
        ]
        columns = None if rows else ["number", "state", "origin", "pattern", "reason"]
        return pandas.DataFrame(rows, columns=columns).set_index("number")

    def export(self, output: str | Path = "best.yaml", trial: int | None = None) -> Path:
        """Write a trial (the best by default) as YAML, its weights beside it; the YAML's path.

        `patternsearch.build` makes the model of it. Raises ConfigError for a trial that did not
        finish.
        """
        export_trial(self.folder, trial, Path(output))
        return Path(output)

    def __str__(self) -> str:
        return conclusion(self.results, self.folder).strip()

    def _repr_html_(self) -> str:
        """In a notebook: the trials, the best by the first objective first."""
        order = [t.number for t in self.results.complete()]
        return str(self.trials.loc[order].dropna(axis="columns", how="all").to_html())
