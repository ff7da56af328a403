"""Directions of two matrices, held against NumPy's full decompositions and closed forms."""

from dataclasses import fields

import numpy as np
import pytest
import torch

from htsr.errors import MatrixError, UsageError
from htsr.spectra import leading as leading_module
from htsr.spectra.changes import effective_rank
from htsr.spectra.denoising import left_vectors
from htsr.spectra.direction_numbers import EPSILONS, Directions
from htsr.spectra.intruders import LeftVectors
from htsr.spectra.leading import TURNED, leading
from htsr.spectra.subspaces import by_head, directions
from htsr.spectra.sums import Sum

SCALARS = [f.name for f in fields(Directions) if f.name not in ("cosines", "notes", "nearest", "values", "base_values")]
SWAPPED = {"left": "right", "right": "left"}


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


@pytest.mark.parametrize("shape", [(1, 9), (9, 1), (1, 1)])
def test_a_single_row_or_column_has_one_direction(shape):
    A, B = heavy(0, *shape), heavy(1, *shape)
    found = directions(A, B, 1)
    for name, value in plain(A, B, 1).items():
        assert getattr(found, name) == pytest.approx(value, abs=1e-5, rel=1e-9), name
    assert directions(A[::-1], B[:, ::-1], 1).values == pytest.approx(found.values)  # strides below 0


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


def rotation(m, i, j, angle):
    """The rotation of axis i towards axis j, in degrees."""
    turn = np.eye(m)
    c, s = np.cos(np.radians(angle)), np.sin(np.radians(angle))
    turn[np.ix_([i, j], [i, j])] = [[c, -s], [s, c]]
    return turn


@pytest.mark.parametrize("angle", [0.001, 30, 44.9, 45.1, 80])
def test_a_rotation_by_a_known_angle(angle):
    A = np.diag(np.arange(12.0, 0.0, -1))[:, :9]
    B = rotation(12, 1, 7, angle) @ A  # of 3 leading directions one turns, out of them
    found = directions(A, B, 3)
    assert found.overlap_left == pytest.approx((2 + np.cos(np.radians(angle)) ** 2) / 3)
    assert found.largest_angle_left == pytest.approx(angle, rel=1e-9)
    assert (found.angle_left, found.overlap_right) == (pytest.approx(0, abs=1e-9), pytest.approx(1))
    assert found.intruders == 0  # it turned towards another direction of A, which it is near at 80 degrees
    assert min(found.nearest) == pytest.approx(max(np.cos(np.radians(angle)), np.sin(np.radians(angle))))
    inside = rotation(12, 0, 1, angle) @ A
    assert directions(A, inside, 3).overlap_left == pytest.approx(1)  # within the leading subspace nothing is seen


def test_scaling_alone_turns_nothing():
    A = heavy(0, 40, 25)
    U, s, Vt = np.linalg.svd(A, full_matrices=False)
    grown = s.copy()
    grown[:4] *= [2.0, 1.9, 1.8, 1.7]
    found = directions(A, U * grown @ Vt, 4)
    for name in ("overlap_left", "overlap_right", "share_both", "share_left", "share_right", "share_scaling"):
        assert getattr(found, name) == pytest.approx(1), name
    assert found.largest_angle_left < 1e-5
    assert found.values == pytest.approx(tuple(grown[:4]))
    assert found.effective_rank < 4 < found.effective_rank_null


def test_a_planted_intruder_is_found_and_a_strengthened_direction_is_none():
    random = np.random.default_rng(0)
    A = heavy(0, 60, 60)
    U, s, Vt = np.linalg.svd(A)
    u = U @ np.ones(60) / 60**0.5  # as far as can be from all of A's left vectors
    v = random.standard_normal(60)
    planted = directions(A, A + 1.5 * s[0] * np.outer(u, v / np.linalg.norm(v)), 5)
    assert planted.intruders == 1
    new = int(np.argmin(planted.nearest))
    assert new == 0
    assert planted.nearest[0] < 0.3
    assert planted.values[0] > 1.4 * s[0]
    assert planted.intruder_counts[0] == 1
    assert planted.intruder_counts_null[0] == 0
    raised = directions(A, A + 1.5 * s[0] * np.outer(U[:, 40], Vt[40]), 5)
    assert raised.intruder_counts == (0, 0, 0, 0)
    assert raised.overlap_left == pytest.approx(4 / 5)


