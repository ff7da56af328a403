import math
from pathlib import Path

import numpy as np
import powerlaw
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mpmath import gammainc

from htsr.spectra import laws
from htsr.spectra.alternatives import LAWS, compare_laws
from htsr.spectra.tail import fit_power_law
from tests.reference import statistics as plain

seeds = st.integers(0, 2**32 - 1)
KINDS = {
    "power_law": lambda r, n: r.exponential(0.7, n),
    "lighter": lambda r, n: np.abs(r.normal(0, 1.5, n)),
    "exponential": lambda r, n: np.log1p(r.exponential(3.0, n)),
    "gap": lambda r, n: np.append(1 + 0.3 * r.random(n - 1), 0.0),
    "heavier": lambda r, n: r.weibull(0.6, n),
    "ties": lambda r, n: np.append(np.round(r.exponential(2.0, n - 2)), [0.0, 1.0]),
}


def tail_of(seed, size, kind):
    t = np.sort(KINDS[kind](np.random.default_rng(seed), size))
    return np.exp(t - t[0])


@settings(max_examples=40)
@given(seeds, st.integers(3, 100), st.sampled_from(sorted(KINDS)))
def test_densities_are_their_formulas_and_no_other_parameters_are_likelier(seed, size, kind):
    x = tail_of(seed, size, kind)
    for law in LAWS:
        fitted = getattr(laws, law)(x)
        limit = np.allclose(fitted.log_density, laws.power_law(x).log_density, atol=1e-9)
        if limit or fitted.parameters.get("Lambda") == math.inf:  # Λ^β is finite, and Λ too large for a float
            continue
        density = getattr(plain, f"log_{law}")
        expected = [density(v, **fitted.parameters) for v in x]
        assert fitted.log_density == pytest.approx(expected, rel=1e-6, abs=1e-6)
        best = math.fsum(expected)
        for name, value in fitted.parameters.items():
            for factor in (0.9, 0.999, 1.001, 1.1):
                moved = fitted.parameters | {name: value * factor}
                assert math.fsum(density(v, **moved) for v in x) <= best + 1e-7 * max(abs(best), 1)


@settings(max_examples=40)
@given(seeds, st.integers(3, 300), st.sampled_from(sorted(KINDS)))
def test_a_law_that_contains_the_power_law_is_never_less_likely(seed, size, kind):
    x = tail_of(seed, size, kind)
    power, t = laws.power_law(x).log_density.sum(), np.log(x)
    for law in ("truncated_power_law", "stretched_exponential", "lognormal"):
        assert getattr(laws, law)(x).log_density.sum() >= power - 1e-9 * max(abs(power), 1)
    heavy = (t**2).mean() >= 2 * t.mean() ** 2
    assert (laws.lognormal(x).parameters["sigma"] == math.inf) == heavy
    assert (laws.stretched_exponential(x).parameters["beta"] == 0) == heavy


@pytest.mark.parametrize(
    ("alpha", "cut"), [(2.3, 0.005), (1.5, 0.1), (4.0, 1e-6), (-1.0, 0.5), (0.5, 1e-4), (6.0, 2.0), (-20.0, 1.0)]
)
def test_the_truncated_law_is_normalised_by_the_incomplete_gamma_function(alpha, cut):
    a, b = alpha - 1 + cut, cut  # exponents of t and of x - 1 - t, t = ln x
    top = math.log1p(max(-a / b, 0.0))
    expected = float(gammainc(1 - alpha, cut)) * cut ** (alpha - 1) * math.exp(cut)
    assert math.exp(laws._moments(a, b, laws._curve, top, 1.0)[0]) == pytest.approx(expected, rel=1e-10)


def held_against_powerlaw(x):
    """Our likelihoods beside those of the package's parameters, and R and p beside those that it has of ours.

    Log densities at its parameters are taken from the plain formulas: its own underflow where μ²/2σ² of a lognormal law
    is above 700, and come out up to 0.7 too high.

    Returns:
        For how many laws the package had found the maximum.
    """
    power, ours, equal = laws.power_law(x).log_density, compare_laws(x), 0
    fit = powerlaw.Fit(x, xmin=1.0, verbose=False)
    for law in ("exponential", "stretched_exponential", "lognormal"):
        parameters = {name: float(value) for name, value in getattr(fit, law).parameters.items()}
        theirs = np.array([getattr(plain, f"log_{law}")(v, **parameters) for v in x])
        mine = getattr(laws, law)(x).log_density
        assert mine.sum() >= theirs.sum() - 1e-7
        R, p = powerlaw.statistics.loglikelihood_ratio(power.copy(), mine.copy(), normalized_ratio=True)
        if np.abs(mine - power).max() > 1e-3:
            assert (ours[law].R, ours[law].p) == (pytest.approx(R, abs=1e-6), pytest.approx(p, abs=1e-6))
            equal += mine.sum() < theirs.sum() + 1e-4
    return equal


@pytest.mark.filterwarnings("ignore")
@settings(max_examples=25)
@given(seeds, st.integers(20, 100), st.sampled_from(["power_law", "lighter", "exponential"]))
def test_likelihoods_are_at_least_those_of_the_powerlaw_package_and_ratios_its_own(seed, size, kind):
    """It stops short of the maximum where that is near the power law; there ours is higher.

    Its power law is left out: version 2.0 bounds α by 3.
    """
    assert held_against_powerlaw(tail_of(seed, size, kind)) >= 1


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "equal"), [("quakes", 1), ("terrorism", 1), ("fires", 3), ("blackouts", 2)])
def test_laws_on_the_reference_data_of_the_powerlaw_package(name, equal):
    values = np.loadtxt(Path(powerlaw.__file__).parent / "reference_data" / f"{name}.txt")
    values = values[values > 0]
    tail = np.sort(values[values >= fit_power_law(values).lambda_min])
    assert held_against_powerlaw(tail / tail[0]) == equal
