"""Order 2, recurrent: the decays of a semiseparable matrix are computed from the input.

With a map 'decay': h_t = a_t * h_{t-1} + sqrt(1 - a_t^2) v_t with a_t = sigmoid(decay(x_t)), the
gated linear recurrence (De et al. 2024, arXiv 2402.19427). With a pattern W as entry: the RNN
h_t = f(z_t), z_t = W h_{t-1} + value(x_t), whose matrix has the decays D_t W, D_t = diag(f(z_t) /
z_t), and whose input is scaled by D_t too: exact, not an approximation.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import ops
from ..assignment import Mixer
from ..layers import Role
from ..mixer import MixerModule, activation
from ..patterns.circulant import full_precision
from ..patterns.semiseparable import Semiseparable
from ..sizes import Sizes


class RecurrentMixer(MixerModule):
    """output([gate(x)] * h) of the states h."""

    def __init__(self, mixer: Mixer, at: Sizes, role: Role = "hidden") -> None:
        super().__init__(mixer, at)
        if mixer.positions.entry is not None:
            self.matrix = self.position_map(role)
        else:
            decay = self.feature_map("decay").bias
            if decay is not None:  # memories of all lengths, from 2 positions to all of them
                longest = max(math.prod(at.inp), 3)
                forget = 0.5 * torch.exp(-torch.rand(at.d_out) * math.log(longest / 2))
                decay.data.copy_(torch.logit(1 - forget))

    @staticmethod
    def unfit(mixer: Mixer) -> str | None:
        if mixer.order != 2 or not isinstance(mixer.positions, Semiseparable):
            return "is of order 2 on a semiseparable pattern"
        if mixer.positions.order > 1 or mixer.positions.state > 1:
            return "computes one decay a position: order=1, state=1"
        if (mixer.positions.entry is None) == ("decay" not in mixer.maps):
            return "has either a map 'decay' or a pattern as entry"
        if extra := set(mixer.maps) - {"value", "decay", "gate", "output"}:
            return f"has maps 'value', 'decay', 'gate' and 'output', not {sorted(extra)[0]!r}"
        return None

    def forward(self, x: Tensor) -> Tensor:
        value = self.map("value", x)
        if self.mixer.positions.entry is not None:
            states = self.run_rnn(value)
        else:
            decay = full_precision(self.maps["decay"](x)).sigmoid()
            states = ops.scan_along_positions(self.mixer.positions, decay, value, self.at.out)
        if "gate" in self.maps:
            states = activation(self.mixer.gate)(self.maps["gate"](self.rows(x))) * states
        return self.map("output", states)

    def run_rnn(self, value: Tensor) -> Tensor:
        step, entry = activation(self.mixer.gate), self.mixer.positions.entry
        assert entry is not None
        cores = self.mixer.positions.entry_cores("decay", self.matrix.cores())
        flat = value.flatten(1, len(self.at.inp))  # [B, n, d]
        if self.matrix.bias is not None:
            flat = flat + self.matrix.bias
        state = torch.zeros_like(flat[:, 0])
        states = []
        for t in range(flat.shape[1]):
            y = ops.along_features(entry, cores, state, self.at.d_out, self.matrix.remembers)
            state = step(y + flat[:, t])
            states.append(state)
        return self.rows(torch.stack(states, 1).unflatten(1, self.at.inp))
