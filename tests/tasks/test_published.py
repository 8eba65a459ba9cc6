"""The published sets: their layouts on small generated files, downloads, and what is broken."""

import gzip
import hashlib
import http.server
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from published import SMALL, etth1, idx

from patternsearch.data import fetch
from patternsearch.data.fetch import Published, Remote, download
from patternsearch.errors import TaskError
from patternsearch.task import IGNORE, as_tensors, checked, get_task, tasks


@pytest.fixture(autouse=True)
def folders(tmp_path, monkeypatch):
    """A data folder and a cache of the test's own."""
    (tmp_path / "data").mkdir()
    monkeypatch.setenv(fetch.FOLDER, str(tmp_path / "data"))
    monkeypatch.setenv(fetch.CACHE, str(tmp_path / "cache"))
    return tmp_path


@pytest.fixture
def small(folders, monkeypatch):
    """A task whose files are there, small."""

    def make(name):
        folder, write, counts = SMALL[name]
        (folders / "data" / folder).mkdir(exist_ok=True)
        write(folders / "data" / folder)
        task = get_task(name)
        for key, value in counts.items():
            monkeypatch.setattr(type(task), key, value)
        return task, folders / "data" / folder

    return make


def test_all_nine_are_here():
    assert set(SMALL) <= set(tasks())


@pytest.mark.parametrize("name", SMALL)
def test_layout(small, name, monkeypatch):
    task, _ = small(name)
    first = checked(task)
    monkeypatch.setattr(type(task), "_parse", None)  # the second time nothing is parsed
    again = checked(task)
    for split in ("train", "valid", "test"):
        for a, b in zip(getattr(first, split), getattr(again, split), strict=True):
            assert np.array_equal(a, b)
            assert any(isinstance(m, np.memmap) for m in bases(b)), "not memory-mapped"
    x, y = as_tensors(first.train, torch.device("cpu"))
    given, wanted = task.batch(x[:4], y[:4])
    assert given.dtype in (torch.float32, torch.int64) and len(given) == len(wanted) == 4


def bases(array):
    while array is not None:
        yield array
        array = getattr(array, "base", None)


def test_images_are_those_of_the_files(small):
    task, folder = small("cifar100")
    rows = np.frombuffer((folder / "test.bin").read_bytes(), np.uint8).reshape(100, -1)
    x, y = task.load().test
    assert y[7] == rows[7, 1] and x[7, 2, 3, 1] == rows[7, 2 + 1024 + 2 * 32 + 3]
    task, _ = small("tiny-imagenet")
    data = task.load()
    assert data.train[0].shape == (200, 64, 64, 3) and len(data.valid[0]) == 200
    assert np.array_equal(data.test[1], np.arange(10))
    assert abs(int(data.test[0][5, 0, 0, 0]) - 5) <= 2


def test_splits_and_windows_of_etth1(small):
    data = small("etth1")[0].load()
    assert [len(x) for x, _ in (data.train, data.valid, data.test)] == [8209, 2785, 2785]
    x, y = data.valid
    train = data.train[0].base
    assert np.allclose(x[0, 336 - 5 :, 0], x[5, 326:331, 0]) and np.array_equal(y[0, 1:], y[1, :-1])
    table = np.concatenate([data.train[0][0], data.train[1][0, :, :]])
    assert train is not None and np.allclose(data.train[0][96, -96:], table[336:])
    whole = np.concatenate([data.train[0][::336].reshape(-1, 7)])
    assert np.abs(whole.mean(0)).max() < 0.05 and np.abs(whole.std(0) - 1).max() < 0.05


def test_forecasts_are_scored_around_the_last_row():
    task = get_task("etth1")
    x, y = torch.randn(3, 336, 7), torch.randn(3, 96, 7)
    given, wanted = task.batch(x, y)
    guess = torch.randn(3, 96, 7)
    scores = {k: (a / b).item() for k, (a, b) in task.scores(guess, wanted).items()}
    plain = guess + x[:, -1:]
    assert scores["mse"] == pytest.approx((plain - y).square().mean().item(), rel=1e-5)
    assert scores["mae"] == pytest.approx((plain - y).abs().mean().item(), rel=1e-5)
    assert not given[:, -1].any()


def test_a_series_that_never_changes(small):
    data = small("electricity")[0].load()
    assert [len(x) for x, _ in (data.train, data.valid, data.test)] == [1249, 145, 385]
    assert not data.train[0][..., 5].any(), "constant columns are zero, not nan"


def test_every_word_is_predicted_once(small):
    task, folder = small("ptb")
    x, y = task.load().test
    tokens = (folder / "ptb.test.txt").read_text().replace("\n", " <eos> ").split()
    assert (y != IGNORE).sum() == len(tokens) - 1
    assert np.array_equal(x.ravel()[1 : len(tokens) - 1], y.ravel()[: len(tokens) - 2])
    uniform = torch.zeros(len(x), 64, 10_000)
    total, count = task.score(uniform, torch.from_numpy(np.array(y)))
    assert task.value((total / count).item()) == pytest.approx(10_000, rel=1e-3)


def test_words_of_news(small):
    task, folder = small("ag-news")
    data = task.load()
    lengths = (data.train[0] != 0).sum(1)
    assert lengths.max() == 7, "title 1 it s 36 1 news, nothing else"
    assert sorted(np.unique(data.test[1])) == [0, 1, 2, 3]
    train = folder / "train.csv"
    train.write_text(train.read_text().replace('"3","', '"5","', 1))
    with pytest.raises(TaskError, match=r"train.csv, row 3: expected a class 1 to 4 and text"):
        task.load()


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


