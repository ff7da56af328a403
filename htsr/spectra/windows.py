"""FARMS windows: submatrices of one shape, so that spectra of matrices of different shapes can be compared."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Real

from htsr.errors import UsageError

_MOST = 200  # along an axis; more than ten times what was published


@dataclass(frozen=True)
class Windows:
    """FARMS windows: equal-shape submatrices that all share one aspect ratio, and so one shape null.

    Up to `count` × `count` windows of `rows` × int(rows · aspect) entries, evenly spread, the last one at the edge of
    the matrix. A window larger than the matrix shrinks to it and keeps its aspect.

    Attributes:
        rows: number of rows of a window. Published: 2000 for LLMs, 100 for CNNs.
        count: number of windows along each axis. Published: 10-15 for LLMs, 9 for CNNs.
        aspect: aspect ratio of a window, columns per row.

    Raises:
        UsageError: rows or count are no whole numbers or below 1, count is above 200, or the aspect is not positive.

    Source: FARMS (ICML 2025).

    Examples:
        >>> import htsr
        >>> for rows, columns in htsr.Windows(rows=2, count=2).slices((5, 4)):
        ...     print(rows.start, rows.stop, columns.start, columns.stop)
        0 2 0 2
        0 2 2 4
        3 5 0 2
        3 5 2 4
    """

    rows: int
    count: int
    aspect: float = 1.0

    def __post_init__(self) -> None:
        whole = type(self.rows) is type(self.count) is int  # True is an int, and no number
        number = isinstance(self.aspect, Real) and not isinstance(self.aspect, bool)
        if not whole or not number or self.rows < 1 or self.count < 1 or not 0 < self.aspect < math.inf:
            raise UsageError(f"windows need rows ≥ 1, count ≥ 1 and aspect > 0, not {self}")
        if self.count > _MOST:
            raise UsageError(
                f"at most {_MOST} × {_MOST} windows of a matrix are pooled, not {self.count} × {self.count}"
            )

    def slices(self, shape: tuple[int, int]) -> list[tuple[slice, slice]]:
        """Row and column slices of the windows, row by row.

        Args:
            shape: (m, n) of the matrix.

        Returns:
            Up to `count`² pairs of slices; fewer where the matrix has no room for so many different windows.
        """
        m, n = shape
        rows = max(1, min(self.rows, m, int(n / self.aspect)))
        columns = max(1, min(int(rows * self.aspect), n))
        return [
            (slice(i, i + rows), slice(j, j + columns))
            for i in _starts(m, rows, self.count)
            for j in _starts(n, columns, self.count)
        ]


def _starts(length: int, window: int, count: int) -> list[int]:
    last = length - window
    if count == 1 or last == 0:
        return [0]
    stride = max(1, last // (count - 1))
    return sorted({min(i * stride, last) for i in range(count - 1)} | {last})
