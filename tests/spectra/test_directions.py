import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from htsr.errors import MatrixError, UsageError
from htsr.spectra.directions import decompose, project_tail, rescaled
from htsr.spectra.erg import erg
from htsr.spectra.esd import esd
from htsr.spectra.tail import fit_power_law


def matrix(seed, *shape):
    random = np.random.default_rng(seed)
    return random.standard_normal(shape) * (1 - random.random(shape[-1])) ** -0.4


shapes = st.tuples(st.integers(12, 40), st.integers(12, 40))


@given(shapes, st.integers(1, 12), st.integers(0, 99))
def test_k_directions_are_the_best_approximation_of_rank_k(shape, k, seed):
    W = matrix(seed, *shape)
    found = project_tail(W, k)
    U, s, Vt = np.linalg.svd(W, full_matrices=False)
    assert (found.kept, found.total) == (k, min(shape))
    np.testing.assert_allclose(found.matrix, U[:, :k] * s[:k] @ Vt[:k], atol=1e-10 * s[0])
    # Eckart-Young: what is lost is exactly the discarded singular values
    assert np.linalg.norm(W - found.matrix) ** 2 == pytest.approx((s[k:] ** 2).sum(), abs=1e-9 * s[0] ** 2)
    assert found.norm_kept == pytest.approx((s[:k] ** 2).sum() / (s**2).sum())
    assert found.lambda_min == pytest.approx(s[k - 1] ** 2)


@given(shapes, st.integers(0, 99), st.sampled_from(["erg", "tail", 3]))
def test_projection_is_idempotent_on_its_own_rank_and_commutes_with_the_transpose(shape, seed, keep):
    W = matrix(seed, *shape)
    found = project_tail(W, keep)
    tolerance = 1e-10 * np.abs(W).max()
    np.testing.assert_allclose(project_tail(found.matrix, found.kept).matrix, found.matrix, atol=tolerance)
    assert np.linalg.matrix_rank(found.matrix, tol=1e-6) == found.kept
    turned = project_tail(W.T, keep)
    assert turned.kept == found.kept
    np.testing.assert_allclose(turned.matrix, found.matrix.T, atol=tolerance)


def test_tails_are_those_of_the_fits():
    W = matrix(1, 120, 90)
    values = esd(W).eigenvalues
    fit = fit_power_law(values, "ks")
    assert project_tail(W, "tail").kept == fit.num_tail
    assert project_tail(W, "tail", fit="hill").kept == 45
    condition = erg(values, fit.lambda_min)
    found = project_tail(W, "erg")
    assert found.kept == condition.num
    assert found.lambda_min == pytest.approx(condition.lambda_erg)
    kept = esd(found.matrix, route="svd").eigenvalues[-found.kept :]
    np.testing.assert_allclose(kept, values[-found.kept :], rtol=1e-8)  # the tail itself is untouched


def test_a_stack_shares_one_tail_and_keeps_k_of_each_piece():
    stack = np.stack([matrix(1, 20, 30), 0.5 * matrix(2, 20, 30), matrix(3, 20, 30)])
    pooled = np.sort(esd(stack).eigenvalues)
    found = project_tail(stack, "tail")
    limit = fit_power_law(pooled).lambda_min
    ranks = [np.linalg.matrix_rank(piece, tol=1e-6) for piece in found.matrix]
    assert ranks == [int((np.linalg.svd(piece)[1] ** 2 >= limit * (1 - 1e-9)).sum()) for piece in stack]
    assert sum(ranks) == found.kept
    for piece, projected in zip(stack, project_tail(stack, 4).matrix, strict=True):
        np.testing.assert_allclose(projected, project_tail(piece, 4).matrix, atol=1e-10)


def test_more_directions_than_there_are_cannot_be_kept():
    W = matrix(5, 10, 14)
    np.testing.assert_allclose(project_tail(W, 10).matrix, W, atol=1e-12)
    with pytest.raises(MatrixError, match="has 10 directions, fewer than the 11 to be kept"):
        project_tail(W, 11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_tensors_keep_dtype_and_blocks_make_no_difference(dtype, monkeypatch):
    W = torch.from_numpy(matrix(7, 50, 24)).to(dtype)
    found = project_tail(W, 5)
    monkeypatch.setattr("htsr.spectra.directions._CHUNK", 24 * 3)
    again = project_tail(W, 5)
    assert isinstance(found.matrix, torch.Tensor)
    assert found.matrix.dtype == dtype
    torch.testing.assert_close(again.matrix, found.matrix)
    exact = project_tail(W.double().numpy(), 5).matrix
    np.testing.assert_allclose(found.matrix.double().numpy(), exact, rtol=2 * torch.finfo(dtype).eps, atol=1e-12)


def test_rescaling_multiplies_singular_values():
    W = matrix(3, 9, 13)
    found = decompose(W)
    ratios = np.linspace(0.5, 2, 9)[None]
    s = np.linalg.svd(rescaled(W, found.vectors, ratios))[1]
    np.testing.assert_allclose(s, np.sort(np.linalg.svd(W)[1][::-1] * ratios[0])[::-1], rtol=1e-10)


def test_what_cannot_be_projected_says_so():
    with pytest.raises(MatrixError, match="zero"):
        project_tail(np.zeros((4, 5)), "tail")
    with pytest.raises(MatrixError, match="NaN"):
        project_tail(np.full((4, 5), np.nan), 2)
    with pytest.raises(MatrixError, match="no crossing"):
        project_tail(np.outer(np.ones(9), np.ones(9)), "erg")
    with pytest.raises(MatrixError, match="no entries"):
        project_tail(np.zeros((0, 5)), 2)
    with pytest.raises(UsageError, match="not 1"):
        project_tail(np.ones(5), 2)
    for keep in (0, -1, True, "all", 2.0):
        with pytest.raises(UsageError, match="keep is"):
            project_tail(np.eye(4), keep)
