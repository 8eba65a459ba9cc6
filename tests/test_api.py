"""Sweeps from Python."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from support import ROOT, SPACE

import patternsearch
from patternsearch import Task
from patternsearch.errors import ConfigError

# MLflow's own use of SQLAlchemy, in this process
pytestmark = pytest.mark.filterwarnings("ignore::sqlalchemy.exc.SADeprecationWarning")
QUICK = {"executor": "inline", "train": {"epochs": 2, "batch": 50}, "quiet": True}


def test_a_sweep_from_python(stocked, capsys):
    space = yaml.safe_load(SPACE)
    result = patternsearch.sweep("digits", space, name="mine", trials=3, **QUICK)
    assert capsys.readouterr().out == ""
    assert (result.name, result.config.trials, result.config.train.epochs) == ("mine", 3, 2)
    table = result.trials
    assert len(table) == 3 and table.index.name == "number" and table.origin.iloc[0] == "cnn"
    done = table[table.state == "COMPLETE"]
    assert result.best.objectives[0] == done.accuracy.max()
    assert result.best.values["parameters"] == done.parameters[result.best.number]
    costs = [t.values["parameters"] for t in result.front]
    assert costs == sorted(costs, reverse=True) and result.front[0].values == result.best.values
    model = patternsearch.build(result.export("best.yaml"))
    assert sum(p.numel() for p in model.parameters()) == result.best.values["parameters"]
    assert f"Best pattern: trial {result.best.number}" in str(result)
    assert "<table" in result._repr_html_()

    more = patternsearch.sweep(
        "digits", space, folder="sweeps", name="mine", resume=True, trials=4, **QUICK
    )
    assert len(more.trials) == 4 and more.trials[:3].accuracy.equals(table.accuracy)
    space["train"]["lr"]["float"] = [1e-3, 1.0]
    with pytest.raises(ConfigError, match=r"space\.yaml is not the one mine was started with"):
        patternsearch.sweep("digits", space, name="mine", resume=True, trials=4, **QUICK)
    with pytest.raises(ConfigError, match=r"started with seed=0, not 3; .*batch=50.*, not .*64"):
        patternsearch.sweep("sweep.yaml", space, name="mine", resume=True, seed=3, train={
            "batch": 64}, quiet=True)  # fmt: skip


def test_mistakes_in_python(here):
    for settings, message in (
        ({"tirals": 3}, r"tirals=: unknown key 'tirals'\. Did you mean 'trials'\?"),
        ({"train": {"epochs": 0}}, r"train=: train\.epochs: got 0; input should be greater"),
        ({"space": {"asignment": {}}}, "no key 'asignment'. Did you mean 'assignment'"),
        ({"start_from": "none.yaml"}, r"start_from: no file none\.yaml"),
        ({"space": "visoin"}, "no file in spaces/ 'visoin'. Did you mean 'vision'"),
    ):
        with pytest.raises(patternsearch.PatternSearchError, match=message):
            patternsearch.sweep("digits", **{"quiet": True, **settings})

    class Local(Task):
        pass

    with pytest.raises(ConfigError, match=r"Local is defined in .*put it into a file of its own"):
        patternsearch.sweep(Local)
    assert not Path("sweeps").exists()


def test_the_example_runs(stocked):
    done = subprocess.run(
        [sys.executable, str(Path(ROOT) / "examples" / "sweep_in_python.py")],
        cwd=stocked,
        env={**os.environ, "PYTHONPATH": ROOT, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "4/4 trials" in done.stdout and "parameters in best.yaml" in done.stdout
