"""`nn.Bilinear` as maps along features and one product a channel, the product of order 2.

y_k = x1' A_k x2 is a tensor A of third order, and y = C (A1 x1 * A2 x2) its canonical polyadic form
(Kolda and Bader 2009, doi 10.1137/07070111X): any tensor has one, of rank at most d1 min(d2, d_out)
with the factors below. Where layers of a model have less between the maps, it is a restriction.
"""

from __future__ import annotations

import torch
from torch import Tensor, einsum, nn

from .layers import FeatureMap
from .pattern import Pattern
from .patterns.dense import Dense
from .patterns.kronecker import Kronecker


class BilinearMap(nn.Module):
    """output(gate(x1) * value(x2)): [*, d1], [*, d2] -> [*, d_out], with `rank` products."""

    def __init__(
        self, sizes: tuple[int, int, int], rank: int, maps: dict[str, Pattern], bias: bool = True
    ) -> None:
        """maps: the patterns of 'gate', 'value' and 'output'. sizes: d1, d2, d_out."""
        super().__init__()
        d1, d2, d_out = sizes
        self.gate = FeatureMap(maps["gate"], d1, rank, bias=False)
        self.value = FeatureMap(maps["value"], d2, rank, bias=False)
        self.output = FeatureMap(maps["output"], rank, d_out, bias)

    def forward(self, x1: Tensor, x2: Tensor) -> Tensor:
        y: Tensor = self.output(self.gate(x1) * self.value(x2))
        return y


def from_bilinear(layer: nn.Bilinear) -> BilinearMap:
    """The same form: a dense map holds the weight, two Kronecker products spread and sum."""
    weight = layer.weight.detach()
    d_out, d1, d2 = weight.shape
    if d_out <= d2:  # products (k, i) of x1_i and row i of A_k
        rank, held = d_out * d1, "value"
        maps: dict[str, Pattern] = {
            "gate": Kronecker(out_modes=(d_out, d1), in_modes=(1, d1)),
            "value": Dense(),
            "output": Kronecker(out_modes=(d_out, 1), in_modes=(d_out, d1)),
        }
        numbers = weight.flatten(0, 1)
    else:  # products (i, j) of x1_i and x2_j
        rank, held = d1 * d2, "output"
        maps = {
            "gate": Kronecker(out_modes=(d1, d2), in_modes=(d1, 1)),
            "value": Kronecker(out_modes=(d1, d2), in_modes=(1, d2)),
            "output": Dense(),
        }
        numbers = weight.flatten(1)
    found = BilinearMap((d1, d2, d_out), rank, maps, layer.bias is not None).to(weight)
    for name in maps:
        for core in getattr(found, name).numbers.values():
            n, m = core.shape
            core.data.copy_(torch.eye(n).to(core) if n == m else torch.ones_like(core))
    getattr(found, held).numbers["weight"].data.copy_(numbers)
    if found.output.bias is not None:
        found.output.bias.data.copy_(layer.bias.detach())
    return found


def to_bilinear(module: BilinearMap) -> nn.Bilinear:
    """The layer with the tensor that the three maps make, whatever their patterns."""
    a1, a2, c = (
        m.pattern.to_dense(m.cores(), m.out, m.inp)
        for m in (module.gate, module.value, module.output)
    )
    weight = einsum("kr,ri,rj->kij", c, a1, a2).detach()
    bias = module.output.bias
    layer = nn.Bilinear(a1.shape[1], a2.shape[1], len(c), bias is not None).to(weight)
    layer.weight.data.copy_(weight)
    if bias is not None:
        layer.bias.data.copy_(bias.detach())
    return layer
