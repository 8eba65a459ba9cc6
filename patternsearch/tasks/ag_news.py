"""AG News: titles and first lines of 127,600 news in four classes.

Source: X. Zhang, J. Zhao, Y. LeCun, Character-level convolutional networks for text classification,
2015.
"""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import ClassVar

import numpy as np

from ..data import text
from ..data.cache import parsed_data
from ..data.fetch import Published, Remote, check_count
from ..errors import TaskError
from ..sizes import Spec
from ..task import Array, Data, Task, stratified

URL = "https://raw.githubusercontent.com/mhjabreel/CharCnn_Keras/master/data/ag_news_csv/"
FILES = {
    "train.csv": "76a0a2d2f92b286371fe4d4044640910a04a803fdd2538e0f3f29a5c6f6b672e",
    "test.csv": "521465c2428ed7f02f8d6db6ffdd4b5447c1c701962353eb2c40d548c3c85699",
}


class AgNews(Task):
    """115,000 news to train, 5,000 of the same to validate, the field's 7,600 to test.

    The first 64 words of title and text, in a vocabulary of the 20,000 most frequent of training.
    """

    name = "ag-news"
    space = "texts"
    spec = Spec(grid=(64,), vocabulary=20_000, classes=4)
    published = Published(
        name, "ag_news_csv", tuple(FILES), tuple(Remote(URL + f, s) for f, s in FILES.items())
    )
    counts: ClassVar[tuple[int, int]] = (120_000, 7_600)
    held_out: ClassVar[int] = 5_000

    def load(self) -> Data:
        return parsed_data(self.name, self.published.locate(), self._parse)

    def _parse(self) -> Data:
        (texts, y), (texts_test, y_test) = (
            self._read(path, n)
            for path, n in zip(self.published.locate(), self.counts, strict=True)
        )
        train, valid, _ = stratified(y, self.held_out, 0)
        size, length = self.spec.vocabulary or 0, self.spec.grid[0]
        known = text.vocabulary(
            (word for i in train for word in texts[i]), size, (text.PAD, text.UNKNOWN)
        )
        x, x_test = (text.padded(t, known, length) for t in (texts, texts_test))
        return Data((x[train], y[train]), (x[valid], y[valid]), (x_test, y_test))

    def _read(self, path: Path, rows: int) -> tuple[list[list[str]], Array]:
        texts, labels = [], []
        for i, row in enumerate(csv.reader(io.StringIO(text.read_text(path), newline=""))):
            if len(row) < 2 or row[0] not in ("1", "2", "3", "4"):
                raise TaskError(
                    f"{path}, row {i + 1}: expected a class 1 to 4 and text, found {row}"
                )
            labels.append(int(row[0]) - 1)
            texts.append(text.words(" ".join(row[1:])))
        check_count(path, "rows", rows, len(labels))
        return texts, np.array(labels, np.int64)
