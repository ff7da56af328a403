"""The exact renormalization group (ERG) or trace-log condition of SETOL, and the effective correlation space (ECS).

Eigenvalues are rescaled so that their mean is one, λ̃ = λ·K/Σλ. Adding ln λ̃ from the largest down, the running sum
rises, then falls, and for a matrix of full rank always crosses zero: the ECS ends there, and det X̃ = 1 on it by
construction. What informs is where that crossing lies relative to the power-law tail: the mean of ln λ̃ over the
power-law tail (`trace_log`) is 0 exactly where both tails are the same, positive where the power-law tail is smaller
than the ECS, negative where it is larger.

For an exact power law trace_log = ln λ̃_min + 1/(α-1).

Source: SETOL (arXiv 2507.17912), §5. Sums of logarithms stand for the determinant, which over- or underflows.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class ERG:
    """The trace-log condition on one ESD of K eigenvalues.

    Attributes:
        num: number of eigenvalues in the ECS: the smallest k for which the sum of the k largest ln λ̃ is below 0; 0
            where the sum does not cross zero.
        lambda_erg: smallest eigenvalue of the ECS, λ_ERG, in the ESD's own units; NaN without a crossing.
        lambda_erg_rescaled: the same eigenvalue rescaled, λ̃_ERG.
        trace_log: mean of ln λ̃ over the power-law tail; 0 is ideal. The primary ERG number.
        logdet: sum of ln λ̃ over the power-law tail.
        delta_lambda_min: λ̃_min of the power law minus λ̃_ERG; 0 is ideal, NaN without a crossing.
        log_lambda_ratio: logarithm ln(λ_min / λ_ERG); 0 is ideal, NaN without a crossing.
        gap: `num` minus the number of eigenvalues in the power-law tail; NaN without a crossing.
        gap_fraction: `gap` / K; NaN without a crossing.
        crossing: whether the sum crosses zero; False where it ends before, as for a low-rank or zero-padded matrix.
    """

    num: int
    lambda_erg: float
    lambda_erg_rescaled: float
    trace_log: float
    logdet: float
    delta_lambda_min: float
    log_lambda_ratio: float
    gap: float
    gap_fraction: float
    crossing: bool


def erg(eigenvalues: npt.NDArray[np.float64], lambda_min: float) -> ERG:
    """The ERG condition of an ESD against its power-law tail λ ≥ `lambda_min`.

    Args:
        eigenvalues: (K,) float64, non-negative, ascending, not all zero; zeros count in K.
        lambda_min: smallest eigenvalue of the power-law tail, in the same units.

    Returns:
        The `ERG` of the spectrum.

    Source: SETOL (arXiv 2507.17912), §5.

    Examples:
        >>> import numpy as np
        >>> from htsr.spectra.erg import erg
        >>> spectrum = np.array([0.25, 1.0, 4.0]) * (3 / 5.25)  # mean 1, so that λ̃ = λ
        >>> erg(spectrum, lambda_min=0.5).num  # ln λ̃ from the largest down: 0.83 - 0.56 - 1.95 < 0
        3
        >>> power_law = np.sort((np.arange(1, 1001) / 1001) ** -0.5)  # α = 3
        >>> λ_min = power_law[0] * 1000 / power_law.sum()
        >>> found = erg(power_law, power_law[0])
        >>> round(found.trace_log, 2), round(float(np.log(λ_min)) + 1 / (3 - 1), 2)
        (-0.17, -0.17)
    """
    K = eigenvalues.size
    positive = eigenvalues[eigenvalues > 0]
    scale = K / float(positive.sum())
    descending = positive[::-1] * scale
    running = np.cumsum(np.log(descending))  # logarithms of determinants, which themselves over- or underflow
    tail = int(np.count_nonzero(positive >= lambda_min))
    logdet = float(running[tail - 1]) if tail else np.nan

    below = np.flatnonzero(running < 0)
    crossing = below.size > 0
    num = int(below[0]) + 1 if crossing else 0
    rescaled = float(descending[num - 1]) if crossing else np.nan
    return ERG(
        num=num,
        lambda_erg=rescaled / scale,
        lambda_erg_rescaled=rescaled,
        trace_log=logdet / tail if tail else np.nan,
        logdet=logdet,
        delta_lambda_min=float(lambda_min * scale - rescaled),
        log_lambda_ratio=float(np.log(lambda_min * scale / rescaled)) if crossing else np.nan,
        gap=num - tail if crossing else np.nan,
        gap_fraction=(num - tail) / K if crossing else np.nan,
        crossing=crossing,
    )
