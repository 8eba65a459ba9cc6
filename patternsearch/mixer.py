"""The base of all mixers as modules, and which one an assignment means."""

from __future__ import annotations

import importlib
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor, nn

from .assignment import Mixer
from .errors import PatternError
from .layers import FeatureMap, PositionMap, Role
from .sizes import Sizes, map_sizes

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "relu": torch.relu,
    "gelu": nn.functional.gelu,
    "silu": nn.functional.silu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
}
_KINDS: list[type[MixerModule]] = []


def activation(name: str) -> Callable[[Tensor], Tensor]:
    return _ACTIVATIONS[name]


class MixerModule(nn.Module, ABC):
    """[B, *inp, d_in] -> [B, *out, d_out]. One subclass a kind of mixing."""

    sums: ClassVar[bool] = False  # whether it stands for a mixer with others added to it

    def __init_subclass__(cls) -> None:
        _KINDS.append(cls)

    def __init__(self, mixer: Mixer, at: Sizes, role: Role = "hidden") -> None:
        """`role` is for the parameters of a matrix along positions, which not every kind has."""
        super().__init__()
        self.mixer, self.at = mixer, at
        self.maps = nn.ModuleDict(
            {
                name: FeatureMap(pattern, *map_sizes(mixer, at, name), mixer.bias)
                for name, pattern in mixer.maps.items()
            }
        )

    @staticmethod
    @abstractmethod
    def unfit(mixer: Mixer) -> str | None:
        """Why this kind is not what `mixer` means, as 'is ...' or 'has ...'; None where it is."""

    @classmethod
    def misfit(cls, mixer: Mixer) -> str | None:
        """`unfit`, and whether there is a `plus` for a kind that takes one, or none for others."""
        if (mixer.plus is not None) != cls.sums:
            return "has another mixer as 'plus'" if cls.sums else "has no 'plus'"
        return cls.unfit(mixer)

    def map(self, name: str, x: Tensor) -> Tensor:
        """The map of that name, or x where there is none."""
        if name not in self.maps:
            return x
        y: Tensor = self.maps[name](x)
        return y

    def feature_map(self, name: str) -> FeatureMap:
        found = self.maps[name]
        assert isinstance(found, FeatureMap)
        return found

    def position_map(self, role: Role) -> PositionMap:
        d_in = self.at.d_out if "value" in self.maps else self.at.d_in
        return PositionMap(
            self.mixer.positions,
            self.at.out,
            self.at.inp,
            d_in,
            self.at.d_out,
            self.mixer.heads,
            self.mixer.bias,
            role if "value" not in self.maps else "hidden",
        )

    def heads(self, x: Tensor) -> Tensor:
        """[B, *positions, d] -> [B, n, heads, d / heads]."""
        split: Tensor = x.flatten(1, len(self.at.inp)).unflatten(-1, (self.mixer.heads, -1))
        return split

    def rows(self, x: Tensor) -> Tensor:
        """Of [B, *inp, d] the positions floor(i in / out) that the output rows stand on."""
        for axis, (o, n) in enumerate(zip(self.at.out, self.at.inp, strict=True)):
            if o != n:
                x = x.index_select(axis + 1, torch.arange(o, device=x.device) * n // o)
        return x


def build_mixer(mixer: Mixer, at: Sizes, role: Role = "hidden", name: str = "mixer") -> MixerModule:
    """The module a mixer means. PatternError names what each kind would need."""
    reasons = []
    for kind in mixer_kinds():
        if (reason := kind.misfit(mixer)) is None:
            return kind(mixer, at, role)
        reasons.append(f"{kind.__name__} {reason}")
    raise PatternError(f"{name}: no kind of mixer fits: {'; '.join(reasons)}")


def mixer_kinds() -> list[type[MixerModule]]:
    """Every kind of mixer, for every module in patternsearch/mixers/."""
    from . import mixers

    for module in pkgutil.iter_modules(mixers.__path__):
        importlib.import_module(f"{mixers.__name__}.{module.name}")
    return sorted(_KINDS, key=lambda kind: kind.__name__)
