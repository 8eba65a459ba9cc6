"""Order 3 on a Kronecker product: softmax attention along each mode of the positions in turn.

(Ho et al. 2019, arXiv 1912.12180.) Along a mode every line of positions attends within itself, so
that the matrix is a product of one block matrix a mode. Where the logits of a line do not depend on
the other modes it is the Kronecker product of its modes' matrices; in general each line has its
own. The modes of a grid are its axes; `in_modes` and `out_modes` give others.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import ops
from ..assignment import Mixer
from ..mixer import MixerModule
from ..patterns.kronecker import Kronecker
from .attention import rotate


class AxialMixer(MixerModule):
    """output(A_n ... A_1 value(x)), every A_m made of the same queries and keys.

    A mode with fewer rows than positions drops rows, row i being position floor(i in / out). Rotary
    encoding turns queries and keys by their place along the mode.
    """

    @staticmethod
    def unfit(mixer: Mixer) -> str | None:
        if mixer.order != 3 or not isinstance(mixer.positions, Kronecker):
            return "is of order 3 on a kronecker pattern"
        if mixer.positions.bias:
            return "has entries computed from the input; use bias=false in 'positions'"
        if set(mixer.maps) - {"output"} != {"query", "key", "value"}:
            return "has maps 'query', 'key', 'value' and maybe 'output'"
        return None

    def forward(self, x: Tensor) -> Tensor:
        assert isinstance(self.mixer.positions, Kronecker)
        outs, inps = self.mixer.positions.factors(self.at.out, self.at.inp)
        q, k, y = (
            self.heads(self.maps[name](x)).unflatten(1, inps) for name in ("query", "key", "value")
        )
        for m in self.mixer.positions.order(len(outs)):
            rows = torch.arange(outs[m], device=x.device) * inps[m] // outs[m]
            if outs[m] != inps[m]:
                q = q.index_select(m + 1, rows)
            y = self.along(m + 1, q, k, y, rows)
            if outs[m] != inps[m]:
                k = k.index_select(m + 1, rows)
        return self.map("output", y.flatten(-2).flatten(1, -2).unflatten(1, self.at.out))

    def along(self, axis: int, q: Tensor, k: Tensor, v: Tensor, rows: Tensor) -> Tensor:
        """[B, *modes, heads, c], the mode `axis` of v mixed by attention along it."""
        q, k, v = (t.movedim(axis, -3) for t in (q, k, v))
        lines = q.shape[:-3]
        q, k, v = (t.flatten(0, -4) for t in (q, k, v))  # [B lines, n, heads, c]
        if self.mixer.encoding == "rotary":
            q, k = rotate(q, rows), rotate(k, torch.arange(k.shape[1], device=k.device))
        y: Tensor = self.attend(q, k, v).unflatten(0, lines).movedim(-3, axis)
        return y

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        square = q.shape[1] == k.shape[1]
        why = "" if square else "window_attention takes a row for every position"
        name = "window_attention" if square else ""
        operator, impl = ops.pick(name, why, str(self.mixer.positions), q)
        if operator is not None:
            return operator(q, k, v, impl=impl)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
