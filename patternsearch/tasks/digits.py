"""Scikit-learn's 1,797 handwritten digits: 8x8 pixels, one channel, scaled from 0..16 to 0..1.

Source: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI, 1998 (the part
that scikit-learn ships).
"""

from __future__ import annotations

import importlib.util
from functools import lru_cache
from pathlib import Path

import numpy as np

from ..errors import TaskError
from ..sizes import Spec
from ..task import Array, Data, Task, stratified

FILE = "datasets/data/digits.csv.gz"
CLASSES, PER_CLASS = 10, 20


@lru_cache(maxsize=1)
def images() -> tuple[Array, Array]:
    """x [1797, 8, 8, 1] float32 in 0..1, y [1797] int64, in scikit-learn's order.

    Read from its file where that is where it has always been: importing sklearn.datasets takes
    longer than all the rest of starting a worker after torch.
    """
    spec = importlib.util.find_spec("sklearn")
    if spec is None or not spec.submodule_search_locations:
        raise TaskError(
            "the digits images come with scikit-learn, which is not installed; "
            "run pip install 'patternsearch[sweep]'"
        )
    file = Path(spec.submodule_search_locations[0]) / FILE
    if file.is_file():
        table = np.loadtxt(file, delimiter=",", dtype=np.float32)
        pixels, labels = table[:, :-1], table[:, -1]
    else:
        from sklearn.datasets import load_digits

        pixels, labels = load_digits(return_X_y=True)
    x = (pixels / 16).astype(np.float32).reshape(-1, 8, 8, 1)
    return x, labels.astype(np.int64)


def few() -> tuple[Array, Array, Array]:
    """Indices of 20 training images a class and of the rest, halved."""
    y = images()[1]
    order = np.random.RandomState(0).permutation(len(y))
    train = np.concatenate([order[y[order] == c][:PER_CLASS] for c in range(CLASSES)])
    rest = np.setdiff1d(order, train)
    half = len(rest) // 2
    valid, _, test = stratified(y[rest], 0, len(rest) - half)
    return np.sort(train), rest[valid], rest[test]


def _data(indices: tuple[Array, Array, Array]) -> Data:
    x, y = images()
    train, valid, test = ((x[i], y[i]) for i in indices)
    return Data(train=train, valid=valid, test=test)


class Digits(Task):
    """20 training images a class (200), 798 to validate and 799 to test, all fixed.

    So few that patterns differ: with all of them every convolution reaches .99.
    """

    name = "digits"
    moves = ("shift",)

    @property
    def spec(self) -> Spec:
        return Spec(grid=(8, 8), channels=1, classes=CLASSES)

    def load(self) -> Data:
        return _data(few())


class DigitsFull(Task):
    """1,078 images to train, 359 to validate, 360 to test, stratified and fixed."""

    name = "digits-full"
    moves = ("shift",)

    @property
    def spec(self) -> Spec:
        return Spec(grid=(8, 8), channels=1, classes=CLASSES)

    def load(self) -> Data:
        return _data(stratified(images()[1], 359, 360))


class DigitsPermuted(Task):
    """`digits` with one fixed permutation of the pixels: the control, where locality is gone."""

    name = "digits-permuted"

    @property
    def spec(self) -> Spec:
        return Spec(grid=(8, 8), channels=1, classes=CLASSES)

    def load(self) -> Data:
        data = Digits().load()
        pixels = np.random.RandomState(1).permutation(64)
        train, valid, test = (
            (x.reshape(-1, 64)[:, pixels].reshape(x.shape), y)
            for x, y in (data.train, data.valid, data.test)
        )
        return Data(train=train, valid=valid, test=test)
