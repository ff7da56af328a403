"""The subspace of a gradient: against LAPACK, and what it must keep."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from htsr.errors import HtsrError, UsageError
from htsr.training.lowrank.subspace import (
    add_projected_back,
    project,
    project_back,
    projector,
    projects_right,
    rotated,
)


def gradient(rows, columns, seed=0, decay=0.7, dtype=torch.float64):
    """A matrix with singular values decay^i, largest first."""
    generator = torch.Generator().manual_seed(seed)
    small = min(rows, columns)
    U = torch.linalg.qr(torch.randn(rows, small, generator=generator, dtype=torch.float64))[0]
    V = torch.linalg.qr(torch.randn(columns, small, generator=generator, dtype=torch.float64))[0]
    return (U * decay ** torch.arange(small) @ V.T).to(dtype)


@settings(max_examples=40)
@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 40),
    rank=st.integers(1, 50),
    method=st.sampled_from(["svd", "randomized"]),
    seed=st.integers(0, 99),
)
def test_a_projector_is_orthonormal_and_loses_what_lies_outside_only(rows, columns, rank, method, seed):
    G = torch.from_numpy(np.random.default_rng(seed).standard_normal((rows, columns)))
    P = projector(G, rank, method, generator=torch.Generator().manual_seed(seed))
    r = min(rows, columns, rank)
    assert P.shape == (min(rows, columns), r)
    torch.testing.assert_close(P.T @ P, torch.eye(r, dtype=G.dtype))
    R = project(G, P)
    assert R.shape == ((rows, r) if rows >= columns else (r, columns))
    back = project_back(R, P, G.shape)
    torch.testing.assert_close(project(back, P), R)  # a projection: twice is once
    torch.testing.assert_close(R.norm() ** 2 + (G - back).norm() ** 2, G.norm() ** 2)
    if r == min(rows, columns):
        torch.testing.assert_close(back, G)
    W = torch.ones_like(G)
    add_projected_back(W, R, P, projects_right(W.shape), 1.0, -0.5)
    torch.testing.assert_close(W, 1 - 0.5 * back)


@pytest.mark.parametrize("shape", [(60, 40), (40, 60), (50, 50)])
@pytest.mark.parametrize("method", ["svd", "randomized"])
def test_both_methods_find_the_singular_vectors_in_order(shape, method):
    G = gradient(*shape)
    P = projector(G, 8, method, generator=torch.Generator().manual_seed(1))
    U, _, Vh = torch.linalg.svd(G, full_matrices=False)
    truth = Vh[:8].T if shape[0] >= shape[1] else U[:, :8]
    torch.testing.assert_close((P.T @ truth).abs(), torch.eye(8, dtype=G.dtype), atol=1e-4, rtol=0)


def test_a_warm_start_follows_a_slowly_turning_gradient_and_keeps_the_signs():
    G, drift = gradient(60, 40, decay=0.9), gradient(60, 40, seed=9, decay=0.99)
    P = projector(G, 8, "randomized", generator=torch.Generator().manual_seed(0))
    for i in range(1, 12):
        H = G + 1e-3 * i * drift
        flipped = P * torch.tensor([-1.0, 1.0] * 4)
        P = projector(H, 8, "randomized", flipped, torch.Generator().manual_seed(i))
        assert ((P * flipped).sum(0) > 0).all()
    best = torch.linalg.svdvals(H)[:8].square().sum()
    assert project(H, P).square().sum() > 0.9999 * best
    cold = projector(H, 8, "randomized", None, torch.Generator().manual_seed(0))
    assert project(H, cold).square().sum() > 0.999 * best


def test_the_rank_may_change_between_projectors():
    G = gradient(30, 20)
    narrow = projector(G, 4, "randomized", None, torch.Generator().manual_seed(0))
    for rank in (2, 4, 11, 20):
        P = projector(G, rank, "randomized", narrow, torch.Generator().manual_seed(0))
        torch.testing.assert_close(P.T @ P, torch.eye(rank, dtype=G.dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", ["svd", "randomized"])
def test_narrow_dtypes_lose_their_own_rounding_only(dtype, method):
    G = 1e-4 * gradient(60, 40, decay=0.9)  # squares that float16 cannot hold
    P = projector(G.to(dtype), 8, method, generator=torch.Generator().manual_seed(0))
    assert P.dtype == dtype
    torch.testing.assert_close(P.float().T @ P.float(), torch.eye(8), atol=1e-2, rtol=0)
    best = torch.linalg.svdvals(G)[:8].norm()
    assert project(G, P.double()).norm() > 0.999 * best


@pytest.mark.parametrize("shape", [(30, 20), (20, 30)])
def test_rotation_is_that_of_the_projected_gradients(shape):
    G, H = gradient(*shape), gradient(*shape, seed=5)
    old, same = projector(G, 6), projector(G, 6) @ torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64))[0]
    new = projector(H, 6)
    R = project(G, old)
    m, v = rotated(R, R**2, old, same, G.shape)
    torch.testing.assert_close(m, project(G, same))  # within one subspace nothing is lost
    assert (v >= 0).all()
    torch.testing.assert_close(v.sum(), R.square().sum())
    m, v = rotated(R, R**2, old, new, G.shape)
    torch.testing.assert_close(m, project(project_back(R, old, G.shape), new))
    unchanged = rotated(R, R**2, old, old, G.shape)
    torch.testing.assert_close(unchanged, (R, R**2))


def test_bad_input_is_a_sentence():
    G = gradient(5, 4)
    with pytest.raises(UsageError, match="by svd or randomized"):
        projector(G, 2, "lanczos")
    for bad in (float("nan"), float("inf")):
        G[2, 2] = bad
        with pytest.raises(HtsrError, match="NaN or Inf"):
            projector(G, 2)


@pytest.mark.parametrize("method", ["svd", "randomized"])
def test_a_zero_gradient_has_some_subspace(method):
    P = projector(torch.zeros(6, 4), 2, method, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(P.T @ P, torch.eye(2))
