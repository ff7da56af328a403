import numpy as np
import pytest
import torch

from htsr.spectra.esd import esd
from htsr.spectra.lanczos import lanczos_esd
from htsr.spectra.tail import fit_power_law


def power_law_matrix(random, M, N, alpha):
    """A matrix whose eigenvalues are a power-law sample."""
    eigenvalues = (1 - random.random(M)) ** (-1 / (alpha - 1))
    left, _ = np.linalg.qr(random.standard_normal((M, M)))
    right, _ = np.linalg.qr(random.standard_normal((N, M)))
    return (left * np.sqrt(eigenvalues)) @ right.T


MATRICES = {
    "gauss": lambda r: r.standard_normal((600, 700)),
    "tall": lambda r: r.standard_normal((2000, 300)),
    "student": lambda r: r.standard_t(3, (600, 600)),
    "power law": lambda r: power_law_matrix(r, 600, 900, 2.5),
}


@pytest.mark.parametrize("kind", MATRICES)
@pytest.mark.parametrize("device", ["cpu", "cpu:0"])
def test_the_distribution_is_within_its_stated_error(random, kind, device):
    W = MATRICES[kind](random)
    exact, found = esd(W).eigenvalues, lanczos_esd(W, device=device)
    K = exact.size
    distance = np.abs(np.searchsorted(exact, found.eigenvalues) - np.arange(K)).max() / K
    assert 0 < found.error < 0.03
    assert distance < 5 * found.error + 2 / K
    assert found.eigenvalues.sum() == pytest.approx(exact.sum(), rel=1e-5)
    assert found.eigenvalues[-3:] == pytest.approx(exact[-3:], rel=1e-4)
    assert found.route == "lanczos/128x8"


def test_alpha_is_within_its_jackknife_error(random):
    W = power_law_matrix(random, 800, 1000, 2.3)
    exact = fit_power_law(esd(W).positive, "hill").alpha
    found = lanczos_esd(W)
    alphas = np.array([fit_power_law(v, "hill").alpha for v in found.replicates])
    error = (7 / 8 * ((alphas - alphas.mean()) ** 2).sum()) ** 0.5
    assert fit_power_law(found.positive, "hill").alpha == pytest.approx(exact, abs=4 * error)
    assert error < 0.1


def test_few_dimensions_are_exact(random):
    W = random.standard_normal((40, 60))
    assert lanczos_esd(W).eigenvalues == pytest.approx(esd(W).eigenvalues, rel=1e-6)


def test_rank_is_approximated(random):
    W = random.standard_normal((600, 150)) @ random.standard_normal((150, 900))
    found = lanczos_esd(W)
    assert found.positive.size == pytest.approx(150, abs=3 * 600 * found.error + 5)


def test_zero_bfloat16_and_seeds(random):
    assert not lanczos_esd(np.zeros((30, 40))).eigenvalues.any()
    W = torch.from_numpy(random.standard_normal((300, 300))).bfloat16()
    assert np.array_equal(lanczos_esd(W, seed=1).eigenvalues, lanczos_esd(W, seed=1).eigenvalues)
    assert not np.array_equal(lanczos_esd(W, seed=1).eigenvalues, lanczos_esd(W, seed=2).eigenvalues)
