"""Small files in the layouts of the published sets, and the tasks told how small they are."""

import gzip
from pathlib import Path

import numpy as np
from PIL import Image

RNG = np.random.RandomState(0)
WORDS = [f"w{i}" for i in range(30)]


def idx(array: np.ndarray) -> bytes:
    head = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes()
    return head + array.astype(np.uint8).tobytes()


def mnist(folder: Path, n: int = 60, test: int = 20) -> None:
    for part, count in (("train", n), ("t10k", test)):
        images = RNG.randint(256, size=(count, 28, 28))
        for kind, array in (("images-idx3", images), ("labels-idx1", np.arange(count) % 10)):
            path = folder / f"{part}-{kind}-ubyte.gz"
            path.write_bytes(gzip.compress(idx(array), mtime=0))


def records(path: Path, count: int, labels: int, classes: int) -> None:
    rows = RNG.randint(256, size=(count, labels + 3072)).astype(np.uint8)
    rows[:, :labels] = (np.arange(count) % classes)[:, None]
    path.write_bytes(rows.tobytes())


def cifar10(folder: Path) -> None:
    for i in range(1, 6):
        records(folder / f"data_batch_{i}.bin", 20, 1, 10)
    records(folder / "test_batch.bin", 20, 1, 10)


def cifar100(folder: Path) -> None:
    records(folder / "train.bin", 300, 2, 100)
    records(folder / "test.bin", 100, 2, 100)


def tiny_imagenet(folder: Path) -> None:
    names = [f"n{i:08}" for i in range(200)]
    (folder / "wnids.txt").write_text("\n".join(names) + "\n")
    (folder / "val/images").mkdir(parents=True)
    for i, name in enumerate(names):
        (folder / "train" / name / "images").mkdir(parents=True)
        for j in range(2):
            picture = Image.new("RGB" if j else "L", (64, 64), (i, j, 9) if j else i)
            picture.save(folder / "train" / name / "images" / f"{name}_{j}.JPEG")
    rows = []
    for i in range(10):
        Image.new("RGB", (64, 64), (i, 0, 0)).save(folder / f"val/images/val_{i}.JPEG")
        rows.append(f"val_{i}.JPEG\t{names[i]}\t0\t0\t62\t62")
    (folder / "val/val_annotations.txt").write_text("\n".join(rows) + "\n")


def etth1(folder: Path, rows: int = 14_500) -> None:
    table = RNG.standard_normal((rows, 7)).round(3) + np.arange(7) * 10
    lines = [f"2016-07-01 00:00:00,{','.join(map(str, row))}" for row in table]
    (folder / "ETTh1.csv").write_text("\n".join(["date,a,b,c,d,e,f,OT", *lines]) + "\n")


def electricity(folder: Path, rows: int = 2_400) -> None:
    table = RNG.randint(1000, size=(rows, 321))
    table[:, 5] = 7  # one client never changes
    text = "\n".join(",".join(map(str, row)) for row in table)
    (folder / "electricity.txt.gz").write_bytes(gzip.compress(text.encode(), 1, mtime=0))


def ag_news(folder: Path) -> None:
    for name, n in (("train", 80), ("test", 20)):
        rows = (f'"{i % 4 + 1}","Title, {i}","It\'s #36;{i} \\news"\n' for i in range(n))
        (folder / f"{name}.csv").write_text("".join(rows))


def sentences(path: Path, lines: int) -> None:
    rows = (" ".join(RNG.choice(WORDS, 20)) for _ in range(lines))
    path.write_text("".join(f" {row} <unk> \n" for row in rows))


def ptb(folder: Path) -> None:
    for name, n in (("train", 30), ("valid", 8), ("test", 8)):
        sentences(folder / f"ptb.{name}.txt", n)


def wikitext2(folder: Path) -> None:
    for name, n in (("train", 30), ("valid", 8), ("test", 8)):
        sentences(folder / f"wiki.{name}.tokens", n)


# task -> its layout's folder, what writes it, the counts of these small files
SMALL = {
    "mnist": ("mnist", mnist, {"counts": (60, 20), "held_out": 20}),
    "cifar10": ("cifar-10-batches-bin", cifar10, {"records": 20, "held_out": 20}),
    "cifar100": ("cifar-100-binary", cifar100, {"records": (300, 100), "held_out": 100}),
    "tiny-imagenet": ("tiny-imagenet-200", tiny_imagenet, {"counts": (2, 10), "held_out": 200}),
    "etth1": ("ETT-small", etth1, {"rows": 14_500}),
    "electricity": ("electricity", electricity, {"rows": 2_400}),
    "ag-news": ("ag_news_csv", ag_news, {"counts": (80, 20), "held_out": 20}),
    "ptb": ("ptb", ptb, {"lines": (30, 8, 8)}),
    "wikitext2": ("wikitext-2", wikitext2, {"lines": (30, 8, 8)}),
}
