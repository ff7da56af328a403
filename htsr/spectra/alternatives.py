"""Other laws for the tail of an ESD, compared with the power law by likelihood.

Each law is fitted by maximum likelihood to the same tail λ ≥ λ_min and compared by the normalised log-likelihood
ratio R (Vuong's test; for the truncated law, which contains the power law, the χ² of the nested case). R > 0 favours
the power law, R < 0 the other one; p is the probability of so large a ratio if both were equally good.

============================= =========================================
``truncated_power_law`` (TPL)  p(λ) ∝ λ^(-α) exp(-Λλ), Λ ≥ 0
``exponential``                p(λ) ∝ exp(-Λλ)
``stretched_exponential``      p(λ) ∝ λ^(β-1) exp(-(Λλ)^β)
``lognormal``                  ln λ normal
============================= =========================================

The fits and the test are the `powerlaw` package's, but for the truncated law, which that package evaluates with
multi-precision integrals (0.6 s a fit) and from version 2 on with α ≤ 3 only.

The extended truncated power law (E-TPL) of WeightWatcher is the truncated law on the tail that ``fix_fingers`` chooses.

Source: Clauset, Shalizi & Newman (SIAM Rev. 51, 2009), §5; Vuong (Econometrica 57, 1989).
"""

from __future__ import annotations

import threading
import warnings
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from htsr.arrays import Vector
from htsr.errors import MatrixError

LAWS = ("truncated_power_law", "exponential", "stretched_exponential", "lognormal")
SIGNIFICANT = 0.05
_STEPS = 2000
_lock = threading.Lock()  # `powerlaw` holds the interpreter anyway, and warning filters are global


@dataclass(frozen=True)
class Comparison:
    """The power law against one other law on one tail.

    Attributes:
        R: normalised log-likelihood ratio; positive favours the power law.
        p: significance of R's sign.
        delta_aic: Akaike's criterion of the other law minus that of the power law; negative favours the other law.
        parameters: of the other law, by name.
    """

    R: float
    p: float
    delta_aic: float
    parameters: dict[str, float]


def compare_laws(tail: npt.ArrayLike) -> dict[str, Comparison]:
    """Compare the power law with each of `LAWS` on one tail.

    Args:
        tail: (n,) eigenvalues > 0, in any order and unit; the smallest is λ_min.

    Returns:
        A `Comparison` for each of `LAWS`, by its name. Its parameters are those of the law of λ/λ_min.

    Raises:
        MatrixError: fewer than 2 distinct positive eigenvalues, or one that is not (status ``degenerate``).
    """
    values = np.sort(np.asarray(tail, dtype=np.float64).ravel())
    if values.size < 2 or not 0 < values[0] < values[-1]:
        raise MatrixError("degenerate", "laws are compared on 2 or more distinct eigenvalues, all > 0")
    values = values / values[0]  # the laws' shapes do not depend on the unit
    alpha, Lambda = fit_truncated(values)
    with _lock, warnings.catch_warnings(), np.errstate(all="ignore"):
        # those of the fits alone, for filters and streams belong to the whole process, other threads included
        warnings.filterwarnings("ignore", module="powerlaw|scipy")
        import powerlaw

        fit = powerlaw.Fit(values, xmin=1.0, verbose=False)
        power = np.asarray(fit.power_law.loglikelihoods(values), dtype=np.float64)
        truncated = _truncated_loglikelihoods(values, alpha, Lambda)
        result = {LAWS[0]: _compare(power, truncated, {"alpha": alpha, "Lambda": Lambda}, nested=True)}
        for law in LAWS[1:]:
            other = getattr(fit, law)
            likelihoods = np.asarray(other.loglikelihoods(values), dtype=np.float64)
            names = (other.parameter1_name, other.parameter2_name, other.parameter3_name)
            numbers = (other.parameter1, other.parameter2, other.parameter3)
            parameters = {str(k): float(v) for k, v in zip(names, numbers, strict=True) if k is not None}
            result[law] = _compare(power, likelihoods, parameters, nested=False)
    return result


def best_law(comparisons: dict[str, Comparison]) -> str:
    """The law of lowest AIC among those significantly (p < 0.05) better than the power law; else ``power_law``.

    Args:
        comparisons: what `compare_laws` returned.
    """
    better = {law: c.delta_aic for law, c in comparisons.items() if c.R < 0 and c.p < SIGNIFICANT}
    return min(better, key=better.__getitem__) if better else "power_law"


def _compare(power: Vector, other: Vector, parameters: dict[str, float], *, nested: bool) -> Comparison:
    import powerlaw

    delta_aic = 2 * (len(parameters) - 1) + 2 * float(power.sum() - other.sum())
    if np.allclose(power, other, rtol=0, atol=1e-9):  # the same law; the ratio would be one of rounding errors
        return Comparison(0.0, 1.0, delta_aic, parameters)
    R, p = powerlaw.loglikelihood_ratio(power.copy(), other.copy(), nested=nested, normalized_ratio=True)
    return Comparison(float(R), float(p), delta_aic, parameters)


def fit_truncated(tail: npt.ArrayLike) -> tuple[float, float]:
    """Maximum-likelihood α and Λ of p(λ) ∝ λ^(-α) exp(-Λλ) on λ ≥ min(tail).

    Args:
        tail: (n,) eigenvalues > 0, not all equal, in any order and unit; Λ is in the inverse of that unit.

    Returns:
        α (any real number, the cut-off makes the law proper) and Λ ≥ 0; Λ = 0 where the power law itself is best.
    """
    from scipy.optimize import minimize

    values = np.asarray(tail, dtype=np.float64)
    unit = values.min()
    x = values / unit
    mean_log, mean = float(np.log(x).mean()), float(x.mean())
    power = 1 + 1 / mean_log

    def loss(parameters: Vector) -> float:  # mean negative log-likelihood
        alpha, log_cut = parameters
        cut = np.exp(log_cut)
        return float(alpha * mean_log + cut * mean + np.log(_normaliser(alpha, cut)))

    bounds = [(-20.0, 60.0), (np.log(1e-12), np.log(50.0))]
    starts = [(power, np.log(1e-3 / mean)), (power / 2, np.log(1 / mean))]
    best = min((minimize(loss, start, method="L-BFGS-B", bounds=bounds) for start in starts), key=lambda r: r.fun)
    if best.fun >= power * mean_log - np.log(power - 1) - 1e-7:  # no better than the power law, which has Λ = 0
        return float(power), 0.0
    return float(best.x[0]), float(np.exp(best.x[1]) / unit)


def _normaliser(alpha: float, cut: float) -> float:
    """∫_1^∞ x^(-α) exp(-Λx) dx, by Simpson's rule in ln x."""
    # e^{-Λx} ends the integrand where Λx > 40; a power law with α > 1 ends it where x^(1-α) < e^{-40}
    end = np.log(max(40.0 / cut, 2.0))
    if alpha > 1:
        end = min(end, 40.0 / (alpha - 1))
    t = np.linspace(0.0, end, _STEPS + 1)
    integrand = np.exp((1 - alpha) * t - cut * np.exp(t))
    simpson = integrand[0] + 4 * integrand[1::2].sum() + 2 * integrand[2:-1:2].sum() + integrand[-1]
    return float(max(simpson * end / (3 * _STEPS), np.finfo(float).tiny))


def _truncated_loglikelihoods(x: Vector, alpha: float, Lambda: float) -> Vector:
    normaliser = _normaliser(alpha, Lambda) if Lambda > 0 else 1 / (alpha - 1)
    return -alpha * np.log(x) - Lambda * x - np.log(normaliser)
