"""The IDX format of the MNIST files.

Source: Y. LeCun, C. Cortes, C. Burges, The MNIST database, 1998: two zero bytes, the type, the
number of axes, their lengths as big-endian 32-bit integers, the numbers.
"""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path

import numpy as np

from ..errors import TaskError
from ..task import Array

TYPES = {8: "u1", 9: "i1", 11: ">i2", 12: ">i4", 13: ">f4", 14: ">f8"}


def is_idx(path: Path) -> bool:
    """Whether a file, gzipped or not, starts as IDX files do."""
    try:
        head = content(path, 4)
    except TaskError:
        return False
    return len(head) == 4 and head[:2] == b"\0\0" and head[2] in TYPES and 1 <= head[3] <= 4


def content(path: Path, count: int = -1) -> bytes:
    """`count` bytes (all by default) of a file, gzipped or not; TaskError where it is broken."""
    try:
        with path.open("rb") as raw:
            zipped = raw.read(2) == b"\x1f\x8b"
        with gzip.open(path) if zipped else path.open("rb") as file:
            return file.read(count)
    except (OSError, EOFError, zlib.error) as e:
        raise TaskError(f"{path}: expected a whole gzip file, found {e}; get it again") from None


def read_idx(path: Path) -> Array:
    """The array of an IDX file, gzipped or not, in the machine's byte order."""
    data = content(path)
    if len(data) < 4 or data[:2] != b"\0\0" or data[2] not in TYPES:
        raise TaskError(f"{path}: expected an IDX file, found it starts with {data[:4].hex()!r}")
    dtype, axes = np.dtype(TYPES[data[2]]), data[3]
    start = 4 + 4 * axes
    shape = np.frombuffer(data[4:start], ">i4").tolist() if len(data) >= start else []
    expected = start + int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    if len(shape) != axes or len(data) != expected:
        raise TaskError(
            f"{path}: expected {expected:,} bytes for {shape} of {dtype.name}, found {len(data):,}"
        )
    array: Array = np.frombuffer(data, dtype, offset=start).reshape(shape)
    return array.astype(dtype.newbyteorder("="))
