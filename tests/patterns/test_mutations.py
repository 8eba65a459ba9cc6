"""The contract suite can fail: an index fault in a family's product is seen by its checks."""

import pytest
from pattern_cases import cases
from pattern_checks import check_causal, check_oracle, check_product

from patternsearch.patterns.banded import Banded
from patternsearch.patterns.kronecker import Kronecker
from patternsearch.patterns.monarch import Monarch
from patternsearch.patterns.semiseparable import Semiseparable


def fails(check, family: str) -> bool:
    """Whether the check refuses at least one of the family's cases."""
    for case in cases(family):
        try:
            check(case)
        except AssertionError:
            return True
    return False


def transposed_blocks(matmul):
    """Monarch's blocks joined in the wrong order: right[j, r, k] for right[r, j, k]."""

    def faulty(self, cores, x, out):
        right = cores["right"]
        if right.shape[-3] == right.shape[-2]:
            cores = {**cores, "right": right.transpose(-3, -2)}
        return matmul(self, cores, x, out)

    return faulty


def shifted_window(matmul):
    """A band that looks one position too far ahead."""

    def faulty(self, cores, x, out):
        return matmul(self, cores, x.roll(-1, -1 - self.lead), out)

    return faulty


def swapped_modes(matmul):
    """The first two Kronecker factors exchanged where their shapes allow."""

    def faulty(self, cores, x, out):
        a, b = cores["factor0"], cores.get("factor1", cores["factor0"])
        if a.shape == b.shape:
            cores = {**cores, "factor0": b, "factor1": a}
        return matmul(self, cores, x, out)

    return faulty


FAULTS = [
    (Monarch, transposed_blocks),
    (Banded, shifted_window),
    (Kronecker, swapped_modes),
]


@pytest.mark.parametrize(("cls", "fault"), FAULTS, ids=lambda f: f.__name__)
def test_an_index_fault_is_seen(monkeypatch, cls, fault):
    assert not fails(check_product, cls.family) and not fails(check_oracle, cls.family)
    monkeypatch.setattr(cls, "matmul", fault(cls.matmul))
    assert fails(check_product, cls.family), "matmul against to_dense"
    assert fails(check_oracle, cls.family), "matmul against the formula"


def test_a_fault_made_twice_is_seen(monkeypatch):
    """The same fault in matmul and to_dense passes one check, and the formula refuses it."""
    matmul, dense = Monarch.matmul, Monarch.to_dense
    monkeypatch.setattr(Monarch, "matmul", lambda s, c, x, o: matmul(s, flip(c), x, o))
    monkeypatch.setattr(Monarch, "to_dense", lambda s, c, o, i: dense(s, flip(c), o, i))
    assert not fails(check_product, "monarch")
    assert fails(check_oracle, "monarch")


def flip(cores):
    return {**cores, "left": cores["left"].flip(-1)}


def test_a_leak_is_seen(monkeypatch):
    matmul = Semiseparable.matmul

    def leaking(self, cores, x, out):
        return matmul(self, cores, x, out) + 1e-6 * x.flip(-1)

    monkeypatch.setattr(Semiseparable, "matmul", leaking)
    case = next(c for c in cases("semiseparable") if c.out == c.inp == (9,))
    with pytest.raises(AssertionError, match="leaks"):
        check_causal(case, 1)
