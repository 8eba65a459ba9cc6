"""What a user's task does wrong is said before anything is trained."""

import re
import sys

import pytest

from patternsearch.errors import TaskError
from patternsearch.task import open_task

HEAD = """
import numpy as np, torch
from patternsearch import Data, Spec, Task
from patternsearch.kinds import Forecast

class Mine(Task):
    spec = Spec(grid=(6, 6), channels=1, classes=3)
    dtype = np.float32

    def load(self):
        x = np.zeros((9, *self.spec.grid, 1), self.dtype)
        y = np.arange(9) % 3
        return Data((x, y), (x, y), (x, y))

class Own({base}):
{body}
"""
X = "must be float32 after batch(), found uint8; scale it there, as in `return x.float() / 255, y`"
SERIES = "spec = Spec(grid=(8,), channels=2, classes={}, horizon=4)\n"
WINDOWS = """
def load(self):
    x, y = np.zeros((9, 8, 2), np.float32), np.zeros((9, 4, self.spec.classes), np.float32)
    return Data((x, y), (x, y), (x, y))
"""


@pytest.fixture
def opened(tmp_path, monkeypatch):
    """Opens a task whose class has a body."""

    def opens(body: str, base: str = "Mine"):
        lines = "".join(f"    {line}\n" for line in body.splitlines())
        (tmp_path / "late.py").write_text(HEAD.format(base=base, body=lines))
        sys.modules.pop("late", None)
        return open_task("late:Own")

    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    yield opens
    sys.modules.pop("late", None)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("dtype = np.uint8", X),
        (
            "def batch(self, x, y): return x[..., 0], y",
            "x must be ['n', 6, 6, 1] after batch(), found [2, 6, 6]",
        ),
        (
            "def batch(self, x, y): return x, y[:, None]",
            "y must be [2] after batch(), found [2, 1]",
        ),
        (
            "def score(self, output, y): return 0.5",
            "two numbers (sum, count) as 'accuracy', found 0.5",
        ),
        (
            "def score(self, output, y): return output.sum(0), len(y)",
            "two numbers (sum, count) as 'accuracy', found (float32 [3], 2)",
        ),
        (
            "def scores(self, output, y): return {'f1': self.score(output, y)}",
            "scores() gives f1 and not the metric 'accuracy'",
        ),
        (
            "def loss(self, output, y): return (output[:, 0] - y) ** 2",
            "loss() must give one number, a tensor without axes, found float32 [2]",
        ),
        (
            "def loss(self, output, y): return (output.argmax(1) != y).float().mean()",
            "loss() must be a differentiable function of the output",
        ),
        (
            "def loss(self, output, y): return output @ y",
            "loss() was tried with output float32 [2, 3] and y int64 [2]: RuntimeError: ",
        ),
        ("moves = ('turn',)", "moves=('turn',) must be a tuple of 'shift' and 'flip'"),
        ("moves = 'flip'", "moves='flip' must be a tuple of 'shift' and 'flip'"),
        (
            "moves = ('shift',)\nspec = Spec(grid=(6,), channels=1, classes=3)",
            "moves=('shift',) are of images, positions (H, W) with channels; found grid=(6,)",
        ),
        ("def load(self): return 1, 2, 3", "load() must give Data, found tuple"),
        (
            "def load(self): return Data(*[Mine.load(self).train[0]] * 3)",
            "train: it must be a pair (x, y), found ndarray",
        ),
        (
            "def load(self): return Data(*[tuple(map(torch.tensor, Mine.load(self).train))] * 3)",
            "train: x must be a numpy array, found torch.Tensor",
        ),
        (
            "def load(self): return Data(*[tuple(a.tolist() for a in Mine.load(self).train)] * 3)",
            "train: x must be a numpy array, found list",
        ),
    ],
)
def test_a_class_that_would_fail_late(opened, body, message):
    with pytest.raises(TaskError, match=re.escape(message)) as caught:
        opened(body)
    said = str(caught.value)
    assert said.startswith("task 'late:Own'") and "; correct " in said and "\n" not in said


def test_classes_that_are_right(opened):
    opened("moves = ('shift', 'flip')")
    opened("dtype = np.uint8\ndef batch(self, x, y): return x.float() / 255, y")
    opened("def score(self, output, y): return 1.5, 2")
    opened(SERIES.format(2) + WINDOWS, "Forecast")
    opened(SERIES.format(1) + WINDOWS + "def batch(self, x, y): return x, y", "Forecast")


def test_a_forecast_of_other_series_than_it_sees(opened):
    with pytest.raises(TaskError, match=r"'late:Own': a forecast .*as many classes as channels"):
        opened(SERIES.format(1) + WINDOWS, "Forecast")


@pytest.mark.parametrize(
    "body",
    [
        "def load(self):\n    return np.zeros((2, 3)) @ np.linalg.inv(np.zeros((3, 3)))",
        "def loss(self, output, y):\n    return torch.stack([np.linalg.inv(np.zeros((3, 3)))])",
        "table = 1\ntable = np.linalg.inv(np.zeros((3, 3)))",
    ],
    ids=["load", "loss", "import"],
)
def test_the_line_of_the_class_is_named(opened, tmp_path, body):
    """And not that of the library that it called."""
    line = HEAD[: HEAD.index("{body}")].count("\n") + 2
    with pytest.raises(TaskError, match="LinAlgError: Singular matrix") as caught:
        opened(body)
    assert f"({tmp_path / 'late.py'}, line {line}); correct the class" in str(caught.value)
    with pytest.raises(
        TaskError, match=r"SyntaxError: [^(]*\(late.py, line \d+\); correct the class"
    ):
        opened("def load(self) return 1")


def test_numbers_are_scores(opened):
    """Plain ones do as well as tensors."""
    import torch

    from patternsearch.evaluation import evaluate
    from patternsearch.train import Splits

    body = "def score(self, output, y): return {}"
    plain, usual = "(output.argmax(-1) == y).sum().item(), len(y)", "Mine.score(self, output, y)"
    found = []
    for said in (plain, usual):
        task, data = opened(body.format(said))
        splits = Splits(data, torch.device("cpu"))
        model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(36, 3))
        found.append(evaluate(model, task, splits.valid)["accuracy"])
    assert found == [1 / 3, 1 / 3]
