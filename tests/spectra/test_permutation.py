import numpy as np
import pytest

from htsr.spectra.bulk import fit_bulk
from htsr.spectra.esd import esd
from htsr.spectra.permutation import permute_entries


def test_permutation_keeps_the_entries_and_destroys_correlation(random):
    W = np.outer(random.standard_normal(200), random.standard_normal(300))
    noise = permute_entries(W, 7)
    assert np.array_equal(np.sort(noise.ravel()), np.sort(W.ravel()))
    assert fit_bulk(esd(W).eigenvalues, 200, 300).mp_softrank < 0.1
    assert fit_bulk(esd(noise).eigenvalues, 200, 300).num_spikes <= 1
    assert np.array_equal(noise, permute_entries(W, 7))
    assert not np.array_equal(noise, permute_entries(W, 8))


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_the_permutation_is_the_one_that_an_index_would_make(random, dtype):
    W = random.standard_normal((30, 20)).astype(dtype)
    index = np.random.Generator(np.random.SFC64((0, 7))).permutation(W.size)
    noise = permute_entries(W, (0, 7))
    assert noise.dtype == dtype
    assert np.array_equal(noise, W.ravel()[index].reshape(W.shape))


def test_large_matrices_are_permuted_uniformly_too(random, monkeypatch):
    monkeypatch.setattr("htsr.spectra.permutation._CHUNK", 7)
    monkeypatch.setattr("htsr.spectra.permutation._DEAL_FROM", 0)
    W = np.arange(24.0).reshape(4, 6)
    places = np.zeros((24, 24))
    runs = 4000
    for seed in range(runs):
        noise = permute_entries(W, seed)
        places[np.arange(24), noise.ravel().astype(int)] += 1
    chi2 = ((places - runs / 24) ** 2 / (runs / 24)).sum()
    assert chi2 == pytest.approx(23**2, abs=6 * (2 * 23**2) ** 0.5)


def test_pieces_are_permuted_within_themselves(random):
    stack = random.standard_normal((3, 8, 10))
    noise = permute_entries(stack, 0)
    for before, after in zip(stack, noise, strict=True):
        assert np.array_equal(np.sort(before.ravel()), np.sort(after.ravel()))
