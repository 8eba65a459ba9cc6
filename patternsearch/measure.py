"""What only a measurement tells: latency and peak memory on the device a trial runs on."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, UntypedStorage, nn

LATENCY_BATCH = 64
_REPEATS = 9
_LONG = 1.0  # seconds of samples after which three are enough
_SHORT = (
    "can't allocate memory",
    "CUDA error: out of memory",  # outside torch's allocator: a context, the code of a kernel
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "Storage size calculation overflowed",
    "Overflow when unpack",
)


@torch.no_grad()
def latency(model: nn.Module, x: Tensor, batch: int = LATENCY_BATCH) -> float:
    """Milliseconds of a forward pass of `batch` examples: median of nine, after two to warm up.

    Of three at least, where nine take long. The examples of x are repeated where there are fewer.
    """
    model.eval()
    x = x.repeat(-(-batch // len(x)), *[1] * (x.dim() - 1))[:batch]
    times: list[float] = []
    while len(times) < 5 or (len(times) < _REPEATS + 2 and sum(times) < 1e3 * _LONG):
        _synchronize(x.device)
        start = time.perf_counter()
        model(x)
        _synchronize(x.device)
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times[2:])


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def training_memory(model: nn.Module, loss: Callable[[], Tensor]) -> float:
    """Megabytes that a training step needs at least; `loss` is what it goes back from.

    Parameters, gradients and AdamW's two moments, and every tensor autograd keeps for the backward
    pass, each storage once. (Resident memory says nothing in a process that has trained before.)
    """
    model.train()
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, UntypedStorage] = {}  # held until counted: none is freed and taken again

    def pack(tensor: Tensor) -> None:
        """Nothing for the graph to hold: with what it made itself it would never be freed."""
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage

    before = [buffer.clone() for buffer in model.buffers()]  # of a batch norm
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda nothing: nothing):
            loss()
    finally:
        with torch.no_grad():
            for buffer, value in zip(model.buffers(), before, strict=True):
                buffer.copy_(value)
    state = 4 * sum(p.numel() * p.element_size() for p in model.parameters())
    return (state + sum(storage.nbytes() for storage in kept.values())) / 2**20


def out_of_memory(error: BaseException | None) -> bool:
    """Whether the device or the machine had too little memory, in the error or behind it.

    Where a capture ends for it, the capture's own error comes on top. A size that no number holds
    is too much as well.
    """
    while error is not None:
        said = isinstance(error, RuntimeError | TypeError) and any(s in str(error) for s in _SHORT)
        if said or isinstance(error, torch.OutOfMemoryError | MemoryError):
            return True
        error = error.__cause__ or error.__context__
    return False
