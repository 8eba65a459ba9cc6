"""Sweeps from Python."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from support import ROOT, SPACE

import patternsearch
from patternsearch import Task
from patternsearch.errors import ConfigError
from patternsearch.retrain import train

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


def test_a_file_that_changed_is_read_again(stocked):
    """In one process, whose threads are as before."""
    rng, space = np.random.default_rng(0), yaml.safe_load(SPACE)
    scores, threads = [], torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        for name in ("noise", "signal"):
            x = rng.normal(size=(300, 8, 8, 1)).astype("float32")
            y = rng.integers(0, 2, 300) if name == "noise" else x.mean((1, 2, 3)) > 0
            np.savez("own.npz", x=x, y=y.astype("int64"))
            found = patternsearch.sweep("own.npz", space, name=name, trials=1, **QUICK)
            scores.append(found.best.values["accuracy"])
        assert scores[0] < 0.65 and scores[0] != scores[1]
        assert torch.get_num_threads() == threads + 1
    finally:
        torch.set_num_threads(threads)


def test_weights_of_another_seed_do_not_take_the_place_of_those_named(stocked):
    patternsearch.sweep("digits", yaml.safe_load(SPACE), name="s", trials=1, **QUICK)
    best = Path("sweeps/s/best.yaml")
    before = best.with_suffix(".safetensors").read_bytes()
    with pytest.raises(ConfigError, match=r"--seed 5: .* the weights of seed 0, .* --output"):
        train(best, seed=5)
    assert best.with_suffix(".safetensors").read_bytes() == before
    assert "weights: five.safetensors" in train(best, seed=5, output=Path("five.safetensors"))
    assert "equal to the logged" in train(best)
    assert yaml.safe_load(best.read_text())["provenance"]["device"] == "cpu"


def test_a_ray_that_ran_before(stocked, monkeypatch):
    """It is too small for a worker, or knows nothing of the folder of the data."""
    import ray

    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False)
    try:
        quick = {**QUICK, "executor": "ray", "trials": 1}
        with pytest.raises(ConfigError, match=r"resources\.cpu=2, and all of Ray has 1 CPU; lower"):
            patternsearch.sweep("digits", yaml.safe_load(SPACE), resources={"cpu": 2}, **quick)
        folder = stocked / "files" / "ETT-small"
        folder.mkdir(parents=True)
        rows = (f"2016-07-01 00:00:00,{','.join([f'{i % 24}.5'] * 7)}" for i in range(17_420))
        (folder / "ETTh1.csv").write_text("\n".join(["date,a,b,c,d,e,f,OT", *rows]) + "\n")
        monkeypatch.setenv("PATTERNSEARCH_DATA", str(stocked / "files"))
        monkeypatch.setenv("PATTERNSEARCH_CACHE", str(stocked / "cache"))
        short = {"epochs": 1, "batch": 32, "examples": 64, "valid_examples": 64}
        found = patternsearch.sweep("etth1", **quick | {"train": short})
        assert found.best is not None and found.best.values["mse"] > 0
    finally:
        ray.shutdown()
