"""Order 2, gated: y = g(x) * (A x) (Poli et al. 2023, arXiv 2302.10866; Dauphin et al. 2017)."""

from __future__ import annotations

from torch import Tensor

from ..assignment import Mixer
from ..layers import Role
from ..mixer import MixerModule, activation
from ..sizes import Sizes


class GatedMixer(MixerModule):
    """output(g(gate(x)) * A value(x)): the input decides how much of each channel passes."""

    def __init__(self, mixer: Mixer, at: Sizes, role: Role = "hidden") -> None:
        super().__init__(mixer, at)
        self.matrix = self.position_map(role)

    @staticmethod
    def unfit(mixer: Mixer) -> str | None:
        if mixer.order != 2 or "gate" not in mixer.maps or "decay" in mixer.maps:
            return "is of order 2 with a map 'gate' and none 'decay'"
        if extra := set(mixer.maps) - {"value", "gate", "output"}:
            return f"has maps 'gate', 'value' and 'output', not {sorted(extra)[0]!r}"
        return None

    def forward(self, x: Tensor) -> Tensor:
        gate = activation(self.mixer.gate)(self.map("gate", self.rows(x)))
        return self.map("output", gate * self.matrix(self.map("value", x)))
