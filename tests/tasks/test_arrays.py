"""Own data from .npz: every accepted form and every refusal."""

import pickle

import numpy as np
import pytest

from patternsearch.errors import TaskError
from patternsearch.sizes import Spec
from patternsearch.task import checked, get_task
from patternsearch.tasks.arrays import ArrayTask

N = 100
RNG = np.random.RandomState(0)
Y = np.arange(N) % 3
IMAGES = RNG.standard_normal((N, 4, 4))


def saved(folder, **arrays):
    path = folder / "own.npz"
    np.savez(path, **arrays)
    return str(path)


def made(folder, x=IMAGES, y=Y, **more):
    return get_task(saved(folder, x=x, y=y, **more))


def everything(task):
    data = checked(task)
    xs, ys = zip(data.train, data.valid, data.test, strict=True)
    return np.concatenate(xs), np.concatenate(ys)


@pytest.mark.parametrize(
    ("shape", "dtype", "grid", "channels", "space"),
    [
        ((5, 7, 3), "float32", (5, 7), 3, "vision"),
        ((5, 5, 3), "uint8", (5, 5), 3, "vision"),
        ((6, 6), "float64", (6, 6), 1, "vision"),
        ((6, 9), "uint8", (6, 9), 1, "vision"),
        ((9, 2), "float16", (9,), 2, "sequences"),
        ((13,), "float32", (13,), 1, "sequences"),
    ],
)
def test_shapes_of_numbers(tmp_path, shape, dtype, grid, channels, space):
    x = RNG.randint(0, 256, (N, *shape)).astype(dtype)
    task = made(tmp_path, x)
    assert task.spec == Spec(grid=grid, channels=channels, classes=3)
    assert task.space == space and task.moves == (("shift", "flip") if len(grid) == 2 else ())
    found, _ = everything(task)
    scale = 255 if dtype == "uint8" else 1
    assert found.dtype == np.float32
    rows = sorted((x / scale).astype(np.float32).reshape(N, -1).tolist())
    assert sorted(found.reshape(N, -1).tolist()) == rows


@pytest.mark.parametrize("dtype", ["uint8", "int32", "int64"])
def test_whole_numbers_with_two_axes_are_tokens(tmp_path, dtype):
    x = RNG.randint(0, 50, (N, 11)).astype(dtype)
    x[3, 4] = 77
    task = made(tmp_path, x)
    assert task.spec == Spec(grid=(11,), vocabulary=78, classes=3)
    assert task.space == "sequences"
    assert sorted(everything(task)[0].tolist()) == sorted(x.tolist())


@pytest.mark.parametrize(("positions", "grid", "channels"), [(1, (4,), 4), (2, (4, 4), 1)])
def test_positions_decide_what_three_axes_are(tmp_path, positions, grid, channels):
    spec = made(tmp_path, positions=positions).spec
    assert (spec.grid, spec.channels) == (grid, channels)


@pytest.mark.parametrize("dtype", ["uint8", "int32", "int64", "bool"])
def test_labels_of_any_integer_type(tmp_path, dtype):
    y = (np.arange(N) % 2).astype(dtype)
    task = made(tmp_path, y=y)
    assert task.spec.classes == 2
    assert np.bincount(everything(task)[1]).tolist() == [50, 50]


def test_split_is_60_20_20_stratified_disjoint_and_fixed(tmp_path):
    x = np.arange(N, dtype=np.float32)[:, None]
    task = made(tmp_path, x)
    data = task.load()
    parts = [part[0].ravel().astype(int).tolist() for part in (data.train, data.valid, data.test)]
    assert [len(p) for p in parts] == [60, 20, 20]
    assert sorted(i for part in parts for i in part) == list(range(N))
    for part, (_, y) in zip(parts, (data.train, data.valid, data.test), strict=True):
        assert y.tolist() == Y[part].tolist()
        assert np.abs(np.bincount(y) - len(y) / 3).max() < 2
    assert parts[1][:5] == [1, 5, 7, 8, 12]


def test_own_splits_are_kept(tmp_path):
    x, v, t = (RNG.standard_normal((n, 5)) for n in (30, 12, 10))
    y, w, u = (np.arange(n) % 3 for n in (30, 12, 10))
    w[0] = 6
    task = made(tmp_path, x, y, x_valid=v, y_valid=w, x_test=t, y_test=u)
    assert task.spec.classes == 7
    data = checked(task)
    for (a, b), (p, q) in zip(((x, y), (v, w), (t, u)), vars(data).values(), strict=True):
        assert np.array_equal(a.astype(np.float32)[..., None], p)
        assert np.array_equal(b, q)


def test_name_is_the_path_as_given_and_rebuilds_the_task(tmp_path, monkeypatch):
    saved(tmp_path, x=IMAGES, y=Y)
    monkeypatch.chdir(tmp_path)
    for name in ("own.npz", "./own.npz"):
        task = get_task(name)
        assert isinstance(task, ArrayTask)
        assert task.name == name
        assert np.array_equal(get_task(task.name).load().test[0], task.load().test[0])
    assert ArrayTask.name == ""
    monkeypatch.chdir("/")
    copy = pickle.loads(pickle.dumps(task))  # the data travel with it
    assert np.array_equal(copy.load().train[0], task.load().train[0])


