"""FARMS windows: submatrices of one shape, so that spectra of matrices of different shapes can be compared."""

from __future__ import annotations

from dataclasses import dataclass

from htsr.errors import UsageError

_MOST = 200  # along an axis; more than ten times what was published


@dataclass(frozen=True)
class Windows:
    """FARMS windows: equal-shape submatrices that all share one aspect ratio, and so one shape null.

    Up to `count` × `count` windows of `rows` × int(rows · aspect) entries, evenly spread, the last one touching the
    edge. A window larger than the matrix shrinks to it and keeps its aspect.

    Attributes:
        rows: rows of a window. Published: 2000 for LLMs, 100 for CNNs.
        count: windows along each axis. Published: 10-15 for LLMs, 9 for CNNs.
        aspect: columns per row.

    Raises:
        UsageError: rows or count below 1, a count above 200, or an aspect that is not positive.

    Source: FARMS (ICML 2025).
    """

    rows: int
    count: int
    aspect: float = 1.0

    def __post_init__(self) -> None:
        if self.rows < 1 or self.count < 1 or not self.aspect > 0:
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
            Up to `count`² pairs; fewer where the matrix has no room for that many different ones.
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
