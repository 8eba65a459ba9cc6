"""LSTM and GRU of torch's own layers."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from ..native import Native, NativeModel, classifier, embedding
from ..sizes import Spec


class Recurrent(NativeModel):
    """`depth` recurrent layers, both ways where nothing is causal, and a linear map.

    Classes come from the mean over positions, forecasts from the last state. A language model's
    output map is its embedding table (Press and Wolf 2017, arXiv 1608.05859).
    """

    layer: ClassVar[type[nn.LSTM] | type[nn.GRU]]
    learning_rates = (2e-3, 4e-2)

    @classmethod
    def searched(cls, spec: Spec) -> tuple[float, float]:
        """Higher where most of a model is a table of words, each of them seen seldom."""
        return (8e-3, 8e-2) if spec.per_position else cls.learning_rates

    @classmethod
    def suits(cls, spec: Spec) -> bool:
        return len(spec.grid) == 1

    def __init__(self, design: Native, spec: Spec) -> None:
        super().__init__(design, spec)
        width, both = design.width, not spec.causal and spec.horizon is None
        self.spec = spec
        self.table = embedding(spec, width)
        self.drop = nn.Dropout(design.dropout)
        self.rnn = self.layer(
            spec.channels or width,
            width // 2 if both else width,
            design.depth,
            batch_first=True,
            bidirectional=both,
            dropout=design.dropout if design.depth > 1 else 0.0,
        )
        self.head = classifier(width, spec)
        if spec.per_position and spec.vocabulary == spec.classes and self.table is not None:
            nn.init.normal_(self.table.weight, std=width**-0.5)
            self.head.weight = self.table.weight

    def flops(self, x: Tensor) -> int:
        """By formula: torch would count step after step."""
        width, both = self.rnn.hidden_size, 1 + self.rnn.bidirectional
        gates = 4 if self.layer is nn.LSTM else 3
        inputs = [self.rnn.input_size, *[both * width] * (self.rnn.num_layers - 1)]
        one = sum(2 * both * gates * width * (d_in + width) for d_in in inputs)
        rows = x.shape[1] if self.spec.per_position else 1
        return int(x.shape[1] * one + 2 * rows * self.head.weight.numel())

    def last(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.features(x), self.head.weight, self.head.bias

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.features(x))
        return logits.unflatten(-1, (*self.spec.rows, -1)) if self.spec.horizon else logits

    def features(self, x: Tensor) -> Tensor:
        h: Tensor = x if self.table is None else self.drop(self.table(x))
        h = self.drop(self.rnn(h)[0])
        if self.spec.horizon is not None:
            h = h[:, -1]
        elif not self.spec.per_position:
            h = h.mean(1)
        return h


class Lstm(Recurrent):
    """LSTM, both ways where nothing is causal (Hochreiter and Schmidhuber 1997).

    Zaremba et al. 2014 (arXiv 1409.2329): 4.6 M parameters reach perplexity 115 on Penn Treebank in
    13 epochs, with a state carried over from window to window. AG News: 86.1 % in Zhang et al. 2015
    (arXiv 1509.01626).
    """

    name = "lstm"
    layer = nn.LSTM


class Gru(Recurrent):
    """GRU, both ways where nothing is causal (Cho et al. 2014, arXiv 1406.1078).

    Close to an LSTM of its size (Chung et al. 2014, arXiv 1412.3555).
    """

    name = "gru"
    layer = nn.GRU
