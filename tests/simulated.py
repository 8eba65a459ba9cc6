"""A search without training: trials end with values that follow from what they are."""

import contextlib
import random
from pathlib import Path

from patternsearch.config import load_config
from patternsearch.search.study import Study, curve_of, trained
from patternsearch.space import load_space
from patternsearch.task import get_task


def simulated(folder: Path, sampler: str, pruner: str, count: int, cut: dict[int, str]) -> list:
    """What is drawn and when it is stopped; `cut`: before which trials the driver dies, and how."""
    changes = [f"pruner={pruner}", "train.epochs=16", "objectives={accuracy: maximize}"]
    config = load_config("sweep.yaml", changes, sampler=sampler, trials=count)
    space, spec = load_space("small.yaml"), get_task("digits").spec
    folder.mkdir()

    def opened() -> Study:
        study = Study(config, space, spec, folder, resume=True)
        study.reconcile()
        study.enqueue_experts()
        return study

    study = opened()
    for i in range(count):
        if (how := cut.get(i)) is not None:
            if how == "running":
                left = study.ask()
                study.report(left.number, {"epoch": 1.0, "accuracy": 0.2}, {})
            elif how in ("drawing", "drawn"):  # some of the parameters are written, or all
                _fail_at(study, "param", 3) if how == "drawing" else _fail_at(study, "user_attr", 1)
                with contextlib.suppress(KeyboardInterrupt):
                    study.ask()
            study = opened()
        if i == 5:  # want of memory: run again at once
            study.try_again(study.ask().number, "out of memory", {"batch": 25})
        proposal = study.ask()
        rng, curve, stop = random.Random(proposal.digest), [], False
        while not stop and len(curve) < 16:
            curve.append({"epoch": len(curve) + 1.0, "accuracy": rng.random()})
            stop = study.report(proposal.number, curve[-1], {})
        values = {**curve[-1], "parameters": 1, "flops": 1}
        study.end(proposal.number, "PRUNED" if stop else "COMPLETE", values, curve=curve)
    found = [t for t in study.study.get_trials() if trained(t)]
    return [(t.params, t.state.name, list(curve_of(t))) for t in found]


def _fail_at(study: Study, what: str, call: int) -> None:
    name, left = f"set_trial_{what}", iter(range(call - 1))
    write = getattr(study.storage, name)

    def cut(*arguments):
        if next(left, None) is None:
            raise KeyboardInterrupt
        write(*arguments)

    setattr(study.storage, name, cut)
