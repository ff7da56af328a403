"""A matrix that is kept as the two factors it is the product of, such as the change of a LoRA adapter.

ΔW = left · right of rank r has r eigenvalues and no more. Multiplied out in float32 it has M of them, all but r made of
rounding; from the factors they are the squared singular values of R_left · R_rightᵀ, an r × r matrix, where
left = Q_left R_left and rightᵀ = Q_right R_right.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Numbers = npt.NDArray[Any]


@dataclass(frozen=True)
class Product:
    """left · right, or a stack of such.

    Attributes:
        left: (m, r) or (pieces, m, r), any float dtype.
        right: (r, n) or (pieces, r, n).

    Raises:
        ValueError: shapes that cannot be multiplied.
    """

    left: Numbers
    right: Numbers

    def __post_init__(self) -> None:
        left, right = self.left.shape, self.right.shape
        if len(left) != len(right) or left[:-2] != right[:-2] or left[-1] != right[-2]:
            raise ValueError(f"factors of shapes {left} and {right} have no product")

    @property
    def rank(self) -> int:
        """The largest rank a piece can have."""
        return min(self.left.shape[-1], *self.shape[-2:])

    @property
    def shape(self) -> tuple[int, ...]:
        """(m, n) or (pieces, m, n)."""
        return (*self.left.shape[:-1], self.right.shape[-1])

    @property
    def ndim(self) -> int:
        """2, or 3 for a stack."""
        return self.left.ndim

    def __getitem__(self, index: Any) -> Product:
        """A piece of a stack, or rows, or (rows, columns) of one product."""
        if self.ndim == 3:
            return Product(self.left[index], self.right[index])
        rows, columns = index if isinstance(index, tuple) else (index, slice(None))
        return Product(self.left[rows], self.right[:, columns])

    def dense(self) -> Numbers:
        """The matrix itself, multiplied in float64."""
        return self.left.astype(np.float64) @ self.right.astype(np.float64)  # type: ignore[no-any-return]

    def eigenvalues(self) -> npt.NDArray[np.float64]:
        """Squared singular values of all pieces, ascending: M = min(m, n) a piece, of which at most `rank` are not 0.

        What lies below float64's resolution of the r × r problem is 0.
        """
        stacks = [x.astype(np.float64) if x.ndim == 3 else x[None].astype(np.float64) for x in (self.left, self.right)]
        pieces = [_singular(left, right) for left, right in zip(*stacks, strict=True)]
        M = min(self.shape[-2:])
        padded = [np.pad(values[:M], (0, max(0, M - values.size))) for values in pieces]
        return np.sort(np.concatenate(padded) ** 2)


def _singular(left: Numbers, right: Numbers) -> Numbers:
    if not (np.isfinite(left).all() and np.isfinite(right).all()):
        return np.full(1, np.nan)
    r_left, r_right = (np.asarray(np.linalg.qr(x, mode="r")) for x in (left, right.T))
    core = r_left @ r_right.T
    values = np.linalg.svd(core, compute_uv=False)
    smallest = max(*left.shape, *right.shape) * np.finfo(np.float64).eps * values.max(initial=0.0)
    return np.where(values > smallest, values, 0.0)
