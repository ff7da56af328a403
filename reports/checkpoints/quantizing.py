"""Quantised and de-quantised again: round-to-nearest, by group along the rows as common formats do it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np

from reports.checkpoints.measuring import Matrix

GROUP = 32
NF4_BLOCK = 64
NF4 = np.array(
    [-1.0, -0.6961928, -0.52507305, -0.39491749, -0.28444138, -0.18477343, -0.09105004, 0.0,
     0.07958030, 0.16093020, 0.24611230, 0.33791524, 0.44070983, 0.56261700, 0.72295684, 1.0]
)  # fmt: skip  # QLoRA (arXiv 2305.14314), appendix E


def int8(W: Matrix) -> Matrix:
    """Symmetric, one scale per row (output channel)."""
    scale = np.maximum(np.abs(W).max(axis=-1, keepdims=True), 1e-30) / 127
    return (np.round(W / scale) * scale).astype(np.float32)


def affine(W: Matrix, bits: int) -> Matrix:
    """Minimum and step in float16 for each group of 32 along a row, as Q4_1 at 4 bits."""
    groups, size = _groups(W, GROUP)
    low = groups.min(axis=1, keepdims=True).astype(np.float16).astype(np.float32)
    step = ((groups.max(axis=1, keepdims=True) - low) / (2**bits - 1)).astype(np.float16).astype(np.float32)
    step = np.maximum(step, 1e-7)
    levels = np.clip(np.round((groups - low) / step), 0, 2**bits - 1)
    return (low + levels * step).ravel()[:size].reshape(W.shape).astype(np.float32)


def nf4(W: Matrix) -> Matrix:
    """Nearest of the 16 NormalFloat levels times the largest absolute entry of each 64."""
    groups, size = _groups(W, NF4_BLOCK)
    scale = np.maximum(np.abs(groups).max(axis=1, keepdims=True), 1e-30)
    levels = NF4[np.searchsorted((NF4[1:] + NF4[:-1]) / 2, groups / scale)]
    return (levels * scale).ravel()[:size].reshape(W.shape).astype(np.float32)


def _groups(W: Matrix, length: int) -> tuple[Matrix, int]:
    """Entries in row order, `length` a line, the last one filled up with its last entry."""
    flat = np.asarray(W, dtype=np.float32).ravel()
    return np.pad(flat, (0, -flat.size % length), mode="edge").reshape(-1, length), flat.size


FORMATS: dict[str, Callable[[Matrix], Matrix]] = {
    "int8 per row": int8,
    "4-bit, groups of 32": partial(affine, bits=4),
    "nf4, blocks of 64": nf4,
    "3-bit, groups of 32": partial(affine, bits=3),
    "2-bit, groups of 32": partial(affine, bits=2),
}
