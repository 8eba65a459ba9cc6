"""What training may add: images moved about, smoothed labels, averaged weights, decay by kind."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from patternsearch import Assignment, Block, Head, Mixer
from patternsearch.augment import Moves, moved
from patternsearch.averaging import MovingAverage
from patternsearch.config import load_config
from patternsearch.errors import ConfigError
from patternsearch.evaluation import evaluate
from patternsearch.layers import Matrix
from patternsearch.model import build_model
from patternsearch.patterns.dense import Dense
from patternsearch.patterns.diagonal import Diagonal
from patternsearch.patterns.low_rank import LowRank
from patternsearch.patterns.monarch import Monarch
from patternsearch.patterns.semiseparable import Semiseparable
from patternsearch.search.worker import task_on
from patternsearch.task import IGNORE, get_task
from patternsearch.train import TrainSettings, TrialRun, run, training_loss

LINEAR = Assignment(width=8, head=Head(positions=Dense()))


@pytest.fixture(scope="module")
def digits():
    return task_on("digits", "cpu")


def settings(**changes) -> TrainSettings:
    return TrainSettings(**{"epochs": 2, "batch": 50, "lr": 1e-2, **changes})


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_images_move_as_by_hand(dtype):
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(1, 255, (40, 5, 7, 3), generator=generator).to(dtype)
    moves = Moves.draw(40, 2, True, generator)
    assert {int(v) for v in moves.by.flatten()} == {-2, -1, 0, 1, 2}
    assert 0 < int(moves.mirrored.sum()) < 40
    found = moved(x, moves)
    for image, out, (down, right), mirror in zip(
        x, found, moves.by.tolist(), moves.mirrored.tolist(), strict=True
    ):
        padded = F.pad(image.movedim(-1, 0), (2, 2, 2, 2))
        hand = padded[:, 2 - down : 7 - down, 2 - right : 9 - right].movedim(0, -1)
        assert torch.equal(out, hand.flip(1) if mirror else hand)
    assert torch.equal(moved(x, Moves.draw(40, 0, False, generator)), x)


def test_moved_images_are_trained_on_and_the_same_again(digits):
    task, splits = digits
    plain = run(LINEAR, task, splits, settings())[1]
    one, two = (run(LINEAR, task, splits, settings(shift=1), seed=0)[1] for _ in range(2))
    assert one.curve == two.curve != plain.curve


def test_examples_come_in_the_order_drawn(digits):
    """However many are gathered at once."""
    task, splits = digits
    trial = TrialRun(LINEAR, task, splits, settings(batch=7))
    x, y = splits.train
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(3))
    found = list(trial._batches(x, y, order))
    assert [len(b) for _, b in found] == [7] * 28 + [4]
    assert torch.equal(torch.cat([a for a, _ in found]), x[order])
    assert torch.equal(torch.cat([b for _, b in found]), y[order])


def test_smoothed_labels():
    task, generator = get_task("digits"), torch.Generator().manual_seed(0)
    logits = torch.randn(6, 10, generator=generator)
    y = torch.tensor([0, 3, 9, IGNORE, 4, 4])
    counted = y != IGNORE
    target = 0.8 * F.one_hot(y[counted], 10) + 0.2 / 10
    hand = -(target * logits[counted].log_softmax(-1)).sum(-1).mean()
    assert training_loss(task, 0.2)(logits, y).item() == pytest.approx(hand.item(), rel=1e-6)
    assert training_loss(task, 0.0) == task.loss


def test_the_average_of_the_weights():
    model = nn.Linear(1, 1, bias=False)
    model.weight.data.fill_(1.0)
    average = MovingAverage(model, 0.5)
    for value in (2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0):
        model.weight.data.fill_(value)
        average.update()
    hand = 1.0
    for n, value in enumerate((2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0), start=1):
        decay = min(0.5, (1 + n) / (10 + n))
        hand = decay * hand + (1 - decay) * value
    average.swap()
    assert model.weight.item() == pytest.approx(hand)
    average.swap()
    assert model.weight.item() == 512


def test_the_averaged_model_is_judged_and_kept(digits):
    task, splits = digits
    plain = TrialRun(LINEAR, task, splits, settings(epochs=3))
    mean = TrialRun(LINEAR, task, splits, settings(epochs=3, ema=0.9))
    while not mean.finished:
        a, b = plain.advance(), mean.advance()
        assert a["train_loss"] == b["train_loss"], "training itself is not changed"
        assert a["valid_loss"] != b["valid_loss"]
    assert evaluate(mean.model, task, splits.valid)["valid_loss"] == b["valid_loss"]


def test_gradients_are_clipped(digits):
    task, splits = digits
    trial = TrialRun(LINEAR, task, splits, settings(clip=1e-3))
    norms, step = [], trial.optimizer.step

    def spy():
        gradients = [p.grad.flatten() for p in trial.model.parameters()]
        norms.append(torch.cat(gradients).norm().item())
        step()

    trial.optimizer.step = spy
    trial.advance()
    assert max(norms) <= 1.001e-3


@pytest.mark.parametrize("pattern", [Dense(), LowRank(rank=4), Monarch()])
def test_a_forecast_begins_small(pattern):
    design = Assignment(width=8, head=Head(positions=pattern))
    readout = build_model(design, get_task("etth1").spec).readout
    torch.manual_seed(0)
    small, usual = (
        m.pattern.to_dense({name: core[0] for name, core in m.cores().items()}, m.out, m.inp)
        for m in (readout, Matrix(readout.pattern, readout.out, readout.inp, 1))
    )
    torch.testing.assert_close(small.std(), 0.1 * usual.std(), rtol=0.2, atol=0)


def test_weight_decay_is_for_matrices():
    mixer, channel = Mixer(positions=Semiseparable(), heads=4), (Diagonal(), Dense())
    block = Block(mixer=mixer, channel=channel, expansion=1.0)
    model = build_model(Assignment(width=8, blocks=(block,)), get_task("mqar").spec)
    decays = {n for n, p in model.named_parameters() if "decay" in n and p.dim() > 1}
    assert decays, "a recurrence has decays of every head"
    decayed = model.decayed()
    assert not decayed & decays and "blocks.0.channel.1.numbers.weight" in decayed
    assert not any("norm" in n or "bias" in n or "channel.0." in n for n in decayed)


@pytest.mark.parametrize(
    ("task", "wrong", "said"),
    [
        ("digits", {"flip": True}, "train.flip=True: digits does not say that a flip leaves"),
        ("digits-permuted", {"shift": 1}, "train.shift=1: digits-permuted does not say"),
        ("etth1", {"label_smoothing": 0.1}, "etth1 is not trained by cross-entropy"),
    ],
)
def test_settings_that_a_task_has_no_use_for(task, wrong, said):
    with pytest.raises(ConfigError, match=said):
        settings(**wrong).check(get_task(task))
    settings(shift=2, flip=True, label_smoothing=0.1).check(get_task("cifar10"))


@pytest.mark.parametrize(
    "wrong", [{"label_smoothing": 1.0}, {"ema": 1.0}, {"clip": 0.0}, {"shift": -1}], ids=str
)
def test_impossible_settings(wrong):
    (name,) = wrong
    with pytest.raises(ConfigError, match=f"train.{name}=.* must be"):
        TrainSettings(**wrong)
    with pytest.raises(ConfigError, match=f"train.{name}: got {wrong[name]}"):
        load_config("digits", train=wrong)
