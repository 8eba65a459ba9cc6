"""The matrix of each family written from its formula, entry by entry, for the contract suite."""

import itertools
import math

import numpy as np


def dense(p, c, o, i):
    return c["weight"]


def diagonal(p, c, o, i):
    return np.diag(c["weight"])


def block_diagonal(p, c, o, i):
    w = np.zeros((o, i))
    for r, k in itertools.product(range(o), range(i)):
        if r * p.blocks // o == k * p.blocks // i:
            w[r, k] = c["weight"][r * p.blocks // o, r % (o // p.blocks), k % (i // p.blocks)]
    return w


def low_rank(p, c, o, i):
    return sum(np.outer(c["left"][:, r], c["right"][r]) for r in range(c["right"].shape[0]))


def monarch(p, c, o, i):
    b, w = p.blocks, np.zeros((o, i))
    for row, col in itertools.product(range(o), range(i)):
        j, r = divmod(row, b)
        k, m = divmod(col, i // b)
        w[row, col] = c["right"][r, j, k] * c["left"][k, r, m]
    return w


def kronecker(p, c, o, i):
    w = np.ones((1, 1))
    for m in range(sum(name.startswith("factor") for name in c)):
        w = np.kron(w, c[f"factor{m}"])
    return w


def average(p, c, o, i, out, inp):
    w = np.ones((1, 1))
    for n, m in zip(out, inp, strict=True):
        axis = np.zeros((n, m))
        for row in range(n):
            first, last = math.floor(row * m / n), math.ceil((row + 1) * m / n)
            axis[row, first:last] = 1 / (last - first)
        w = np.kron(w, axis)
    return w


def banded(p, c, o, i, out, inp):
    lower, upper, dilation = p.window(inp)
    w = np.zeros((o, i))
    for row in np.ndindex(*out):
        centre = [r * n // m for r, n, m in zip(row, inp, out, strict=True)]
        for col in np.ndindex(*inp):
            tap = []
            for k, s, lo, up, d in zip(col, centre, lower, upper, dilation, strict=True):
                steps, rest = divmod(k - s, d)
                tap.append(steps + lo if rest == 0 and -lo <= steps <= up else None)
            if None not in tap:
                at = tuple(tap) if p.tie == "toeplitz" else (*row, *tap)
                entry = np.ravel_multi_index(row, out), np.ravel_multi_index(col, inp)
                w[entry] = c["taps"][at]
    return w


def semiseparable(p, c, o, i):
    """Column j is the answer to a unit impulse at j, by stepping the recurrence."""
    a = np.broadcast_to(c["decay"], (i,))
    w = np.zeros((i, i))
    for j in range(i):
        scale = math.sqrt(1 - a[j] ** 2) if p.normalise else 1.0
        state = scale
        for t in range(j, i):
            state = state if t == j else a[t] * state
            w[t, j] = state
        state = scale
        for t in range(j - 1, -1, -1) if p.two_sided else ():
            state = a[t] * state
            w[t, j] = state
    return w[[r * i // o for r in range(o)]]


ORACLES = {
    f.__name__: f
    for f in (dense, diagonal, block_diagonal, low_rank, monarch, kronecker, average, banded)
}
ORACLES["semiseparable"] = semiseparable


def oracle(case, cores) -> np.ndarray:
    """The matrix of a case whose entries are numbers, [prod(out), prod(inp)]."""
    function = ORACLES[case.pattern.family]
    sizes = (math.prod(case.out), math.prod(case.inp))
    if function.__code__.co_argcount == 6:
        sizes += (case.out, case.inp)
    return function(case.pattern, {k: v.numpy() for k, v in cores.items()}, *sizes)
