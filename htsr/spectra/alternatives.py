"""Other laws for the tail of an ESD, compared with the power law by likelihood.

Each law of `htsr.spectra.laws` is fitted by maximum likelihood to the same tail λ ≥ λ_min and compared by the
normalised log-likelihood ratio R = Σ d_i / (√n·sd(d)), d_i the difference of both log densities at λ_i. R > 0 favours
the power law, R < 0 the other one; p is the probability of so large a ratio if both were equally good: erfc(|R|/√2)
(Vuong's test), and for the truncated law, which contains the power law, that of the χ² law of 2Σd_i.

The test is that of the `powerlaw` package, and so are its numbers where that package has found the maximum. Version 2.0
bounds α of the power law and of the truncated law by 3, and compares a steeper tail with the wrong power law; its
optimiser often stops short, and then the other law looks worse than it is; and densities that underflow spoil its sums.
Here every fit is the maximum. A power law is a limit of the stretched exponential and of the lognormal law too, so that
R of these is never positive: it is 0, with p = 1, where the tail is no lighter than a power law.

The extended truncated power law (E-TPL) of WeightWatcher is the truncated law on the tail that ``fix_fingers`` chooses.

Source: Clauset, Shalizi & Newman (SIAM Rev. 51, 2009), §5; Vuong (Econometrica 57, 1989).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from htsr.arrays import Vector
from htsr.errors import MatrixError
from htsr.spectra import laws
from htsr.spectra.laws import FittedLaw

LAWS = ("truncated_power_law", "exponential", "stretched_exponential", "lognormal")
SIGNIFICANT = 0.05
_SAME = 1e-9  # log densities that differ by less are those of the same law


@dataclass(frozen=True)
class LikelihoodRatio:
    """The power law against one other law on one tail.

    Attributes:
        R: normalised log-likelihood ratio; positive favours the power law.
        p: significance of R's sign.
        delta_aic: Akaike's criterion of the other law minus that of the power law; negative favours the other law.
        parameters: parameters of the other law, by name.
    """

    R: float
    p: float
    delta_aic: float
    parameters: dict[str, float]


def compare_laws(tail: npt.ArrayLike) -> dict[str, LikelihoodRatio]:
    """Compare the power law with each of `LAWS` on one tail.

    Args:
        tail: (n,) eigenvalues > 0, in any order and unit; the smallest is λ_min.

    Returns:
        A `LikelihoodRatio` for each of `LAWS`, by its name. Its parameters are those of the law of λ/λ_min.

    Raises:
        MatrixError: fewer than 2 eigenvalues are distinct, one is not positive, or the largest is infinite or more than
            1e300 times the smallest (status ``degenerate``).

    Examples:
        >>> import numpy as np
        >>> from htsr.spectra.alternatives import compare_laws
        >>> ratios = compare_laws(5 + np.random.default_rng(0).exponential(2.0, 500))
        >>> ratios["exponential"].R < 0, ratios["exponential"].p < 0.001
        (True, True)
    """
    x, _ = _ratios(tail)  # the laws' shapes do not depend on the unit
    power = laws.power_law(x)
    return {
        "truncated_power_law": likelihood_ratio(power, laws.truncated_power_law(x), nested=True),
        "exponential": likelihood_ratio(power, laws.exponential(x)),
        "stretched_exponential": likelihood_ratio(power, laws.stretched_exponential(x)),
        "lognormal": likelihood_ratio(power, laws.lognormal(x)),
    }


def _ratios(tail: npt.ArrayLike) -> tuple[Vector, float]:
    """λ/λ_min of a tail, (n,) ascending, and λ_min."""
    values = np.sort(np.asarray(tail, dtype=np.float64).ravel())
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        if values.size < 2 or not (0 < values[0] < values[-1] and values[-1] / values[0] <= laws.LARGEST):
            why = f"laws are fitted to 2 or more distinct eigenvalues, all > 0, within a factor of {laws.LARGEST:g}"
            raise MatrixError("degenerate", why)
    return values / values[0], float(values[0])


def likelihood_ratio(power: FittedLaw, other: FittedLaw, *, nested: bool = False) -> LikelihoodRatio:
    """Vuong's test of a power law against another law on the same tail.

    Args:
        power: the power law, fitted.
        other: the other law, fitted to the same n eigenvalues.
        nested: whether the other law contains the power law; R is then never positive, and p that of a χ² law of one
            degree of freedom.

    Examples:
        >>> import numpy as np
        >>> from htsr.spectra import laws
        >>> from htsr.spectra.alternatives import likelihood_ratio
        >>> x = np.exp(np.random.default_rng(0).exponential(1.0, 500))
        >>> likelihood_ratio(laws.power_law(x), laws.exponential(x)).R > 0
        True
    """
    difference = power.log_density - other.log_density
    total = float(difference.sum())
    delta_aic = 2 * (len(other.parameters) - len(power.parameters)) + 2 * total
    # the ratio would be one of rounding errors; a law that contains the other is no less likely but for them
    if float(np.abs(difference).max()) <= _SAME or (nested and total >= 0):
        return LikelihoodRatio(0.0, 1.0, delta_aic, other.parameters)
    R = total / (math.sqrt(difference.size) * float(difference.std()))
    # the χ² law of one degree of freedom is that of a squared normal number
    p = math.erfc(math.sqrt(abs(total))) if nested else math.erfc(abs(R) / math.sqrt(2))
    return LikelihoodRatio(R, p, delta_aic, other.parameters)


def best_law(ratios: dict[str, LikelihoodRatio]) -> str:
    """The law of lowest AIC among those significantly (p < 0.05) better than the power law; else ``power_law``.

    Args:
        ratios: likelihood ratios from `compare_laws`.

    Examples:
        >>> import numpy as np
        >>> from htsr.spectra.alternatives import best_law, compare_laws
        >>> best_law(compare_laws(np.exp(np.random.default_rng(0).exponential(1.0, 500))))
        'power_law'
    """
    better = {law: ratio.delta_aic for law, ratio in ratios.items() if ratio.R < 0 and ratio.p < SIGNIFICANT}
    return min(better, key=better.__getitem__) if better else "power_law"


def fit_truncated(tail: npt.ArrayLike) -> tuple[float, float]:
    """Maximum-likelihood α and Λ of p(λ) ∝ λ^(-α) exp(-Λλ) on λ ≥ min(tail).

    Args:
        tail: (n,) eigenvalues > 0, not all equal, in any order and unit; Λ is in the inverse of that unit.

    Returns:
        α (any real number, the cut-off makes the law proper) and Λ ≥ 0; Λ = 0 where the power law itself is best.

    Raises:
        MatrixError: fewer than 2 eigenvalues are distinct, one is not positive, or the largest is infinite or more than
            1e300 times the smallest (status ``degenerate``).

    Examples:
        >>> import numpy as np
        >>> from htsr.spectra.alternatives import fit_truncated
        >>> alpha, Lambda = fit_truncated(3.0 * np.exp(np.random.default_rng(0).exponential(0.5, 1000)))
        >>> print(f"{alpha:.1f} {Lambda:.3f}")
        3.0 0.000
    """
    x, unit = _ratios(tail)
    parameters = laws.truncated_power_law(x).parameters
    return parameters["alpha"], parameters["Lambda"] / unit
