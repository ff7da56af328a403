"""Directions of two matrices, held against NumPy's full decompositions and closed forms."""

import numpy as np
import pytest
import torch

from htsr.errors import MatrixError, UsageError
from htsr.spectra.subspaces import EPSILONS, by_head, directions


def heavy(seed, *shape):
    random = np.random.default_rng(seed)
    return random.standard_normal(shape) * (1 - random.random(shape[-1])) ** -0.4


def plain(A, B, k):
    """The same by full decompositions, as the definitions say."""
    (U, s, Vt), (X, t, Yt) = (np.linalg.svd(W, full_matrices=False) for W in (A, B))
    D = B - A
    left, right = U[:, :k].T @ X[:, :k], Vt[:k] @ Yt[:k].T
    nearest = np.abs(U.T @ X[:, :k]).max(axis=0)
    d = np.linalg.svd(D, compute_uv=False)
    p = d / d.sum()
    both = U[:, :k].T @ D @ Vt[:k].T
    square = (D**2).sum()
    angles = [np.degrees(np.arccos(np.clip(np.linalg.svd(c, compute_uv=False), 0, 1))) for c in (left, right)]
    return {
        "overlap_left": (left**2).sum() / k,
        "overlap_right": (right**2).sum() / k,
        "angle_left": np.median(angles[0]),
        "angle_right": np.median(angles[1]),
        "largest_angle_left": angles[0].max(),
        "largest_angle_right": angles[1].max(),
        "intruder_counts": tuple(int((nearest < epsilon).sum()) for epsilon in EPSILONS),
        "share_both": (both**2).sum() / square,
        "share_left": ((U[:, :k].T @ D) ** 2).sum() / square,
        "share_right": ((D @ Vt[:k].T) ** 2).sum() / square,
        "share_scaling": (np.diag(both) ** 2).sum() / square,
        "effective_rank": np.exp(-(p * np.log(p)).sum()),
        "change_stable_rank": square / d[0] ** 2,
        "relative": square**0.5 / np.linalg.norm(A),
        "nearest": tuple(nearest),
        "values": tuple(t[:k]),
        "base_values": tuple(s[:k]),
    }


@pytest.mark.parametrize("shape", [(30, 20), (20, 30), (24, 24)])
@pytest.mark.parametrize("size", [0.05, 3.0])
def test_numbers_are_those_of_full_decompositions(shape, size):
    A = heavy(0, *shape)
    B = A + size * heavy(1, *shape)
    found = directions(A, B, 5)
    for name, value in plain(A, B, 5).items():
        assert getattr(found, name) == pytest.approx(value, abs=1e-9, rel=1e-9), name
    assert (found.chance_left, found.chance_right) == (5 / shape[0], 5 / shape[1])


def test_no_change_is_exactly_none():
    A = heavy(0, 30, 20)
    found = directions(A, A.copy(), 4)
    assert (found.overlap_left, found.overlap_right, found.largest_angle_left, found.relative) == (1.0, 1.0, 0.0, 0.0)
    assert found.intruder_counts == (0, 0, 0, 0)
    assert found.overlap_left_null is found.effective_rank is found.share_both is None


def test_bad_input_is_a_sentence():
    A = heavy(0, 8, 6)
    with pytest.raises(UsageError, match=r"one shape, not \(8, 6\) and \(6, 8\)"):
        directions(A, A.T)
    with pytest.raises(UsageError, match="8 rows do not divide into 3 heads"):
        by_head(A, A, 3, 0)
    with pytest.raises(MatrixError, match="NaN"):
        directions(A, torch.full((8, 6), torch.nan))
    with pytest.raises(MatrixError, match="B is zero"):
        directions(A, 0 * A)
