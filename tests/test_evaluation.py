"""Evaluation: in batches that are not larger than needed, over the labels that count."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from patternsearch import Assignment, Block, Data, Head, Spec, Task
from patternsearch.errors import TaskError
from patternsearch.evaluation import evaluate, largest_batch
from patternsearch.kinds import LanguageModel
from patternsearch.patterns.dense import Dense
from patternsearch.task import IGNORE, cross_entropy
from patternsearch.train import Splits, TrainSettings, TrialRun, training_loss
from patternsearch.vocabulary import linear_cross_entropy

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
NONE = torch.full((2, 3), IGNORE)


class Few(Task):
    """One label in ten."""

    spec = Spec(grid=(4,), channels=2, classes=3)

    def __init__(self, count: int = 200) -> None:
        self.count = count

    def load(self) -> Data:
        rng = np.random.RandomState(0)
        x = rng.standard_normal((self.count, 4, 2)).astype(np.float32)
        y = np.where(np.arange(self.count) % 10, IGNORE, x[:, 0].argmax(1))
        return Data((x, y), (x, y), (x, y))


class Text(LanguageModel):
    spec = Spec(grid=(3,), vocabulary=5, classes=5, per_position=True)

    def load(self) -> Data:
        raise NotImplementedError


class Wide(nn.Module):
    """Remembers how many examples it is given at once."""

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.spec, self.sizes = spec, []
        self.weight = nn.Parameter(torch.linspace(-1, 1, spec.classes))

    def forward(self, x):
        self.sizes.append(len(x))
        return x.flatten(1).sum(1, keepdim=True) * self.weight


@pytest.mark.parametrize(("side", "most"), [(8, 512), (16, 256), (32, 64), (64, 64)])
def test_positions_limit_a_batch(side, most):
    class Pictures(Task):
        spec = Spec(grid=(side, side), channels=1, classes=5)

        def load(self):
            raise NotImplementedError

    task = Pictures()
    x = torch.randn(600, side, side, 1, generator=torch.Generator().manual_seed(0)) / side
    y = torch.arange(600) % 5
    model = Wide(task.spec)
    found = evaluate(model, task, (x, y))
    assert max(model.sizes) == most and sum(model.sizes) == 600
    output = model(x)
    assert found["accuracy"] == (output.argmax(1) == y).double().mean().item()
    assert found["valid_loss"] == pytest.approx(F.cross_entropy(output, y).item(), rel=1e-6)
    assert largest_batch(task.spec, CUDA) == min(1024, 2**20 // side**2)


def test_outputs_limit_a_batch():
    words = Spec(grid=(32,), vocabulary=10_000, classes=10_000, per_position=True)
    assert largest_batch(words, CPU) == largest_batch(words, CUDA) == 6


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_batch_without_a_label_is_no_loss(smoothing):
    loss = training_loss(Few(), smoothing)
    output = torch.randn(2, 3, 4, requires_grad=True)
    found = loss(output, NONE)
    found.backward()
    assert found.item() == 0 and not output.grad.any()


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_loss_is_the_mean_over_labels(smoothing, monkeypatch):
    output = torch.randn(2, 3, 4, dtype=torch.float64)
    y = torch.tensor([[0, IGNORE, 3], [IGNORE, 1, IGNORE]])
    wanted = F.cross_entropy(output[y >= 0], y[y >= 0], label_smoothing=smoothing)
    torch.testing.assert_close(cross_entropy(output, y, smoothing), wanted)
    monkeypatch.setattr(torch.Tensor, "is_cpu", False)  # as where the host does not look
    torch.testing.assert_close(cross_entropy(output, y, smoothing), wanted)


def test_no_label_in_parts_of_a_large_vocabulary():
    h, weight, bias = (torch.randn(*s, requires_grad=True) for s in ((2, 3, 4), (5, 4), (5,)))
    found = linear_cross_entropy(h, weight, bias, NONE)
    found.backward()
    assert found.item() == 0 and not any(t.grad.any() for t in (h, weight, bias))
    total, scores = Text().judged(torch.randn(2, 3, 5), NONE)
    assert total == 0 and scores["perplexity"][1] == 0


def test_few_labels_are_trained_and_judged_by():
    task = Few()
    splits = Splits(task.load(), CPU)
    design = Assignment(width=4, head=Head(positions=Dense()))
    trial = TrialRun(design, task, splits, TrainSettings(epochs=10, batch=4, lr=2e-2))
    while not trial.finished:
        row = trial.advance()
    x, y = splits.valid
    with torch.no_grad():
        wanted = F.cross_entropy(trial.model(x), y, ignore_index=IGNORE).item()
    assert row["accuracy"] > 0.6
    for batch in (1024, 7):  # some without a label
        found = evaluate(trial.model, task, splits.valid, batch)
        assert found["valid_loss"] == pytest.approx(wanted)
    with pytest.raises(TaskError, match=r"none of the 9 examples .* raise train.valid_examples"):
        evaluate(trial.model, task, (x[1:10], y[1:10]))


@pytest.mark.parametrize("count", [1, 17, 33])
def test_a_last_batch_of_one_cannot_be_normed(count):
    """On one position a single example has no variance; alone it is left as it is."""

    class Points(Few):
        spec = Spec(grid=(1,), channels=2, classes=3)

        def load(self):
            data = super().load()
            pair = data.train[0][:, :1], np.arange(self.count) % 3
            return Data(pair, pair, pair)

    task = Points(count)
    splits = Splits(task.load(), CPU)
    for norm, steps in (("batch", count // 16), ("none", -(-count // 16))):
        design = Assignment(width=4, blocks=(Block(channel=(Dense(),), norm=norm),))
        trial = TrialRun(design, task, splits, TrainSettings(epochs=1, batch=16))
        if norm == "batch" and count == 1:
            with pytest.raises(ValueError, match="more than 1 value per channel"):
                trial.advance()
        else:
            trial.advance()
            assert trial.steps == steps