def test_leading_vectors_decide_on_intruders_where_they_can(monkeypatch):
    A = Sum.of(heavy(0, 60, 50))
    known = leading(A, 6).left
    near = leading(A.plus(Sum.of(heavy(1, 60, 50)), 0.02), 6).left
    full = left_vectors(heavy(0, 60, 50))[0].nearest(near)
    monkeypatch.setattr(LeftVectors, "_decomposed", property(lambda self: pytest.fail("A was decomposed")))
    np.testing.assert_allclose(LeftVectors(A, known).nearest(near), full, atol=1e-12)


@pytest.mark.parametrize("change", ["sign", "rows", "columns", "scale", "transposed", "rotated"])
def test_what_means_the_same_gives_the_same(change):
    A, B = heavy(0, 30, 20), heavy(0, 30, 20) + 0.3 * heavy(1, 30, 20)
    random = np.random.default_rng(2)
    rows, columns = random.permutation(30), random.permutation(20)
    Q, _ = np.linalg.qr(random.standard_normal((30, 30)))
    same = {
        "sign": lambda W: -W,
        "rows": lambda W: W[rows],
        "columns": lambda W: W[:, columns],
        "scale": lambda W: 2.0**40 * W,
        "transposed": lambda W: W.T,
        "rotated": lambda W: Q @ W,
    }[change]
    before, after = directions(A, B, 4, draws=0), directions(same(A), same(B), 4, draws=0)
    for name in SCALARS:
        turned = "_".join(SWAPPED.get(word, word) for word in name.split("_")) if change == "transposed" else name
        if getattr(before, name) is not None and not (change == "transposed" and name.startswith("intruder")):
            assert getattr(after, turned) == pytest.approx(getattr(before, name), rel=1e-8, abs=1e-8), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_stored_dtypes_are_summed_in_float64(dtype):
    A, B = (torch.from_numpy(heavy(seed, 30, 20)).to(dtype) for seed in (0, 1))
    narrow, wide = directions(A, B, 4), directions(A.double(), B.double(), 4)
    assert narrow.overlap_left == pytest.approx(wide.overlap_left, abs=1e-12)
    assert narrow.share_both == pytest.approx(wide.share_both, abs=1e-12)
    assert narrow.relative == pytest.approx(wide.relative)


@pytest.mark.parametrize("size", [0.01, 0.1])
def test_the_null_is_that_of_perturbation_theory(size):
    """First order: u_j turns towards u_i by (σ_j g_ij + σ_i g_ji) / (σ_j² - σ_i²), and out of all of A's by g/σ_j."""
    m, n, k = 80, 50, 3
    s = np.concatenate([[30.0, 25.0, 20.0], np.linspace(8, 1, n - k)])
    U, _ = np.linalg.qr(np.random.default_rng(0).standard_normal((m, m)))
    A = U[:, :n] * s
    G = np.random.default_rng(5).standard_normal((m, n))
    B = A + size * s[0] * G / np.linalg.norm(G)
    variance = (size * s[0]) ** 2 / (m * n)
    top, rest = s[:k, None], s[None, k:]
    turned = ((top**2 + rest**2) / (top**2 - rest**2) ** 2).sum()
    left = variance * (turned + ((m - n) / s[:k] ** 2).sum()) / k
    right = variance * turned / k
    found = directions(A, B, k, draws=20)
    assert 1 - found.overlap_left_null == pytest.approx(left, rel=0.15)
    assert 1 - found.overlap_right_null == pytest.approx(right, rel=0.15)
    for name in ("overlap_left", "overlap_right"):  # the change itself is such a draw
        assert 1 - getattr(found, name) == pytest.approx(1 - getattr(found, f"{name}_null"), rel=0.4)
    for name in ("effective_rank", "change_stable_rank"):
        assert getattr(found, name) == pytest.approx(getattr(found, f"{name}_null"), rel=0.1)
    for name, relative in (("share_left", 0.3), ("share_right", 0.3), ("share_both", 0.9)):
        assert getattr(found, name) == pytest.approx(getattr(found, f"{name}_null"), rel=relative)