def bad(value, at=(0, 0, 0), x=IMAGES):
    x = x.copy()
    x[at] = value
    return x


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": bad(np.nan, (7, 0, 0))}, "x has NaN or infinite .* 1 of 100 .* example 7; drop"),
        ({"x": bad(1e60)}, "x has NaN or infinite values"),
        ({"x": np.zeros((N, 2, 2, 2, 2))}, r"x must be \[n, H, W, C\].*found \[100, 2, 2, 2, 2\]"),
        ({"x": np.zeros(N)}, r"x must be .*found \[100\]"),
        ({"x": np.zeros((N, 0))}, r"x must be .*found \[100, 0\]"),
        ({"x": np.zeros((N, 4, 4), int)}, r"must be floats.* found int64 \[100, 4, 4\]; save"),
        ({"x": np.full((N, 4), "a")}, "must be floats.* found <U1"),
        ({"x": np.full((N, 4), -3)}, "tokens must be in .*found -3 to -3"),
        ({"x": np.full((N, 4), 2**40)}, "tokens must be in .*found 1099511627776"),
        ({"y": Y + 0.5}, r"y must be whole numbers from 0, found float64; .*np\.unique"),
        ({"y": Y - 1}, "y must be whole numbers from 0, found -1"),
        ({"y": np.array(["cat", "dog"] * 50)}, r"y must be whole numbers .*found <U3; .*np\.uni"),
        ({"y": Y[:, None]}, r"y must be \[n\], one class an example; found \[100, 1\]"),
        ({"y": np.zeros(N, int)}, "y must hold two classes or more, found only 0"),
        ({"y": Y * 1000}, "fewer classes than examples, found class 2000 with 100"),
        ({"y": Y[:-1]}, "x and y must be of one length, found 100 and 99"),
        ({"x": IMAGES[:49], "y": Y[:49]}, "49 examples; 50 are the least"),
        ({"x": IMAGES[:9], "y": Y[:9]}, "x has 9 examples; at least 10"),
        ({"positions": 3}, r"positions must be 1 or 2 for x \[100, 4, 4\], found 3"),
        ({"x": np.zeros((N, 4)), "positions": 2}, r"positions must be 1 for x \[100, 4\], found 2"),
        ({"x_valid": IMAGES}, "no array 'y_valid', only .*; give all of x_valid, .* or none"),
        ({"x_val": IMAGES}, "no use for an array 'x_val'. Did you mean 'x_valid'. Known: x, y,"),
        ({"ids": Y}, r"no use for an array 'ids'\. Known: x, y,"),
    ],
)
def test_refusals(tmp_path, arrays, message):
    path = saved(tmp_path, **{"x": IMAGES, "y": Y, **arrays})
    with pytest.raises(TaskError, match=message) as e:
        get_task(path)
    assert str(e.value).startswith(f"{path}: ")
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    ("split", "message"),
    [
        ({"x_valid": IMAGES[:, :3]}, r"x_valid must be like x, .*\['n', 4, 4\]; found .*3, 4"),
        ({"x_test": np.zeros((N, 4, 4), "uint8")}, "x_test must be like x, float64 .*found uint8"),
        ({"x_valid": IMAGES[:9], "y_valid": Y[:9]}, "x_valid has 9 examples; at least 10"),
        ({"y_test": Y[:-3]}, "x_test and y_test must be of one length, found 100 and 97"),
        ({"y_valid": Y - 2}, "y_valid must be whole numbers from 0, found -2"),
        ({"x_test": bad(np.inf)}, "x_test has NaN or infinite values"),
        ({"y": np.ones(N, int)}, "y must hold two classes or more, found only 1"),
    ],
)
def test_refusals_of_own_splits(tmp_path, split, message):
    own = {f"{k}_{s}": v for s in ("valid", "test") for k, v in (("x", IMAGES), ("y", Y))}
    with pytest.raises(TaskError, match=message):
        made(tmp_path, **{**own, **split})


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (("x", "labels"), "no use for an array 'labels'"),
        (("X", "y"), "'X'. Did you mean 'x'"),
        (("x_train", "y_train"), "'x_train'. Did you mean 'x'"),
        (("x",), "no array 'y', only x"),
        (("y",), "no array 'x', only y"),
        ((), "no array 'x', only nothing"),
    ],
)
def test_missing_names(tmp_path, keys, message):
    with pytest.raises(TaskError, match=message):
        get_task(saved(tmp_path, **dict(zip(keys, (IMAGES, Y), strict=False))))


class Trap:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return self.path.touch, ()


def test_objects_and_ragged_lists_are_refused_and_never_unpickled(tmp_path):
    trap = tmp_path / "sprung"
    ragged = np.array([[1.0], [1.0, 2.0]] * 50, dtype=object)
    for x in (ragged, np.array([Trap(trap)] * N, dtype=object)):
        with pytest.raises(TaskError, match=r"own\.npz: x cannot be read as plain numbers"):
            made(tmp_path, x)
    bare = tmp_path / "bare.npz"
    bare.write_bytes(pickle.dumps(Trap(trap)))
    with pytest.raises(TaskError, match=r"not an \.npz file"):
        get_task(str(bare))
    assert not trap.exists()


def test_files_that_are_no_npz(tmp_path):
    path = tmp_path / "own.npz"
    with pytest.raises(TaskError, match=r"own\.npz: no such file or folder, seen from "):
        get_task(str(path))
    for content in (b"", b"x,y\n1,2\n"):
        path.write_bytes(content)
        with pytest.raises(TaskError, match=r"not an \.npz file, or cut off; write it with "):
            get_task(str(path))
    with path.open("wb") as file:
        np.save(file, IMAGES)
    with pytest.raises(TaskError, match=r"not an \.npz file"):
        get_task(str(path))


def test_damaged_files(tmp_path):
    path = tmp_path / "own.npz"
    np.savez_compressed(path, x=IMAGES, y=Y)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(TaskError, match=r"not an \.npz file, or cut off"):
        get_task(str(path))
    middle = len(whole) // 3
    path.write_bytes(whole[:middle] + b"\0" * 50 + whole[middle + 50 :])
    with pytest.raises(TaskError, match=r"x cannot be read .*write it again"):
        get_task(str(path))
