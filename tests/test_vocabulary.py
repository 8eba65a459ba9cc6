"""Large vocabularies: tied and factored tables, and their cross-entropy in parts."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from patternsearch.assignment import Assignment, Block, Head, Mixer, Stem
from patternsearch.describe import short
from patternsearch.errors import PatternError
from patternsearch.model import build_model
from patternsearch.native import Native
from patternsearch.patterns.banded import Banded
from patternsearch.patterns.dense import Dense
from patternsearch.patterns.low_rank import LowRank
from patternsearch.patterns.monarch import Monarch
from patternsearch.pictures import matrix
from patternsearch.sizes import Spec, model_cost, places, resolve
from patternsearch.space import load_space
from patternsearch.task import IGNORE, Data, Task
from patternsearch.train import Splits, TrainSettings, TrialRun
from patternsearch.vocabulary import LARGE, linear_cross_entropy

SPEC = Spec(grid=(6,), vocabulary=3000, classes=3000, per_position=True, causal=True)
TIED = Assignment(width=16, head=Head(tied=True))
FACTORED = replace(TIED, stem=Stem(table=LowRank(rank=4)))


class Words(Task):
    """Unnamed, so that no other test meets it."""

    higher_is_better = False
    spec = SPEC

    def load(self):
        x = torch.randint(3000, (40, 6), generator=torch.Generator().manual_seed(0)).numpy()
        return Data(train=(x, x), valid=(x, x), test=(x, x))


def test_in_parts_it_is_the_same_cross_entropy():
    generator = torch.Generator().manual_seed(1)
    h, weight, bias = (
        torch.randn(*shape, generator=generator, dtype=torch.float64, requires_grad=True)
        for shape in ((2, 350, 5), (3000, 5), (3000,))
    )
    y = torch.randint(3000, (2, 350), generator=generator)
    y[0, 3:90] = IGNORE
    ours = linear_cross_entropy(h, weight, bias, y)
    theirs = F.cross_entropy(F.linear(h, weight, bias).flatten(0, 1), y.flatten())
    torch.testing.assert_close(ours, theirs)
    gradients = (torch.autograd.grad(3 * loss, (h, weight, bias)) for loss in (ours, theirs))
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("design", [TIED, FACTORED], ids=["dense", "low_rank"])
def test_a_table_serves_both_ends(design):
    model = build_model(design, SPEC)
    count = sum(p.numel() for p in model.parameters())
    assert model_cost(resolve(design, SPEC), SPEC).parameters == count
    assert count == (3000 * 17 if design is TIED else 3000 * 5 + 4 * 16)
    x = torch.randint(3000, (2, 6))
    h = model.features(x)
    table = model.stem.table(torch.arange(3000))
    torch.testing.assert_close(model(x), h @ table.mT + model.head.bias)
    assert set(model.rates()) == {name for name, _ in model.named_parameters()}
    assert model.rates()[next(n for n, p in model.named_parameters() if len(p) == 3000)] == 1


def test_the_whole_table_of_rank_has_the_rank():
    table = build_model(FACTORED, SPEC).stem.table(torch.arange(3000))
    assert torch.linalg.matrix_rank(table) == 4
    like = build_model(TIED, SPEC).stem.table(torch.arange(3000))
    torch.testing.assert_close(table.std(), like.std(), rtol=0.25, atol=0)
    assert resolve(replace(TIED, stem=Stem(table=LowRank(rank=0.5))), SPEC).stem.table.rank == 8


@pytest.mark.parametrize("design", [TIED, FACTORED], ids=["dense", "low_rank"])
def test_a_table_is_drawn_and_told(design):
    model = build_model(design, SPEC)
    found = list(places(model.assignment, SPEC))
    assert [place.name for place in found] == ["stem.table", "head.map"][design is TIED :]
    for place in found:
        torch.testing.assert_close(matrix(model, place), model.stem.table(torch.arange(3000)))
    assert short(model.assignment).startswith(
        "w16 table of rank 4" if design is FACTORED else "w16 |"
    )


def test_where_a_table_cannot_be():
    with pytest.raises(PatternError, match="tied=True takes the table of 3000 tokens for 4"):
        resolve(TIED, Spec(grid=(6,), vocabulary=3000, classes=4))
    wide = Block(mixer=Mixer(positions=Banded(lower=1, upper=0, entry=Dense())), widen=2)
    with pytest.raises(PatternError, match="tied=True keeps the width of the table"):
        resolve(replace(TIED, blocks=(wide,)), SPEC)
    with pytest.raises(PatternError, match=r"stem\.table: monarch; a table is dense or low_rank"):
        resolve(replace(TIED, stem=Stem(table=Monarch())), SPEC)


@pytest.mark.parametrize(
    "design",
    [TIED, FACTORED, Native(native="gru", width=8), Native(native="transformer", width=8)],
    ids=str,
)
def test_a_trial_trains_as_with_the_logits_at_once(design):
    assert LARGE <= SPEC.classes
    task = Words()
    splits = Splits(task.load(), torch.device("cpu"))
    rows = []
    for large in (True, False):
        trial = TrialRun(design, task, splits, TrainSettings(epochs=2, batch=16), seed=1)
        assert trial.large
        trial.large = large
        rows.append([trial.advance(), trial.advance()])
    for one, other in zip(*rows, strict=True):
        assert one["train_loss"] == pytest.approx(other["train_loss"], rel=1e-3)
    assert rows[0][1]["train_loss"] < rows[0][0]["train_loss"]


def test_the_experts_share_their_tables():
    space = load_space("language")
    for params in space.experts.values():
        assert space.point(params)[1].head.tied
