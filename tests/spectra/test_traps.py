import numpy as np
import pytest

from htsr.spectra.traps import remove_traps
from tests.models import heavy_matrix


def noise(seed, rows, columns):
    return np.random.default_rng(seed).standard_normal((rows, columns))


def test_a_shifted_mean_is_subtracted_where_it_makes_a_trap():
    W = noise(0, 200, 150)
    threshold = (200 * 150) ** -0.25
    below, above = remove_traps(W + 0.4 * threshold), remove_traps(W + 2 * threshold)
    assert (below.traps_before, below.mean_removed) == (0, 0.0)
    assert (above.traps_before, above.traps_after, above.clipped) == (1, 0, 0)
    assert above.mean_removed == pytest.approx(2 * threshold + W.mean())
    np.testing.assert_allclose(above.matrix, W - W.mean(), atol=1e-12)


def test_single_large_entries_are_clipped_at_the_size_that_makes_a_spike():
    W = noise(1, 200, 150)
    edge = (200 * 150) ** 0.25
    W[3, 5], W[70, 20] = 3 * edge, -2 * edge
    cleaned = remove_traps(W)
    assert (cleaned.traps_before, cleaned.traps_after, cleaned.mean_removed) == (2, 0, 0.0)
    assert cleaned.clipped == 2
    assert cleaned.limit == pytest.approx(edge, rel=0.02)
    untouched = np.ones(W.shape, bool)
    untouched[[3, 70], [5, 20]] = False
    np.testing.assert_array_equal(cleaned.matrix[untouched], W[untouched])
    assert cleaned.matrix[3, 5] == -cleaned.matrix[70, 20] == pytest.approx(cleaned.limit)
    again = remove_traps(cleaned.matrix)
    assert again.matrix is cleaned.matrix


def test_correlations_are_no_traps_and_stay():
    W = heavy_matrix(np.random.default_rng(2), 120, 90)
    W -= W.mean()
    cleaned = remove_traps(W)
    assert cleaned.traps_before == 0
    assert cleaned.matrix is W
    assert remove_traps(np.zeros((20, 10))).traps_before == 0


def test_traps_of_a_heavy_tailed_body_are_reported_not_hidden():
    W = np.random.default_rng(3).standard_t(2.5, (200, 150))
    cleaned = remove_traps(W)
    assert cleaned.traps_before > cleaned.traps_after
    assert cleaned.clipped > 0
    stack = remove_traps(np.stack([noise(4, 60, 50), noise(5, 60, 50)]) + 1.0)
    assert (stack.traps_before, stack.traps_after) == (2, 0)
