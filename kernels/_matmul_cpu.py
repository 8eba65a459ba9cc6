"""Products with a matrix on CPU, by oneDNN where that is the faster library.

torch multiplies float32 matrices with MKL, which leaves AVX-512 unused on processors of other
makers; oneDNN, that torch carries too, is then twice as fast, and as fast on AVX2. Only a call of
it costs some microseconds more.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

WORK = 1 << 20  # multiplications from which the call is paid back
SHORT = 128  # columns of both matrices from which turning tall ones is


def _find() -> Any:
    """What torch.compile emits for a linear layer; None where it is missing or no gain."""
    if not torch.backends.mkldnn.is_available():
        return None
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        return None
    packet = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    return packet and packet.default


_ONEDNN = _find()


def fast(dtype: torch.dtype) -> bool:
    """Whether large products in `dtype` go through oneDNN."""
    at_hand = _ONEDNN is not None and bool(torch.backends.mkldnn.enabled)
    return at_hand and dtype == torch.float32


def linear(x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [n, i] times w [o, i] turned, plus bias [o]: [n, o]. No autograd."""
    if x.shape[0] * w.numel() < WORK or not (x.is_cpu and fast(x.dtype)):
        return F.linear(x, w, bias)
    y: Tensor = _ONEDNN(_packed(x), _packed(w), bias, "none", [], "")
    return y


def _packed(x: Tensor) -> Tensor:
    """Without gaps between rows or columns, for which oneDNN is a thousand times slower."""
    return x if x.is_contiguous() or x.mT.is_contiguous() else x.contiguous()


def outer(a: Tensor, b: Tensor) -> Tensor:
    """a [n, o] turned times b [n, i]: [o, i], summed over many n. No autograd."""
    if min(a.shape[1], b.shape[1]) < SHORT:
        return torch.mm(a.t(), b)
    return linear(a.t(), b.t())
