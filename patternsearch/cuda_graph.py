"""The passes of a training step as one CUDA graph: small models launch faster than they compute."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache

import torch
from torch import Tensor, nn

Backward = Callable[[Tensor, Tensor], Tensor]
_WARMUP = 3  # passes before the capture: kernels are compiled and workspaces taken in them


@cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """One for all captures of a process: cuBLAS keeps a workspace for every stream it has seen."""
    return torch.cuda.Stream(device)


class GraphedBackward:
    """Replays a function (inputs, targets) -> loss that leaves gradients in `parameters`.

    Batches of the shape of the first one take the graph, others run as they are. The function must
    always be the same, draw no random numbers and wait for no result. Gradients are those of one
    call: set the parameters' to None between calls, as optimisers do. `buffers` are what it changes
    besides, such as running statistics.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], buffers: Iterable[Tensor] = ()) -> None:
        self.parameters, self.buffers = list(parameters), list(buffers)
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, backward: Backward, given: Tensor, wanted: Tensor) -> Tensor:
        """Its loss; it is no attribute, lest a trial that it belongs to outlives its end."""
        if self.graph is None:
            self._capture(backward, given, wanted)
        if (given.shape, wanted.shape) != (self.given.shape, self.wanted.shape):
            return backward(given, wanted)
        assert self.graph is not None
        self.given.copy_(given)
        self.wanted.copy_(wanted)
        self.graph.replay()
        for parameter, gradient in zip(self.parameters, self.gradients, strict=True):
            parameter.grad = gradient
        return self.loss.clone()

    def _capture(self, backward: Backward, given: Tensor, wanted: Tensor) -> None:
        self.given, self.wanted = given.clone(), wanted.clone()
        before = [buffer.clone() for buffer in self.buffers]
        aside = _stream(given.device)
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(_WARMUP):
                backward(self.given, self.wanted)
                self._forget()
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=aside):
            self.loss = backward(self.given, self.wanted)
        self.gradients = [parameter.grad for parameter in self.parameters]
        self._forget()
        for buffer, value in zip(self.buffers, before, strict=True):
            buffer.copy_(value)
        self.graph = graph

    def _forget(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None
