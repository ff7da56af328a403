"""How much of a spectrum is signal: numbers of one matrix beside what Gaussian noise of its shape passes.

=============== ==================================== ========================================= =================
name            value                                null                                      score
=============== ==================================== ========================================= =================
``snr``         Σ σ above the edge / Σ σ below it    0                                         value
``alpha``       α of Hill's fit                      1 + 1/(mean + 3 sd of 1/(α - 1) of noise) null - value
``erg``         share of eigenvalues in the ECS      mean - 3 sd of noise, and one eigenvalue  null - value
``stable_rank`` Σλ / λ_max                           pieces·M·N over the 99 % of λ_max         ln(null / value)
``outliers``    share of entries above τ times mean  99 % of Binomial(size, erfc(τ/√π)) / size value - null
=============== ==================================== ========================================= =================

A score is larger for more signal. It is above 0 for at most about one of 100 matrices of noise (``snr`` of a 64 × 64
matrix: 5). The 99 % quantile of λ_max is Tracy and Widom's (`htsr.spectra.bulk`), means and standard deviations are
drawn (`noise_of`). ``outliers`` needs activations (`htsr.calibration.outliers`); its null is that of Gaussian weights
whose inputs are all of one size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import lru_cache

import numpy as np

from htsr.arrays import Vector
from htsr.errors import MatrixError
from htsr.spectra.bulk import fit_bulk, mp_quantile, tw_threshold
from htsr.spectra.erg import erg
from htsr.spectra.null import gaussian_eigenvalues
from htsr.spectra.tail import fit_power_law

_SPREADS = 3.0  # standard deviations between noise's mean and what passes for signal
_DRAWS = 64
_SIDE = 256  # smaller side up to which noise is drawn as it is


def signal(values: Vector, M: int, N: int, pieces: int) -> tuple[float, float, float]:
    """Signal-to-noise ratio of a spectrum: Σ √λ above the edge of noise over Σ √λ below it; its null; its score.

    The edge is the value that the largest eigenvalue of noise exceeds with a probability of 1 %
    (`htsr.spectra.bulk.tw_threshold`), with σ from the quantiles of the bulk, so the ratio of noise is 0. It does not
    depend on the units of the weights.

    Args:
        values: eigenvalues, (K,) ascending.
        M: smaller side of a matrix.
        N: larger side of a matrix.
        pieces: number of pooled matrices.

    Raises:
        MatrixError: all eigenvalues lie above the edge, so there is no noise to compare with.

    Examples:
        >>> import numpy as np
        >>> from htsr.spectra.signal import signal
        >>> noise = np.random.default_rng(0).standard_normal((200, 100))
        >>> signal(np.linalg.svd(noise, compute_uv=False)[::-1] ** 2, 100, 200, 1)
        (0.0, 0.0, 0.0)
    """
    bulk = fit_bulk(values, M, N, pieces)
    singular = np.sqrt(np.maximum(values, 0.0))
    above = values > bulk.threshold
    noise = float(singular[~above].sum())
    if noise <= 0:
        raise MatrixError("no_bulk", "all eigenvalues lie above the edge of noise")
    ratio = float(singular[above].sum()) / noise
    return ratio, 0.0, ratio


def _alpha(values: Vector, M: int, N: int, pieces: int) -> tuple[float, float, float]:
    alpha = fit_power_law(values[values > 0], "hill").alpha
    mean, sd = noise_of(M, N, pieces)[0]
    null = 1 + 1 / (mean + _SPREADS * sd)
    return alpha, null, null - alpha


def _erg(values: Vector, M: int, N: int, pieces: int) -> tuple[float, float, float]:
    found = erg(values, float(values[-1]))
    if not found.crossing:
        raise MatrixError("no_ecs", "the trace-log condition has no crossing")
    mean, sd = noise_of(M, N, pieces)[1]
    share, null = found.num / values.size, mean - _SPREADS * sd - 1 / values.size  # counts are whole
    return share, null, null - share


def _stable_rank(values: Vector, M: int, N: int, pieces: int) -> tuple[float, float, float]:
    rank, null = float(values.sum() / values[-1]), pieces * M * N / tw_threshold(1.0, M, N, pieces)
    return rank, null, math.log(null / rank)


@lru_cache(maxsize=256)
def noise_of(M: int, N: int, pieces: int) -> tuple[tuple[float, float], tuple[float, float]]:
    """Mean and standard deviation, in Gaussian noise, of 1/(α - 1) of Hill's fit and of the ECS's share.

    Large matrices are drawn with a smaller side of 256 and the same aspect ratio: the standard deviation of such
    numbers, which depend smoothly on all eigenvalues, and the distance of their mean from that of the Marchenko-Pastur
    law go with 1/M. The standard deviation goes with 1/√pieces.

    Args:
        M: smaller side of a matrix.
        N: larger side of a matrix.
        pieces: number of pooled matrices.

    Examples:
        >>> from htsr.spectra.signal import noise_of
        >>> [(round(mean, 3), round(sd, 3)) for mean, sd in noise_of(64, 64, 1)]
        [(0.865, 0.039), (0.734, 0.005)]
    """
    side = min(M, _SIDE)
    together = min(pieces, -(-_SIDE // side))
    random = np.random.default_rng((M, N, pieces))
    drawn = gaussian_eigenvalues(side, round(N * side / M), random, _DRAWS * together)
    pooled = np.sort(drawn.reshape(_DRAWS, -1))
    slopes = [1 / (fit_power_law(values, "hill").alpha - 1) for values in pooled]
    shares = [erg(values, float(values[-1])).num / values.size for values in pooled]
    narrower = (together / pieces) ** 0.5

    def at_full_size(found: list[float], limit: float) -> tuple[float, float]:
        mean, sd = float(np.mean(found)), float(np.std(found, ddof=1))
        return limit + (mean - limit) * side / M, sd * narrower * side / M

    return at_full_size(slopes, _hill_of_noise(M / N)), at_full_size(shares, ecs_share_of_noise(M / N))


@lru_cache(maxsize=256)
def ecs_share_of_noise(ratio: float) -> float:
    """Share of the eigenvalues of large noise that lies in the effective correlation space.

    It is the share s for which the mean of ln λ̃ over the largest s of the Marchenko-Pastur law is 0.

    Args:
        ratio: smaller side over larger side of the matrix, M/N.

    Examples:
        >>> from htsr.spectra.signal import ecs_share_of_noise
        >>> round(ecs_share_of_noise(1.0), 3), round(ecs_share_of_noise(0.25), 3)
        (0.731, 0.87)
    """
    logs = _logs_of_noise(ratio)
    return float(np.argmax(np.cumsum(logs) < 0)) / logs.size


def _hill_of_noise(ratio: float) -> float:
    """1/(α - 1) of Hill's fit to large noise: the mean of ln λ over the upper half, less that of the median."""
    logs = _logs_of_noise(ratio)
    upper = logs[: logs.size // 2]
    return float(upper.mean() - upper[-1])


def _logs_of_noise(ratio: float, points: int = 20_000) -> Vector:
    """ln λ̃ of the Marchenko-Pastur law, descending, at `points` equally spaced quantiles."""
    probabilities = (np.arange(points) + 0.5) / points
    return np.log(np.maximum(mp_quantile(probabilities, 1 / ratio), 1e-300))[::-1]


SIGNALS: Mapping[str, Callable[[Vector, int, int, int], tuple[float, float, float]]] = {
    "snr": signal,
    "alpha": _alpha,
    "erg": _erg,
    "stable_rank": _stable_rank,
}
"""Value, null and score by name, from ascending eigenvalues, M, N and the number of pieces."""
