"""The random part of a spectrum: Marchenko-Pastur bulk, spikes, correlation traps.

A pure-noise N × M matrix with entry variance σ² and aspect ratio Q = N/M ≥ 1 has the Marchenko-Pastur (MP) ESD: λ/N is
distributed between σ²(1 ± 1/√Q)². Its largest eigenvalue scatters about

    μ = σ²·(√(N-1) + √M)²      with scale      s = σ²·(√(N-1) + √M)·(1/√(N-1) + 1/√M)^(1/3)

by the Tracy-Widom law TW₁ (Johnstone 2001). An eigenvalue above μ + q·s, q the 99 % quantile, is a spike.

Permuting the entries of W (`htsr.spectra.permutation`) destroys all correlation and keeps the entries. Eigenvalues of
the permuted matrix beyond its own bulk edge are correlation traps: they come from single large entries or from a
shifted mean, and a mean shift makes one as soon as |mean W|/σ > (N·M)^(-1/4).

Sources: HT-SR (Martin & Mahoney, JMLR 2021); SETOL (arXiv 2507.17912); Johnstone (Ann. Statist. 29, 2001).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from htsr.arrays import Vector

TW1_99 = 2.0234
_QUANTILES = np.linspace(0.05, 0.95, 91)
_ROUNDS = 50


@dataclass(frozen=True)
class Bulk:
    """The MP bulk of one ESD.

    Attributes:
        sigma: standard deviation of the entries that make the bulk, σ_MP.
        lambda_plus: upper bulk edge σ²(√N + √M)², in units of the eigenvalues.
        lambda_minus: lower bulk edge σ²(√N - √M)².
        threshold: value above which an eigenvalue is a spike: the Tracy-Widom 99 % quantile of a pure-noise matrix
            (`tw_threshold`).
        num_spikes: number of eigenvalues above `threshold`.
        mp_softrank: MP soft rank lambda_plus / λ_max; 1 and above for noise.
        distance: Kolmogorov-Smirnov distance between the eigenvalues below `threshold` and the MP law. A bulk that
            is not MP at all has a large one, and its σ means little.
    """

    sigma: float
    lambda_plus: float
    lambda_minus: float
    threshold: float
    num_spikes: int
    mp_softrank: float
    distance: float


@lru_cache(maxsize=64)
def _mp_table(Q: float, nodes: int = 4001) -> tuple[Vector, Vector]:
    """Grid of x = λ/(N σ²) and the MP distribution function on it.

    With x = 1 + 1/Q + 2 cos(θ)/√Q the density is 2 sin²θ/(π x) dθ, smooth also at the edges.
    """
    theta = np.linspace(np.pi, 0.0, nodes)
    x = 1 + 1 / Q + 2 * np.cos(theta) / Q**0.5
    with np.errstate(invalid="ignore", divide="ignore"):
        density = 2 * np.sin(theta) ** 2 / (np.pi * x)
    if Q == 1:  # sin²θ/(2 + 2cosθ) = (1 - cosθ)/2
        density = (1 - np.cos(theta)) / np.pi
    steps = (density[1:] + density[:-1]) / 2 * (theta[:-1] - theta[1:])
    cdf = np.concatenate([[0.0], np.cumsum(steps)])
    return x, cdf / cdf[-1]


def mp_quantile(probability: float | Vector, Q: float) -> Vector:
    """Quantiles of the MP law of λ/(N σ²).

    Args:
        probability: probability in [0, 1]; a number, or an array of any shape.
        Q: aspect ratio N/M ≥ 1.

    Returns:
        float64, in the shape of `probability`; from a table of 4001 nodes.

    Examples:
        >>> import numpy as np
        >>> from htsr.spectra.bulk import mp_quantile
        >>> mp_quantile(np.array([0.0, 1.0]), Q=4.0).tolist()  # the edges (1 ± 1/√Q)²
        [0.25, 2.25]
    """
    x, cdf = _mp_table(float(Q))
    return np.asarray(np.interp(probability, cdf, x))


def mp_cdf(value: float | Vector, Q: float) -> Vector:
    """Distribution function of the MP law of λ/(N σ²).

    Args:
        value: value of λ/(N σ²); a number, or an array of any shape.
        Q: aspect ratio N/M ≥ 1.

    Returns:
        float64, in the shape of `value`; from a table of 4001 nodes.

    Examples:
        >>> from htsr.spectra.bulk import mp_cdf
        >>> round(float(mp_cdf(1.0, Q=1.0)), 4)  # 1/3 + √3/(2π)
        0.609
    """
    x, cdf = _mp_table(float(Q))
    return np.asarray(np.interp(value, x, cdf))


def tw_threshold(sigma: float, M: int, N: int, pieces: int = 1) -> float:
    """The value that the largest eigenvalue of a pure-noise matrix exceeds with a probability of 1 %.

    Args:
        sigma: standard deviation of the entries.
        M: smaller side of the matrix.
        N: larger side of the matrix.
        pieces: number of pooled matrices; the probability is 1 % that any one of them exceeds the value.

    Returns:
        The threshold μ + q·s of the module's text, in units of the eigenvalues of WᵀW.

    Source: Johnstone (Ann. Statist. 29, 2001), theorem 1.1.

    Examples:
        >>> import numpy as np
        >>> from htsr.spectra.bulk import tw_threshold
        >>> noise = np.random.default_rng(0).standard_normal((500, 40, 20))
        >>> largest = np.linalg.norm(noise, ord=2, axis=(1, 2)) ** 2
        >>> float(np.mean(largest > tw_threshold(1.0, M=20, N=40)))  # about 0.01
        0.006
    """
    root_n, root_m = max(N - 1, 1) ** 0.5, M**0.5
    centre = (root_n + root_m) ** 2
    scale = (root_n + root_m) * (1 / root_n + 1 / root_m) ** (1 / 3)
    return sigma**2 * (centre + tw1_quantile(0.01 / pieces) * scale)


@lru_cache(maxsize=64)
def tw1_quantile(tail: float) -> float:
    """Upper quantile of the Tracy-Widom law TW₁, P(X > quantile) = `tail`.

    Shifted-gamma approximation of Chiani (2014, J. Multivar. Anal. 129), good to 0.01 for tails from 0.1 to 1e-6.

    Examples:
        >>> from htsr.spectra.bulk import tw1_quantile
        >>> round(tw1_quantile(0.05), 2)  # 0.9793 in tables
        0.98
    """
    if tail == 0.01:
        return TW1_99
    from scipy.special import gammainccinv

    return float(0.186054 * gammainccinv(46.446, tail) - 9.84801)


def fit_bulk(eigenvalues: Vector, M: int, N: int, pieces: int = 1) -> Bulk:
    """Fit the MP law to the bulk of an ESD, spikes excluded.

    σ starts from the median and is then refitted to the quantiles of what lies below the spike threshold, until the
    number of spikes stays; heavy tails therefore do not widen the bulk.

    Args:
        eigenvalues: (K,) float64, ascending, not all 0, of K/M matrices of shape N × M.
        M: smaller side of a matrix.
        N: larger side of a matrix.
        pieces: number of pooled matrices, K/M.

    Returns:
        The `Bulk`; a heavy tail makes many spikes and not a wide bulk.

    Examples:
        >>> import numpy as np
        >>> from htsr.spectra.bulk import fit_bulk
        >>> random = np.random.default_rng(0)
        >>> W = random.standard_normal((400, 200))
        >>> signal = 5 * np.outer(random.standard_normal(400), random.standard_normal(200)) / 20
        >>> for matrix in (W, W + signal):
        ...     bulk = fit_bulk(np.linalg.eigvalsh(matrix.T @ matrix), M=200, N=400)
        ...     print(round(bulk.sigma, 2), bulk.num_spikes)
        1.0 0
        1.0 1
    """
    Q = N / M
    x = eigenvalues / N
    variance = float(np.median(x) / mp_quantile(0.5, Q))  # a median is moved little by the few spikes above it
    if variance == 0.0:  # more than half of the spectrum is zero
        variance = float(x.mean())
    expected = mp_quantile(_QUANTILES, Q)
    seen: set[int] = set()
    while len(seen) < _ROUNDS:
        threshold = tw_threshold(variance**0.5, M, N, pieces)
        below = int(np.searchsorted(eigenvalues, threshold, side="right"))
        if below in seen or below < 2:
            break
        seen.add(below)
        # least squares of observed against expected quantiles; the outer 5 % at each edge scatter most
        observed = np.interp(_QUANTILES * (below - 1), np.arange(below), x[:below])
        variance = float(observed @ expected / (expected @ expected))
    edge = variance * N
    return Bulk(
        sigma=variance**0.5,
        lambda_plus=edge * (1 + Q**-0.5) ** 2,
        lambda_minus=edge * (1 - Q**-0.5) ** 2,
        threshold=threshold,
        num_spikes=int(eigenvalues.size - below),
        mp_softrank=edge * (1 + Q**-0.5) ** 2 / float(eigenvalues[-1]),
        distance=_ks_distance(mp_cdf(x[:below] / variance, Q)) if below and variance > 0 else 1.0,
    )


def _ks_distance(uniform: Vector) -> float:
    n = uniform.size
    return float(max((np.arange(1, n + 1) / n - uniform).max(), (uniform - np.arange(n) / n).max()))


def jensen_shannon_distance(a: Vector, b: Vector) -> float:
    """√ of the Jensen-Shannon divergence (nats) between two ESDs of equal size, each sorted and divided by its sum.

    The k-th smallest eigenvalue's share of the trace is compared with its counterpart's: no binning is involved.
    In [0, √ln 2]; 0 for equal spectra up to scale.

    Args:
        a: first ESD, (K,) ≥ 0, ascending, not all 0.
        b: second ESD, (K,) likewise.

    Source: Lin (IEEE Trans. Inf. Theory 37, 1991); WeightWatcher's ``rand_distance`` bins the ESDs instead.

    Examples:
        >>> import numpy as np
        >>> from htsr.spectra.bulk import jensen_shannon_distance
        >>> jensen_shannon_distance(np.array([1.0, 2.0, 3.0]), np.array([2.0, 4.0, 6.0]))
        0.0
        >>> round(jensen_shannon_distance(np.array([0.0, 0.0, 1.0]), np.array([1.0, 1.0, 1.0])), 3)
        0.564
    """
    p, q = a / a.sum(), b / b.sum()
    mean = (p + q) / 2

    def divergence(u: Vector) -> float:
        return float((u[u > 0] * np.log(u[u > 0] / mean[u > 0])).sum())

    return max((divergence(p) + divergence(q)) / 2, 0.0) ** 0.5


def signal_to_noise(eigenvalues: Vector, lambda_plus: float) -> float:
    """Σ σ_i above the Marchenko-Pastur edge over Σ σ_i below it, divided by σ_max; σ_i = √λ_i are singular values.

    Infinite where nothing lies below the edge. Spectrum (arXiv 2406.06623) means this ratio and computes another: its
    edge IQR(σ_i)/1.349·(1 + √(M/N)) lacks a √N, so that noise lies above it. The division by σ_max is Spectrum's, and
    lets the score depend on the units of the weights; `htsr.select` goes without.

    Args:
        eigenvalues: (K,) in any order, not all 0.
        lambda_plus: upper edge of the bulk, as in `Bulk`, in units of the eigenvalues.

    Examples:
        >>> import numpy as np
        >>> from htsr.spectra.bulk import signal_to_noise
        >>> round(signal_to_noise(np.array([1.0, 4.0, 100.0]), lambda_plus=5.0), 6)  # 10 / (1 + 2) / 10
        0.333333
    """
    singular = np.sqrt(np.maximum(eigenvalues, 0.0))
    above = eigenvalues > lambda_plus
    noise = float(singular[~above].sum())
    return float(singular[above].sum()) / noise / float(singular.max()) if noise else float("inf")
