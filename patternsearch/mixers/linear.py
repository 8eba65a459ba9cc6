"""Order 1: fixed weights, y = A x. Convolutions, MLP-Mixer, time-invariant recurrences."""

from __future__ import annotations

from torch import Tensor

from ..assignment import Mixer
from ..layers import Role
from ..mixer import MixerModule
from ..sizes import Sizes


class LinearMixer(MixerModule):
    """output(A value(x)), with the maps that are given."""

    def __init__(self, mixer: Mixer, at: Sizes, role: Role = "hidden") -> None:
        super().__init__(mixer, at)
        self.matrix = self.position_map(role)

    @staticmethod
    def unfit(mixer: Mixer) -> str | None:
        if mixer.order != 1:
            return f"is of order 1, not {mixer.order}"
        if extra := set(mixer.maps) - {"value", "output"}:
            return f"has maps 'value' and 'output', not {sorted(extra)[0]!r}"
        return None

    def forward(self, x: Tensor) -> Tensor:
        return self.map("output", self.matrix(self.map("value", x)))
