"""Small files such as a user may have."""

from pathlib import Path

import numpy as np
from PIL import Image

RNG = np.random.RandomState(0)


def series(path="s.csv", rows=400, edit=lambda row, i: row):
    t = np.arange(rows)
    table = [[f"d{i}", f"{np.sin(i / 5):.4f}", f"{i % 7}", "5"] for i in t]
    lines = [",".join(edit(row, i)) for i, row in enumerate(table)]
    path = inside_path(path)
    path.write_text("\n".join(["day,a,b,c", *lines]) + "\n")
    return str(path)


def inside_path(name):
    return Path.cwd() / name


def texts(name="t.csv", rows=120, classes=("fox", "hen")):
    named = [classes[i % len(classes)] for i in range(rows)]
    lines = [f'"the quick {c} says number {i}, loudly",{c}' for i, c in enumerate(named)]
    inside_path(name).write_text("\n".join(["text,label", *lines]) + "\n")
    return str(inside_path(name))


def images(name="img", sizes=((20, 20),), classes=("a", "b"), n=40):
    for c in classes:
        folder = inside_path(name) / c
        folder.mkdir(parents=True)
        for i in range(n):
            pixels = RNG.randint(256, size=(*sizes[i % len(sizes)], 3)).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"{i}.png")
    return str(inside_path(name))
