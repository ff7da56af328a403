"""What no solver is given: entries that are no numbers, and squares that the precision of a computation cannot hold."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from htsr.errors import MatrixError


def require_finite(total: float) -> None:
    """Refuse a matrix whose sum, or that of its squares, is no finite number.

    Args:
        total: sum of the entries or of their squares.

    Raises:
        MatrixError: the sum is not finite (status ``nan``).

    Examples:
        >>> from htsr.spectra.checks import require_finite
        >>> require_finite(1.0)
    """
    if not np.isfinite(total):
        raise MatrixError("nan", "the matrix has NaN, infinite or overflowing entries")


def require_squares(largest: float, dtype: str, has_entries: Callable[[], Any]) -> None:
    """Refuse a matrix whose Gram matrix is not one of numbers that `dtype` can hold.

    Args:
        largest: largest entry of the Gram matrix, which lies on its diagonal.
        dtype: precision of the computation.
        has_entries: function that says whether the matrix has an entry that is not 0.

    Raises:
        MatrixError: entries are NaN, infinite or overflow (status ``nan``), or their squares vanish (``underflow``).

    Examples:
        >>> from htsr.spectra.checks import require_squares
        >>> require_squares(1e-44, "float32", lambda: True)
        Traceback (most recent call last):
        htsr.errors.MatrixError: its entries are so small that float32 cannot hold their squares
    """
    require_finite(largest)
    if largest < np.finfo(dtype).tiny / np.finfo(dtype).eps and bool(has_entries()):
        raise MatrixError("underflow", f"its entries are so small that {dtype} cannot hold their squares")
