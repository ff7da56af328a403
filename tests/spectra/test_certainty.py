from dataclasses import fields

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from htsr.spectra.certainty import _least_distance, fit_is_certain
from htsr.spectra.density import ESD
from htsr.spectra.esd import esd
from htsr.spectra.measure import measure
from htsr.spectra.metrics import LayerMetrics, Options
from htsr.spectra.tail import fit_power_law


def matrix(seed, M, more, tail):
    random = np.random.default_rng(seed)
    scales = (1 - random.random(M + more)) ** -tail
    return (random.standard_normal((M, M + more)) * scales).astype(np.float32)


def row(W, **options):
    unmeasured = LayerMetrics(
        name="w", role="", block=None, kind="linear", stored="float32", rows=W.shape[0], columns=W.shape[1], warning=""
    )
    return measure(lambda: W, unmeasured, Options(null=False, **options)).row


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 2**32 - 1),
    st.integers(8, 60),
    st.integers(0, 100),
    st.floats(0.0, 1.2),
    st.sampled_from(["ks", "hill", "hill_paper", "fix_fingers", "clip_xmax"]),
)
def test_a_row_in_float32_has_the_fit_of_float64(seed, M, more, tail, fit):
    """Whatever shape and spectrum; what float32 cannot say comes from float64."""
    W = matrix(seed, M, more, tail)
    single, double = row(W, dtype="float32", fit=fit), row(W, dtype="float64", fit=fit)
    assert (single.status, single.num_pl_tail) == (double.status, double.num_pl_tail)
    if double.alpha is not None:
        for name in ("alpha", "sigma", "lambda_min", "alpha_hat"):
            assert getattr(single, name) == pytest.approx(getattr(double, name), rel=2e-3, abs=1e-9)
        assert pytest.approx(double.D, abs=1e-3) == single.D
    for name in ("norm", "lambda_max", "stable_rank"):
        assert getattr(single, name) == pytest.approx(getattr(double, name), rel=1e-5)


def test_a_row_says_in_which_precision_it_was_computed():
    assert row(matrix(0, 60, 60, 0.3), dtype="float32").route == "gram/float32"
    assert row(matrix(0, 60, 60, 0.3), dtype="float32", fit="clip_xmax").route == "gram/float64"


def test_a_row_that_is_repeated_is_that_of_float64():
    W = matrix(1, 40, 0, 1.0)
    single, double = row(W, dtype="float32", fit="fix_fingers"), row(W, dtype="float64", fit="fix_fingers")
    for each in fields(LayerMetrics):
        assert each.name == "seconds" or getattr(single, each.name) == getattr(double, each.name)


def spectrum(eigenvalues):
    values = np.sort(np.asarray(eigenvalues, dtype=np.float64))
    return ESD(values, values.size, 2 * values.size, 1, route="gram/float32")


def certain(eigenvalues, method="ks", xmin=None):
    found = spectrum(eigenvalues)
    fit = fit_power_law(found.positive, method, xmin=xmin)
    return fit_is_certain(found, fit.method, fit.alpha, fit.D, fit.lambda_min, "cpu")


def test_another_tail_that_is_as_good_makes_a_fit_uncertain():
    """A rival whose D is pushed, by moving the smallest eigenvalue of its tail, to that of the best."""
    values = np.sort((1 - np.random.default_rng(3).random(60)) ** -1.0)
    best = fit_power_law(values)
    assert certain(values)

    def with_last(top):
        moved = values.copy()
        moved[-1] = top
        return fit_power_law(moved)

    low, high = values[-2] * 1.01, values[-1] * 50
    starts = np.array([with_last(top).lambda_min for top in np.geomspace(low, high, 200)])
    change = int(np.flatnonzero(np.diff(starts) != 0)[0])  # where the best tail becomes another one
    a, b = np.geomspace(low, high, 200)[change : change + 2]
    first = with_last(a).lambda_min
    for _ in range(60):
        middle = (a * b) ** 0.5
        a, b = (middle, b) if with_last(middle).lambda_min == first else (a, middle)
    values[-1] = a
    assert not certain(values)
    assert best.num_tail > 2


def test_unresolved_eigenvalues_matter_where_the_tail_could_begin_there():
    random = np.random.default_rng(0)
    log_uniform = np.exp(random.uniform(np.log(2e-6), 0, 200))  # one power law over all of float32's range and beyond
    assert not certain(np.concatenate([np.zeros(100), log_uniform]))
    bulk = esd(matrix(0, 90, 30, 0.4)).positive
    assert certain(np.concatenate([np.zeros(9), bulk]))
    assert certain(bulk, "hill")
    assert not certain(np.concatenate([np.zeros(1), bulk]), "hill")


def test_a_given_begin_is_certain_unless_an_eigenvalue_comes_too_near():
    values = np.linspace(1.0, 4.0, 50)
    assert certain(values, xmin=values[20] * 1.001)
    assert not certain(values, xmin=values[20] * (1 + 1e-7))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(8, 80))
def test_the_least_distance_is_below_that_of_any_exponent(seed, size):
    values = np.sort(np.random.default_rng(seed).lognormal(0, 2, size))
    log, empirical = np.log(values / values[0]), np.arange(size) / size
    tried = min(np.abs(1 - np.exp(-s * log) - empirical).max() for s in np.geomspace(1e-3, 1e2, 500))
    assert _least_distance(values) <= tried + 1e-6
    alpha = fit_power_law(values, xmin=values[0])
    assert _least_distance(values) <= alpha.D + 1e-6
