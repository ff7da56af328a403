import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from htsr.errors import MatrixError, UsageError
from htsr.spectra.directions import project_tail
from htsr.spectra.erg import erg
from htsr.spectra.esd import esd
from htsr.spectra.nudge import nudge, nudge_spectrum
from htsr.spectra.tail import fit_power_law


def spectrum(seed, alpha, bulk=200, tail=100):
    random = np.random.default_rng(seed)
    return np.sort(np.concatenate([random.random(bulk), (1 - random.random(tail)) ** (-1 / (alpha - 1))]))


def matrix(seed, alpha, bulk=90, tail=60):
    random = np.random.default_rng(seed)
    values = spectrum(seed, alpha, bulk, tail)
    U, _ = np.linalg.qr(random.standard_normal((values.size, values.size)))
    V, _ = np.linalg.qr(random.standard_normal((values.size + 30, values.size)))
    return (U * np.sqrt(values)) @ V.T


def exponent(tail):
    return 1 + tail.size / np.log(tail / tail.min()).sum()


def trace_log(values, tail):
    return np.log(values[tail] * values.size / values.sum()).mean()


@settings(max_examples=50)
@given(st.integers(0, 99), st.floats(1.4, 6), st.floats(0.01, 1), st.sampled_from(["ks", "hill", "fix_fingers"]))
def test_exponent_moves_as_stated_and_trace_log_and_norm_are_kept(seed, alpha, strength, fit):
    before = spectrum(seed, alpha)
    try:
        moved = nudge_spectrum(before, strength, fit=fit)
    except MatrixError:
        found = fit_power_law(before, fit)
        T = trace_log(before, before >= found.lambda_min)
        assert (found.alpha - 2) * T <= 0 or abs(T) < 0.05  # the two conditions disagree, or T has nowhere to go
        return
    after, tail = moved.eigenvalues, moved.tail
    assert 0 < moved.strength <= strength
    assert exponent(before[tail]) == pytest.approx(moved.alpha)
    assert exponent(after[tail]) == pytest.approx(moved.alpha_after)
    assert moved.alpha_after - 1 == pytest.approx((moved.alpha - 1) ** (1 - moved.strength))
    assert abs(moved.alpha_after - 2) <= abs(moved.alpha - 2)
    assert after.sum() == pytest.approx(before.sum())
    T, T_after = trace_log(before, tail), trace_log(after, tail)
    assert erg(before, before[tail].min()).trace_log == pytest.approx(T, abs=1e-9)
    assert min(T, 0) - 1e-9 <= T_after <= max(T, 0) + 1e-9
    np.testing.assert_allclose(after[~tail] / before[~tail], after[0] / before[0])
    product = np.log(after[tail]).sum() - tail.sum() * np.log(after[0] / before[0])  # the common factor undone
    assert product == pytest.approx(np.log(before[tail]).sum(), abs=1e-6)


def quantiles(alpha, count=100):
    """An exact power law from 1 on, its points evenly spaced in probability."""
    return (1 - np.linspace(0, 0.99, count)) ** (-1 / (alpha - 1))


@pytest.fixture
def tail_from_one(monkeypatch):
    monkeypatch.setattr("htsr.spectra.nudge.fit_power_law", lambda values, fit: fit_power_law(values, xmin=1.0))


@pytest.mark.usefixtures("tail_from_one")
def test_full_strength_gives_two_where_the_condition_allows_it():
    moved = nudge_spectrum(np.concatenate([np.full(900, 0.001), quantiles(3.0)]), 1.0)
    assert moved.alpha == pytest.approx(3, abs=0.1)
    assert moved.strength == 1.0
    assert moved.alpha_after == pytest.approx(2.0)


@pytest.mark.usefixtures("tail_from_one")
def test_a_layer_that_meets_the_condition_is_left():
    tail = quantiles(2.5)
    others = np.exp(np.log(tail).mean()) * 140 - tail.sum()  # the norm of the rest that makes T zero
    assert 0 < others / 40 < 1
    before = np.concatenate([np.full(40, others / 40), tail])
    assert trace_log(before, before >= 1) == pytest.approx(0, abs=1e-12)
    with pytest.raises(MatrixError, match="without taking"):
        nudge_spectrum(before, 0.1)


@pytest.mark.parametrize("alpha", [1.5, 3.5, 5.0])
@pytest.mark.parametrize("fit", ["ks", "hill"])
def test_small_nudges_take_the_refitted_alpha_towards_two(alpha, fit):
    values = spectrum(3, alpha)
    first = fit_power_law(values, fit).alpha
    for _ in range(60):
        try:
            values = np.sort(nudge_spectrum(values, 0.05, fit=fit).eigenvalues)
        except MatrixError:  # the trace-log condition is met
            break
    last = fit_power_law(values, fit).alpha
    assert abs(last - 2) < 0.75 * abs(first - 2)


def test_the_matrix_gets_that_spectrum_and_keeps_its_singular_vectors():
    W = matrix(1, 3.5)
    changed, moved = nudge(W, 0.2)
    np.testing.assert_allclose(esd(changed).eigenvalues, np.sort(moved.eigenvalues.ravel()), rtol=1e-8)
    assert np.linalg.norm(changed) == pytest.approx(np.linalg.norm(W))
    left, right = changed @ W.T, changed.T @ W  # symmetric where the singular vectors are shared
    np.testing.assert_allclose(left, left.T, atol=1e-9)
    np.testing.assert_allclose(right, right.T, atol=1e-9)
    turned, _ = nudge(W.T, 0.2)
    np.testing.assert_allclose(turned, changed.T, atol=1e-10)


def test_strength_zero_changes_nothing():
    W = torch.from_numpy(matrix(2, 4.0)).float()
    same, moved = nudge(W, 0.0)
    assert same is W
    assert moved.alpha_after == moved.alpha
    np.testing.assert_allclose(moved.eigenvalues, esd(W).eigenvalues[None], rtol=1e-6)


def test_stacks_pool_their_eigenvalues():
    stack = np.stack([matrix(4, 3.0), matrix(5, 3.0)])
    changed, moved = nudge(stack, 0.1)
    assert moved.eigenvalues.shape == (2, 150)
    np.testing.assert_allclose(np.sort(moved.eigenvalues.ravel()), esd(changed).eigenvalues, rtol=1e-8)


def test_what_cannot_be_nudged_says_so():
    with pytest.raises(UsageError, match="between 0 and 1"):
        nudge_spectrum(spectrum(0, 3), 1.5)
    with pytest.raises(MatrixError, match="too short"):
        nudge_spectrum(np.array([1.0, 2.0, 3.0]), 0.1)
    with pytest.raises(MatrixError, match="2 distinct"):
        nudge_spectrum(np.ones(40), 0.1)


def test_an_orthogonal_matrix_has_no_tail_to_move():
    W = torch.nn.init.orthogonal_(torch.empty(96, 96))
    for change in (lambda: nudge(W, 0.5), lambda: project_tail(W, "tail")):
        with pytest.raises(MatrixError, match="all eigenvalues are equal but for rounding"):
            change()
