import numpy as np
import pytest
import torch

from htsr.errors import MatrixError, UsageError
from htsr.spectra.denoising import denoise, intruders, noise_threshold, shrink_intruders, threshold_of_known_noise
from tests.models import heavy_matrix

SHAPES = [(60, 60), (40, 100), (100, 40)]


def test_the_factors_are_the_published_ones():
    """Gavish & Donoho: 4/√3 and 2.858 for square matrices, and their fit of ω(β), good to 0.02."""
    assert threshold_of_known_noise(1.0) == pytest.approx(4 / 3**0.5)
    for beta in (0.05, 0.2, 0.5, 0.8, 1.0):
        omega = noise_threshold(np.ones(3), round(1000 * beta), 1000)
        assert omega == pytest.approx(0.56 * beta**3 - 0.95 * beta**2 + 1.82 * beta + 1.43, abs=0.02)
    assert noise_threshold(np.ones(3), 500, 500) == pytest.approx(2.858, abs=1e-3)


@pytest.mark.parametrize("shape", SHAPES)
def test_denoising_is_the_hard_threshold_of_the_singular_values(shape, random):
    noise = random.standard_normal(shape)
    assert denoise(noise).kept == 0
    U, V = (np.linalg.qr(random.standard_normal((size, 3)))[0] for size in shape)
    change = noise + U * [90.0, 60.0, 40.0] @ V.T  # the edge lies at √m + √n < 17
    found = denoise(change)
    u, s, vt = np.linalg.svd(change, full_matrices=False)
    kept = np.where(s > found.threshold, s, 0)
    assert (found.kept, found.total) == (3, min(shape)) == (np.count_nonzero(kept), len(s))
    np.testing.assert_allclose(found.matrix, u * kept @ vt, atol=1e-10)
    assert found.norm_kept == pytest.approx((kept**2).sum() / (s**2).sum())
    assert found.threshold == pytest.approx(noise_threshold(s, *sorted(shape)))


def test_signs_order_scale_and_dtype_do_not_matter(random):
    change = random.standard_normal((50, 80))
    change[:4] *= 30
    found = denoise(change)
    assert 0 < found.kept < 50
    rows, columns = random.permutation(50), random.permutation(80)
    for other in (-change, change[rows][:, columns], change.T, 1e-6 * change, change.astype(np.float32)):
        again = denoise(other)
        assert again.kept == found.kept
        assert again.norm_kept == pytest.approx(found.norm_kept, rel=1e-5)
    np.testing.assert_allclose(denoise(change[rows]).matrix, found.matrix[rows], atol=1e-9)
    stack = denoise(torch.from_numpy(np.stack([change, random.standard_normal((50, 80))])))
    assert stack.kept == found.kept  # the second piece has its own threshold, and is noise
    np.testing.assert_allclose(stack.matrix[0], found.matrix, atol=1e-9)
    assert not stack.matrix[1].any()


def test_a_change_of_low_rank_has_no_noise_to_tell(random):
    low = random.standard_normal((60, 4)) @ random.standard_normal((4, 80))
    found = denoise(low)
    assert (found.kept, found.norm_kept) == (4, 1.0)
    assert found.threshold < 3e-7 * np.linalg.norm(low, 2)
    np.testing.assert_allclose(found.matrix, low, atol=1e-10)
    stored = denoise((low + random.standard_normal((60, 80)) * 1e-6).astype(np.float32))  # as merged and rounded
    assert stored.kept == 4
    for bad, status in ((np.zeros((5, 5)), "zero"), (np.full((5, 5), np.nan), "nan"), (np.ones((0, 5)), "empty")):
        with pytest.raises(MatrixError) as error:
            denoise(bad)
        assert error.value.status == status


def found_by_svd(base, tuned, k, epsilon):
    """The definition, by two decompositions."""
    U = np.linalg.svd(base, full_matrices=False)[0]
    u, s, vt = np.linalg.svd(tuned, full_matrices=False)
    return [j for j in range(k) if np.abs(U.T @ u[:, j]).max() < epsilon], u, s, vt


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("epsilon", [0.3, 0.6, 0.9])
def test_intruders_are_those_of_the_definition(shape, epsilon, random):
    base = random.standard_normal(shape) * np.linspace(3, 0.2, shape[1])
    tuned = base + 8 * random.standard_normal((shape[0], 3)) @ random.standard_normal((3, shape[1])) / 3
    which, u, s, vt = found_by_svd(base, tuned, 10, epsilon)
    assert intruders(base, tuned, 10, epsilon) == len(which)
    found = shrink_intruders(base, tuned, 0.25, 10, epsilon)
    assert found.intruders == len(which)
    s = s.copy()
    s[which] *= 0.25
    np.testing.assert_allclose(found.matrix, u * s @ vt, atol=1e-9)
    rows = random.permutation(shape[0])
    assert intruders(-base[rows], tuned[rows], 10, epsilon) == len(which)


def test_a_gaussian_change_of_the_same_norm_makes_no_intruder(random):
    base = heavy_matrix(random, 80, 120).double().numpy()
    low = random.standard_normal((80, 2)) @ random.standard_normal((2, 120))
    low *= np.linalg.norm(base) / np.linalg.norm(low)
    noise = random.standard_normal(base.shape)
    noise *= np.linalg.norm(low) / np.linalg.norm(noise)
    assert intruders(base, base + low, 5) == 2
    assert intruders(base, base + noise / 2, 5) == 0


def test_what_is_no_intruder_is_left(random):
    base = random.standard_normal((30, 50))
    assert intruders(base, base, 30, 0.999) == 0
    assert intruders(base, 3 * base, 30, 0.999) == 0
    W = torch.from_numpy(base).bfloat16()
    same = shrink_intruders(W, W)
    assert same.intruders == 0
    assert torch.equal(same.matrix, W)
    assert intruders(np.zeros((5, 5)), np.eye(5), 2, 0.5) == 2  # nothing of it was there before
    for k, epsilon in ((0, 0.5), (True, 0.5), (3, 1.5)):
        with pytest.raises(UsageError):
            intruders(base, base, k, epsilon)
