"""What is learned about a fit from resampled spectra: how sure α is, and whether the tail is a power law at all.

All resamples are fitted together (`htsr.spectra.tail.fit_rows`).

Sources: Efron & Tibshirani, An Introduction to the Bootstrap (1993); Clauset, Shalizi & Newman (SIAM Rev. 51, 2009).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from htsr.arrays import Vector
from htsr.errors import MatrixError, UsageError
from htsr.spectra.tail import FitMethod, PowerLawFit, fit_power_law, fit_rows

_TOGETHER = 1 << 18  # eigenvalues of resamples that are fitted at a time
_SMALLEST_SHARE = 2.0**-54  # uniform numbers are multiples of 2^-53, 0 among them
_FLAT, _STEEP = 1e-6, 500.0  # (α-1)·ln(xmax/λ_min) of a law that is uniform in ln λ, and of one that ends before xmax
_GOF = 1  # keeps the draws of the goodness of fit apart from others of the same seed


def bootstrap_alpha(
    eigenvalues: npt.ArrayLike,
    method: FitMethod = "ks",
    *,
    resamples: int = 200,
    level: float = 0.95,
    seed: int = 0,
    xmin: float | None = None,
    xmax: float | None = None,
) -> tuple[float, float]:
    """Percentile bootstrap interval of α: eigenvalues are resampled, λ_min is chosen anew each time.

    Eigenvalues of one matrix repel each other and so are less variable than an independent sample: the interval
    errs on the wide side, and shows how far α depends on the choice of λ_min.

    Args:
        eigenvalues: (K,) in any order; those that are not positive are left out.
        method: how λ_min is chosen, as in `fit_power_law`.
        resamples: number of bootstrap samples; those with fewer than 2 distinct eigenvalues are left out.
        level: probability of the interval.
        seed: seed of the resampling.
        xmin: value of λ_min where it is not to be chosen, as in `fit_power_law`; else None.
        xmax: largest eigenvalue that takes part in each fit; None for all.

    Returns:
        Lower and upper bound of α.

    Raises:
        MatrixError: no sample has 2 distinct eigenvalues (status ``degenerate``).

    Source: Efron & Tibshirani, An Introduction to the Bootstrap (1993), §13.3.

    Examples:
        >>> import numpy as np
        >>> from htsr.spectra.resampling import bootstrap_alpha
        >>> values = np.exp(np.random.default_rng(0).exponential(0.5, 500))
        >>> low, high = bootstrap_alpha(values, resamples=50)
        >>> low < 3 < high
        True
    """
    values = np.asarray(eigenvalues, dtype=np.float64).ravel()
    values = values[values > 0]
    random = np.random.default_rng(seed)
    alphas = [np.empty(0)]
    for count in _portions(resamples if values.size else 0, values.size):
        rows = values[random.integers(0, values.size, (count, values.size))]
        if xmax is not None:
            rows[rows > xmax] = np.inf
        alphas.append(fit_rows(np.sort(rows, axis=1), method, xmin=xmin).alpha)
    found = np.concatenate(alphas)
    found = found[~np.isnan(found)]
    if not found.size:
        raise MatrixError("degenerate", "no bootstrap sample has 2 distinct eigenvalues")
    low, high = np.quantile(found, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def goodness_of_fit(
    eigenvalues: npt.ArrayLike,
    method: FitMethod = "ks",
    *,
    resamples: int = 1000,
    seed: int = 0,
    xmin: float | None = None,
    xmax: float | None = None,
) -> float:
    """p-value of the goodness of a power-law fit, by the semi-parametric bootstrap.

    The fit is repeated on samples that do follow it: as many eigenvalues, each with probability n/K from the fitted
    power law above λ_min and otherwise one of those below λ_min; λ_min is chosen anew. p is the share of samples
    whose distance D is at least that of the spectrum. p ≤ 0.1 rules the power law out; a larger p does not show
    that it is true, the less so the shorter the tail.

    Where the method does not search for λ_min (``hill``, ``hill_paper``, or `xmin`), only the tail is sampled, as many
    values as it has, and p tests that given tail: half of all eigenvalues are seldom a power law. Then p is exact,
    since the law of D depends on n alone. Eigenvalues that the fit leaves out, above `xmax` or dropped by
    ``clip_xmax``, are left out here. With `xmax` the samples are of the power law cut there, with its own exponent of
    maximum likelihood, and are fitted as the spectrum is; p is then exact but for the error of that exponent.

    Args:
        eigenvalues: (K,) in any order; those that are not positive are left out.
        method: how λ_min is chosen, as in `fit_power_law`.
        resamples: number of samples. The standard error of p is √(p(1-p)/resamples): at most 0.05 with 100 samples,
            0.01 with 2,500.
        seed: seed of the samples.
        xmin: value of λ_min where it is not to be chosen, as in `fit_power_law`; else None.
        xmax: largest eigenvalue that is taken into account; None for all.

    Returns:
        The p-value, from 0 to 1.

    Raises:
        MatrixError: `fit_power_law` finds nothing to fit.
        UsageError: `resamples` is below 1, or `fit_power_law` refuses an argument.

    Source: Clauset, Shalizi & Newman (SIAM Rev. 51, 2009), §4.1.

    Examples:
        >>> import numpy as np
        >>> from htsr.spectra.resampling import goodness_of_fit
        >>> random = np.random.default_rng(0)
        >>> goodness_of_fit(np.exp(random.exponential(0.5, 500)), resamples=200) > 0.1
        True
        >>> goodness_of_fit(1 + random.exponential(0.5, 500), "hill", resamples=200) > 0.1
        False
    """
    if resamples < 1:
        raise UsageError(f"the goodness of fit takes a number of resamples above 0, not {resamples}")
    fit = fit_power_law(eigenvalues, method, xmin=xmin, xmax=xmax)
    values = np.sort(np.asarray(eigenvalues, dtype=np.float64).ravel())
    values = values[(values > 0) & (values <= fit.lambda_max)]
    law = fit if xmax is None else replace(fit, alpha=_cut_exponent(values, fit, xmax))
    random = np.random.default_rng((seed, _GOF))
    searched = xmin is None and method in ("ks", "fix_fingers", "clip_xmax")
    draws = values.size if searched else fit.num_tail
    reached = 0
    for count in _portions(resamples, draws):
        share = np.sort(random.random((count, draws)), axis=1)
        if searched:
            D = fit_rows(semiparametric_sample(values, law, share, xmax), method).D
        else:
            D = _distances_of_given_tail(law, share, xmax)
        reached += int(np.count_nonzero(D >= fit.D))
    return reached / resamples


def semiparametric_sample(values: Vector, fit: PowerLawFit, share: Vector, xmax: float | None = None) -> Vector:
    """Spectra whose tail is the fitted power law, and whose eigenvalues below λ_min are those of `values`.

    Args:
        values: eigenvalues that were fitted, (K,), ascending.
        fit: fitted power law.
        share: share of the law that lies above each eigenvalue, (B, n) numbers from 0 to 1, ascending in each row.
        xmax: eigenvalue at which the law is cut; None for the whole law.

    Returns:
        Eigenvalues, (B, n), ascending in each row.

    Examples:
        >>> import numpy as np
        >>> from htsr.spectra.resampling import semiparametric_sample
        >>> from htsr.spectra.tail import fit_power_law
        >>> fit = fit_power_law([1.0, 2.0, 4.0, 8.0], xmin=4.0)
        >>> semiparametric_sample(np.array([1.0, 2.0, 4.0, 8.0]), fit, np.array([[0.5, 0.6, 0.9]]))
        array([[1., 2., 4.]])
    """
    body = values[values < fit.lambda_min]
    above = 1 - body.size / values.size
    # one uniform number does for both choices: below n/K it is that much of the tail's own share
    rows = _tail_of(fit, share / above, xmax)
    if body.size:
        index = ((1 - share) * values.size).astype(np.intp)
        rows = np.where(share <= above, rows, body[np.minimum(index, body.size - 1)])
    return rows[:, ::-1]


def _tail_of(fit: PowerLawFit, share: Vector, xmax: float | None) -> Vector:
    """Eigenvalues above which `share` of a fitted power law lies, λ_min where that is all or more; (B, n)."""
    share = np.clip(share, _SMALLEST_SHARE, 1.0)
    if xmax is not None:
        beyond = (xmax / fit.lambda_min) ** (1 - fit.alpha)
        share = beyond + share * (1 - beyond)
    with np.errstate(over="ignore"):
        values = fit.lambda_min * share ** (1 / (1 - fit.alpha))
    return np.minimum(values, min(xmax or np.inf, np.finfo(np.float64).max))  # infinite ones would be none


def _cut_exponent(values: Vector, fit: PowerLawFit, xmax: float) -> float:
    """Exponent of maximum likelihood of the power law on [λ_min, xmax], at least 1.

    With a = α-1 and L = ln(xmax/λ_min) the mean of ln(λ/λ_min) is 1/a - L/(e^(aL) - 1), which falls as a grows.
    """
    from scipy.optimize import brentq

    L = float(np.log(xmax / fit.lambda_min))
    n = fit.num_tail - (fit.method == "hill")  # which counts λ_min itself
    mean = float(np.log(values[values >= fit.lambda_min] / fit.lambda_min).sum()) / n
    if mean >= (0.5 - _FLAT) * L:
        return 1.0 + _FLAT / L
    if mean * _STEEP <= L:  # nothing lies beyond xmax
        return 1.0 + 1.0 / mean
    return 1.0 + float(brentq(lambda u: 1 / u - 1 / np.expm1(u) - mean / L, _FLAT, _STEEP)) / L


def _distances_of_given_tail(fit: PowerLawFit, share: Vector, xmax: float | None) -> Vector:
    """(B,) D of samples of a tail whose λ_min is not searched for, from (B, n) ascending uniform numbers."""
    if fit.method == "hill":  # whose tail begins with λ_min itself; over the smallest the others are a sample again
        share = share / share[:, -1:]
    return fit_rows(_tail_of(fit, share[:, ::-1], xmax), xmin=fit.lambda_min).D


def _portions(resamples: int, size: int) -> Iterator[int]:
    """How many resamples of `size` eigenvalues to fit at a time."""
    most = max(1, _TOGETHER // max(size, 1))
    while resamples > 0:
        yield min(most, resamples)
        resamples -= most
