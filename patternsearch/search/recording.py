"""What a sweep tells the record of itself, and of trials that were over before."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..config import METRICS, SweepConfig, masked
from ..export import environment, versions
from ..pattern import Cost
from ..space import Space
from ..tracking import Past
from .folders import CONFIG, ENVIRONMENT, SPACE, STARTS
from .results import TrialRecord
from .setup import note


def described(
    config: SweepConfig, space: Space, origin: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Parameters and tags of a sweep whose environment.yaml says `origin`."""
    constants = config.model_dump(exclude={"train", "caps", "resources", "objectives"})
    params = {
        k: masked(v) if isinstance(v, str) else v for k, v in constants.items() if v is not None
    }
    params |= {f"train.{k}": v for k, v in config.train.model_dump().items()}
    params |= {f"cap.{k}": v for k, v in config.caps.model_dump().items() if v is not None}
    params["space.size"] = f"{space.size():.4g}"
    tags = {
        "mlflow.note.content": note(config),
        **{f"version.{k}": v for k, v in versions().items()},
        **{f"device.{k}": v for k, v in origin["device"].items()},
        **{f"git.{k}": v["commit"] for k, v in origin["git"].items()},
    }
    return params, tags


def texts(folder: Path) -> list[tuple[str, str]]:
    """Name and content of what a sweep begins with, without passwords."""
    kept = (folder / name for name in (CONFIG, SPACE, ENVIRONMENT, STARTS))
    found = [(p.name, masked(p.read_text())) for p in kept if p.exists()]
    return [*found, ("environment.txt", environment())]


def past(trial: TrialRecord) -> Past:
    """A trial as the record has it."""
    began, ended = (int(hours * 3600e3) for hours in trial.hours)
    return Past(
        number=trial.number,
        name=f"t{trial.number:04} {trial.pattern}",
        state=trial.state,
        params=trial.params,
        tags={"origin": trial.origin, "trial": trial.number, "pattern": trial.pattern},
        curve=list(trial.curve),
        values={k: v for k, v in trial.values.items() if k in METRICS},
        reason=last_line(trial.reason) if trial.reason else None,
        began=began,
        ended=ended,
    )


def known(cost: Cost) -> dict[str, float]:
    """What is logged of a trial's costs before it is measured."""
    return {"parameters": cost.parameters, "flops": cost.flops}


def last_line(why: str) -> str:
    """Of a traceback the error itself."""
    return why.strip().splitlines()[-1]
