import zlib

import numpy as np
import pytest
import torch

from patternsearch.task import IGNORE, as_tensors, checked, get_task
from patternsearch.tasks.selective_copy import DATA as TOKENS
from patternsearch.tasks.selective_copy import LENGTH, MARKER, NOISE, VOCABULARY

TASK = get_task("selective-copy")
DATA = checked(TASK)
CPU = torch.device("cpu")


def online(tokens):
    """Answers place by place: reads one token after another and never looks ahead."""
    queue, answers = [], []
    for token in tokens:
        if token == MARKER:
            answers.append(queue.pop(0))
        else:
            queue += [token] if token != NOISE else []
            answers.append(IGNORE)
    return answers


@pytest.mark.parametrize("split", ["train", "valid", "test"])
def test_the_answer_is_the_data_in_order(split):
    x, y = getattr(DATA, split)
    for tokens, labels in zip(x.tolist(), y.tolist(), strict=True):
        assert labels == online(tokens)
        data = [t for t in tokens[:LENGTH] if t != NOISE]
        assert len(data) == TOKENS and MARKER not in data
        assert tokens[LENGTH:] == [MARKER] * TOKENS
        assert labels[LENGTH:] == data


def test_places_and_tokens_are_uniform():
    x = DATA.train[0]
    tokens = x[:, :LENGTH][x[:, :LENGTH] != NOISE]
    counts = np.bincount(tokens, minlength=VOCABULARY)
    assert counts[[NOISE, MARKER]].sum() == 0
    assert np.abs(counts[1:MARKER] / len(tokens) - 1 / 8).max() < 0.02
    share = (x[:, :LENGTH] != NOISE).mean(axis=0)
    assert np.abs(share - TOKENS / LENGTH).max() < 0.04


def test_chance_is_an_eighth():
    y = DATA.valid[1]
    labels = y[y != IGNORE]
    assert 1 / 8 <= np.bincount(labels).max() / len(labels) < 0.15


def test_distances_vary_so_that_no_fixed_place_holds_the_answer():
    x, y = DATA.valid
    for marker in range(LENGTH, LENGTH + TOKENS):
        for place in range(LENGTH):
            assert (x[:, place] == y[:, marker]).mean() < 0.25


def test_sizes_types_and_spec():
    spec = TASK.spec
    assert (spec.grid, spec.vocabulary, spec.classes) == ((36,), 10, 10)
    assert spec.causal and spec.per_position and spec.channels is None
    for (x, y), n in ((DATA.train, 1280), (DATA.valid, 1024), (DATA.test, 1024)):
        assert x.shape == y.shape == (n, 36)
        assert (x.dtype, y.dtype) == (np.int64, np.int64)
    assert TASK.space == "sequences"


def test_no_sequence_is_in_two_splits():
    seen = [row.tobytes() for x, _ in (DATA.train, DATA.valid, DATA.test) for row in x]
    assert len(set(seen)) == len(seen)


def test_two_loads_are_equal_and_these():
    """Results of other versions compare only while the held-out sequences stay the same."""
    again = get_task("selective-copy").load()
    for split in ("train", "valid", "test"):
        for a, b in zip(getattr(DATA, split), getattr(again, split), strict=True):
            assert np.array_equal(a, b)
    found = [zlib.crc32(x.tobytes()) for x, _ in (DATA.valid, DATA.test)]
    assert found == [3868296897, 3690982066]


@pytest.mark.parametrize("seed", [0, 7, 2**40])
def test_epochs_are_fresh_and_fixed_by_seed_and_number(seed):
    train = as_tensors(DATA.train, CPU)
    x, y = TASK.epoch(train, 1, seed)
    assert (x.dtype, y.dtype, x.shape) == (torch.int64, torch.int64, (1280, 36))
    again = TASK.epoch(train, 1, seed)
    assert torch.equal(x, again[0]) and torch.equal(y, again[1])
    for number, other in ((0, seed), (1, seed + 1)):
        assert not torch.equal(x, TASK.epoch(train, number, other)[0])


def test_tasks_draw_from_different_streams():
    assert TASK.salt != get_task("mqar").salt
