"""One number per matrix that says how far its training has come, cheap enough to be computed while it trains.

Larger means less trained in all of them, so a policy that favours large scores pushes what lags behind.

==================== ================================================================================================
``alpha``            exponent α of the power law; large: a thin tail, little learned
``alpha_null``       α of pure noise of the same shape: nothing but the shape, nothing is decomposed
``alpha_minus_null`` α - α_null: the shape's part of α removed; 0: like noise, negative: learned
``erg_gap``          (eigenvalues in the ECS - in the power-law tail) / K; positive with α > 2. Wants ``ks``
``trace_log``        mean ln λ̃ over the power-law tail; the same sign. Wants ``ks``
``stable_rank``      Σλ/λ_max
==================== ================================================================================================
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, TypeAlias, get_args

import numpy as np
import numpy.typing as npt

from htsr.errors import UsageError
from htsr.spectra.density import ESD
from htsr.spectra.erg import erg
from htsr.spectra.null import alpha_null
from htsr.spectra.tail import FitMethod, fit_power_law
from htsr.spectra.windows import Windows

ScoreName: TypeAlias = Literal["alpha", "alpha_null", "alpha_minus_null", "erg_gap", "trace_log", "stable_rank"]
Score: TypeAlias = ScoreName | Callable[[ESD], float]


def score(spectrum: ESD, name: Score, fit: FitMethod = "hill") -> float:
    """The score of one ESD.

    Args:
        spectrum: spectrum of the matrix.
        name: name of the score, as in the table above, or a function of the `ESD`.
        fit: how the power-law tail is chosen (`htsr.spectra.tail`).

    Returns:
        The score, without unit; NaN for the stable rank of a matrix of zeros, and for an ERG gap without a crossing.

    Raises:
        MatrixError: the score needs a tail, and the spectrum has none (`ESD.require_tail`).
        UsageError: there is no score of that name.

    Examples:
        >>> import htsr, numpy as np
        >>> from htsr.spectra.scores import score
        >>> spectrum = htsr.esd(np.diag(np.arange(1.0, 31.0)))
        >>> round(score(spectrum, "stable_rank"), 3), 9455 / 900  # Σλ = 1² + … + 30²
        (10.506, 10.505555555555556)
        >>> score(spectrum, lambda spectrum: spectrum.eigenvalues[-1])
        900.0
    """
    if callable(name):
        return float(name(spectrum))
    if name == "alpha_null":
        return null_of_shape((spectrum.N, spectrum.M), spectrum.pieces, fit)
    if name == "stable_rank":
        values = spectrum.positive
        return float(values.sum() / values[-1]) if values.size else np.nan
    spectrum.require_tail()
    values = _without_gaps(spectrum)
    tail = fit_power_law(values, fit)
    if name == "alpha":
        return tail.alpha
    if name == "alpha_minus_null":
        return tail.alpha - null_of_shape((spectrum.N, spectrum.M), spectrum.pieces, fit)
    if name == "erg_gap":
        return erg(values, tail.lambda_min).gap_fraction
    if name == "trace_log":
        return erg(values, tail.lambda_min).trace_log
    raise UsageError(f"unknown score {name!r}: {', '.join(get_args(ScoreName))}, or a function of an ESD")


def _without_gaps(spectrum: ESD) -> npt.NDArray[np.float64]:
    """The eigenvalues above the resolution, as `htsr.analyze` fits them.

    Those few that a float32 computation cannot tell from 0 count as the smallest that it can: they lie in the lower
    half, which `hill` counts but does not read. Where more than half are 0 the matrix is of low rank.
    """
    values, positive = spectrum.eigenvalues, spectrum.positive
    gaps = spectrum.route.endswith("float32") and 2 * positive.size > values.size
    return np.maximum(values, positive[0]) if gaps else positive


def null_of_shape(
    shape: tuple[int, int], pieces: int = 1, fit: FitMethod = "hill", windows: Windows | None = None
) -> float:
    """α of pure noise of this shape, or of its windows; nothing is read.

    Args:
        shape: (m, n) of the matrix, or of each piece where several are pooled.
        pieces: number of pieces of that shape.
        fit: how the power-law tail is chosen (`htsr.spectra.tail`).
        windows: FARMS windows; None for the whole matrix.

    Returns:
        The median of `htsr.spectra.null.alpha_null`; the same for the same arguments.

    Examples:
        >>> from htsr.spectra.scores import null_of_shape
        >>> null_of_shape((64, 64)) < null_of_shape((64, 256))  # a narrower bulk has a steeper edge
        True
    """
    if windows is not None:
        cuts = windows.slices(shape)
        rows, columns = cuts[0]
        shape = (rows.stop - rows.start, columns.stop - columns.start)
        pieces *= len(cuts)
    return alpha_null(min(shape), max(shape), pieces, fit).alpha
