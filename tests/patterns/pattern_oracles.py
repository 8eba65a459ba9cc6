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
            for k, s, lo, up, d, n in zip(col, centre, lower, upper, dilation, inp, strict=True):
                ends = (0, n, -n) if p.tie == "circulant" else (0,)
                seen = [(k - s + end) // d for end in ends if (k - s + end) % d == 0]
                tap.append(next((t + lo for t in seen if -lo <= t <= up), None))
            if None not in tap:
                at = (*row, *tap) if p.tie == "none" else tuple(tap)
                entry = np.ravel_multi_index(row, out), np.ravel_multi_index(col, inp)
                w[entry] = c["taps"][at]
    return w


def lags_of(p, c, n, at):
    """Coefficients of lag 1 to 3 at every position, from partial correlations multiplied out."""
    k = [np.broadcast_to(c["decay"][at], (n,))]
    k += [np.broadcast_to(np.tanh(c["reflection"][(m, *at)]), (n,)) for m in range(p.order - 1)]
    scale = np.sqrt(np.prod([1 - v**2 for v in k], 0)) if p.normalise else np.ones(n)
    if len(k) == 1:
        return k, scale
    if len(k) == 2:
        return [k[0] - k[0] * k[1], k[1]], scale
    first, second = k[0] - k[0] * k[1] - k[1] * k[2], k[1] - k[0] * k[2] + k[0] * k[1] * k[2]
    return [first, second, k[2]], scale


def semiseparable(p, c, o, i, out, inp):
    """The inverse of a banded matrix: h - sum_k a_k shift^k h = s x."""
    w = np.zeros((i, i))
    for n in range(p.state):
        at = () if p.state == 1 else (n,)
        lags, scale = lags_of(p, c, i, at)
        own = np.zeros((i, i))
        for order in [1, -1] if p.two_sided else [1]:
            system = np.eye(i)
            for k, a in enumerate(lags, 1):
                system -= np.diag(a[::order])[:, :] @ np.eye(i, k=-k)
            one = np.linalg.inv(system)[::order, ::order]
            own += one if order == 1 else one - np.eye(i)
        own = own * scale
        own = own * c["write"][n] if "write" in c else own
        w += own if p.state == 1 else own * np.broadcast_to(c["read"][n], (i,))[:, None]
    at = np.arange(i).reshape(inp)
    for axis, (o, n) in enumerate(zip(out, inp, strict=True)):
        at = at.take([r * n // o for r in range(o)], axis)
    return w[at.reshape(-1)]


def block_sparse(p, c, o, i):
    """Pixelfly's mask from its definition; a random one from the block sizes alone is read off."""
    b, w = p.blocks, np.zeros((o, i))
    for row, held in enumerate(p.columns()):
        if p.mask == "butterfly":
            near = [
                j for j in range(b) if (j ^ row).bit_count() <= 1 and (j ^ row) < 2 ** len(held)
            ]
            near = [j for j in near if (j ^ row) < 2 ** (len(held) - 1) or j == row]
            assert sorted(held) == near
        assert len(set(held)) == p.kept()
        for k, col in enumerate(held):
            rows = np.arange(row * o // b, (row + 1) * o // b)
            cols = np.arange(col * i // b, (col + 1) * i // b)
            w[np.ix_(rows, cols)] = c["weight"][row, k]
    return w


def btt(p, c, o, i):
    _, f, r, a = c["left"].shape
    w = np.zeros((o, i))
    for row, col in itertools.product(range(o), range(i)):
        (y, x), (u, v) = divmod(row, f), divmod(col, a)
        w[row, col] = sum(c["right"][x, y, u, k] * c["left"][u, x, k, v] for k in range(r))
    return w


def digits(n, sizes):
    return np.unravel_index(n, sizes)


def tt(p, c, o, i):
    n = len(c)
    cores = [c[f"core{k}"] for k in range(n)]
    cores[0] = cores[0][None]
    cores[-1] = cores[-1].reshape(cores[-1].shape[0], *cores[-1].shape[1:3], 1)
    outs, inps = ([core.shape[axis] for core in cores] for axis in (1, 2))
    w = np.zeros((o, i))
    for row, col in itertools.product(range(o), range(i)):
        product = np.ones((1, 1))
        for core, a, b in zip(cores, digits(row, outs), digits(col, inps), strict=True):
            product = product @ core[:, a, b, :]
        w[row, col] = product[0, 0]
    return w


def tucker(p, c, o, i):
    n = len(c) // 2
    left, right = [c[f"out{k}"] for k in range(n)], [c[f"in{k}"] for k in range(n)]
    w = np.zeros((o, i))
    for at in np.ndindex(*c["core"].shape):
        column, row = np.ones(1), np.ones(1)
        for k in range(n):
            column, row = np.kron(column, left[k][:, at[k]]), np.kron(row, right[k][at[n + k]])
        w += c["core"][at] * np.outer(column, row)
    return w


def block_term(p, c, o, i):
    if p.terms == 1:
        return tucker(p, c, o, i)
    return sum(tucker(p, {k: v[t] for k, v in c.items()}, o, i) for t in range(p.terms))


def cp(p, c, o, i):
    w = np.zeros((o, i))
    for r in range(c["in0"].shape[0]):
        column, row = np.ones(1), np.ones(1)
        for k in range(len(c) // 2):
            column, row = np.kron(column, c[f"out{k}"][:, r]), np.kron(row, c[f"in{k}"][r])
        w += np.outer(column, row)
    return w


def butterfly(p, c, o, i):
    """Every path from an input to an output sets one bit a factor."""
    w = np.zeros((o, i))
    for row, col in itertools.product(range(o), range(i)):
        at, value = col, 1.0
        for k in range(len(c)):
            bit, old = row >> k & 1, at >> k & 1
            value *= c[f"factor{k}"][at >> (k + 1), at % 2**k, bit, old]
            at = at & ~(1 << k) | bit << k
        w[row, col] = value
    return w


def blast(p, c, o, i):
    w, b = np.zeros((o, i)), p.blocks
    for row, col in itertools.product(range(o), range(i)):
        (u, s), (v, t) = divmod(row, o // b), divmod(col, i // b)
        w[row, col] = np.sum(c["left"][u, s] * c["middle"][u, v] * c["right"][v, :, t])
    return w


def circulant(p, c, o, i, out, inp):
    w, b = np.zeros((o, i)), p.blocks
    for row, col in itertools.product(np.ndindex(*out), np.ndindex(*inp)):
        cells, lag = [0, 0], []
        for r, k, m, n in zip(row, col, out, inp, strict=True):
            (u, s), (v, t) = divmod(r, m // b), divmod(k, n // b)
            cells = [cells[0] * b + u, cells[1] * b + v]
            lag.append((s - t) % (max(m, n) // b))
        w[np.ravel_multi_index(row, out), np.ravel_multi_index(col, inp)] = c["weight"][
            (*cells, *lag)
        ]
    return w


def low_displacement(p, c, o, i):
    """Powers of the shifts: Z_f(v) = sum_k v_k Z_f^k."""
    n = c["left"].shape[1]
    w = np.zeros((n, n))
    for left, right in zip(c["left"], c["right"], strict=True):
        factors = []
        for v, f in ((left, 1.0), (right, -1.0)):
            shift = np.diag(np.ones(n - 1), -1)
            shift[0, n - 1] += f
            factors.append(sum(v[k] * np.linalg.matrix_power(shift, k) for k in range(n)))
        w += factors[0] @ factors[1]
    return w[:o, :i]


def einsum(p, c, o, i):
    (f, d, r, g, a), (_, e, _, b, _) = c["left"].shape, c["right"].shape
    w = np.zeros((o, i))
    for row, col in itertools.product(range(o), range(i)):
        (x, y, z), (u, v, s) = digits(row, (e, f, d)), digits(col, (g, b, a))
        w[row, col] = sum(c["right"][y, x, k, v, u] * c["left"][y, z, k, u, s] for k in range(r))
    return w


def parts_of(pattern, name, count, c, out, inp):
    for k in range(count):
        own = {key.removeprefix(f"{name}{k}_"): v for key, v in c.items() if f"{name}{k}_" in key}
        yield matrix(pattern[k], own, out[k], inp[k])


def sum_(p, c, o, i, out, inp):
    n = len(p.terms)
    return sum(parts_of(p.terms, "term", n, c, [out] * n, [inp] * n))


def product(p, c, o, i, out, inp):
    """Without axes, and with the middle at the smaller of both sides (inner = 1)."""
    if p.axes:
        w = np.ones((1, 1))
        for n, m, axis in zip(out, inp, range(len(inp)), strict=True):
            own = {k.replace(f"factor{axis}_", ""): v for k, v in c.items() if f"r{axis}_" in k}
            w = np.kron(w, matrix(p.factors[axis], own, (n,), (m,)))
        return w
    assert p.inner == 1.0
    n, middle = len(p.factors), tuple(map(min, out, inp))
    outs, inps = [out] + [middle] * (n - 1), [middle] * (n - 1) + [inp]
    w = np.eye(o)
    for part in parts_of(p.factors, "factor", n, c, outs, inps):
        w = w @ part
    return w


ORACLES = {
    f.__name__.removesuffix("_"): f
    for f in (
        *(average, banded, blast, block_diagonal, block_sparse, block_term, btt, butterfly),
        *(circulant, cp, dense, diagonal, einsum, kronecker, low_displacement, low_rank, monarch),
        *(product, semiseparable, sum_, tt, tucker),
    )
}


def matrix(pattern, cores, out, inp) -> np.ndarray:
    """The matrix of a pattern whose entries are numbers, [prod(out), prod(inp)]."""
    function, sizes = ORACLES[pattern.family], (math.prod(out), math.prod(inp))
    return function(pattern, cores, *sizes, *(out, inp)[: function.__code__.co_argcount - 4])


def oracle(case, cores) -> np.ndarray:
    return matrix(case.pattern, {k: v.numpy() for k, v in cores.items()}, case.out, case.inp)