@pytest.mark.parametrize(("following", "scatters"), [(7.0, False), (8.0, False), (9.8, True)])
def test_a_null_that_hangs_on_two_close_singular_values_says_so(following, scatters):
    """Held against draws: the deviation of 1 - overlap over them, relative to its mean."""
    m, n, k = 40, 30, 3
    A = np.eye(m, n) * np.concatenate([[14.0, 12.0, 10.0, following], np.linspace(5, 1, n - 4)])
    G = np.random.default_rng(1).standard_normal((m, n))
    B = A + 1.5 * G / np.linalg.norm(G)
    draws = [directions(A, B, k, seed=seed) for seed in range(30)]
    said = [any(note.startswith("null scatters: singular values 3 and 4") for note in one.notes) for one in draws]
    lost = [1 - one.overlap_left_null for one in draws]
    assert np.std(lost) / np.mean(lost) > 0.5 if scatters else np.std(lost) / np.mean(lost) < 0.3
    assert np.mean(said) > 0.7 if scatters else not any(said)


def test_the_null_effective_rank_is_that_of_gaussian_matrices():
    draws = [np.random.default_rng(seed).standard_normal((120, 70)) for seed in range(3)]
    mean = np.mean([effective_rank(np.linalg.svd(G, compute_uv=False)) for G in draws])
    A = heavy(0, 120, 70)
    assert directions(A, A + draws[0], 2, draws=0).effective_rank_null == pytest.approx(mean, rel=0.01)


def test_a_change_of_low_rank_keeps_it_through_the_rounding_of_float32():
    A = heavy(0, 64, 48).astype(np.float32)
    low = (heavy(1, 64, 4) @ heavy(2, 4, 48)).astype(np.float32)
    found = directions(A, A + np.float32(0.02) * low, 3)
    assert 1 < found.effective_rank < 4.01


def test_no_number_stands_on_equal_singular_values_or_on_rounding_in_silence():
    Q, _ = np.linalg.qr(heavy(0, 20, 20))
    assert any("undefined" in note for note in directions(Q, heavy(1, 20, 20), 3).notes)
    low = (heavy(1, 30, 2) @ heavy(2, 2, 20)).astype(np.float32)
    found = directions(low, low + heavy(3, 30, 20).astype(np.float32), 5)
    assert found.k == 2
    assert "A has 2 singular values above the rounding of its entries, 5 were asked for" in found.notes
    A = heavy(0, 20, 20).astype(np.float32)
    rounded = directions(A, torch.from_numpy(A).bfloat16(), 3)
    assert any("no larger than the rounding errors" in note for note in rounded.notes)
    assert not directions(A, A * np.float32(1.001), 3).notes


def test_heads_and_pieces_are_matrices_of_their_own():
    A, B = heavy(0, 24, 20), heavy(1, 24, 20)
    heads = by_head(A, B, 3, 0, 2)
    assert heads[1] == directions(A[8:16], B[8:16], 2, seed=1)
    across = by_head(A.T.copy(), B.T.copy(), 3, 1, 2)
    assert across[2].overlap_right == pytest.approx(heads[2].overlap_left)
    stack = directions(A.reshape(3, 8, 20), B.reshape(3, 8, 20), 2)
    assert stack.overlap_left == pytest.approx(np.mean([head.overlap_left for head in heads]))
    assert stack.intruder_counts == tuple(np.sum([head.intruder_counts for head in heads], axis=0))
    assert len(stack.nearest) == 6
    assert stack.cosines.shape == (3, 2, 2)


