"""A small residual CNN of torch's own layers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..native import Native, NativeModel, classifier, embedding
from ..sizes import Spec


class Residual(nn.Module):
    """Two convolutions of three with batch norms around a skip, which strides as they do."""

    def __init__(self, dims: int, d_in: int, d_out: int, stride: int, dropout: float) -> None:
        super().__init__()
        conv, norm = (nn.Conv1d, nn.Conv2d)[dims - 1], (nn.BatchNorm1d, nn.BatchNorm2d)[dims - 1]
        self.body = nn.Sequential(
            conv(d_in, d_out, 3, stride, 1, bias=False),
            norm(d_out),
            nn.ReLU(),
            nn.Dropout(dropout),
            conv(d_out, d_out, 3, 1, 1, bias=False),
            norm(d_out),
        )
        same = d_in == d_out and stride == 1
        self.skip: nn.Module = nn.Identity() if same else conv(d_in, d_out, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.body(x) + self.skip(x))


class Cnn(NativeModel):
    """ResNet-style CNN: three stages of `depth` blocks at w, 2w and 4w channels, a pool, linear.

    He et al. 2016 (arXiv 1512.03385): 0.27 M parameters reach 91.25 % on CIFAR-10 after 64,000
    steps; plain CNNs of this size pass 99 % on MNIST. The largest value over the positions, as in
    the nets of short budgets (Jordan 2024, arXiv 2404.00498), tells images apart some hundred steps
    before their mean does. Over words two stages of one width and the mean: word CNNs reach 91.5 %
    on AG News (Zhang et al. 2015, arXiv 1509.01626).
    """

    name = "cnn"
    depths = (1, 2)
    strides = (1, 2)
    dropouts = (0.0, 0.1)
    widths = 4
    learning_rates = (2e-3, 4e-2)

    @classmethod
    def suits(cls, spec: Spec) -> bool:
        classes = not spec.rows and not spec.causal
        return classes and len(spec.grid) <= 2

    def __init__(self, design: Native, spec: Spec) -> None:
        super().__init__(design, spec)
        dims, width = len(spec.grid), design.width
        conv, norm = (nn.Conv1d, nn.Conv2d)[dims - 1], (nn.BatchNorm1d, nn.BatchNorm2d)[dims - 1]
        self.table = embedding(spec, width)
        channels = spec.channels if spec.channels is not None else width
        widths = [width, 2 * width, 4 * width] if dims == 2 else [width, width]
        layers: list[nn.Module] = [
            conv(channels, width, 3, design.stride, 1, bias=False),
            norm(width),
            nn.ReLU(),
        ]
        before = width
        for i, after in enumerate(widths):
            for j in range(design.depth):
                stride = 2 if i and not j else 1
                layers.append(Residual(dims, before, after, stride, design.dropout))
                before = after
        self.body = nn.Sequential(*layers)
        self.head = classifier(before, spec)

    def forward(self, x: Tensor) -> Tensor:
        h = x if self.table is None else self.table(x)
        h = self.body(h.movedim(-1, 1)).flatten(2)
        h = h.mean(-1) if x.dim() < 4 else h.amax(-1)
        logits: Tensor = self.head(h)
        return logits
