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

from dataclasses import dataclass, fields
from typing import Literal, TypeAlias, get_args

import numpy as np
import numpy.typing as npt

from htsr.arrays import Vector
from htsr.errors import MatrixError, UsageError
from htsr.spectra.scan import Indices, Tails, least_of_each

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
        lambda_min: smallest eigenvalue of the tail, in units of the eigenvalues.
        lambda_max: largest eigenvalue of the tail, in the same units.
        num_tail: number of eigenvalues in the tail, n.
        method: how λ_min was chosen; ``fixed`` where it was given.
        num_fingers: number of largest eigenvalues that ``clip_xmax`` dropped.
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
        method: how λ_min is chosen: ``ks``, ``hill``, ``hill_paper``, ``fix_fingers`` or ``clip_xmax``, as in the table
            above.
        xmin: value of λ_min, in units of the eigenvalues, where it is not to be chosen: the tail is λ ≥ xmin, whatever
            the method, and xmin stands for λ_min in the formulas.
        xmax: largest eigenvalue that takes part in the fit; None for all.

    Returns:
        The `PowerLawFit`, computed in float64.

    Raises:
        MatrixError: fewer than two eigenvalues are positive and distinct (status ``degenerate``), or some are NaN or
            infinite (``nan``).
        UsageError: there is no such method, or xmin is not positive or leaves fewer than two distinct eigenvalues.

    Source: Clauset, Shalizi & Newman (SIAM Rev. 51, 2009), §3; LLR (arXiv 2605.22297) for ``hill``; WeightWatcher for
    ``fix_fingers`` and ``clip_xmax``.

    Examples:
        >>> import htsr, numpy as np
        >>> eigenvalues = np.exp(np.random.default_rng(0).exponential(0.5, 1000))  # a power law with α = 1 + 1/0.5
        >>> fit = htsr.fit_power_law(eigenvalues)
        >>> round(fit.alpha, 1), fit.D < 0.03, fit.method
        (3.0, True, 'ks')
        >>> round(htsr.fit_power_law(eigenvalues, xmin=1.0).alpha, 1)
        3.0
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

    if xmin is not None and np.unique(values[values >= xmin]).size < 2:
        raise UsageError(f"fewer than 2 distinct eigenvalues lie above xmin = {xmin:g}")
    found = fit_rows(values[None], method, xmin=xmin)
    alpha, n, fingers = float(found.alpha[0]), int(found.num_tail[0]), int(found.num_fingers[0])
    return PowerLawFit(
        alpha=alpha,
        sigma=(alpha - 1) / n**0.5,
        D=float(found.D[0]),
        lambda_min=float(found.lambda_min[0]),
        lambda_max=float(values[-1 - fingers]),
        num_tail=n,
        method=method if xmin is None else "fixed",
        num_fingers=fingers,
    )


@dataclass(frozen=True)
class Fits:
    """Power laws fitted to several spectra.

    Attributes:
        alpha: exponents, (B,); NaN, like D and lambda_min, where fewer than 2 distinct eigenvalues are there to fit.
        D: Kolmogorov-Smirnov distances, (B,).
        lambda_min: smallest eigenvalue of each tail, (B,).
        num_tail: number of eigenvalues in each tail, (B,); 0 where there is no fit.
        num_fingers: number of largest eigenvalues that ``clip_xmax`` dropped, (B,).
    """

    alpha: Vector
    D: Vector
    lambda_min: Vector
    num_tail: Indices
    num_fingers: Indices


def fit_rows(rows: Vector, method: FitMethod = "ks", *, xmin: float | None = None) -> Fits:
    """Fit a power law to the tail of each of several spectra at once.

    Args:
        rows: spectra, (B, K), positive, ascending in each row; infinite at the end of a row that has fewer than K.
        method: how λ_min is chosen, as in `fit_power_law`.
        xmin: value of λ_min, in units of the eigenvalues, where it is not to be chosen; else None.

    Returns:
        The `Fits`, one for each row.

    Examples:
        >>> import numpy as np
        >>> from htsr.spectra.tail import fit_rows
        >>> rows = np.sort(np.exp(np.random.default_rng(0).exponential(1.0, (2, 1000))))
        >>> fit_rows(rows, xmin=1.0).alpha.round(2)
        array([1.98, 2.  ])
    """
    count = np.isfinite(rows).sum(axis=1)
    every = np.arange(len(rows))
    largest = rows[every, np.maximum(count - 1, 0)]
    if xmin is None:
        good = (count >= 2) & (largest > rows[:, 0] * (1 + _DISTINCT))
    else:
        begins = np.minimum((rows < xmin).sum(axis=1), rows.shape[1] - 1)
        good = (count - begins >= 2) & (largest > rows[every, begins])
    result = Fits(*np.full((3, len(rows)), np.nan), *np.zeros((2, len(rows)), dtype=np.intp))
    if good.any():
        rows, count, largest = rows[good], count[good], largest[good]
        if xmin is not None:
            fits = _given_tails(rows, count, begins[good], np.full(len(rows), xmin))
        elif method == "clip_xmax":
            fits = _clip_xmax(rows, count)
        elif method in ("ks", "fix_fingers"):
            fits = _least_distance(rows, at_peak=method == "fix_fingers")
        else:
            median = count // 2 if method == "hill" else count - count // 2 - 1
            start = np.minimum(median, (rows < largest[:, None]).sum(axis=1) - 1)  # not all of a tail are equal
            # the paper's sum has no term for λ_min itself, nor counts it
            first = start if method == "hill" else start + 1
            fits = _given_tails(rows, count, first, rows[np.arange(len(rows)), start])
        for field in fields(Fits):
            getattr(result, field.name)[good] = getattr(fits, field.name)
    return result


