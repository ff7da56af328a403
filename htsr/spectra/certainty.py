"""Whether a fit to eigenvalues that were computed in float32 is the fit that float64 would give.

With ε the machine epsilon of float32, λ̄ the mean of all M eigenvalues and r = λ_max/Σλ, the relative error of a
computed one is taken to be at most

    ε_i = ε·(c + 8·λ̄/λ_i + (4/√M + 6r)·λ_max/λ_i),    c = 16 on a CPU, and at least M/4 elsewhere.

That is no theorem (which would have nearly every row repeated) but what rounding does: in the Gram matrix its errors
have the size of the entries, in the reduction that of λ_max over directions of no preference, but for a single large
eigenvalue, which the first steps must cancel; solvers that iterate in float32 add M/10·ε at λ_max. Over Gaussian,
scaled, sparse, shifted and heavy-tailed matrices of up to 1500 × 1500 and 64 × 50,000, some of them with one dominant
eigenvalue, no error exceeds 0.8 of it. For the tail that begins at λ_i this bounds, to first order,

    |Δ ln(λ_j/λ_i)| ≤ 2ε_i,    |Δα| ≤ 2ε_i·(α-1)²,    |ΔD| ≤ 2ε_i·(α-1) + ties/n:

the fitted distribution function is 1 - exp(-u), u = (α-1)·ln(λ_j/λ_i), and e^(-u)·(1+u) ≤ 1. Ties are neighbours that
float64 may find equal; equal values count once (`htsr.spectra.scan`). The fit is certain where Δα is at most α/1000,
the λ_min being the same, and no other tail can have the smaller D, with the errors of both. A λ_min by index (``hill``)
is the same, and one that is given asks that no eigenvalue comes too near.

All that is for spectra that float32 resolves. One with eigenvalues below its resolution is computed again in float64:
rank, entropy, the shape null and any other fit hang on them. What counts eigenvalues in a histogram (``fix_fingers``,
E-TPL) or compares many fits (``clip_xmax``, resamples) is computed in float64 from the start (`htsr.spectra.measure`).
"""

from __future__ import annotations

import numpy as np

from htsr.arrays import EPSILON, Vector
from htsr.spectra.density import ESD
from htsr.spectra.scan import Tails

_ULPS = 16.0
_WITHIN = 1e-3  # of α
_COARSE = 16  # values of a tail at which a lower bound of its D is taken


def relative_errors(spectrum: ESD, device: str = "cpu") -> Vector:
    """Bounds ε_i of the relative errors of a spectrum that was computed in float32.

    Args:
        spectrum: spectrum of one matrix, or of several pooled.
        device: device that it was computed on.

    Returns:
        (positive,) float64 bounds, one for each positive eigenvalue, in their ascending order.

    Examples:
        >>> import numpy as np
        >>> from htsr.spectra.certainty import relative_errors
        >>> from htsr.spectra.esd import esd
        >>> spectrum = esd(np.diag([1.0, 1.0, 1.0, 3.0]), dtype="float32")
        >>> (relative_errors(spectrum) / 2**-23).round(1).tolist()
        [98.5, 98.5, 98.5, 25.2]
    """
    values = spectrum.positive
    largest = values[-1]
    mean = min(largest, spectrum.pieces * spectrum.eigenvalues.mean())  # of a piece of a pool, at most that
    ulps = _ULPS if device == "cpu" else max(_ULPS, spectrum.M / 4)
    share = largest / (spectrum.M * mean)
    size = 8 * mean + largest * (4 / spectrum.M**0.5 + 6 * share)
    return EPSILON["float32"] * (ulps + size / values)


def is_single(spectrum: ESD) -> bool:
    """Whether a spectrum was computed in float32.

    Args:
        spectrum: spectrum that names its route.

    Examples:
        >>> import numpy as np
        >>> from htsr.spectra.certainty import is_single
        >>> from htsr.spectra.esd import esd
        >>> is_single(esd(np.eye(2), dtype="float32"))
        True
    """
    return spectrum.route.endswith("/float32")


def is_unresolved(spectrum: ESD) -> bool:
    """Whether a spectrum was computed in float32 and has eigenvalues below its resolution.

    Args:
        spectrum: spectrum that names its route.

    Examples:
        >>> import numpy as np
        >>> from htsr.spectra.certainty import is_unresolved
        >>> from htsr.spectra.esd import esd
        >>> [is_unresolved(esd(np.diag([1e-4, 1.0]), dtype=dtype)) for dtype in ("float32", "float64")]
        [True, False]
    """
    return is_single(spectrum) and bool(spectrum.eigenvalues[0] == 0)


def fit_is_certain(spectrum: ESD, method: str, alpha: float, D: float, lambda_min: float, device: str) -> bool:
    """Whether float64 would give the same λ_min as float32 has given, and α to a thousandth.

    Args:
        spectrum: spectrum that was fitted, computed in float32, which resolves all of it.
        method: how λ_min was chosen: ``ks``, ``hill`` or ``hill_paper``; ``fixed`` where it was given.
        alpha: exponent of the fit.
        D: Kolmogorov-Smirnov distance of the fit.
        lambda_min: smallest eigenvalue of its tail.
        device: device that the spectrum was computed on.

    Examples:
        >>> import numpy as np
        >>> from htsr.spectra.certainty import fit_is_certain
        >>> from htsr.spectra.esd import esd
        >>> from htsr.spectra.tail import fit_power_law
        >>> spectrum = esd(np.random.default_rng(0).standard_normal((60, 90)), dtype="float32")
        >>> fit = fit_power_law(spectrum.positive)
        >>> fit_is_certain(spectrum, "ks", fit.alpha, fit.D, fit.lambda_min, "cpu")
        True
    """
    values = spectrum.positive
    errors = relative_errors(spectrum, device)
    own = errors[np.searchsorted(values, lambda_min)]
    if not 2 * own * (alpha - 1) ** 2 <= _WITHIN * alpha:
        return False
    if method == "fixed":
        return bool((np.abs(values / lambda_min - 1) > errors).all())
    return method != "ks" or _is_least(values, errors, D, lambda_min)


def _is_least(values: Vector, errors: Vector, D: float, lambda_min: float) -> bool:
    """Whether no tail but that from λ_min on can have the least D."""
    tails = Tails.of(values)
    first = tails.starts[:-1]  # the largest value begins no tail
    near = np.diff(values, append=np.inf) <= 2 * errors * values
    ties = np.cumsum(near[::-1])[::-1][first]
    margin = 2 * errors[first] * (tails.alpha[:-1] - 1) + ties / tails.size[:-1]
    own = int(np.searchsorted(values[first], lambda_min))
    least = D + margin[own]
    others = np.delete(np.arange(first.size), own)
    others = others[tails.distances(others, _COARSE) - margin[others] <= least]
    return bool((tails.distances(others) - margin[others] > least).all())
