"""What a user would train instead: models of torch's own layers, sized to the same caps."""

from __future__ import annotations

import importlib
import math
import pkgutil
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from .errors import ConfigError, unknown
from .pattern import Cost, Dims
from .sizes import Spec

KEY = "native"  # tells such a design, as data, from an assignment


class NativeModel(nn.Module):
    """Inputs and outputs as those of `model.Model`; a subclass in baselines/ is listed by name.

    design: width and depth, dropout, and stride of the first layer where the kind has one. `rates`
    is the range in which the learning rate is searched; `widths` the step in which widths grow,
    0 where there is nothing to size.
    """

    name: ClassVar[str]
    depths: ClassVar[tuple[int, ...]] = (1, 2)
    strides: ClassVar[tuple[int, ...]] = (1,)
    dropouts: ClassVar[tuple[float, ...]] = (0.0, 0.1, 0.3)
    learning_rates: ClassVar[tuple[float, float]] = (1e-3, 1e-2)
    widths: ClassVar[int] = 8

    @classmethod
    def searched(cls, spec: Spec) -> tuple[float, float]:
        """The range of the learning rate for such data."""
        return cls.learning_rates

    @classmethod
    @abstractmethod
    def suits(cls, spec: Spec) -> bool:
        """Whether it is what one would train for such data."""

    @abstractmethod
    def __init__(self, design: Native, spec: Spec) -> None:
        super().__init__()

    def flops(self, x: Tensor) -> int:
        """FLOPs of one example, a product and a sum as two, as torch counts them."""
        counter = FlopCounterMode(display=False)
        with counter, torch.no_grad():
            self(x)
        return int(counter.get_total_flops())

    def last(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
        """(h, weight, bias) whose h weight' + bias are the logits; None where not told apart."""
        return None

    def rates(self) -> dict[str, float]:
        """Parameter name -> learning rate over the base rate: one for all."""
        return dict.fromkeys((name for name, _ in self.named_parameters()), 1.0)

    def decayed(self) -> set[str]:
        """Names of the parameters that weight decay is for: matrices that are no tables."""
        tables = {id(m.weight) for m in self.modules() if isinstance(m, nn.Embedding)}
        return {n for n, p in self.named_parameters() if p.dim() > 1 and id(p) not in tables}


@dataclass(frozen=True, kw_only=True)
class Native:
    """A native baseline with its settings: what a trial of it is."""

    native: str
    width: int = 8
    depth: int = 1
    dropout: float = 0.0
    stride: int = 1

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def build(self, spec: Spec, seed: int = 0) -> NativeModel:
        """A freshly initialised model; the same seed gives the same parameters."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return kind(self.native)(self, spec)

    def cost(self, spec: Spec) -> Cost:
        """Parameters, and FLOPs of one example."""
        return _cost(self, spec)

    def short(self) -> str:
        parts = [f"{self.native} w{self.width} depth {self.depth}"]
        parts += [f"stride {self.stride}"] if self.stride > 1 else []
        parts += [f"dropout {self.dropout:g}"] if self.dropout else []
        return " ".join(parts)


@lru_cache(maxsize=4096)
def _cost(design: Native, spec: Spec) -> Cost:
    with torch.device("meta"):
        model = kind(design.native)(design, spec).eval()
        tokens = spec.vocabulary is not None
        shape = (1, *spec.grid) if spec.channels is None else (1, *spec.grid, spec.channels)
        x = torch.zeros(shape, dtype=torch.int64 if tokens else torch.float32)
        flops = model.flops(x)
    parameters = sum(p.numel() for p in model.parameters())
    return Cost(parameters=parameters, flops=flops, bytes=4 * parameters)


def sized(design: Native, spec: Spec, caps: Mapping[str, float]) -> Native | None:
    """The design at the largest width that is within the caps, or None where none is."""

    def fits(width: int) -> bool:
        cost = replace(design, width=width).cost(spec)
        return all(getattr(cost, name) <= cap for name, cap in caps.items())

    step = kind(design.native).widths
    if not fits(step or 1):
        return None
    if not step:
        return replace(design, width=1)
    low = 1
    while fits(2 * low * step) and 2 * low * step <= 4096:
        low *= 2
    high = 2 * low
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle * step) else (low, middle)
    return replace(design, width=low * step)


def settings(name: str, spec: Spec, caps: Mapping[str, float]) -> Iterator[tuple[Native, float]]:
    """Designs of a kind with learning rates, evenly over its settings, without an end.

    The sequence of Halton: every start of it covers the ranges about evenly. Nothing comes where
    the kind does not fit the caps.
    """
    model, number = kind(name), 0
    low, high = model.searched(spec)
    while True:
        number += 1
        at = [_radical(number, base) for base in (2, 3, 5, 7)]
        chosen = [
            options[int(share * len(options))]
            for options, share in zip(
                (model.depths, model.dropouts, model.strides), at[1:], strict=True
            )
        ]
        depth, dropout, stride = chosen
        design = Native(native=name, depth=int(depth), dropout=dropout, stride=int(stride))
        if (fitting := sized(design, spec, caps)) is not None:
            yield fitting, low * (high / low) ** at[0]
        elif number >= 30:
            return


def _radical(number: int, base: int) -> float:
    """The digits of a number, mirrored at the point."""
    value, share = 0.0, 1.0
    while number:
        share /= base
        number, digit = divmod(number, base)
        value += share * digit
    return value


@lru_cache(maxsize=1)
def kinds() -> dict[str, type[NativeModel]]:
    """Name -> class, for every module in patternsearch/baselines/."""
    from . import baselines as package

    found: dict[str, type[NativeModel]] = {}
    for module in pkgutil.iter_modules(package.__path__):
        loaded = importlib.import_module(f"{package.__name__}.{module.name}")
        for value in vars(loaded).values():
            if isinstance(value, type) and issubclass(value, NativeModel) and "name" in vars(value):
                found[value.name] = value
    return dict(sorted(found.items()))


def kind(name: str) -> type[NativeModel]:
    if (found := kinds().get(name)) is None:
        raise ConfigError(unknown("native baseline", name, kinds()))
    return found


def suited(spec: Spec) -> list[str]:
    """Names of the baselines for data of such sizes."""
    return [name for name, model in kinds().items() if model.suits(spec)]


def embedding(spec: Spec, width: int) -> nn.Embedding | None:
    """A table of words, None where there are none.

    Of a deviation of 0.1, as small as Zaremba et al. 2014 have it: with torch's own of 1 most words
    of a short budget stay the noise they began as.
    """
    if spec.vocabulary is None:
        return None
    table = nn.Embedding(spec.vocabulary, width)
    nn.init.normal_(table.weight, std=0.1)
    return table


def positions(grid: Dims, width: int) -> nn.Parameter:
    """Learned positions [prod(grid), width]: at first sines and cosines along every axis.

    Vaswani et al. 2017 (arXiv 1706.03762), on grids Beyer et al. 2022 (arXiv 2205.01580). Noise of
    0.02 in their place takes most of a short budget to become visible beside the content.
    """
    share = width // (2 * len(grid))
    rates = 1e4 ** (-torch.arange(share) / share)
    axes = torch.meshgrid(*(torch.arange(float(n)) for n in grid), indexing="ij")
    angles = [axis.flatten()[:, None] * rates for axis in axes]
    return nn.Parameter(torch.cat([wave(a) for a in angles for wave in (torch.sin, torch.cos)], -1))


def classifier(width: int, spec: Spec) -> nn.Linear:
    """To the classes, zero at first, so that training starts from equal shares."""
    head = nn.Linear(width, spec.classes * math.prod(spec.rows if spec.horizon else ()))
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    return head
