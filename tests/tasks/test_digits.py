import sys

import numpy as np
import pytest
from sklearn.datasets import load_digits

from patternsearch.errors import TaskError
from patternsearch.task import checked, get_task, stratified
from patternsearch.tasks import digits

SIZES = {
    "digits": (200, 798, 799),
    "digits-full": (1078, 359, 360),
    "digits-permuted": (200, 798, 799),
}


def splits(name):
    data = checked(get_task(name))
    return data.train, data.valid, data.test


@pytest.mark.parametrize("name", SIZES)
def test_splits_are_every_image_once(name):
    """Compared as (sorted pixels, label), which no permutation changes."""
    parts = splits(name)
    assert tuple(len(x) for x, _ in parts) == SIZES[name]
    images, labels = load_digits(return_X_y=True)
    expected = sorted([*sorted(p), k] for p, k in zip(images, labels, strict=True))
    found = [[*sorted(p.ravel() * 16), k] for x, y in parts for p, k in zip(x, y, strict=True)]
    assert sorted(found) == expected


@pytest.mark.parametrize("name", ["digits", "digits-full"])
def test_pixels_stay_in_place(name):
    known = {p.tobytes(): k for p, k in zip(*load_digits(return_X_y=True), strict=True)}
    for x, y in splits(name):
        pixels = (x.astype(np.float64) * 16).reshape(len(x), 64)
        assert [known[p.tobytes()] for p in pixels] == y.tolist()


@pytest.mark.parametrize("name", SIZES)
def test_dtypes_scale_and_spec(name):
    spec = get_task(name).spec
    assert (spec.grid, spec.channels, spec.classes) == ((8, 8), 1, 10)
    assert not (spec.causal or spec.per_position or spec.vocabulary)
    for x, y in splits(name):
        assert (x.dtype, y.dtype) == (np.float32, np.int64)
        assert (x.min(), x.max()) == (0, 1)


@pytest.mark.parametrize("name", SIZES)
def test_classes_are_balanced_and_chance_is_a_tenth(name):
    train, *held_out = splits(name)
    if name != "digits-full":
        assert np.bincount(train[1]).tolist() == [20] * 10
    rest = sum(np.bincount(y) for _, y in held_out)
    for _, y in held_out:
        counts = np.bincount(y, minlength=10)
        assert np.abs(counts - rest * len(y) / rest.sum()).max() < 2
        assert counts.max() / len(y) < 0.11  # the best constant answer


@pytest.mark.parametrize("name", SIZES)
def test_two_loads_are_equal(name):
    before = splits(name)
    digits.images.cache_clear()
    for (x, y), (u, v) in zip(before, splits(name), strict=True):
        assert np.array_equal(x, u)
        assert np.array_equal(y, v)


def test_the_splits_are_these():
    """Results of other versions compare only while the splits stay the same."""
    train, valid, test = digits.few()
    assert train[:6].tolist() == [6, 14, 18, 34, 37, 47]
    assert [part.sum() for part in (train, valid, test)] == [176867, 739730, 697109]
    full = stratified(digits.images()[1], 359, 360)
    assert [part.sum() for part in full] == [958024, 336973, 318709]


def test_permuted_is_digits_with_one_permutation_of_pixels():
    plain, permuted = splits("digits"), splits("digits-permuted")
    columns = np.concatenate([x.reshape(-1, 64) for x, _ in plain])
    shuffled = np.concatenate([x.reshape(-1, 64) for x, _ in permuted])
    order = np.random.RandomState(1).permutation(64)
    assert np.array_equal(columns[:, order], shuffled)
    assert np.count_nonzero(order == np.arange(64)) < 5
    for (_, y), (_, v) in zip(plain, permuted, strict=True):
        assert np.array_equal(y, v)


def test_without_the_file_scikit_learn_is_asked(monkeypatch):
    x, y = digits.images.__wrapped__()
    monkeypatch.setattr(digits, "FILE", "datasets/data/moved.csv.gz")
    u, v = digits.images.__wrapped__()
    assert np.array_equal(x, u)
    assert np.array_equal(y, v)
    assert (u.dtype, v.dtype) == (np.float32, np.int64)


def test_without_scikit_learn(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(TaskError, match=r"pip install 'patternsearch\[sweep\]'"):
        digits.images.__wrapped__()