def _given_tails(rows: Vector, count: Indices, start: Indices, lambda_min: Vector) -> Fits:
    """Exponent and distance of one tail of each row: from `start` on, whose λ_min is given."""
    index = np.arange(rows.shape[1])
    inside = (index >= start[:, None]) & (index < count[:, None])
    ratio = np.zeros(rows.shape)
    np.log(rows / lambda_min[:, None], out=ratio, where=inside)
    n = count - start
    alpha = 1.0 + n / ratio.sum(axis=1)
    new = inside & (np.diff(ratio, axis=1, prepend=-np.inf) > 0)
    new[np.arange(len(rows)), start] = True
    first = np.maximum.accumulate(np.where(new, index, 0), axis=1)  # of equal eigenvalues the first stands for all
    gap = np.abs(1.0 - np.exp((1.0 - alpha[:, None]) * ratio) - (first - start[:, None]) / n[:, None])
    return Fits(alpha, np.where(inside, gap, 0.0).max(axis=1), lambda_min, n, np.zeros_like(n))


def _least_distance(rows: Vector, *, at_peak: bool = False) -> Fits:
    """The tail of least D of each row; with `at_peak` among those that begin near its histogram's peak, if any does."""
    tails = Tails.of(rows)
    begins = rows[tails.spectrum, tails.starts]
    if not at_peak:
        chosen, D = tails.best()
    else:
        peak = np.array([histogram_peak(row[np.isfinite(row)]) for row in rows])[tails.spectrum]
        inside = np.flatnonzero((begins >= PEAK_WINDOW[0] * peak) & (begins <= PEAK_WINDOW[1] * peak))
        near = tails.distances(inside)
        best = least_of_each(tails.spectrum[inside], near, inside)
        best = best[near[best] < 1]
        spectrum = tails.spectrum[inside[best]]
        chosen, D = tails.best() if best.size < len(rows) else (np.empty(len(rows), dtype=np.intp), np.empty(len(rows)))
        chosen[spectrum], D[spectrum] = inside[best], near[best]
    n = tails.size[chosen].astype(np.intp)
    return Fits(tails.alpha[chosen], D, begins[chosen], n, np.zeros_like(n))


def _clip_xmax(rows: Vector, count: Indices) -> Fits:
    """The tails of least D, after dropping the fewest top eigenvalues that make α fall by more than 1."""
    result = _least_distance(rows)
    whole = result.alpha.copy()
    open_ = np.arange(len(rows))
    for dropped in range(1, MAX_FINGERS + 1):
        kept = count[open_] - dropped
        left = np.where(np.arange(rows.shape[1]) < kept[:, None], rows[open_], np.inf)
        top = left[np.arange(open_.size), np.maximum(kept - 1, 0)]
        good = (kept >= 2) & (top > left[:, 0] * (1 + _DISTINCT))
        open_, left = open_[good], left[good]
        if not open_.size:
            break
        clipped = _least_distance(left)
        fallen = clipped.alpha < whole[open_] - FINGER_DROP
        for field in fields(Fits):
            getattr(result, field.name)[open_[fallen]] = getattr(clipped, field.name)[fallen]
        result.num_fingers[open_[fallen]] = dropped
        open_ = open_[~fallen]
    return result


def histogram_peak(eigenvalues: Vector, bins: int = PEAK_BINS) -> float:
    """Lower edge of the fullest of equal bins of log10 λ, as an eigenvalue.

    Args:
        eigenvalues: (K,), positive.
        bins: number of bins between the smallest and the largest eigenvalue.

    Examples:
        >>> import numpy as np
        >>> from htsr.spectra.tail import histogram_peak
        >>> print(f"{histogram_peak(np.array([1.0, 9.0, 9.5, 10.0, 100.0]), bins=4):.2f}")
        3.16
    """
    counts, edges = np.histogram(np.log10(eigenvalues), bins=bins)
    return float(10 ** edges[np.argmax(counts)])
