"""Maximum-likelihood fits of the laws that a power-law tail is compared with.

Each is a density of x = λ/λ_min on x ≥ 1; t = ln x, and ⟨·⟩ is the mean over the tail.

============================= ==================================== =============================================
``power_law``                  p(x) ∝ x^(-α)                        α = 1 + 1/⟨t⟩
``exponential``                p(x) ∝ exp(-Λx)                      Λ = 1/(⟨x⟩ - 1)
``stretched_exponential``      p(x) ∝ x^(β-1) exp(-(Λx)^β)          one equation for β
``lognormal``                  p(x) ∝ exp(-(t-μ)²/2σ²)/x            two equations: an exponential family in t, t²
``truncated_power_law`` (TPL)  p(x) ∝ x^(-α) exp(-Λx), Λ ≥ 0        two equations: an exponential family in t, x
============================= ==================================== =============================================

The likelihood of each has one maximum only. That of the last three may lie where the law is the power law: at Λ = 0 for
the truncated law, and in the limits β → 0 and μ → -∞, σ → ∞ for the others. For those two it does so exactly
where ⟨t²⟩ ≥ 2⟨t⟩², the tail being no lighter than a power law.

Source: Clauset, Shalizi & Newman (SIAM Rev. 51, 2009), table 2.1, for the densities.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from htsr.arrays import Vector

_ROUNDS, _HALVINGS = 100, 20
_DEPTH = 40.0  # e^-40 of the density's height is beyond double precision
_PANELS, _ORDER = 16, 20
_OCTAVES: Vector = np.exp2(np.arange(-24.0, 40.0))
_IN_OCTAVE: Vector = 1 + np.arange(17.0) / 16
_MOST = 0.9  # share of b that one step takes away
_HIGHEST = 709.0  # e^t is a float up to there; where the density is seen t is smaller, by `LARGEST`
LARGEST = 1e300  # λ/λ_min up to which laws are fitted
_FLAT = 1e-8  # below it β⟨t⟩ is rounding, and the law the power law


@dataclass(frozen=True)
class FittedLaw:
    """A law fitted to a tail.

    Attributes:
        parameters: the law's parameters by name, those of x = λ/λ_min.
        log_density: natural logarithm of the density of x at each eigenvalue of the tail, (n,).
    """

    parameters: dict[str, float]
    log_density: Vector


def power_law(x: Vector) -> FittedLaw:
    """The power law p(x) ∝ x^(-α).

    Args:
        x: ratios λ/λ_min of the tail, (n,), all ≥ 1, not all 1.

    Examples:
        >>> import numpy as np
        >>> from htsr.spectra.laws import power_law
        >>> power_law(np.exp([0.0, 1.0, 2.0])).parameters
        {'alpha': 2.0}
    """
    t = np.log(x)
    mean = float(t.mean())
    return FittedLaw({"alpha": 1 + 1 / mean}, -math.log(mean) - (1 + 1 / mean) * t)


def exponential(x: Vector) -> FittedLaw:
    """The exponential law p(x) ∝ exp(-Λx).

    Args:
        x: ratios λ/λ_min of the tail, (n,), all ≥ 1, not all 1.

    Examples:
        >>> import numpy as np
        >>> from htsr.spectra.laws import exponential
        >>> exponential(np.array([1.0, 3.0, 5.0])).parameters
        {'Lambda': 0.5}
    """
    above = x - 1
    mean = float(above.mean())
    return FittedLaw({"Lambda": 1 / mean}, -math.log(mean) - above / mean)


def stretched_exponential(x: Vector) -> FittedLaw:
    """The stretched exponential law p(x) ∝ x^(β-1) exp(-(Λx)^β), a Weibull law from x = 1 on.

    For a given β the best Λ has a closed form, Λ^β = 1/⟨x^β - 1⟩, and what is left is concave in β: t follows a
    Gompertz law.

    Args:
        x: ratios λ/λ_min of the tail, (n,), all ≥ 1, not all 1.

    Returns:
        The law. Where the power law itself is best, β is 0 and Λ infinite; Λ^β, which is what counts, may be finite
        where Λ is too large for a float.

    Examples:
        >>> import numpy as np
        >>> from htsr.spectra.laws import stretched_exponential
        >>> t = np.random.default_rng(0).exponential(2.0, 10_000)
        >>> print(f"{stretched_exponential((1 + t) ** 2).parameters['beta']:.1f}")
        0.5
    """
    t = np.log(x)
    unit = float(t.mean())
    z = t / unit
    b = _gompertz(z)
    if b <= _FLAT:
        return FittedLaw({"Lambda": math.inf, "beta": 0.0}, power_law(x).log_density)
    # x^β - 1 over its mean, both divided by the largest x^β: that alone may overflow
    growth = -np.exp(b * (z - z.max())) * np.expm1(-b * z)
    mean = float(growth.mean())
    beta, log_mean = b / unit, math.log(mean) + b * float(z.max())
    log_density = math.log(beta) - log_mean + (beta - 1) * t - growth / mean
    return FittedLaw({"Lambda": _exp(-log_mean / beta), "beta": beta}, log_density)


def _gompertz(z: Vector) -> float:
    """b of the best density ∝ exp(bz - c(e^(bz) - 1)) on z ≥ 0, from (n,) z of mean 1; 0 where b → 0 is best.

    The derivative of the profiled log-likelihood is 1 - K(b), where K = ⟨z e^(bz)⟩/⟨e^(bz) - 1⟩ - 1/b grows with b:
    it is the mean of a density that e^(bz) tilts.
    """
    if float((z * z).mean()) >= 2:  # K(0) = ⟨z²⟩/2
        return 0.0
    top = float(z.max())

    def excess(b: float) -> tuple[float, float]:
        tilt = np.exp(b * (z - top))
        growth = float((-tilt * np.expm1(-b * z)).mean())
        first, second = float((z * tilt).mean()) / growth, float((z * z * tilt).mean()) / growth
        return first - 1 / b - 1, second - first**2 + 1 / b**2

    high = 1.0
    while excess(high)[0] < 0:
        high *= 2
    return _increasing_root(excess, 0.0, high)


def _increasing_root(f: Callable[[float], tuple[float, float]], low: float, high: float) -> float:
    """Root of an increasing function of value and slope `f` between `low` and `high`: Newton's steps, bisection where
    one would leave the bracket.
    """
    x = (low + high) / 2
    for _ in range(_ROUNDS):
        value, slope = f(x)
        low, high = (x, high) if value < 0 else (low, x)
        step = x - value / slope if slope > 0 else low
        new = step if low < step < high else (low + high) / 2
        if abs(new - x) <= 1e-13 * x:
            return new
        x = new
    return x


def lognormal(x: Vector) -> FittedLaw:
    """The lognormal law p(x) ∝ exp(-(ln x - μ)²/2σ²)/x from x = 1 on.

    Args:
        x: ratios λ/λ_min of the tail, (n,), all ≥ 1, not all 1.

    Returns:
        The law. Where the power law itself is best, μ is -∞ and σ is ∞.

    Examples:
        >>> import numpy as np
        >>> from htsr.spectra.laws import lognormal
        >>> t = np.random.default_rng(0).normal(3.0, 2.0, 20_000)
        >>> law = lognormal(np.exp(t[t > 0]))
        >>> print(f"{law.parameters['mu']:.1f} {law.parameters['sigma']:.1f}")
        3.0 2.0
    """
    t = np.log(x)
    a, b, log_normaliser = _fit_family(t, np.square, lambda a: 2 / a**2, lambda a, b: max(-a / (2 * b), 0.0))
    parameters = {"mu": -a / (2 * b), "sigma": (2 * b) ** -0.5} if b > 0 else {"mu": -math.inf, "sigma": math.inf}
    return FittedLaw(parameters, -(a + 1) * t - b * t**2 - log_normaliser)


def truncated_power_law(x: Vector) -> FittedLaw:
    """The power law with an exponential cut-off, p(x) ∝ x^(-α) exp(-Λx), Λ ≥ 0.

    Args:
        x: ratios λ/λ_min of the tail, (n,), all ≥ 1, not all 1.

    Returns:
        The law; α is any real number, the cut-off makes the law proper. Where the power law itself is best, Λ is 0.

    Examples:
        >>> import numpy as np
        >>> from htsr.spectra.laws import truncated_power_law
        >>> x = 1 + np.random.default_rng(0).gamma(1.0, 4.0, 20_000)  # the exponential law, which has α = 0
        >>> print(f"{truncated_power_law(x).parameters['Lambda']:.2f}")
        0.25
    """
    t = np.log(x)

    def expected(a: float) -> float:
        return 1 / (a * (a - 1)) if a > 1 else math.inf

    # with x - 1 - t in place of x the two numbers of a short tail are not nearly the same one
    a, b, log_normaliser = _fit_family(t, _curve, expected, lambda a, b: math.log1p(max(-a / b, 0.0)))
    return FittedLaw({"alpha": a + 1 - b, "Lambda": b}, -(a + 1) * t - b * _curve(t) - log_normaliser)


def _curve(t: Vector) -> Vector:
    return np.expm1(np.minimum(t, _HIGHEST)) - t


def _fit_family(
    t: Vector,
    h: Callable[[Vector], Vector],
    expected: Callable[[float], float],
    peak: Callable[[float, float], float],
) -> tuple[float, float, float]:
    """The best density exp(-at - b·h(t))/Z on t ≥ 0, b ≥ 0, h convex.

    An exponential family: the likelihood is concave in (a, b) and its maximum is where the means of t and h(t) are
    those of the sample. Scoring in (a, ln b), which keeps b > 0, with halved steps where the likelihood would fall.

    Args:
        t: ln x of the tail, (n,), not all 0.
        h: convex function of t.
        expected: mean of h under the density of b = 0, whose mean of t is 1/a; the maximum is at b = 0 where the
            sample's is no smaller.
        peak: function that gives the t at which the density of (a, b) is largest.

    Returns:
        a, b and ln Z.
    """
    mean_t, mean_h = float(t.mean()), float(h(t).mean())
    a = 1 / mean_t
    if mean_h >= expected(a):
        return a, 0.0, math.log(mean_t)
    b = 1 / mean_h
    here = _moments(a, b, h, peak(a, b), mean_t)
    for _ in range(_ROUNDS):
        log_Z, t_, v_, tt, tv, vv = here  # v = b·h(t), the derivative by ln b
        slope_a, slope_b = mean_t - t_, b * mean_h - v_
        determinant = max(tt * vv - tv**2, 1e-14 * tt * vv)
        step_b = max(-(tt * slope_b - tv * slope_a) / determinant, -_MOST)
        step_a = -(slope_a + tv * step_b) / tt  # the best for that step of b
        gain = -(slope_a * step_a + slope_b * step_b)
        loss = a * mean_t + b * mean_h + log_Z
        rounding = 4e-15 * (abs(a) * mean_t + b * mean_h + abs(log_Z))
        if gain <= rounding:
            break
        for halvings in range(_HALVINGS):
            new_a, new_b = a + step_a / 2**halvings, b * (1 + step_b / 2**halvings)
            there = _moments(new_a, new_b, h, peak(new_a, new_b), mean_t)
            if new_a * mean_t + new_b * mean_h + there[0] <= loss - 1e-4 * gain / 2**halvings + rounding:
                break
        else:  # nothing but rounding is left to gain
            break
        a, b, here = new_a, new_b, there
    return a, b, here[0]


def _moments(
    a: float, b: float, h: Callable[[Vector], Vector], top: float, unit: float
) -> tuple[float, float, float, float, float, float]:
    """ln Z of exp(-at - b·h(t)) on t ≥ 0, and means, variances and covariance of t and v = b·h(t).

    Returns:
        ln Z, ⟨t⟩, ⟨v⟩, var t, cov(t, v), var v. By Gauss-Legendre quadrature where the density, which is log-concave,
        is above e^-40 of its height at `top`.
    """

    def exponent(t: Vector) -> Vector:
        return -a * t - b * h(t)

    highest = float(exponent(np.array([top]))[0])

    def reach(direction: float) -> float:
        """How far from the top the density is to be seen, within a fifteenth."""

        def seen(steps: Vector) -> int:
            return int(np.count_nonzero(exponent(top + direction * steps) > highest - _DEPTH))

        with np.errstate(over="ignore", invalid="ignore"):
            octave = unit * float(_OCTAVES[max(seen(unit * _OCTAVES) - 1, 0)])
            return octave * float(_IN_OCTAVE[min(seen(octave * _IN_OCTAVE), 16)])

    low = max(top - reach(-1.0), 0.0) if top > 0 else 0.0
    width = top + reach(1.0) - low
    nodes, weights = _quadrature()
    t = low + width * nodes
    v = b * h(t)
    density = weights * np.exp(-a * t - v - highest)
    total = float(density.sum())
    density /= total
    mean_t, mean_v = float(density @ t), float(density @ v)
    t -= mean_t
    v -= mean_v
    return (
        highest + math.log(total * width),
        mean_t,
        mean_v,
        float(density @ (t * t)),
        float(density @ (t * v)),
        float(density @ (v * v)),
    )


@lru_cache(maxsize=1)
def _quadrature() -> tuple[Vector, Vector]:
    """Nodes and weights on [0, 1]: panels, so that a density of one sharp edge costs no more than a smooth one."""
    nodes, weights = np.polynomial.legendre.leggauss(_ORDER)
    starts = np.arange(_PANELS)[:, None] / _PANELS
    return (starts + (nodes + 1) / (2 * _PANELS)).ravel(), np.tile(weights / (2 * _PANELS), _PANELS)


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf
