"""Order 4: attention to pairs of positions whose logits are a sum of two.

The softmax over pairs (s, r) of q . k_s + q . k2_r is the product of two softmaxes, so that with
values v_s * v2_r the whole is two attentions and a product: exact, in the time of order 3. (Roy et
al. 2025, arXiv 2507.02754, has the trilinear logits of which these are the part of rank one.)
"""

from __future__ import annotations

from torch import Tensor

from ..assignment import Mixer
from ..patterns.banded import Banded
from ..patterns.dense import Dense
from .attention import AttentionMixer


class TwoKeyMixer(AttentionMixer):
    """output((A(q, key) value) * (A(q, key2) value2)), both A on the support of `positions`."""

    @staticmethod
    def unfit(mixer: Mixer) -> str | None:
        if mixer.order != 4 or not isinstance(mixer.positions, Banded | Dense):
            return "is of order 4 on a banded or dense pattern"
        if mixer.positions.entry is not None:
            return "computes numbers as entries; remove 'entry'"
        if set(mixer.maps) - {"output"} != {"query", "key", "value", "key2", "value2"}:
            return "has maps 'query', 'key', 'value', 'key2', 'value2' and maybe 'output'"
        return None

    def forward(self, x: Tensor) -> Tensor:
        q = self.queries(x)
        first, second = (
            self.attend(q, self.keys(x, key), self.heads(self.maps[value](x)))
            for key, value in (("key", "value"), ("key2", "value2"))
        )
        return self.map("output", (first * second).flatten(2).unflatten(1, self.at.out))
