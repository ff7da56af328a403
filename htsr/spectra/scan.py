"""The exponent and distance of every tail of a spectrum, and the tail of least distance.

A tail begins at one of the d distinct eigenvalues but the largest, and holds all that equal it: with ties a tail that
began among equals would not be λ ≥ λ_min. The empirical distribution function is P(X < λ) at the distinct values.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from htsr.arrays import Vector

Indices = npt.NDArray[np.intp]

_TIE = 1e-9  # relative; closer values are equal but for the rounding of what computed them
_CELLS = 1 << 18  # of the table of gaps that is worked on at a time
_SEARCH_FROM = 256  # with fewer distinct values the whole table is as fast
_LEVELS = (16, 128)  # values of a tail at which a lower bound of its D is taken


@dataclass(frozen=True)
class Tails:
    """The tails of a spectrum of K positive eigenvalues, d of them distinct: one for each distinct value but the last.

    Attributes:
        starts: (d,) where each distinct value begins in the ascending spectrum.
        log: (d,) ln of the distinct values over the largest, ascending.
        size: (d-1,) eigenvalues in each tail.
        alpha: (d-1,) exponent of each tail; infinite where rounding leaves none.
    """

    starts: Indices
    log: Vector
    size: Vector
    alpha: Vector

    @classmethod
    def of(cls, eigenvalues: Vector) -> Tails:
        """The tails of (K,) positive ascending `eigenvalues`, of which two at least are distinct."""
        every = np.log(eigenvalues)
        every -= every[-1]  # α depends on ratios only; small numbers keep the sums exact
        starts = np.flatnonzero(np.concatenate([[True], np.diff(every) > _TIE]))
        log, size = every[starts], (every.size - starts[:-1]).astype(np.float64)
        above = np.cumsum(every[::-1])[::-1][starts[:-1]]
        spread = above - size * log[:-1]
        exponents = np.full(size.size, np.inf)
        np.divide(size, spread, out=exponents, where=spread > 1e-12 * size)
        return cls(starts, log, size, 1.0 + exponents)

    def distances(self, rows: Indices, points: int | None = None) -> Vector:
        """D of each tail: its largest gap between the fitted and the empirical distribution function.

        Args:
            rows: indices of the tails.
            points: distinct values of each tail, evenly spread over it, at which gaps are taken; all by default, fewer
                give a lower bound.

        Returns:
            D, in the shape of `rows`.
        """
        result = np.empty(rows.size)
        last = self.log.size - 1
        step = max(1, _CELLS // (points or self.log.size))
        for first in range(0, rows.size, step):
            row = rows[first : first + step, None]
            if points is None:
                column = np.arange(row.min(), last + 1)
            else:
                column = row + ((last - row) * np.linspace(0.0, 1.0, points)).astype(np.intp)
            gap = self.log[column] - self.log[row]
            gap *= np.where(np.isfinite(self.alpha[row]), 1.0 - self.alpha[row], 0.0)
            np.exp(np.minimum(gap, 0.0, out=gap), out=gap)  # above 0 only left of the tail
            gap += (self.starts[column] - self.starts[row]) / self.size[row] - 1.0
            np.abs(gap, out=gap)
            gap[column < row] = 0.0
            result[first : first + step] = gap.max(axis=1)
        return np.where(np.isfinite(self.alpha[rows]), result, 1.0)

    def best(self) -> tuple[int, float]:
        """Index and D of the tail of least D, the first of equals.

        Most tails are ruled out by a lower bound: D at a few of their values.
        """
        rows = np.arange(self.alpha.size)
        if rows.size < _SEARCH_FROM:
            D = self.distances(rows)
            return int(np.argmin(D)), float(D.min())
        found, least = -1, np.inf

        def tried(chosen: Indices) -> None:
            nonlocal found, least
            D = self.distances(chosen)
            k = int(np.argmin(D))
            if D[k] < least or (D[k] == least and chosen[k] < found):
                found, least = int(chosen[k]), float(D[k])

        for points in _LEVELS:
            bound = self.distances(rows, points)
            tried(rows[[int(np.argmin(bound))]])
            kept = bound <= least
            rows, bound = rows[kept], bound[kept]
        rows = rows[np.argsort(bound, kind="stable")]
        bound = np.sort(bound, kind="stable")
        for first in range(0, rows.size, 64):
            if bound[first] > least:
                break
            tried(rows[first : first + 64])
        return found, least
