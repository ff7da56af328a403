"""Power-law fits of the tail of an ESD.

The model is the continuous power law p(λ) ∝ λ^(-α) for λ ≥ λ_min. For a tail of n eigenvalues λ_i ≤ … ≤ λ_j ≤ … the
maximum-likelihood exponent, its standard error and the Kolmogorov-Smirnov distance are

    α(i) = 1 + n / Σ_{j≥i} ln(λ_j/λ_i)
    σ(i) = (α(i) - 1) / √n
    D(i) = max_{j≥i} | 1 - (λ_j/λ_i)^(1-α(i)) - (j-i)/n |

with the one-sided empirical CDF (j-i)/n, as WeightWatcher has it (`powerlaw` takes the larger of both sides); of equal
eigenvalues the first stands for all, so it is the share below λ_j. The methods differ in the choice of λ_min, which in
those that search begins a group of equal eigenvalues (`htsr.spectra.scan`): the tail is all λ ≥ λ_min.

=============== ==================================================================================================
``ks``          the λ_min of smallest D (Clauset, Shalizi & Newman 2009); the default of the analyzer
``hill``        λ_min at index ⌊K/2⌋, the median; the default of LLR, as its code has it: n counts the zero term
``hill_paper``  1 + k/Σ_{i≤k} ln(λ_{K-i+1}/λ_{K-k}), k = ⌊K/2⌋: the classical Hill estimator, as LLR's text has it
``fix_fingers`` as ``ks``, λ_min restricted to [0.95, 1.5] times the peak of the histogram of log10 λ (100 bins)
``clip_xmax``   as ``ks`` after dropping the fewest (at most 10) top eigenvalues that make α fall by more than 1
=============== ==================================================================================================

Sources: SETOL (arXiv 2507.17912); HT-SR (Martin & Mahoney, JMLR 2021); LLR (arXiv 2605.22297).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
import numpy.typing as npt

from htsr.arrays import Vector
from htsr.errors import MatrixError, UsageError
from htsr.spectra.scan import Tails

FitMethod: TypeAlias = Literal["ks", "hill", "hill_paper", "fix_fingers", "clip_xmax"]
MAX_FINGERS = 10
FINGER_DROP = 1.0
PEAK_BINS = 100
PEAK_WINDOW = (0.95, 1.5)
_DISTINCT = 1e-6  # closer eigenvalues are equal but for rounding


@dataclass(frozen=True)
class PowerLawFit:
    """A power law fitted to the tail of an ESD.

    Attributes:
        alpha: exponent α of p(λ) ∝ λ^(-α), above 1.
        sigma: standard error of α, (α-1)/√n.
        D: Kolmogorov-Smirnov distance between the tail and the fit, in [0, 1].
        lambda_min: where the tail begins, in units of the eigenvalues.
        lambda_max: where it ends, in the same units.
        num_tail: eigenvalues in the tail, n.
        method: how λ_min was chosen; ``fixed`` where it was given.
        num_fingers: top eigenvalues dropped by ``clip_xmax``.
    """

    alpha: float
    sigma: float
    D: float
    lambda_min: float
    lambda_max: float
    num_tail: int
    method: str
    num_fingers: int = 0


def fit_power_law(
    eigenvalues: npt.ArrayLike,
    method: FitMethod = "ks",
    *,
    xmin: float | None = None,
    xmax: float | None = None,
) -> PowerLawFit:
    """Fit a power law to the tail of `eigenvalues`.

    Args:
        eigenvalues: (K,) in any order; those that are not positive are left out.
        method: how λ_min is chosen, see the module's text.
        xmin: λ_min by hand, in units of the eigenvalues, whatever the method: the tail is λ ≥ xmin, and xmin its begin
            in the formulas.
        xmax: eigenvalues above it are left out of the fit.

    Returns:
        The `PowerLawFit`, computed in float64.

    Raises:
        MatrixError: fewer than two distinct positive eigenvalues (status ``degenerate``), or some that are NaN or
            infinite (``nan``).
        UsageError: unknown method, or an xmin that is not positive or leaves fewer than two distinct eigenvalues.

    Source: Clauset, Shalizi & Newman (SIAM Rev. 51, 2009), §3; LLR (arXiv 2605.22297) for ``hill``; WeightWatcher for
    ``fix_fingers`` and ``clip_xmax``.
    """
    if method not in get_args(FitMethod):
        raise UsageError(f"unknown fit {method!r}: {', '.join(get_args(FitMethod))}")
    if xmin is not None and not xmin > 0:
        raise UsageError(f"xmin is an eigenvalue, a positive number, not {xmin}")
    values = np.sort(np.asarray(eigenvalues, dtype=np.float64).ravel())
    if not np.isfinite(values).all():
        raise MatrixError("nan", "NaN or infinite eigenvalues")
    values = values[values > 0]
    if xmax is not None:
        values = values[values <= xmax]
    if values.size < 2 or values[-1] <= values[0] * (1 + _DISTINCT):
        raise MatrixError("degenerate", "fewer than 2 distinct positive eigenvalues, nothing to fit")

    if xmin is not None:
        tail = values[values >= xmin]
        if tail.size < 2 or not tail[0] < tail[-1]:
            raise UsageError(f"fewer than 2 distinct eigenvalues lie above xmin = {xmin:g}")
        return _fit_tail(tail, xmin, "fixed")
    if method == "hill":
        start = _nearest_distinct(values, values.size // 2)
        return _fit_tail(values[start:], values[start], method)
    if method == "hill_paper":
        return _hill_paper(values)
    if method == "clip_xmax":
        return _clip_xmax(values)
    tails = Tails.of(values)
    if method == "fix_fingers":
        peak, begins = histogram_peak(values), values[tails.starts[:-1]]
        inside = np.flatnonzero((begins >= PEAK_WINDOW[0] * peak) & (begins <= PEAK_WINDOW[1] * peak))
        D = tails.distances(inside)
        if (D < 1).any():
            return _found(values, tails, int(inside[np.argmin(D)]), float(D.min()), method)
    return _found(values, tails, *tails.best(), method)


def _found(values: Vector, tails: Tails, index: int, D: float, method: str) -> PowerLawFit:
    """The fit of one tail of `values`."""
    start, n, alpha = int(tails.starts[index]), int(tails.size[index]), float(tails.alpha[index])
    return PowerLawFit(alpha, (alpha - 1) / n**0.5, D, float(values[start]), float(values[-1]), n, method)


def _fit_tail(tail: Vector, lambda_min: float, method: str) -> PowerLawFit:
    """Exponent and distance of one given tail, without the scan."""
    ratio = np.log(tail / lambda_min)
    n = tail.size
    alpha = float(1.0 + n / ratio.sum())
    D = _distance(ratio, alpha)
    return PowerLawFit(alpha, (alpha - 1) / n**0.5, D, float(lambda_min), float(tail[-1]), n, method)


def _distance(ratio: Vector, alpha: float) -> float:
    """D from (n,) ln(λ/λ_min), ascending."""
    first = np.flatnonzero(np.diff(ratio, prepend=-np.inf) > 0)
    return float(np.abs(1.0 - np.exp((1.0 - alpha) * ratio[first]) - first / ratio.size).max())


def _hill_paper(values: Vector) -> PowerLawFit:
    k = values.size // 2
    start = _nearest_distinct(values, values.size - k - 1)
    k = values.size - start - 1
    fit = _fit_tail(values[start:], values[start], "hill_paper")
    alpha = 1.0 + (fit.alpha - 1.0) * k / (k + 1)
    ratio = np.log(values[start + 1 :] / values[start])
    D = _distance(ratio, alpha)
    return replace(fit, alpha=alpha, sigma=(alpha - 1) / k**0.5, D=D, num_tail=k)


def _nearest_distinct(values: Vector, start: int) -> int:
    """`start`, or the last index below it whose tail is not all equal."""
    return min(start, int(np.searchsorted(values, values[-1])) - 1)


def _clip_xmax(values: Vector) -> PowerLawFit:
    def best(dropped: int) -> PowerLawFit | None:
        kept = values[: values.size - dropped]
        if kept.size < 2 or kept[-1] <= kept[0] * (1 + _DISTINCT):
            return None
        tails = Tails.of(kept)
        return replace(_found(kept, tails, *tails.best(), "clip_xmax"), num_fingers=dropped)

    whole = best(0)
    assert whole is not None  # the caller has seen two distinct values
    for dropped in range(1, MAX_FINGERS + 1):
        clipped = best(dropped)
        if clipped is None:
            break
        if clipped.alpha < whole.alpha - FINGER_DROP:
            return clipped
    return whole


def histogram_peak(eigenvalues: Vector, bins: int = PEAK_BINS) -> float:
    """Lower edge of the fullest of `bins` equal bins of log10 λ, as an eigenvalue; `eigenvalues` are (K,), positive."""
    counts, edges = np.histogram(np.log10(eigenvalues), bins=bins)
    return float(10 ** edges[np.argmax(counts)])


def bootstrap_alpha(
    eigenvalues: npt.ArrayLike,
    method: FitMethod = "ks",
    *,
    resamples: int = 200,
    level: float = 0.95,
    seed: int = 0,
    **fit: Any,
) -> tuple[float, float]:
    """Percentile bootstrap interval of α: eigenvalues are resampled, λ_min is chosen anew each time.

    Eigenvalues of one matrix repel each other and so are less variable than an independent sample: the interval
    errs on the wide side, and shows how far α depends on the choice of λ_min.

    Args:
        eigenvalues: (K,) in any order; those that are not positive are left out.
        method: see `fit_power_law`.
        resamples: bootstrap samples; those of fewer than 2 distinct eigenvalues are left out.
        level: probability inside the interval.
        seed: of the resampling.
        **fit: `xmin` and `xmax` of `fit_power_law`.

    Returns:
        Lower and upper bound of α.

    Raises:
        MatrixError: no sample has 2 distinct eigenvalues (status ``degenerate``).

    Source: Efron & Tibshirani, An Introduction to the Bootstrap (1993), §13.3.
    """
    values = np.asarray(eigenvalues, dtype=np.float64).ravel()
    values = values[values > 0]
    random = np.random.default_rng(seed)
    alphas = []
    for _ in range(resamples):
        try:
            alphas.append(fit_power_law(random.choice(values, values.size), method, **fit).alpha)
        except (MatrixError, UsageError):  # a resample of equal values
            continue
    if not alphas:
        raise MatrixError("degenerate", "no bootstrap sample has 2 distinct eigenvalues")
    low, high = np.quantile(alphas, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
