from pathlib import Path

import numpy as np
import powerlaw
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from htsr.errors import MatrixError, UsageError
from htsr.spectra.esd import esd
from htsr.spectra.resampling import bootstrap_alpha
from htsr.spectra.scan import Tails
from htsr.spectra.tail import fit_power_law, histogram_peak
from tests.reference import statistics as plain

seeds = st.integers(0, 2**32 - 1)


def pareto(random, size, alpha, xmin=1.0):
    return xmin * (1 - random.random(size)) ** (-1 / (alpha - 1))


def body_and_tail(random, size=400, alpha=2.5):
    """Half a power law above 1, half a uniform body below."""
    return np.concatenate([random.random(size // 2), pareto(random, size // 2, alpha)])


@settings(max_examples=60)
@given(seeds, st.integers(2, 150), st.floats(1.2, 6.0))
def test_ks_is_the_plain_scan(seed, size, alpha):
    values = pareto(np.random.default_rng(seed), size, alpha)
    fit = fit_power_law(values)
    expected = plain.ks_fit(values)
    assert (fit.alpha, fit.D, fit.lambda_min, fit.num_tail) == pytest.approx(expected, rel=1e-9)


def test_tails_are_their_formulas(random):
    values = np.sort(body_and_tail(random, 500))
    tails = Tails.of(values)
    D = tails.distances(np.arange(499))
    for start in (0, 63, 64, 65, 300, 498):
        alpha = plain.tail_exponent(values[start:])
        assert tails.alpha[start] == pytest.approx(alpha, rel=1e-10)
        assert D[start] == pytest.approx(plain.one_sided_distance(values[start:], alpha), rel=1e-9)


@settings(max_examples=30)
@given(seeds, st.integers(300, 900), st.sampled_from([0.0, 0.05, 0.3]))
def test_the_search_finds_the_least_of_all_distances(seed, size, grid):
    values = np.sort(body_and_tail(np.random.default_rng(seed), size))
    values = np.exp(np.round(np.log(values) / grid) * grid) if grid else values
    tails = Tails.of(values)
    D = tails.distances(np.arange(tails.alpha.size))
    assert tails.best() == (int(np.argmin(D)), D.min())


@settings(max_examples=20)
@given(seeds, st.integers(200, 500), st.sampled_from([0.0, 0.05]))
def test_spectra_searched_together_are_those_searched_alone(seed, size, grid):
    random = np.random.default_rng(seed)
    rows = np.sort([body_and_tail(random, size) for _ in range(6)])[:, : size // 2 * 2]
    rows = np.exp(np.round(np.log(rows) / grid) * grid) if grid else rows
    kept = random.integers(2, rows.shape[1], 6)
    together = Tails.of(np.where(np.arange(rows.shape[1]) < kept[:, None], rows, np.inf))
    index, D = together.best()
    for i, row in enumerate(rows):
        alone = Tails.of(row[: kept[i]])
        (expected,), least = alone.best()
        assert D[i] == least
        assert (together.spectrum[index[i]], together.starts[index[i]]) == (i, alone.starts[expected])
        assert together.alpha[index[i]] == pytest.approx(alone.alpha[expected], rel=1e-12)


def reference_data(name):
    return np.loadtxt(Path(powerlaw.__file__).parent / "reference_data" / name)


@pytest.mark.parametrize(("name", "alpha", "tail"), [("quakes", 1.95, 2659), ("terrorism", 2.45, 547)])
def test_ties_begin_no_tail_as_in_the_powerlaw_package(name, alpha, tail):
    values = reference_data(f"{name}.txt")  # 19,302 values, 70 of them distinct; 9,101 and 101
    values = values[values > 0] / 1000
    fit = fit_power_law(values)
    theirs = powerlaw.Fit(values, verbose=False).power_law
    assert fit.alpha == pytest.approx(theirs.alpha, rel=1e-9)
    assert (round(fit.alpha, 2), fit.num_tail, fit.lambda_min) == (alpha, tail, theirs.xmin)


@settings(max_examples=40)
@given(seeds, st.integers(10, 200), st.sampled_from(["ks", "fix_fingers", "clip_xmax"]))
def test_the_tail_is_all_from_lambda_min_on(seed, size, method):
    values = np.ceil(pareto(np.random.default_rng(seed), size, 2.0))
    if np.unique(values).size > 1:
        fit = fit_power_law(values, method)
        assert fit.num_tail == np.count_nonzero((values >= fit.lambda_min) & (values <= fit.lambda_max))


def test_two_hundred_thousand_points():
    values = reference_data("fires.txt")  # 203,785, of which 2,826 are distinct
    fit = fit_power_law(values)
    tail = values[values >= fit.lambda_min]
    assert (fit.num_tail, fit.alpha) == (tail.size, pytest.approx(1 + tail.size / np.log(tail / tail.min()).sum()))


@pytest.mark.parametrize("method", ["hill", "hill_paper"])
@settings(max_examples=40)
@given(seed=seeds, size=st.integers(4, 200))
def test_hill_is_its_formula(method, seed, size):
    values = np.random.default_rng(seed).lognormal(size=size)
    assert fit_power_law(values, method).alpha == pytest.approx(getattr(plain, method)(values), rel=1e-10)


@pytest.mark.parametrize(("method", "expected"), [("hill", 2.119), ("hill_paper", 2.112)])
def test_hill_of_a_gaussian_matrix_has_the_published_value(random, method, expected):
    values = esd(random.standard_normal((768, 768))).positive
    assert fit_power_law(values, method).alpha == pytest.approx(expected, abs=0.02)


def test_given_xmin_agrees_with_the_powerlaw_package(random):
    values = body_and_tail(random)
    ours = fit_power_law(values, xmin=1.5)
    theirs = powerlaw.Fit(values, xmin=1.5, verbose=False).power_law
    assert ours.alpha == pytest.approx(theirs.alpha, rel=1e-9)
    assert ours.sigma == pytest.approx(theirs.sigma, rel=1e-9)
    # powerlaw takes the larger of both sides of the empirical CDF, which differ by 1/n
    assert ours.D <= theirs.D + 1e-9 <= ours.D + 1 / ours.num_tail + 2e-9


@pytest.mark.parametrize("alpha", [1.6, 2.0, 2.5, 4.0])
def test_alpha_is_unbiased_and_sigma_covers(random, alpha):
    runs = 500
    fits = [fit_power_law(pareto(random, 400, alpha), xmin=1.0) for _ in range(runs)]
    z = np.array([(fit.alpha - alpha) / fit.sigma for fit in fits])
    assert abs(z.mean()) < 4 / runs**0.5
    assert z.std() == pytest.approx(1.0, abs=0.15)
    assert np.mean(np.abs(z) < 1.96) == pytest.approx(0.95, abs=0.04)


def test_ks_finds_where_the_tail_begins(random):
    fits = [fit_power_law(body_and_tail(random, 2000, alpha=2.5)) for _ in range(40)]
    assert np.mean([fit.alpha for fit in fits]) == pytest.approx(2.5, abs=0.06)
    assert np.median([fit.lambda_min for fit in fits]) == pytest.approx(1.0, abs=0.15)


@pytest.mark.parametrize("method", ["ks", "hill", "hill_paper", "fix_fingers", "clip_xmax"])
@settings(max_examples=25)
@given(seed=seeds, exponent=st.integers(-12, 12))
def test_scale_changes_nothing_but_the_unit(method, seed, exponent):
    values = body_and_tail(np.random.default_rng(seed), 120)
    # a power of ten moves the histogram of log10 λ by whole units
    fit, scaled = (fit_power_law(v, method) for v in (values, values * 10.0**exponent))
    assert (scaled.alpha, scaled.D, scaled.num_tail) == pytest.approx((fit.alpha, fit.D, fit.num_tail), rel=1e-6)
    assert scaled.lambda_min == pytest.approx(fit.lambda_min * 10.0**exponent, rel=1e-9)


def test_fix_fingers_stays_at_the_peak(random):
    values = np.sort(random.lognormal(0.0, 1.0, 2000))
    peak = histogram_peak(values)
    fit = fit_power_law(values, "fix_fingers")
    assert 0.95 * peak <= fit.lambda_min <= 1.5 * peak
    inside = np.flatnonzero((values[:-1] >= 0.95 * peak) & (values[:-1] <= 1.5 * peak))
    assert Tails.of(values).distances(inside).min() == fit.D


def test_clip_xmax_drops_the_fewest_that_free_the_tail():
    # a flat body under a finger of 9 eigenvalues that is a perfect, very steep power law of its own
    values = np.concatenate([np.linspace(1, 2, 60), 6 * (1 - np.arange(9) / 9) ** (-1 / 60)])
    alphas = [fit_power_law(values[: values.size - k]).alpha for k in range(11)]
    fewest = next(k for k in range(1, 11) if alphas[k] < alphas[0] - 1)
    fit = fit_power_law(values, "clip_xmax")
    assert fewest == 3
    assert alphas[0] > 20
    assert (fit.num_fingers, fit.alpha) == (fewest, alphas[fewest])
    assert fit.lambda_max == values[-1 - fewest]


def test_clip_xmax_leaves_a_clean_tail_alone(random):
    values = pareto(random, 300, 2.5)
    assert fit_power_law(values, "clip_xmax").alpha == fit_power_law(values, "ks").alpha
    assert fit_power_law(values, "clip_xmax").num_fingers == 0


def test_xmin_and_xmax_by_hand(random):
    values = body_and_tail(random)
    fit = fit_power_law(values, xmin=2.0, xmax=50.0)
    kept = np.sort(values[(values >= 2.0) & (values <= 50.0)])
    assert fit.num_tail == kept.size
    assert fit.lambda_max == kept[-1]
    assert fit.lambda_min == 2.0
    assert fit.alpha == pytest.approx(1 + kept.size / np.log(kept / 2.0).sum())
    assert fit.method == "fixed"


@pytest.mark.parametrize("values", [[], [1.0], [2.0, 2.0, 2.0], [0.0, -1.0, 3.0], [0.0] * 5])
def test_nothing_to_fit_is_said(values):
    with pytest.raises(MatrixError, match="fewer than 2 distinct") as caught:
        fit_power_law(values)
    assert caught.value.status == "degenerate"


@pytest.mark.parametrize("method", ["ks", "hill", "hill_paper", "fix_fingers", "clip_xmax"])
def test_ties_do_not_divide_by_zero(method):
    fit = fit_power_law([1.0, 2.0, 5.0, 5.0, 5.0, 5.0, 5.0, 5.0], method)
    assert np.isfinite(fit.alpha)
    assert fit.lambda_min < fit.lambda_max


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_numbers_that_are_none_are_refused(bad):
    with pytest.raises(MatrixError, match="NaN or infinite"):
        fit_power_law([1.0, 2.0, bad, 5.0])


def test_bad_arguments_are_usage_errors(random):
    values = pareto(random, 50, 2.5)
    with pytest.raises(UsageError, match="unknown fit 'median'"):
        fit_power_law(values, "median")
    with pytest.raises(UsageError, match="above xmin"):
        fit_power_law(values, xmin=values.max() * 2)
    for xmin in (0.0, -1.0, float("nan")):
        with pytest.raises(UsageError, match="a positive number"):
            fit_power_law(values, xmin=xmin)
    with pytest.raises(MatrixError, match="no bootstrap sample"):
        bootstrap_alpha([3.0, 3.0, 3.0])


def test_bootstrap_interval_is_seeded_and_covers(random):
    covered = 0
    for _ in range(40):
        low, high = bootstrap_alpha(pareto(random, 150, 2.5), "hill", resamples=80, seed=1, xmin=1.0)
        covered += low <= 2.5 <= high
    assert covered >= 32  # 95 % of 40 is 38
    values = body_and_tail(random)
    assert bootstrap_alpha(values, resamples=20, seed=3) == bootstrap_alpha(values, resamples=20, seed=3)
    assert bootstrap_alpha(values, resamples=20, seed=3) != bootstrap_alpha(values, resamples=20, seed=4)
