"""The command line: every mistake is one line on stderr with its remedy, exit status 2, and
nothing half-written."""

import re
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from support import ROOT, SPACE, command

from patternsearch import __version__
from patternsearch.cli import app, main

pytestmark = pytest.mark.filterwarnings("ignore::sqlalchemy.exc.SADeprecationWarning")

COMMANDS = ("sweep", "confirm", "compare", "report", "export", "train", "show", "list", "ui")
QUICK = ("sweep", "sweep.yaml", "--name", "new")


def files() -> dict[str, bytes]:
    """What lies below the current folder."""
    return {str(p): p.read_bytes() for p in Path().rglob("*") if p.is_file()}


def refused(capsys, *arguments: str) -> str:
    """The one line a mistake gives. Nothing may be written, nothing said on stdout."""
    before = files()
    with pytest.raises(SystemExit) as caught:
        main(list(arguments))
    out, err = capsys.readouterr()
    assert caught.value.code == 2, err
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1, err
    assert files() == before
    assert not Path("sweeps").exists(), "not even an empty folder"
    return err


@pytest.mark.parametrize(
    "options, message",
    [
        (["--set", "trails=3"], "unknown key 'trails'. Did you mean 'trials'?"),
        (["--set", "train.epochs=many"], "train.epochs: got 'many'"),
        (["--trials", "0"], "--trials: trials: got 0"),
        (["--sampler", "tpee"], "'tpe', 'gp', 'nsga2', 'random' or 'structured'"),
        (["--executor", "dask"], "'ray' or 'inline'"),
        (["--set", "space=none.yaml"], "no file none.yaml; give an existing YAML file"),
        (["--set", "space=visoin"], "Did you mean 'vision'?"),
        (["--set", "objectives={accurcy: maximize}"], "Did you mean 'accuracy'?"),
        (["--set", "objectives={accuracy: minimize}"], "of which more is better; maximize it"),
        (["--set", "objectives={parameters: maximize}"], "of which less is better; minimize it"),
        (["--set", "caps.parameters=10"], "raise caps or widen the space"),
        (["--set", "storage=nonsense"], "check the URL"),
        (["--set", "storage=sqlite:////none/such/x.db"], "check the URL"),
        (["--name", "../up"], "use letters, digits"),
        (["--name", "a/b"], "use letters, digits"),
        (["--name", ""], "use letters, digits"),
        (["--dir", "/proc/none"], "cannot make the folder /proc/none"),
        (["--dir", "sweep.yaml"], "cannot make the folder sweep.yaml"),
        (["--tracking-uri", "sqlite:////none/such/x.db"], "no folder /none/such; make it"),
        (["--tracking-uri", "sqlite:///small.yaml"], "cannot be read"),
        (["--tracking-uri", "nonsense://x"], "with --tracking-uri"),
        (["--resume", "--name", "none"], "no sweep 'none'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_of_a_sweep(here, capsys, options, message):
    options = list(options)
    if "--name" in options:
        arguments = ["sweep", "sweep.yaml", *options]
    else:
        arguments = [*QUICK, *options]
    assert message in refused(capsys, *arguments)


@pytest.mark.parametrize(
    "name, message",
    [
        ("digitz", "no task 'digitz'. Did you mean 'digits'?"),
        ("none.yaml", "no file none.yaml"),
        ("none.npz", "none.npz: no such file"),
        ("nowhere:Task", "no module 'nowhere'"),
        ("", "must name a task"),
    ],
)
def test_sweeps_that_do_not_exist(here, capsys, name, message):
    assert message in refused(capsys, "sweep", name)


def test_resume_without_a_sweep(here, capsys):
    message = "no sweep of digits in sweeps; start one with `patternsearch sweep`"
    assert message in refused(capsys, "sweep", "sweep.yaml", "--resume")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("wanted", ["1", "0.25"])
def test_a_gpu_where_there_is_none(here, capsys, wanted):
    said = refused(capsys, *QUICK, "--set", f"resources.gpu={wanted}")
    assert f"resources.gpu={wanted}, but torch sees no GPU here" in said


@pytest.mark.parametrize(
    "body, message",
    [
        ("def load(self): raise RuntimeError('disk on fire')", "RuntimeError: disk on fire"),
        ("def __init__(self): raise OSError('no share')", "OSError: no share"),
        ("def load(self): return 3", "load() must give Data, found int"),
        ("spec = property(lambda self: 1 / 0)", "ZeroDivisionError"),
    ],
)
def test_a_task_class_that_raises(here, capsys, monkeypatch, body, message):
    (here / "mine.py").write_text(
        "from patternsearch.tasks.digits import Digits\n"
        f"class Own(Digits):\n    name = ''\n    {body}\n"
    )
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    said = refused(capsys, *QUICK, "--set", "task=mine:Own")
    assert message in said and "correct the class" in said


def test_wrong_arrays(here, capsys):
    np.savez("data.npz", x=np.zeros((60, 4, 2), np.float32), y=np.full(60, 0.5))
    assert "y must be whole numbers from 0" in refused(capsys, "sweep", "data.npz")
    Path("data.npz").write_bytes(Path("data.npz").read_bytes()[:100])
    assert "cut off" in refused(capsys, "sweep", "data.npz")


@pytest.mark.parametrize("executor", ["inline", "ray"])
def test_an_unreachable_tracking_server(here, executor):
    """Found before anything is written, within seconds, Ray or not."""
    before, start = files(), time.monotonic()
    done = command(here, *QUICK, "--executor", executor, "--tracking-uri", "http://127.0.0.1:9")
    seconds = time.monotonic() - start
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and "start the server or pass another" in done.stderr
    assert files() == before and not Path("sweeps").exists()
    assert seconds < 40, seconds


def test_a_store_that_is_no_database(here, capsys):
    Path("sweeps").mkdir()
    Path("sweeps/mlflow.db").write_text("not a database " * 100)
    before = files()
    with pytest.raises(SystemExit) as caught:
        main(list(QUICK))
    err = capsys.readouterr().err
    assert caught.value.code == 2 and "cannot be read" in err and "move the file away" in err
    assert files() == before


def test_a_store_that_cannot_be_written(stocked, capsys):
    with sqlite3.connect("sweeps/mlflow.db", isolation_level=None) as other:
        other.execute("BEGIN IMMEDIATE")  # another sweep in the middle of a write: no mistake
        with pytest.raises(SystemExit) as caught:
            main([*QUICK, "--dry-run"])
        assert not caught.value.code, capsys.readouterr().err
        other.execute("ROLLBACK")


def run_(*arguments: str) -> None:
    with pytest.raises(SystemExit) as caught:
        main(list(arguments))
    assert not caught.value.code


def test_names_taken_and_configurations_changed(stocked, capsys):
    run_(*QUICK, "--trials", "1")
    before = files()

    def refuses(*arguments: str) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            main(list(arguments))
        out, err = capsys.readouterr()
        assert caught.value.code == 2 and out == "" and err.count("\n") == 1, err
        after = files()
        kept = [k for k in before if "mlflow.db" not in k and k != "small.yaml"]
        assert after.keys() == before.keys() and all(after[k] == before[k] for k in kept)
        return err

    said = refuses(*QUICK)
    assert "exists; choose another --name, or go on with --resume" in said
    said = refuses(*QUICK, "--resume", "--set", "train.epochs=3")
    assert "started with train.epochs=2, not 3; resume" in said
    assert "started with seed=0, not 5" in refuses(*QUICK, "--resume", "--seed", "5")
    Path("small.yaml").write_text(SPACE.replace("[4, 12]", "[4, 16]"))
    said = refuses(*QUICK, "--resume")
    assert "is not the one new was started with" in said and "sweeps/new/space.yaml" in said
    Path("small.yaml").write_text(SPACE)
    run_(*QUICK, "--resume", "--trials", "2")

    capsys.readouterr()
    assert "no finished trial 99; it has 0" in refuses_export("--trial", "99")
    assert "no sweep 'old'. Known: new." in refuses_export("old")
    assert "give a .yaml file in a folder that exists" in refuses_export("-o", "none/x.yaml")
    assert "give a .yaml file in a folder that exists" in refuses_export("-o", "x.safetensors")


def refuses_export(*arguments: str) -> str:
    """The line of an export that must not write anything."""
    done = command(Path.cwd(), "export", *arguments)
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1
    assert not list(Path().glob("*.safetensors")) and not Path("best.yaml").exists()
    return done.stderr


def test_an_export_of_a_sweep_without_a_finished_trial(stocked, capsys):
    with pytest.raises(SystemExit) as caught:
        main([*QUICK, "--trials", "1", "--set", "train.epochs=100000", "--time", "0.5"])
    assert caught.value.code == 1
    before = files()
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        main(["export"])
    out, err = capsys.readouterr()
    assert caught.value.code == 2 and out == ""
    assert err == "error: new has no finished trial yet; nothing to export\n"
    assert files() == before


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["train", "none.yaml"], "cannot read none.yaml: No such file or directory"),
        (["train", "sweep.yaml"], "'schema' is missing; is it a file of `patternsearch export`?"),
        (["train", "best.yaml", "-o", "none/w.safetensors"], "no folder none; make it first"),
        (["train", "tagged.yaml"], "only plain YAML is read, without tags such as !!python"),
        (["train", "other.yaml"], "classes=11"),
        (["train", "best.yaml", "--seed", "-1"], "seed=-1 must be at least 0"),
        (["train", "best.yaml", "--seed", "9" * 20], "must be at least 0 and below 2**63"),
        (["train", "lost.yaml"], "no task 'digitz'. Did you mean 'digits'?"),
        (["show", "none.yaml"], "cannot read none.yaml"),
        (["show", "bandd"], "no pattern family 'bandd'. Did you mean 'banded'?"),
        (["show", "cut.yaml"], "cannot read the weights cut.safetensors"),
        (["show", "best.yaml", "-o", "none/x.png"], "cannot write none/x.png"),
        (["show", "banded", "-o", "none/x.png"], "cannot write none/x.png"),
        (["list", "famlies"], "no list 'famlies'. Did you mean 'families'?"),
        (["ui"], "no record in sweeps; run a sweep there first, or give --dir"),
        (["export"], "no sweep in sweeps; start one with `patternsearch sweep`"),
        (["export", "none"], "no sweep 'none'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_of_the_other_commands(here, exported, capsys, arguments, message):
    text = exported.read_text()
    Path("best.yaml").write_text(text)
    Path("cut.yaml").write_text(text)
    Path("cut.safetensors").write_bytes(exported.with_suffix(".safetensors").read_bytes()[:200])
    Path("lost.yaml").write_text(text.replace("task: digits", "task: digitz"))
    Path("other.yaml").write_text(text.replace("classes: 10", "classes: 11"))
    tag = "!!python/object/apply:os.system ['touch pwned']"
    Path("tagged.yaml").write_text(text.replace("task: digits", f"task: {tag}"))
    assert message in refused(capsys, *arguments)


@pytest.mark.parametrize(
    "arguments",
    [
        ["swep", "digits"],
        ["sweep", "digits", "--tirals", "3"],
        ["sweep", "digits", "-x"],
    ],
    ids=" ".join,
)
def test_usage(capsys, arguments):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    out, err = capsys.readouterr()
    assert caught.value.code == 2 and out == "" and "Usage: patternsearch" in err


# What works.


def test_dry_run_says_the_plan_and_writes_nothing(here, capsys):
    before = files()
    run_(*QUICK, "--dry-run", "--set", "caps.parameters=900")
    out = capsys.readouterr().out
    for text in ("task        digits: grid (8, 8)", "4 trials by structured", "maximize accuracy"):
        assert text in out
    assert re.search(r"cnn: w8 .* 994 parameters, .*left out: parameters=994 is over the cap", out)
    assert files() == before and not Path("sweeps").exists()


def test_show_draws_and_lists_the_places(here, exported, capsys):
    run_("show", str(exported), "-o", "picture.png")
    out = capsys.readouterr().out
    assert "stem.mixer.positions: banded(entry=dense), 8x8x1 -> 4x4x8, 80 parameters" in out
    total = int(re.search(r"total: ([\d,]+) parameters", out)[1].replace(",", ""))
    from patternsearch import build

    assert total == sum(p.numel() for p in build(exported).parameters())
    assert Path("picture.png").read_bytes().startswith(b"\x89PNG")
    run_("show", "monarch")
    assert "monarch: " in capsys.readouterr().out and Path("monarch.png").exists()


def test_list_names_everything(here, capsys):
    run_("list")
    out = capsys.readouterr().out
    from patternsearch.pattern import families
    from patternsearch.task import tasks

    for name in [*families(), *tasks(), "vision", "sequences", "linear_scan"]:
        assert re.search(rf"^  {re.escape(name)} +\S", out, re.MULTILINE), name
    run_("list", "tasks")
    assert any(line.startswith("  digits ") for line in capsys.readouterr().out.splitlines())


def test_own_arrays_are_searched_at_once(stocked, capsys):
    rng = np.random.RandomState(0)
    y = rng.randint(0, 2, 200)
    np.savez("mine.npz", x=(rng.randn(200, 6, 2) + y[:, None, None]).astype("float32"), y=y)
    options = ("--executor", "inline", "--trials", "2", "--set", "space=small.yaml")
    run_("sweep", "mine.npz", *options, "--set", "train={epochs: 5, batch: 20}", "--name", "own")
    assert "Best pattern: trial" in capsys.readouterr().out
    run_("export", "own")
    data = yaml.safe_load(Path("best.yaml").read_text())
    assert data["task"] == "mine.npz" and data["spec"]["grid"] == [6]
    run_("train", "best.yaml")
    assert "(equal to the logged" in capsys.readouterr().out


def test_every_command_has_help(capsys):
    assert {c.name or c.callback.__name__ for c in app.registered_commands} == set(COMMANDS)
    for name in COMMANDS:
        with pytest.raises(SystemExit) as caught:
            main([name, "--help"])
        out = capsys.readouterr().out
        assert caught.value.code == 0
        entries = re.findall(r"^  (?:-\w, )?(--[\w-]+)(.*(?:\n {10,}\S.*)*)", out, re.MULTILINE)
        assert len(entries) >= 2 or name == "list"
        for option, text in entries:
            assert re.search(r"\w[\w ,]{4,}\.", text), f"{name} {option} says nothing"


def test_help_is_quick_and_needs_no_torch():
    code = (
        "import sys\n"
        "from patternsearch.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'numpy', 'ray', 'optuna', 'mlflow', 'pydantic', 'matplotlib'}\n"
        "print('loaded:', sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.endswith("loaded: []\n")
    for name in COMMANDS:
        assert re.search(rf"^  {name} +[A-Z]", done.stdout, re.MULTILINE), name


def test_version(capsys):
    run_("--version")
    assert capsys.readouterr().out == f"patternsearch {__version__}\n"
