"""A user's own images: folders, depths, splits, IDX files, and what is refused."""

import numpy as np
import pytest
import torch
from own_files import RNG, images, inside_path, series
from PIL import Image
from published import idx

from patternsearch.errors import TaskError
from patternsearch.task import checked, get_task
from patternsearch.train import TrainSettings


@pytest.fixture(autouse=True)
def inside(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_folder_of_images():
    task = get_task(images())
    data = checked(task)
    assert task.spec.grid == (20, 20) and task.spec.channels == 3 and task.space == "images"
    assert data.train[0].dtype == np.uint8 and len(data.train[0]) == 48
    TrainSettings(shift=2, flip=True).check(task)  # whoever asks knows the labels
    x, _ = task.batch(*map(torch.as_tensor, data.train))
    assert x.mean((0, 1, 2)).abs().max() < 1e-4 and (x.std((0, 1, 2)) - 1).abs().max() < 1e-2
    scaled = get_task(images("several", sizes=((20, 20), (30, 10))))
    assert scaled.spec.grid == (32, 32) and "scaled to 32x32 from 2 sizes" in scaled.note
    for part in ("train", "test"):
        images(f"split/{part}", n=30)
    assert [len(x) for x, _ in vars(get_task(str(inside_path("split"))).load()).values()] == [
        48,
        12,
        60,
    ]


def test_image_folders_that_are_refused():
    inside_path("img").mkdir()
    series("img/a.csv")
    with pytest.raises(TaskError, match=r"none with images in it; for a\.csv give its own path"):
        get_task(str(inside_path("img")))
    with pytest.raises(TaskError, match="each of two classes or more, found only 'a'"):
        get_task(images("one", classes=("a",)))
    with pytest.raises(TaskError, match="blank: every pixel to train on is 9; nothing tells"):
        get_task(pictures("blank", lambda i: Image.new("L", (9, 9), 9)))
    with pytest.raises(TaskError, match="2 images to train; 50 are the least"):
        get_task(images("few", n=1))
    path = images("broken")
    (inside_path("broken") / "a" / "3.png").write_bytes(b"\x89PNG nothing")
    with pytest.raises(TaskError, match=r"3.png: expected an image, found"):
        get_task(path)
    inside_path("bare").mkdir()
    with pytest.raises(TaskError, match="found none with images in it"):
        get_task(str(inside_path("bare")))


def pictures(name, make, n=30, classes=("a", "b"), suffix="png"):
    """`make(i)` as the images of every class; the folder."""
    for c in classes:
        folder = inside_path(name) / c
        folder.mkdir(parents=True, exist_ok=True)
        for i in range(n):
            make(i).save(folder / f"{i}.{suffix}")
    return str(inside_path(name))


@pytest.mark.parametrize(
    ("suffix", "dtype", "low", "high", "said"),
    [
        ("png", np.uint16, 100, 4095, "of I;16 images 100..4095 became 0..255"),
        ("tif", np.float32, 0.25, 1, "of F images 0.25..1 became 0..255"),
        ("tif", np.int32, -70_000, 70_000, "of I images -70000..70000 became 0..255"),
    ],
)
def test_images_of_more_than_8_bits_keep_what_is_in_them(suffix, dtype, low, high, said):
    ramp = np.linspace(low, high, 144).reshape(12, 12).astype(dtype)
    folder = pictures("deep", lambda i: Image.fromarray(np.roll(ramp, i)), suffix=suffix)
    task = get_task(folder)
    x = checked(task).train[0]
    assert task.spec.channels == 1 and said in task.note
    assert np.abs(np.sort(x[0].ravel()) - np.linspace(0, 255, 144)).max() <= 1
    Image.fromarray(ramp.astype(np.uint8)).save("deep/a/eight.png")
    with pytest.raises(TaskError, match=r"modes .* have no common scale; save all of them in 8"):
        get_task(folder)


def test_what_is_transparent_becomes_white():
    def icon(i):
        drawn = np.zeros((12, 12, 4), np.uint8)  # black, told from the ground by alpha alone
        drawn[i % 12, :, 3] = 255
        return Image.fromarray(drawn)

    task = get_task(pictures("icons", icon))
    x = checked(task).train[0]
    assert (x.reshape(len(x), -1).mean(axis=1) == 255 * 11 / 12).all()
    assert "images with transparency, laid on white: 60" in task.note


def folders(*paths, n=30):
    for path in paths:
        where = inside_path(path)
        pictures(where.parent, lambda i: Image.new("L", (9, 9), i), n, classes=(where.name,))
    return str(inside_path(paths[0].split("/")[0]))


def test_splits_beside_the_classes():
    folder = folders("f/cat", "f/dog", "f/Test/cat", "f/Test/dog", "f/.ipynb_checkpoints")
    pictures("f/cat", lambda i: Image.new("L", (9, 9)), 3, classes=(".hidden",))
    inside_path("f/dog/notes.txt").write_text("of a dog")
    inside_path("f/empty").mkdir()
    task = get_task(folder)
    data = task.load()
    assert task.spec.classes == 2
    assert [len(x) for x, _ in (data.train, data.valid, data.test)] == [48, 12, 60]
    assert "files left out, such as dog/notes.txt: 1; folders left out: 'empty'" in task.note


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        (("f/train/a", "f/train/b", "f/val/a", "f/val/B"), r"val: class 'B' has no im.* mean 'b'"),
        (("f/a", "f/b", "f/test"), "f/test: read as a split by its name; .* rename it where it is"),
        (("f/a", "f/b", "f/val/a", "f/valid/a"), "f: one split in val and valid; join them"),
        (("f/train/a", "f/train/b", "f/train/c", "f/val/d"), r"class 'd' has no images in "),
    ],
)
def test_splits_that_are_refused(paths, message):
    folder = folders(*paths)
    with pytest.raises(TaskError, match=message):
        get_task(folder)


def test_idx_files():
    folder = inside_path("idx")
    folder.mkdir()
    for part, n in (("train", 60), ("t10k", 20)):
        (folder / f"{part}-images-idx3-ubyte").write_bytes(idx(RNG.randint(256, size=(n, 9, 9))))
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(idx(np.arange(n) % 3))
    task = get_task(str(folder))
    data = checked(task)
    assert [len(x) for x, _ in (data.train, data.valid, data.test)] == [48, 12, 20]
    assert task.spec.grid == (9, 9) and task.spec.classes == 3 and task.space == "vision"
    (folder / "train-labels-idx1-ubyte").write_bytes(idx(np.arange(59) % 3))
    (inside_path("idx2")).mkdir()
    for path in folder.iterdir():
        path.rename(inside_path("idx2") / path.name)
    with pytest.raises(TaskError, match="expected 60 labels, found 59"):
        get_task(str(inside_path("idx2")))
