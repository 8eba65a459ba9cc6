"""What every task keeps to, splitting, and tasks by module:Class."""

import importlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from patternsearch.errors import TaskError
from patternsearch.sizes import Spec
from patternsearch.task import IGNORE, Data, Task, as_tensors, checked, get_task, stratified, tasks

NAMES = ("digits", "digits-full", "digits-permuted", "mqar", "selective-copy")
MODULE = """
import numpy as np
from patternsearch.task import Data, Task
from patternsearch.sizes import Spec

LIMIT = 3

class Mine(Task):
    spec = Spec(grid=(4,), channels=2, classes=3)

    def load(self):
        x, y = np.ones((6, 4, 2), np.float32), np.arange(6) % 3
        return Data((x, y), (x, y), (x, y))

class Unfinished(Task):
    def load(self):
        return None

class Asking(Mine):
    def __init__(self, path):
        self.path = path

class Helper:
    pass
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path / "mymodule.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    sys.modules.pop("mymodule", None)


def test_all_are_found():
    assert set(NAMES) <= set(tasks())


@pytest.mark.parametrize("name", NAMES)
def test_contract(name):
    task = get_task(name)
    assert task.name == name
    data = checked(task)
    train = as_tensors(data.train, torch.device("cpu"))
    x, y = task.epoch(train, 0, 0)
    assert x.shape[1:] == train[0].shape[1:] and x.dtype == train[0].dtype
    assert y.shape[1:] == train[1].shape[1:] and y.dtype == torch.int64


def test_unknown_name():
    with pytest.raises(TaskError, match=r"no task 'digist'\. Did you mean 'digits'.*module:Class"):
        get_task("digist")


def test_task_of_a_module(module):
    task = get_task("mymodule:Mine")
    assert task.name == "mymodule:Mine"
    assert type(get_task(task.name)) is type(task)
    assert len(checked(task).train[0]) == 6
    assert "Mine" not in tasks()


def test_the_current_folder_is_searched(module, tmp_path):
    """A command's own folder, not the user's, is where Python looks first."""
    code = "from patternsearch.task import get_task; print(get_task('mymodule:Mine').spec.classes)"
    root = str(Path(__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-I", "-c", f"import sys; sys.path.insert(0, {root!r}); {code}"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "3\n", done.stderr


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nomodule:Mine", "no module 'nomodule' can be imported; start in its folder"),
        ("mymodule.sub:Mine", "no module 'mymodule.sub' can be imported"),
        ("mymodule:Mein", "no class in mymodule 'Mein'. Did you mean 'Mine'"),
        ("mymodule:Helper", "Helper must be a subclass of patternsearch.Task"),
        ("mymodule:LIMIT", "LIMIT must be a subclass"),
        ("mymodule:Unfinished", "Unfinished must define spec$"),
        ("mymodule:Asking", "Asking must be made without arguments"),
        ("mymodule:", "must be module:Class"),
        (":Mine", "must be module:Class"),
        ("my-module:Mine", "must be module:Class"),
    ],
)
def test_wrong_names_of_modules_and_classes(module, name, message):
    with pytest.raises(TaskError, match=message) as e:
        get_task(name)
    assert f"task {name!r}" in str(e.value)


def test_a_module_that_lacks_another_says_so_itself(module):
    (module / "mymodule.py").write_text("import not_installed_anywhere")
    importlib.invalidate_caches()
    with pytest.raises(ModuleNotFoundError, match="not_installed_anywhere"):
        get_task("mymodule:Mine")


def test_two_tasks_of_one_name():
    tasks()
    message = r"'digits' is in patternsearch\.tasks\.digits and in .*; rename one"
    with pytest.raises(TaskError, match=message):
        type("Digits", (Task,), {"name": "digits"})


class Broken(Task):
    """y and x of one split as told."""

    spec = Spec(grid=(3,), channels=2, classes=4)

    def __init__(self, x=None, y=None, spec=None):
        self.x = np.zeros((5, 3, 2), np.float32) if x is None else x
        self.y = np.arange(5) % 4 if y is None else y
        self.spec = spec or type(self).spec
        self.name = "broken"

    def load(self):
        good = (np.zeros((5, *self.x.shape[1:]), self.x.dtype), self.y)
        return Data(good, (self.x, self.y), good)


TOKENS = Spec(grid=(3,), vocabulary=6, classes=4)
LABELLED = Spec(grid=(3,), channels=2, classes=4, per_position=True)
X = np.zeros((5, 3, 2), np.float32)


@pytest.mark.parametrize(
    ("x", "y", "spec", "message"),
    [
        (X.astype(float), None, None, "train: x must be float32, found float64"),
        (X.swapaxes(1, 2), None, None, r"x must be \['n', 3, 2\], found \[5, 2, 3\]"),
        (X + np.float32(np.nan), None, None, "valid: x has NaN"),
        (X[:0], None, None, r"valid: x must be .*found \[0, 3, 2\]"),
        (X[..., 0], None, TOKENS, "x must be int64, found float32"),
        (np.full((5, 3), 6), None, TOKENS, r"tokens must be in \[0, 6\), found 6 to 6"),
        (np.full((5, 3), -1), None, TOKENS, r"tokens must be in \[0, 6\), found -1"),
        (None, np.zeros((5, 1), int), None, r"y must be \[5\], found \[5, 1\]"),
        (None, np.zeros(5, int), LABELLED, r"y must be \[5, 3\], found \[5\]"),
        (None, np.zeros(5, np.int32), None, "y must be int64, found int32"),
        (None, np.arange(5), None, r"labels must be in \[0, 4\), found 0 to 4"),
        (None, np.arange(5) - 1, None, r"labels must be in \[0, 4\), found -1"),
        (None, np.full(5, IGNORE), None, "y has no label besides -100"),
    ],
)
def test_data_that_is_not_what_the_spec_says(x, y, spec, message):
    with pytest.raises(TaskError, match=message) as e:
        checked(Broken(x, y, spec))
    assert "task 'broken', " in str(e.value)
    checked(Broken())


def test_a_task_with_its_own_loss_decides_what_y_is():
    class Regression(Broken):
        def loss(self, output, y):
            return ((output[..., 0] - y) ** 2).mean()

    y = np.linspace(0, 1, 5, dtype=np.float32)
    assert np.array_equal(checked(Regression(y=y)).valid[1], y)
    with pytest.raises(TaskError, match="y must be int64, found float32"):
        checked(Broken(y=y))


@pytest.mark.parametrize(("n", "valid", "test"), [(1797, 359, 360), (50, 10, 10), (101, 0, 50)])
@pytest.mark.parametrize("seed", [0, 1])
def test_stratified(n, valid, test, seed):
    y = np.random.RandomState(9).choice(5, n, p=[0.4, 0.3, 0.15, 0.1, 0.05])
    parts = stratified(y, valid, test, seed)
    assert [len(p) for p in parts] == [n - valid - test, valid, test]
    assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(n))
    for part in parts:
        share = np.bincount(y, minlength=5) * len(part) / n
        assert np.abs(np.bincount(y[part], minlength=5) - share).max() < 2
    again = stratified(y, valid, test, seed)
    assert all(np.array_equal(a, b) for a, b in zip(parts, again, strict=True))
    assert not np.array_equal(parts[2], stratified(y, valid, test, seed + 1)[2])
    assert not np.array_equal(np.diff(parts[2]), np.full(test - 1, parts[2][1] - parts[2][0]))
