import math

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from htsr.errors import MatrixError, UsageError
from htsr.spectra.resampling import _cut_exponent, bootstrap_alpha, goodness_of_fit
from htsr.spectra.tail import fit_power_law, fit_rows
from tests.reference import statistics as plain

METHODS = ["ks", "hill", "hill_paper", "fix_fingers", "clip_xmax"]
seeds = st.integers(0, 2**32 - 1)


def pareto(random, size, alpha):
    return (1 - random.random(size)) ** (-1 / (alpha - 1))


@pytest.mark.parametrize("limits", [{}, {"xmin": 1.2}, {"xmax": 4.0}])
@pytest.mark.parametrize("method", METHODS)
@settings(max_examples=12)
@given(seed=seeds, size=st.integers(2, 80), ties=st.booleans())
def test_rows_are_fitted_as_each_by_itself(method, limits, seed, size, ties):
    random = np.random.default_rng(seed)
    rows = pareto(random, (5, size), 2.5)
    rows = np.sort(np.ceil(rows * 3) / 3 if ties else rows)
    kept = np.where(rows <= limits.get("xmax", np.inf), rows, np.inf)
    fits = fit_rows(kept, method, xmin=limits.get("xmin"))
    for i, row in enumerate(rows):
        try:
            fit = fit_power_law(row, method, **limits)
        except (MatrixError, UsageError):
            assert np.isnan(fits.alpha[i])
            continue
        assert fits.alpha[i] == pytest.approx(fit.alpha, rel=1e-12)
        assert (fits.num_tail[i], fits.num_fingers[i]) == (fit.num_tail, fit.num_fingers)
        assert (fits.D[i], fits.lambda_min[i]) == pytest.approx((fit.D, fit.lambda_min), rel=1e-9)


@pytest.mark.parametrize("method", METHODS)
def test_the_bootstrap_is_one_fit_after_the_other(random, method):
    values = np.concatenate([random.random(60), pareto(random, 60, 2.5)])
    draws = np.random.default_rng(5)
    alphas = [fit_power_law(draws.choice(values, values.size), method).alpha for _ in range(30)]
    expected = tuple(np.quantile(alphas, [0.025, 0.975]))
    assert bootstrap_alpha(values, method, resamples=30, seed=5) == pytest.approx(expected, rel=1e-9)


@settings(max_examples=15)
@given(seeds, st.integers(5, 25), st.booleans())
def test_goodness_of_fit_is_the_plain_bootstrap(seed, size, body):
    random = np.random.default_rng(seed)
    values = pareto(random, size, 2.5)
    values = np.concatenate([values, random.random(size)]) if body else values
    shares = np.random.default_rng((seed, 1)).random((20, values.size))
    assert goodness_of_fit(values, resamples=20, seed=seed) == plain.goodness_of_fit(values, shares)


CUT = 7.4  # 5 % of a power law of exponent 2.5 lies above
CASES = [
    *[("ks", {"xmin": 1.0}), ("hill", {}), ("hill_paper", {})],
    *[
        ("ks", {"xmin": 1.0, "xmax": CUT}),
        ("hill", {"xmax": CUT}),
        ("hill_paper", {"xmax": CUT}),
        ("hill", {"xmax": 2.0}),
    ],
    *[("hill", {"xmax": 1e300}), ("ks", {"xmin": 1.0, "xmax": np.inf})],
]


@pytest.mark.parametrize(("method", "limits"), CASES)
def test_p_of_a_given_tail_is_uniform_under_the_null(random, method, limits):
    draws = [pareto(random, 40, 2.5) for _ in range(400)]
    p = np.sort([goodness_of_fit(v, method, resamples=99, seed=i, **limits) for i, v in enumerate(draws)])
    distance = np.abs(p - np.arange(400) / 400).max()
    assert distance < 1.63 / 400**0.5 + 0.01  # Kolmogorov's 1 % quantile, and steps of 1/99


@pytest.mark.parametrize("method", ["ks", "hill"])
def test_power_laws_that_are_cut_are_seldom_ruled_out(random, method):
    """The samples are cut as the spectrum is: whole ones ruled out half of all true power laws."""
    p = [goodness_of_fit(pareto(random, 200, 2.5), method, resamples=40, seed=i, xmax=CUT) for i in range(40)]
    assert np.mean(np.array(p) <= 0.1) <= 0.29  # 0.1, plus 4 standard errors


@settings(max_examples=30)
@given(seeds, st.integers(3, 60), st.floats(1.01, 20.0), st.floats(1.0, 1e6))
def test_the_exponent_of_a_cut_law_is_the_likeliest(seed, size, alpha, beyond):
    values = np.sort(pareto(np.random.default_rng(seed), size, alpha))
    xmax = float(values[-1]) * beyond
    assume(math.isfinite(xmax))
    fit = fit_power_law(values, xmin=float(values[0]))
    logs, width = np.log(values / values[0]), np.log(xmax / values[0])

    def likelihood(a):
        return size * (np.log(a) - np.log(-np.expm1(-a * width))) - a * logs.sum()

    found = _cut_exponent(values, fit, xmax) - 1
    assert likelihood(found) >= max(
        likelihood(found * 1.01), likelihood(found * 0.99) if found * width > 1e-5 else -np.inf
    )


def test_p_does_not_depend_on_the_unit_nor_on_the_portions(random, monkeypatch):
    values = pareto(random, 50, 2.5)
    whole = goodness_of_fit(values, resamples=40)
    assert goodness_of_fit(values * 2.0**20, resamples=40) == whole
    monkeypatch.setattr("htsr.spectra.resampling._TOGETHER", 200)
    assert goodness_of_fit(values, resamples=40) == whole
    assert len({goodness_of_fit(values, resamples=40, seed=seed) for seed in range(5)}) > 1


@pytest.mark.parametrize("method", METHODS)
def test_power_laws_are_seldom_ruled_out(random, method):
    p = [goodness_of_fit(pareto(random, 80, 2.5), method, resamples=30, seed=i) for i in range(20)]
    assert np.mean(np.array(p) <= 0.1) <= 0.35  # 0.1 where p is exact, plus 3.7 standard errors


def test_other_laws_are_ruled_out(random):
    for values in (random.lognormal(0.0, 0.5, 1000), random.exponential(1.0, 1000)):
        assert goodness_of_fit(values, "hill", resamples=100) == 0.0
        fit = fit_power_law(values)
        # what ks finds in a lighter tail is short; from a given λ_min on there is power
        assert fit.num_tail < 250
        assert goodness_of_fit(values, xmin=float(np.median(values)), resamples=100) <= 0.01


def test_nothing_to_test_is_said():
    with pytest.raises(MatrixError, match="fewer than 2 distinct"):
        goodness_of_fit([3.0, 3.0])
    with pytest.raises(UsageError, match="a number of resamples above 0, not 0"):
        goodness_of_fit([1.0, 2.0, 3.0], resamples=0)
