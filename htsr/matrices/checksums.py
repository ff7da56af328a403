"""A digest of what a matrix holds: whether two processes, or two runs, have the same one."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np

from htsr.arrays import Array, Product, as_numpy
from htsr.errors import MatrixError
from htsr.matrices.models import WeightMatrix

_CHUNK = 1 << 22  # entries at a time


def checksum(matrix: WeightMatrix, entries: int | None = None) -> str | None:
    """A digest of the entries of a matrix.

    Args:
        matrix: matrix that is read.
        entries: number of entries, evenly spread, that the digest is made of; all by default.

    Returns:
        24 hexadecimal digits; None where the matrix cannot be read, or a device has no memory left for it.

    Examples:
        >>> import htsr, torch
        >>> from htsr.matrices.checksums import checksum
        >>> first, second = (htsr.describe({"up_proj.weight": torch.full((4, 4), x)}).matrices[0] for x in (1.0, 2.0))
        >>> checksum(first) == checksum(first), checksum(first) == checksum(second)
        (True, False)
    """
    digest = hashlib.blake2b(digest_size=12)
    try:
        values = matrix.read()
        for part in (values.left, values.right) if isinstance(values, Product) else (values,):
            _update(digest, part, entries)
    except (MatrixError, RuntimeError, MemoryError):
        return None
    return digest.hexdigest()


def _update(digest: Any, values: Array, entries: int | None) -> None:
    rows = values.reshape(-1, values.shape[-1])
    if entries is None:
        step = max(1, _CHUNK // rows.shape[1])
        parts = [rows[i : i + step] for i in range(0, rows.shape[0], step)]
    else:
        flat = rows.reshape(-1)
        parts = [flat[:: flat.shape[0] // entries | 1]]  # odd: entries of more than one column
    for part in parts:
        digest.update(np.ascontiguousarray(as_numpy(part)).tobytes())
