"""The exponent and distance of every tail of a spectrum, and the tail of least distance; for many spectra at a time.

A tail begins at one of the d distinct eigenvalues but the largest, and holds all that equal it: with ties a tail that
began among equals would not be λ ≥ λ_min. The empirical distribution function is P(X < λ) at the distinct values.

Spectra lie one behind the other in flat arrays, whatever their numbers of distinct values: the resamples of a bootstrap
cost one call of each array operation, not one each.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from htsr.arrays import Vector

Indices = npt.NDArray[np.intp]

_TIE = 1e-9  # relative; closer values are equal but for the rounding of what computed them
_CELLS = 1 << 15  # of the table of gaps that is worked on at a time: what the processor's cache holds
_LEVELS = (8, 32, 128)  # values of a tail at which a lower bound of its D is taken
_TRIED = 4  # tails of each spectrum that are measured whole at first


@dataclass(frozen=True)
class Tails:
    """The tails of one spectrum or several: one for each distinct eigenvalue, but that the largest begins none.

    Attributes:
        spectrum: number of the spectrum that each distinct value belongs to, (d,), ascending.
        starts: index at which each distinct value begins in its ascending spectrum, (d,).
        log: logarithm ln of each distinct value over the largest of its spectrum, (d,), ascending in each spectrum.
        last: index, in these arrays, of the largest value of the same spectrum, (d,).
        size: number of eigenvalues in each tail, (d,).
        alpha: exponent of each tail, (d,); infinite where rounding leaves none, and for the largest value.
    """

    spectrum: Indices
    starts: Indices
    log: Vector
    last: Indices
    size: Vector
    alpha: Vector

    @classmethod
    def of(cls, eigenvalues: Vector) -> Tails:
        """The tails of positive ascending eigenvalues.

        Args:
            eigenvalues: one spectrum, (K,), or several, (B, K), a row each; infinite at the end of a row with fewer.

        Examples:
            >>> import numpy as np
            >>> from htsr.spectra.scan import Tails
            >>> Tails.of(np.exp([0.0, 1.0, 2.0])).alpha
            array([ 2.,  3., inf])
        """
        rows = np.atleast_2d(eigenvalues)
        present = np.isfinite(rows)
        count = present.sum(axis=1)
        every = np.log(rows)
        every -= np.take_along_axis(every, count[:, None] - 1, axis=1)  # α depends on ratios only; small numbers keep
        every[~present] = 0.0  # the sums exact
        new = np.diff(every, axis=1, prepend=-np.inf) > _TIE
        new &= present
        spectrum, starts = np.nonzero(new)
        log, size = every[new], (count[spectrum] - starts).astype(np.float64)
        above = np.cumsum(every[:, ::-1], axis=1)[:, ::-1][new]
        spread = above - size * log
        exponents = np.full(size.size, np.inf)
        np.divide(size, spread, out=exponents, where=spread > 1e-12 * size)
        last = np.cumsum(np.bincount(spectrum, minlength=len(rows)))[spectrum] - 1
        return cls(spectrum, starts, log, last, size, 1.0 + exponents)

    def distances(self, tails: Indices, points: int | None = None) -> Vector:
        """D of each tail: its largest gap between the fitted and the empirical distribution function.

        Args:
            tails: indices of the tails, (n,).
            points: number of distinct values of each tail, evenly spread over it, at which gaps are taken; all by
                default, fewer give a lower bound.

        Returns:
            D of each tail, (n,).

        Examples:
            >>> import numpy as np
            >>> from htsr.spectra.scan import Tails
            >>> print(Tails.of(np.exp([0.0, 1.0, 2.0])).distances(np.array([0])).round(3))  # 1 - 1/e - 1/3
            [0.299]
        """
        result = np.empty(tails.size)
        lengths = self.last[tails] - tails + 1
        order = np.argsort(-lengths, kind="stable") if points is None else np.arange(tails.size)
        first = 0
        while first < tails.size:  # tails of about the same length at a time, so that little is computed twice
            width = points or int(lengths[order[first]])
            chosen = order[first : first + max(1, _CELLS // width)]
            row = tails[chosen, None]
            if points is None:
                column = np.minimum(row + np.arange(width), self.last[row])
            else:
                column = row + ((lengths[chosen, None] - 1) * np.linspace(0.0, 1.0, points)).astype(np.intp)
            gap = self.log[column] - self.log[row]
            gap *= np.where(np.isfinite(self.alpha[row]), 1.0 - self.alpha[row], 0.0)
            np.exp(gap, out=gap)
            gap += (self.starts[column] - self.starts[row]) / self.size[row] - 1.0
            result[chosen] = np.abs(gap, out=gap).max(axis=1)
            first += chosen.size
        return np.where(np.isfinite(self.alpha[tails]), result, 1.0)

    def best(self) -> tuple[Indices, Vector]:
        """Index and D of the tail of least D of each spectrum, the first of equals.

        Most tails are ruled out by a lower bound: D at a few of their values.

        Returns:
            Indices of the tails and their distances, (B,) each.

        Examples:
            >>> import numpy as np
            >>> from htsr.spectra.scan import Tails
            >>> index, D = Tails.of(np.exp([[0.0, 1.0, 2.0], [0.0, 3.0, 3.5]])).best()
            >>> index, D.round(3)
            (array([0, 4]), array([0.299, 0.365]))
        """
        tails = np.arange(self.alpha.size)
        found = np.flatnonzero(np.diff(self.spectrum, prepend=-1))
        least = np.full(found.size, np.inf)

        def measure(chosen: Indices) -> None:
            D = self.distances(chosen)
            index = least_of_each(self.spectrum[chosen], D, chosen)
            spectrum, tail, D = self.spectrum[chosen[index]], chosen[index], D[index]
            better = (D < least[spectrum]) | ((D == least[spectrum]) & (tail < found[spectrum]))  # noqa: SIM300
            found[spectrum[better]], least[spectrum[better]] = tail[better], D[better]

        if tails.size**2 <= _CELLS * found.size:  # the whole table is so small that bounds cost more
            measure(tails)
            return found, least
        bound = np.empty(0)
        for points in _LEVELS:
            bound = self.distances(tails, points)
            measure(tails[least_of_each(self.spectrum[tails], bound, tails)])
            kept = bound <= least[self.spectrum[tails]]
            tails, bound = tails[kept], bound[kept]
        together = _TRIED
        while tails.size:
            order = np.lexsort((bound, self.spectrum[tails]))
            tails, bound = tails[order], bound[order]
            begins = np.searchsorted(self.spectrum[tails], self.spectrum[tails])
            now = np.arange(tails.size) - begins < together  # the most promising of each spectrum
            measure(tails[now])
            kept = ~now & (bound <= least[self.spectrum[tails]])
            tails, bound, together = tails[kept], bound[kept], 2 * together
        return found, least


def least_of_each(group: Indices, values: Vector, index: Indices) -> Indices:
    """Position of the least value of each group, that of the least `index` among equals.

    Args:
        group: group of each value, (n,).
        values: the values, (n,).
        index: numbers by which equal values are told apart, (n,).

    Returns:
        A position for each group that occurs, in ascending order of the groups.

    Examples:
        >>> import numpy as np
        >>> from htsr.spectra.scan import least_of_each
        >>> least_of_each(np.array([0, 0, 1, 1]), np.array([3.0, 2.0, 5.0, 5.0]), np.array([0, 1, 3, 2]))
        array([1, 3])
    """
    order = np.lexsort((index, values, group))
    return order[np.diff(group[order], prepend=-1) > 0]
