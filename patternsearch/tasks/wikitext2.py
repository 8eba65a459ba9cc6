"""WikiText-2: two million words of good Wikipedia articles, 33,278 of them told apart.

Source: S. Merity, C. Xiong, J. Bradbury, R. Socher, Pointer sentinel mixture models, 2016. The
publisher's archive is gone; the address is that of PyTorch's examples, with the same texts.
"""

from __future__ import annotations

from typing import ClassVar

from ..data.fetch import Published, Remote
from ..data.words import Words
from ..sizes import Spec

URL = "https://raw.githubusercontent.com/pytorch/examples/main/word_language_model/data/wikitext-2/"
SHA256 = {
    "train": "9e9fa1ad55b1c2c95b08e37dd8e653f638fac2c6de904b79e813611eefbc985f",
    "valid": "f0737ed31fc1329026e95cb8b98e19c2a182c39c240ab909dc31abf2f8af58e8",
    "test": "d790b833ef8cf03a90db7bf1271b7520b83c45ce07ba3c1a9699df81e239eca0",
}
REMOTES = tuple(Remote(f"{URL}{s}.txt", h, f"wiki.{s}.tokens") for s, h in SHA256.items())


class Wikitext2(Words):
    """The next word, in windows of 64: 2,088,628 words to train, 217,646 and 245,569 held out."""

    name = "wikitext2"
    spec = Spec(grid=(64,), vocabulary=33_278, classes=33_278, per_position=True, causal=True)
    published = Published(name, "wikitext-2", tuple(r.file for r in REMOTES), REMOTES)
    lines: ClassVar[tuple[int, int, int]] = (36_718, 3_760, 4_358)
