"""A sum of mixers of any order: convolution + attention (Chen et al. 2021, arXiv 2106.02253)."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor, nn

from ..assignment import Mixer
from ..codec import FrozenDict
from ..layers import Role
from ..mixer import MixerModule, build_mixer
from ..sizes import Sizes


class SumMixer(MixerModule):
    """The mixer's own result, and that of `plus`, and of its `plus`: causal where all parts are.

    Its matrix is the sum of their matrices, A + B(x) for a convolution and an attention.
    """

    sums = True

    def __init__(self, mixer: Mixer, at: Sizes, role: Role = "hidden") -> None:
        super().__init__(replace(mixer, maps=FrozenDict()), at)
        self.mixer = mixer
        self.parts = nn.ModuleList(build_mixer(part, at, role) for part in mixer.parts())

    @staticmethod
    def unfit(mixer: Mixer) -> str | None:
        return None

    def forward(self, x: Tensor) -> Tensor:
        first, *rest = self.parts
        y: Tensor = first(x)
        for part in rest:
            y = y + part(x)
        return y
