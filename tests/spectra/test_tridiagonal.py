import threading
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from htsr.spectra.certainty import relative_errors
from htsr.spectra.density import ESD
from htsr.spectra.eigenvalues import gram
from htsr.spectra.tridiagonal import float32_eigenvalues


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 70),
    st.integers(0, 140),
    st.floats(0.0, 1.5),
    st.sampled_from([1e-15, 1e-6, 1.0, 1e15]),
    st.integers(0, 2**32 - 1),
)
def test_errors_are_within_their_bound(M, more, tail, scale, seed):
    """For light and heavy-tailed columns and entries, near overflow and underflow."""
    random = np.random.default_rng(seed)
    W = random.standard_normal((M, M + more)) * (1 - random.random(M + more)) ** -tail
    if seed % 3 == 0:
        W = W * random.standard_t(2, W.shape)
    W = (W * (scale / np.abs(W).max())).astype(np.float32)
    exact = np.linalg.eigvalsh(gram(W, "float64"))
    found = float32_eigenvalues(gram(W, "float32"))
    assert (np.diff(found) >= 0).all()
    spectrum = ESD(np.where(exact > 4e-15 * exact[-1], exact, 0.0), M, M + more, 1, route="gram/float32")
    errors = np.abs(found - exact)[-spectrum.positive.size :]
    assert (errors <= relative_errors(spectrum) * spectrum.positive).all()


def test_one_triangle_is_enough(random):
    W = random.standard_normal((40, 60)).astype(np.float32)
    whole = gram(W, "float32")
    half = np.tril(whole)
    assert np.array_equal(float32_eigenvalues(half), float32_eigenvalues(whole))


@pytest.mark.parametrize("M", [1, 2, 31, 32, 33])
def test_a_multiple_of_the_identity(M):
    assert float32_eigenvalues(3 * np.eye(M, dtype=np.float32)) == pytest.approx(np.full(M, 3.0), rel=1e-9)


def test_zero_has_zeros():
    assert not float32_eigenvalues(np.zeros((5, 5), dtype=np.float32)).any()


def test_other_threads_go_on_meanwhile(random):
    W = random.standard_normal((700, 900)).astype(np.float32)
    matrix = gram(W, "float32")
    worker = threading.Thread(target=float32_eigenvalues, args=(matrix,))
    steps = 0
    worker.start()
    while worker.is_alive():
        time.sleep(0)
        steps += 1
    assert steps > 1  # with the interpreter's lock held, one at most
