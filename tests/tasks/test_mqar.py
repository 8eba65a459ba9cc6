import zlib

import numpy as np
import pytest
import torch

from patternsearch.task import IGNORE, as_tensors, checked, get_task
from patternsearch.tasks.mqar import LENGTH, PAIRS, POWER, VOCABULARY, distinct

PREFIX = 2 * PAIRS
TASK = get_task("mqar")
DATA = checked(TASK)
CPU = torch.device("cpu")


def recall(tokens):
    """The answer to the last of these tokens, from nothing but the prefix; None if no key."""
    for i in range(0, PREFIX, 2):
        if tokens[i] == tokens[-1]:
            return tokens[i + 1]
    return None


@pytest.mark.parametrize("split", ["train", "valid", "test"])
def test_every_label_is_the_value_after_its_key_in_the_prefix(split):
    x, y = getattr(DATA, split)
    for tokens, labels in zip(x.tolist(), y.tolist(), strict=True):
        asked = [t for t in range(LENGTH) if labels[t] != IGNORE]
        assert len(asked) == PAIRS
        assert all(t >= PREFIX and t % 2 == 0 for t in asked)
        assert sorted(tokens[t] for t in asked) == sorted(tokens[0:PREFIX:2])
        for t in asked:  # and nothing after the query is needed
            assert labels[t] == recall(tokens[: t + 1])


def test_prefix_has_distinct_keys_and_distinct_values():
    x = DATA.train[0]
    keys, values = x[:, 0:PREFIX:2], x[:, 1:PREFIX:2]
    assert (keys.min(), keys.max()) == (1, VOCABULARY // 2 - 1)
    assert (values.min(), values.max()) == (VOCABULARY // 2, VOCABULARY - 1)
    assert all(len(set(row)) == PAIRS for row in [*keys.tolist(), *values.tolist()])


def test_all_other_places_are_uniform_over_the_vocabulary():
    x, y = DATA.train
    fill = x[:, PREFIX:][y[:, PREFIX:] == IGNORE]
    counts = np.bincount(fill, minlength=VOCABULARY)
    expected = len(fill) / VOCABULARY
    assert np.abs(counts - expected).max() < 5 * expected**0.5


def test_places_of_queries_follow_the_power_law():
    """Against one weighted draw after another, without replacement."""
    places = (LENGTH - PREFIX) // 2
    weights = np.arange(1, places + 1) ** (POWER - 1)
    rng = np.random.default_rng(0)
    p = weights / weights.sum()
    slow = np.stack([rng.choice(places, PAIRS, replace=False, p=p) for _ in range(4000)])
    fast = distinct(np.random.RandomState(0), 4000, weights, PAIRS)
    for k in range(PAIRS):  # the k-th drawn
        a, b = (np.bincount(d[:, k], minlength=places) / 4000 for d in (slow, fast))
        assert np.abs(a - b).max() < 0.035
    asked = np.argwhere(DATA.train[1][:, PREFIX:] != IGNORE)[:, 1] // 2
    share = np.bincount(asked, minlength=places) / len(DATA.train[0])
    expected = np.bincount(slow.ravel(), minlength=places) / 4000
    assert np.abs(share - expected).max() < 0.06


def test_chance_is_a_quarter_among_the_values_seen_and_a_32th_blind():
    x, y = DATA.valid
    labels = y[y != IGNORE]
    for k in range(PAIRS):  # always the k-th value
        guess = np.broadcast_to(x[:, 2 * k + 1, None], y.shape)
        assert 0.2 < (guess == y)[y != IGNORE].mean() < 0.3
    assert np.bincount(labels).max() / len(labels) < 0.05


def test_sizes_types_and_spec():
    spec = TASK.spec
    assert (spec.grid, spec.vocabulary, spec.classes) == ((32,), 64, 64)
    assert spec.causal and spec.per_position and spec.channels is None
    for (x, y), n in ((DATA.train, 1280), (DATA.valid, 1024), (DATA.test, 1024)):
        assert x.shape == y.shape == (n, 32)
        assert (x.dtype, y.dtype) == (np.int64, np.int64)
    assert TASK.space == "sequences"


def test_no_sequence_is_in_two_splits():
    seen = [row.tobytes() for x, _ in (DATA.train, DATA.valid, DATA.test) for row in x]
    assert len(set(seen)) == len(seen)


def test_two_loads_are_equal():
    again = get_task("mqar").load()
    for split in ("train", "valid", "test"):
        for a, b in zip(getattr(DATA, split), getattr(again, split), strict=True):
            assert np.array_equal(a, b)


def test_the_sequences_are_these():
    """Results of other versions compare only while the held-out sequences stay the same."""
    found = [zlib.crc32(x.tobytes()) for x, _ in (DATA.valid, DATA.test)]
    assert found == [3599424016, 1248178855]


@pytest.mark.parametrize("seed", [0, 7, 2**32, 2**64 - 1])
def test_epochs_are_fresh_and_fixed_by_seed_and_number(seed):
    train = as_tensors(DATA.train, CPU)
    x, y = TASK.epoch(train, 3, seed)
    assert x.shape == y.shape == (1280, 32)
    assert (x.dtype, y.dtype) == (torch.int64, torch.int64)
    again = TASK.epoch(train, 3, seed)
    assert torch.equal(x, again[0]) and torch.equal(y, again[1])
    for number, other in ((2, seed), (3, seed + 1), (4, seed)):
        assert not torch.equal(x, TASK.epoch(train, number, other)[0])


def test_training_data_are_epoch_0_of_seed_0():
    x, y = TASK.epoch(as_tensors(DATA.train, CPU), 0, 0)
    assert np.array_equal(x.numpy(), DATA.train[0])
    assert np.array_equal(y.numpy(), DATA.train[1])


def test_an_oracle_scores_1_and_a_fixed_answer_what_it_should():
    _, y = as_tensors(DATA.valid, CPU)
    perfect = torch.nn.functional.one_hot(y.clamp(min=0), VOCABULARY).float()
    right, count = TASK.score(perfect, y)
    assert (right.item(), count.item()) == (1024 * PAIRS, 1024 * PAIRS)
    assert TASK.loss(50 * perfect, y).item() < 1e-6
    assert TASK.loss(0 * perfect, y).item() == pytest.approx(np.log(VOCABULARY), rel=1e-5)
    assert TASK.score(perfect.roll(1, dims=-1), y)[0].item() == 0
