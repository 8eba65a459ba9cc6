"""Order 3: attention, y = A(x) x with A a softmax of products of x on the pattern's support.

(Vaswani et al. 2017, arXiv 1706.03762; a band as support: Beltagy et al. 2020, arXiv 2004.05150.)
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import ops
from ..assignment import Mixer
from ..layers import Role
from ..mixer import MixerModule
from ..patterns.banded import Banded
from ..patterns.dense import Dense
from ..sizes import Sizes


class AttentionMixer(MixerModule):
    """Softmax attention in `heads` heads; entries outside of the support are no candidates."""

    def __init__(self, mixer: Mixer, at: Sizes, role: Role = "hidden") -> None:
        super().__init__(mixer, at)
        self.support: Tensor | None
        self.register_buffer("support", self._support(), persistent=False)

    @staticmethod
    def unfit(mixer: Mixer) -> str | None:
        if mixer.order != 3 or not isinstance(mixer.positions, Banded | Dense):
            return "is of order 3 on a banded or dense pattern"
        if mixer.positions.entry is not None:
            return "computes numbers as entries; remove 'entry'"
        if set(mixer.maps) - {"output"} != {"query", "key", "value"}:
            return "has maps 'query', 'key', 'value' and maybe 'output'"
        return None

    def _support(self) -> Tensor | None:
        """[rows, positions], true where an entry may be non-zero; None for all."""
        pattern, (out, inp) = self.mixer.positions, (self.at.out, self.at.inp)
        if isinstance(pattern, Dense):
            return None
        cores = {n: torch.ones(c.shape) for n, c in pattern.cores(out, inp).items()}
        support = pattern.to_dense(cores, out, inp) != 0
        return None if bool(support.all()) else support

    def forward(self, x: Tensor) -> Tensor:
        y = self.attend(self.queries(x), self.keys(x, "key"), self.heads(self.maps["value"](x)))
        return self.map("output", y.flatten(2).unflatten(1, self.at.out))

    def queries(self, x: Tensor) -> Tensor:
        q = self.heads(self.maps["query"](self.rows(x)))
        return rotate(q, self.centres(q)) if self.mixer.encoding == "rotary" else q

    def keys(self, x: Tensor, name: str) -> Tensor:
        k = self.heads(self.maps[name](x))
        if self.mixer.encoding == "none":
            return k
        return rotate(k, torch.arange(k.shape[1], device=k.device))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """[B, rows, heads, c] from queries of the rows and keys, values of all positions."""
        name, why = self.operator()
        operator, impl = ops.pick(name, why, str(self.mixer.positions), q)
        if operator is not None:
            return operator(q, k, v, **self.window(), impl=impl)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=self.support).transpose(1, 2)

    def operator(self) -> tuple[str, str]:
        if self.at.out != self.at.inp or (len(self.at.inp) > 1 and self.support is not None):
            return "", "window_attention takes a band on one axis, with a row for every position"
        if self.support is not None and getattr(self.mixer.positions, "tie", "") == "circulant":
            return "", "window_attention ends where its input ends; a circulant band goes around"
        return "window_attention", ""

    def window(self) -> dict[str, int | None]:
        """The support as window_attention takes it; None reaches every position."""
        pattern = self.mixer.positions
        if not isinstance(pattern, Banded) or self.support is None:
            return {}
        (lower,), (upper,), (dilation,) = pattern.window(self.at.inp)
        reach = self.at.inp[0] - 1 if dilation == 1 else -1
        return {
            "lower": None if lower == reach else lower,
            "upper": None if upper == reach else upper,
            "dilation": dilation,
        }

    def centres(self, q: Tensor) -> Tensor:
        """Positions of the rows, counted row by row."""
        n = math.prod(self.at.inp)
        grid = torch.arange(n, device=q.device).reshape(1, *self.at.inp, 1)
        return self.rows(grid).flatten()


def rotate(x: Tensor, positions: Tensor) -> Tensor:
    """Rotary encoding (Su et al. 2021, arXiv 2104.09864): x [B, n, h, d] turned by its position."""
    half = x.shape[-1] // 2
    kind = torch.promote_types(x.dtype, torch.float32)
    speed = 10_000.0 ** (-torch.arange(half, device=x.device, dtype=kind) / max(half, 1))
    angle = positions[:, None, None] * speed
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat([a * cos - b * sin, a * sin + b * cos, rest], -1)
