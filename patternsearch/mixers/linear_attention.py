"""Order 3 in linear time: entries are plain products of features, and no softmax.

(Katharopoulos et al. 2020, arXiv 2006.16236.) On a semiseparable pattern it is causal: a
semiseparable matrix of state size N has the entries c_i (a_{j+1} ... a_i) b_j with N numbers c_i
and b_j, and here they are the queries and the keys (Dao and Gu 2024, arXiv 2405.21060, section 4).
On a low_rank pattern it sees both sides, and `rank` is the number of features.
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
from ..patterns.circulant import full_precision
from ..patterns.low_rank import LowRank
from ..patterns.semiseparable import Semiseparable, standing
from ..sizes import Sizes


def positive(x: Tensor) -> Tensor:
    """elu(x) + 1, without rounding where x is far below zero."""
    return x.clamp(max=0).exp() + x.relu()


def with_sums(v: Tensor) -> Tensor:
    """One more channel of ones, which a product turns into the sum of the weights."""
    return torch.cat([v, torch.ones_like(v[..., :1])], -1)


def averaged(y: Tensor) -> Tensor:
    """Rows over the sums in their last channel; rows whose weights all vanished stay zero."""
    return y[..., :-1] / y[..., -1:].clamp_min(torch.finfo(y.dtype).eps ** 2)


class LowRankAttentionMixer(MixerModule):
    """y_i = sum_j p(q_i) . p(k_j) v_j / sum_j p(q_i) . p(k_j) with p(x) = elu(x) + 1, all j.

    q and k have `rank` numbers a head, so that a head's matrix has that rank.
    """

    @staticmethod
    def unfit(mixer: Mixer) -> str | None:
        if mixer.order != 3 or not isinstance(mixer.positions, LowRank):
            return "is of order 3 on a low_rank pattern"
        if mixer.encoding != "none":
            return "has positive features, which cannot be turned; use encoding='none'"
        if set(mixer.maps) - {"output"} != {"query", "key", "value"}:
            return "has maps 'query', 'key', 'value' and maybe 'output'"
        return None

    def forward(self, x: Tensor) -> Tensor:
        q = positive(self.heads(self.maps["query"](self.rows(x)))).transpose(1, 2)
        k = positive(self.heads(self.maps["key"](x))).transpose(1, 2)
        v = with_sums(self.heads(self.maps["value"](x))).transpose(1, 2)
        scale = 1 / math.prod(self.at.inp)  # keeps sums over long inputs in range
        y = averaged(q @ (k.mT @ (v * scale)))
        return self.map("output", y.transpose(1, 2).flatten(2).unflatten(1, self.at.out))


class LinearAttentionMixer(MixerModule):
    """y_i = sum_{j <= i} f_i . (a_{j+1} ... a_i g_j) v_j, f and g of the queries and keys.

    normalise: f = p(q), g = p(k) with p(x) = elu(x) + 1, and each row is divided by its sum. Else
    f = q / sqrt(state), g = k: a polynomial of third order in x. q and k have `state` numbers a
    head. A map 'decay' gives each of them a decay a = sigmoid(decay(x)) (Yang et al. 2023, arXiv
    2312.06635); without it a = 1. two_sided adds the positions after i, with the product of the
    decays from i to j - 1.
    """

    def __init__(self, mixer: Mixer, at: Sizes, role: Role = "hidden") -> None:
        super().__init__(mixer, at)
        bias = self.feature_map("decay").bias if "decay" in mixer.maps else None
        if bias is not None:  # memories of all lengths, from 2 positions to all of them
            longest = max(math.prod(at.inp), 3)
            forget = 0.5 * torch.exp(-torch.rand(bias.shape) * math.log(longest / 2))
            bias.data.copy_(torch.logit(1 - forget))

    @staticmethod
    def unfit(mixer: Mixer) -> str | None:
        if mixer.order != 3 or not isinstance(mixer.positions, Semiseparable):
            return "is of order 3 on a semiseparable pattern"
        if mixer.positions.entry is not None or mixer.positions.order > 1:
            return "computes numbers as entries, from one state back: no 'entry', order=1"
        if mixer.encoding != "none":
            return "has an order of positions already; use encoding='none'"
        if set(mixer.maps) - {"output", "decay"} != {"query", "key", "value"}:
            return "has maps 'query', 'key', 'value' and maybe 'decay' and 'output'"
        return None

    def forward(self, x: Tensor) -> Tensor:
        assert isinstance(self.mixer.positions, Semiseparable)
        flat = x.flatten(1, len(self.at.inp))[:, None]  # a grid is read row by row
        index = standing(self.at.out, self.at.inp, x.device)
        q = self.numbers("query", flat[:, :, index])
        k, v = self.numbers("key", flat), self.numbers("value", flat)
        decay = F.logsigmoid(self.numbers("decay", flat)) if "decay" in self.maps else None
        scale = self.mixer.positions.state**-0.5
        if self.mixer.positions.normalise:
            q, k, v, scale = positive(q), positive(k), with_sums(v), 1.0
        if self.at.out != self.at.inp:  # the rows' queries where they stand, and none elsewhere
            q = q.new_zeros(k.shape).index_copy(1, index, q)
        y = self.past(q, k, v, decay, scale)
        if self.mixer.positions.two_sided:
            back = None if decay is None else decay.flip(1)
            y = y + self.past(q.flip(1), k.flip(1), v.flip(1), back, scale).flip(1)
            y = y - scale * (q * k).sum(-1, keepdim=True) * v
        y = y[:, index] if self.at.out != self.at.inp else y
        y = averaged(y) if self.mixer.positions.normalise else y
        return self.map("output", y.flatten(2).unflatten(1, self.at.out))

    def numbers(self, name: str, flat: Tensor) -> Tensor:
        """[B, 1, n, d] through a map -> [B, n, heads, numbers a head]."""
        split: Tensor = self.maps[name](flat)[:, 0].unflatten(-1, (self.mixer.heads, -1))
        return split

    def past(self, q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, scale: float) -> Tensor:
        """Every position and those before it: [B, n, heads, c]."""
        what = str(self.mixer.positions)
        operator, impl = ops.pick("linear_attention", "", what, q)
        if operator is not None:
            low, q = ops.lowered({"k": k, "v": v}, q)
            return operator(q, low["k"], low["v"], decay=decay, scale=scale, impl=impl)
        return states(q, k, v, decay) * scale


def states(q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None) -> Tensor:
    """The recurrence of linear attention, position after position, in float32 at least."""
    kind, (q, k, v) = v.dtype, map(full_precision, (q, k, v))
    decay = None if decay is None else full_precision(decay).exp()
    rows, state = [], q.new_zeros(*q.shape[:1], *q.shape[2:], v.shape[-1])
    for t in range(q.shape[1]):
        new = k[:, t, :, :, None] * v[:, t, :, None, :]
        state = new + (state if decay is None else decay[:, t, :, :, None] * state)
        rows.append((q[:, t, :, :, None] * state).sum(-2))  # no product that autocast would lower
    return torch.stack(rows, 1).to(kind)
