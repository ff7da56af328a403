"""What is known of the spectrum of one matrix: its empirical spectral density (ESD), whatever computed it."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from htsr.spectra.resolution import require_tail


@dataclass(frozen=True)
class ESD:
    """Eigenvalues of one matrix, or of equal-shape pieces pooled (slices of a kernel, windows).

    Attributes:
        eigenvalues: (K,) float64, ascending, K = M · pieces; exactly 0 where they lie below the resolution of the
            stored numbers or of the route.
        M: smaller side of a piece.
        N: larger side of a piece.
        pieces: number of matrices that are pooled in `eigenvalues`.
        route: name of the route that computed them, and of its precision, such as ``"gram/float64"``.
        error: standard error of the distribution function, largest over λ; None where the route is exact.
        replicates: (probes, K) leave-one-probe-out eigenvalues of the ``lanczos`` route, for jackknife errors.
        equal_within: relative difference of eigenvalues that are equal but for rounding.
        piece_rank: median rank of the pieces, where it is known; else None.

    Examples:
        >>> import htsr, numpy as np
        >>> spectrum = htsr.esd(np.diag([0.0, 1.0, 2.0]))
        >>> spectrum.eigenvalues, spectrum.positive, spectrum.Q
        (array([0., 1., 4.]), array([1., 4.]), 1.0)
        >>> spectrum.require_tail()
        Traceback (most recent call last):
        htsr.errors.MatrixError: 2 eigenvalues above the resolution, too few for a fit
    """

    eigenvalues: npt.NDArray[np.float64] = field(repr=False)
    M: int
    N: int
    pieces: int
    route: str
    error: float | None = None
    replicates: npt.NDArray[np.float64] | None = field(default=None, repr=False)
    equal_within: float = 1e-6
    piece_rank: int | None = None

    @property
    def Q(self) -> float:
        """Aspect ratio N/M ≥ 1."""
        return self.N / self.M

    def require_tail(self) -> None:
        """Refuse a spectrum that has no tail to speak of, so that no exponent of it would mean anything.

        Raises:
            MatrixError: fewer than 8 eigenvalues are above the resolution (status ``tiny``), or fewer than 8 differ by
                more than rounding (``degenerate``), as for an orthogonal matrix.
        """
        require_tail(self.eigenvalues, self.equal_within)

    @property
    def positive(self) -> npt.NDArray[np.float64]:
        """The eigenvalues above the resolution, ascending."""
        return self.eigenvalues[np.searchsorted(self.eigenvalues, 0.0, side="right") :]
