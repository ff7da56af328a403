import numpy as np
import pytest
from scipy.integrate import quad

from htsr.spectra.bulk import (
    fit_bulk,
    jensen_shannon_distance,
    mp_cdf,
    mp_quantile,
    tw1_quantile,
    tw_threshold,
)
from htsr.spectra.esd import esd
from htsr.spectra.null import alpha_null, gaussian_eigenvalues, shape_null
from htsr.spectra.permutation import permute_entries
from htsr.spectra.tail import fit_power_law
from tests.reference import statistics as plain


@pytest.mark.parametrize("Q", [1.0, 1.5, 4.0, 50.0])
def test_mp_distribution_is_the_integral_of_its_density(Q):
    low, high = (1 - Q**-0.5) ** 2, (1 + Q**-0.5) ** 2
    for x in np.linspace(low, high, 7)[1:-1]:
        # the density diverges as 1/√x at x = 0 for Q = 1; x = t² removes that
        expected, _ = quad(lambda t: 2 * t * plain.mp_density(t * t, Q), low**0.5, x**0.5)
        assert mp_cdf(x, Q) == pytest.approx(expected, abs=2e-5)
        assert mp_quantile(mp_cdf(x, Q), Q) == pytest.approx(x, abs=1e-6)
    assert mp_cdf(high * 1.1, Q) == 1.0


# upper quantiles of TW1: Bejan (2005), table 1
@pytest.mark.parametrize(("tail", "quantile"), [(0.10, 0.4501), (0.05, 0.9793), (0.01, 2.0234), (0.001, 3.2724)])
def test_tracy_widom_quantiles(tail, quantile):
    assert tw1_quantile(tail) == pytest.approx(quantile, abs=0.03)


@pytest.mark.parametrize(("M", "N", "pieces"), [(80, 80, 1), (80, 240, 1), (30, 60, 6)])
def test_noise_exceeds_the_spike_threshold_once_in_a_hundred(random, M, N, pieces):
    runs = 3000
    threshold = tw_threshold(1.0, M, N, pieces)
    largest = [max(gaussian_eigenvalues(M, N, random)[0, -1] for _ in range(pieces)) for _ in range(runs // pieces)]
    assert np.mean(np.array(largest) > threshold) == pytest.approx(0.01, abs=0.012 if pieces > 1 else 0.006)


@pytest.mark.parametrize("shape", [(200, 200), (200, 600), (600, 200), (100, 3000)])
@pytest.mark.parametrize("spikes", [0, 1, 6])
def test_planted_spikes_are_counted_and_sigma_is_found(random, shape, spikes):
    sigma = 0.03
    W = sigma * random.standard_normal(shape)
    edge = sigma * (shape[0] ** 0.5 + shape[1] ** 0.5)
    for i in range(spikes):
        u, v = random.standard_normal(shape[0]), random.standard_normal(shape[1])
        W += (3 + i) * edge * np.outer(u / np.linalg.norm(u), v / np.linalg.norm(v))
    bulk = fit_bulk(esd(W).eigenvalues, min(shape), max(shape))
    assert bulk.num_spikes == spikes
    assert bulk.sigma == pytest.approx(sigma, rel=0.02)
    assert bulk.distance < 0.06
    assert bulk.lambda_plus == pytest.approx(edge**2, rel=0.04)


def test_a_heavy_tail_does_not_widen_the_bulk(random):
    noise = random.standard_normal((400, 400))
    factor = random.standard_normal((400, 15)) * (1 - random.random(15)) ** -0.7
    W = noise + factor @ random.standard_normal((15, 400)) / 3
    bulk = fit_bulk(esd(W).eigenvalues, 400, 400)
    assert W.std() > 1.8
    assert bulk.sigma == pytest.approx(1.0, abs=0.04)
    assert bulk.num_spikes == 15


@pytest.mark.parametrize("shift", [0.0, 0.5, 2.0, 4.0])
def test_a_mean_shift_makes_a_trap_where_theory_puts_it(random, shift):
    N, M, sigma = 900, 400, 0.02
    mean = shift * sigma * (N * M) ** -0.25
    noise = permute_entries(mean + sigma * random.standard_normal((N, M)), 3)
    bulk = fit_bulk(values := esd(noise).eigenvalues, M, N)
    assert bulk.num_spikes == (1 if shift > 1 else 0)
    if shift > 1:  # Baik, Ben Arous & Péché, in units of σ² and λ/N
        theta2, q = M * mean**2 / sigma**2, M / N
        assert values[-1] / N == pytest.approx(sigma**2 * (1 + theta2) * (q + theta2) / theta2, rel=0.04)


def test_jensen_shannon_distance_bounds(random):
    a = np.sort(random.random(50))
    assert jensen_shannon_distance(a, 7 * a) == pytest.approx(0.0, abs=1e-7)
    disjoint = np.array([0.0, 1.0]), np.array([1.0, 0.0])
    assert jensen_shannon_distance(*disjoint) == pytest.approx(np.log(2) ** 0.5)
    b = np.sort(random.lognormal(size=50))
    assert jensen_shannon_distance(a, b) == pytest.approx(jensen_shannon_distance(b, a))


@pytest.mark.parametrize("M", [40, 700])  # both solvers
def test_laguerre_eigenvalues_are_those_of_gaussian_matrices(random, M):
    N = 2 * M
    count = 4 * 700 // M
    drawn = gaussian_eigenvalues(M, N, random, count).ravel()
    made = np.concatenate([esd(random.standard_normal((M, N))).eigenvalues for _ in range(count)])
    for level in (0.02, 0.25, 0.5, 0.75, 0.98):
        assert np.quantile(drawn, level) == pytest.approx(np.quantile(made, level), rel=0.06)
    assert drawn.sum() == pytest.approx(count * M * N, rel=0.05)


# measured values for the Hill fit
@pytest.mark.parametrize(("Q", "alpha"), [(1, 2.12), (2.67, 2.99), (3, 3.13), (4, 3.46), (32, 8.0)])
def test_shape_null_of_the_hill_fit(Q, alpha):
    null = shape_null(384, round(Q * 384), 1, lambda values: fit_power_law(values, "hill").alpha, draws=8)
    assert null.alpha == pytest.approx(alpha, rel=0.02)
    assert null.sd < 0.02 * alpha


def test_pooled_nulls_share_matrices_and_agree_with_independent_ones(random):
    def alpha(values):
        return fit_power_law(values, "fix_fingers").alpha

    found = shape_null(40, 60, 9, alpha, draws=16)
    independent = [
        alpha(np.sort(np.linalg.svd(random.standard_normal((9, 40, 60)), compute_uv=False).ravel() ** 2))
        for _ in range(40)
    ]
    assert abs(found.alpha - np.median(independent)) < np.std(independent)
    assert 0.3 < found.sd / np.std(independent) < 3


def test_nulls_of_single_matrices_are_those_of_the_first_release():
    null = alpha_null(128, 384, 1, "ks")
    assert (round(null.alpha, 2), round(null.sd, 2)) == (7.49, 3.37)