def test_broken_files_are_told_in_one_line(small, folders):
    task, folder = small("mnist")
    images = folder / "train-images-idx3-ubyte.gz"
    whole = images.read_bytes()
    cut(images)
    with pytest.raises(TaskError, match=r"train-images.*: expected a whole gzip file, found"):
        task.load()
    images.write_bytes(idx(np.zeros((60, 28, 28)))[:-1])
    with pytest.raises(TaskError, match=r"expected 47,056 bytes for \[60, 28, 28\].* found 47,055"):
        task.load()
    images.write_bytes(b"<html>not found</html>")
    with pytest.raises(TaskError, match="expected an IDX file, found it starts with '3c68746d'"):
        task.load()
    images.write_bytes(gzip.compress(idx(np.zeros((59, 28, 28)))))
    with pytest.raises(TaskError, match="expected 60 examples, found 59"):
        task.load()
    images.write_bytes(whole)
    task.load()


@pytest.mark.parametrize(
    ("name", "file", "change", "message"),
    [
        ("cifar10", "data_batch_3.bin", lambda b: b[:-1], "expected 61,460 bytes .* found 61,459"),
        ("cifar100", "train.bin", lambda b: b[:1] + b"\xc8" + b[2:], "expected labels below 100"),
        ("tiny-imagenet", "wnids.txt", lambda b: b[10:], "expected 200 classes, found 199"),
        ("tiny-imagenet", "val/images/val_3.JPEG", lambda b: b[:50], "val_3.* expected an image"),
        ("etth1", "ETTh1.csv", lambda b: b[: len(b) // 2], r"line \d+: expected 7 numbers|rows"),
        ("etth1", "ETTh1.csv", lambda b: b.replace(b",30.", b",nan", 1), "expected 7 numbers"),
        ("ptb", "ptb.valid.txt", lambda b: b"\n".join(b.split(b"\n")[:5]), "expected 8 lines"),
        ("ptb", "ptb.train.txt", lambda b: b[:99] + b"\xe9" + b[99:], "line 2: expected UTF-8"),
    ],
)
def test_short_and_wrong_files(small, name, file, change, message):
    task, folder = small(name)
    (folder / file).write_bytes(change((folder / file).read_bytes()))
    with pytest.raises(TaskError, match=message) as e:
        task.load()
    assert str(folder / file) in str(e.value) and "\n" not in str(e.value)


def test_changed_files_are_parsed_again(small):
    task, folder = small("etth1")
    before = task.load().train[0][0].copy()
    etth1(folder)
    assert not np.array_equal(before, task.load().train[0][0])


def test_nothing_there_and_no_network(folders, monkeypatch):
    remote = Remote("http://127.0.0.1:9/set/words.txt", "0" * 64)
    published = Published("words", "words", ("words.txt",), (remote,))
    with pytest.raises(TaskError) as e:
        published.locate()
    text = str(e.value)
    assert remote.url in text and f"put it into {folders / 'data/words'}" in text
    monkeypatch.setenv(fetch.FOLDER, str(folders / "nowhere"))
    with pytest.raises(TaskError, match=r"no folder .*nowhere"):
        published.locate()


class Server(http.server.BaseHTTPRequestHandler):
    """Serves `body`, ranges too; the first answers break off after `limit` bytes."""

    body = b""
    limit = None
    asked: list = []  # noqa: RUF012

    def do_GET(self):
        start = int((self.headers.get("Range") or "bytes=0-")[6:-1])
        self.asked.append(start)
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(self.body) - start))
        self.end_headers()
        limit = type(self).limit
        type(self).limit = None
        self.wfile.write(self.body[start:limit])

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}/set.bin"
        running.shutdown()
        thread.join()


def test_an_interrupted_download_goes_on(folders, server):
    Server.body, Server.limit, Server.asked = bytes(range(256)) * 2000, 200_000, []
    remote = Remote(server, hashlib.sha256(Server.body).hexdigest())
    with pytest.raises(TaskError, match="cannot be had"):
        download("set", remote, folders)
    left = (folders / "set.bin.part").stat().st_size
    assert 0 < left <= 200_000
    assert download("set", remote, folders).read_bytes() == Server.body
    assert Server.asked == [0, left] and not list(folders.glob("*.part"))


def test_a_wrong_checksum_is_not_kept(folders, server):
    Server.body, Server.limit, Server.asked = b"something else", None, []
    with pytest.raises(TaskError, match=r"expected sha256 0000.*, found another"):
        download("set", Remote(server, "0" * 64), folders)
    assert not (folders / "set.bin").exists() and not list(folders.glob("*.part"))


def test_an_archive_is_unpacked(folders, server):
    import io
    import tarfile

    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        info = tarfile.TarInfo("inner/a.txt")
        info.size = 2
        tar.addfile(info, io.BytesIO(b"hi"))
    Server.body, Server.limit = packed.getvalue(), None
    remote = Remote(server, hashlib.sha256(Server.body).hexdigest(), "inner.tar.gz")
    (path,) = Published("inner", "inner", ("a.txt",), (remote,)).locate()
    assert path.read_text() == "hi"
    cut(folders / "data/inner.tar.gz")
    path.unlink()
    with pytest.raises(TaskError, match="expected a whole archive"):
        Published("inner", "inner", ("a.txt",), (remote,)).locate()
