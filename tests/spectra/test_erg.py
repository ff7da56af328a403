import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from htsr.spectra.erg import erg
from htsr.spectra.null import gaussian_eigenvalues
from tests.reference import statistics as plain

seeds = st.integers(0, 2**32 - 1)


@settings(max_examples=80)
@given(seeds, st.integers(3, 200), st.floats(0.1, 3.0), st.floats(-6, 6))
def test_count_is_where_the_product_falls_below_one(seed, size, spread, exponent):
    values = np.sort(np.random.default_rng(seed).lognormal(0.0, spread, size)) * 10**exponent
    found = erg(values, values[size // 2])
    assert found.num == (plain.erg_count(values) or 0)
    if found.crossing:
        assert found.lambda_erg == pytest.approx(values[-found.num])
        assert found.lambda_erg_rescaled == pytest.approx(values[-found.num] * size / values.sum())


@settings(max_examples=80)
@given(seeds, st.integers(20, 200), st.floats(0.05, 0.95))
def test_sign_of_the_trace_log_is_that_of_the_gap(seed, size, where):
    values = np.sort(np.random.default_rng(seed).lognormal(0.0, 1.0, size))
    found = erg(values, values[int(where * size)])
    if abs(found.gap) > 1:  # at the crossing itself they may differ by one eigenvalue
        assert np.sign(found.trace_log) == np.sign(found.gap)
        assert np.sign(found.delta_lambda_min) == np.sign(found.gap)
        assert np.sign(found.log_lambda_ratio) == np.sign(found.gap)
    assert found.logdet == pytest.approx(found.trace_log * (found.num - found.gap))


@pytest.mark.parametrize("alpha", [2.2, 2.5, 3.0, 4.0])
def test_closed_form_of_an_exact_power_law(alpha):
    u = (np.arange(40_000) + 0.5) / 40_000
    values = (1 - u) ** (-1 / (alpha - 1))
    found = erg(values, values[0])
    x_min = values[0] * values.size / values.sum()
    assert found.trace_log == pytest.approx(np.log(x_min) + 1 / (alpha - 1), abs=1e-3)


@pytest.mark.parametrize(("q", "share"), [(1, 0.731), (0.5, 0.8145), (0.383, 0.838), (0.25, 0.870), (0.1, 0.918)])
def test_share_of_the_ecs_in_pure_noise(random, q, share):
    M = 1500
    values = gaussian_eigenvalues(M, round(M / q), random)[0]
    assert erg(values, values[M // 2]).num / M == pytest.approx(share, abs=0.004)


def test_no_overflow_where_a_product_would(random):
    values = gaussian_eigenvalues(8192, 8192, random)[0]
    with np.errstate(over="ignore"):
        assert np.isinf(np.prod(values[-4000:] * 8192 / values.sum()))
    assert erg(values, values[4096]).num == pytest.approx(5989, abs=12)


def test_low_rank_matrices_are_flagged():
    values = np.concatenate([np.zeros(90), np.geomspace(1, 3, 10)])
    found = erg(values, 1.0)
    assert not found.crossing
    assert found.num == 0
    assert np.isnan([found.lambda_erg, found.gap, found.gap_fraction, found.delta_lambda_min]).all()
    assert found.trace_log == pytest.approx(np.log(values[-10:] * 100 / values.sum()).mean())
    # zeros count in K: the same positive values alone do cross
    assert erg(values[90:], 1.0).crossing
