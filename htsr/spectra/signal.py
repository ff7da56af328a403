"""How much of a spectrum is signal: numbers of one matrix beside what Gaussian noise of its shape has.

=============== ==================================== ======================================== =================
name            value                                null: the same of Gaussian noise         score
=============== ==================================== ======================================== =================
``snr``         Σ σ above the edge / Σ σ below it    0 in 99 of 100 matrices                  value
``alpha``       α of Hill's fit                      α of noise (`htsr.spectra.null`)         null - value
``erg``         share of eigenvalues in the ECS      that share of the Marchenko-Pastur law   null - value
``stable_rank`` Σλ / λ_max                           M·N / (√M + √N)²                         ln(null / value)
``outliers``    share of entries above τ times mean  erfc(τ/√π), equal inputs                 value - null
=============== ==================================== ======================================== =================

A score is larger for more signal and 0 for noise, in the mean or, for ``snr``, nearly always. ``outliers`` needs
activations (`htsr.calibration.outliers`); the null is that of Gaussian weights whose inputs are all of one size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import lru_cache

import numpy as np

from htsr.arrays import Vector
from htsr.errors import MatrixError
from htsr.spectra.bulk import fit_bulk, mp_quantile
from htsr.spectra.erg import erg
from htsr.spectra.null import alpha_null
from htsr.spectra.tail import fit_power_law


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
    alpha, null = fit_power_law(values[values > 0], "hill").alpha, alpha_null(M, N, pieces, "hill").alpha
    return alpha, null, null - alpha


def _erg(values: Vector, M: int, N: int, pieces: int) -> tuple[float, float, float]:
    found = erg(values, float(values[-1]))
    if not found.crossing:
        raise MatrixError("no_ecs", "the trace-log condition has no crossing")
    share, null = found.num / values.size, ecs_share_of_noise(M / N)
    return share, null, null - share


def _stable_rank(values: Vector, M: int, N: int, pieces: int) -> tuple[float, float, float]:
    rank, null = float(values.sum() / values[-1]), pieces * M * N / (M**0.5 + N**0.5) ** 2
    return rank, null, math.log(null / rank)


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
    points = 20_000
    logs = np.log(np.maximum(mp_quantile((np.arange(points) + 0.5) / points, 1 / ratio), 1e-300))[::-1]
    return float(np.argmax(np.cumsum(logs) < 0)) / points


SIGNALS: Mapping[str, Callable[[Vector, int, int, int], tuple[float, float, float]]] = {
    "snr": signal,
    "alpha": _alpha,
    "erg": _erg,
    "stable_rank": _stable_rank,
}
"""Value, null and score by name, from ascending eigenvalues, M, N and the number of pieces."""