def test_k_may_be_read_from_the_spectrum():
    from htsr.spectra.directions import project_tail

    A, B = heavy(0, 60, 40), heavy(1, 60, 40)
    for keep in ("erg", "tail"):
        assert directions(A, B, keep, draws=0).k == project_tail(A, keep).kept
    assert directions(A, B, 100, draws=0).k == 40
    with pytest.raises(UsageError, match="'erg', 'tail' or a number"):
        directions(A, B, 0)


@pytest.mark.parametrize("shape", [(90, 60), (60, 90)])
def test_products_alone_find_what_lapack_finds(monkeypatch, shape):
    A = heavy(0, *shape)
    dense = leading(A, 3)
    monkeypatch.setattr(leading_module, "_DENSE_UP_TO", 16)
    monkeypatch.setattr(leading_module, "_eigenvectors", lambda *_: pytest.fail("the Gram matrix was decomposed"))
    found = leading(A, 3)
    np.testing.assert_allclose(found.values, dense.values, rtol=1e-10)
    np.testing.assert_allclose(found.left, dense.left, atol=TURNED)
    assert found.error > 0
    assert found.turned <= TURNED
    lost = torch.linalg.matrix_norm(dense.left - found.left @ (found.left.mT @ dense.left), ord=2)
    assert float(lost) <= found.turned  # the stated bound of the angle holds
    again = leading(A, 3)
    assert torch.equal(again.left, found.left)


def test_products_give_up_where_there_is_no_gap_and_lapack_takes_over(monkeypatch):
    monkeypatch.setattr(leading_module, "_DENSE_UP_TO", 16)
    W = np.diag(np.concatenate([[3.0], np.full(79, 2.0)]))
    found = leading(W, 2)
    assert found.values.tolist() == pytest.approx([3.0, 2.0])
    assert found.gap == pytest.approx(0, abs=1e-12)
    assert leading(W, 1).values.tolist() == pytest.approx([3.0])


@pytest.mark.parametrize("shape", [(30, 20), (20, 30)])
def test_a_sum_of_matrices_is_never_put_together(shape, monkeypatch):
    monkeypatch.setattr("htsr.spectra.sums._CHUNK", 64)  # a few rows at a time
    A, B = heavy(0, *shape), heavy(1, *shape).astype(np.float32)
    W, difference = A - 0.5 * B.astype(np.float64), Sum.of(A).plus(Sum.of(B), -0.5)
    X, Y = torch.from_numpy(heavy(2, shape[1], 3)), torch.from_numpy(heavy(3, shape[0], 3))
    for found, dense, right, left in ((difference, W, X, Y), (difference.T, W.T, Y, X)):
        assert found.shape == dense.shape
        np.testing.assert_allclose(np.tril(found.gram()), np.tril(dense.T @ dense), atol=1e-12)
        np.testing.assert_allclose(found.times(right), dense @ right.numpy(), atol=1e-12)
        np.testing.assert_allclose(found.transposed_times(left), dense.T @ left.numpy(), atol=1e-12)
        np.testing.assert_allclose(found.gram_times(right), dense.T @ (dense @ right.numpy()), atol=1e-11)
        np.testing.assert_allclose(found.dense(), dense)
        assert found.norm() == pytest.approx(np.linalg.norm(dense))


def test_steep_spectra_are_decomposed_themselves():
    U, _ = np.linalg.qr(heavy(0, 50, 50))
    V, _ = np.linalg.qr(heavy(1, 40, 40))
    s = np.logspace(0, -12, 40)
    found = leading(U[:, :40] * s @ V.T, 25)
    np.testing.assert_allclose(found.values, s[:25], rtol=1e-6)
    np.testing.assert_allclose(np.abs((found.left.numpy() * U[:, :25]).sum(axis=0)), 1, atol=1e-9)
