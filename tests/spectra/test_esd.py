import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from htsr.errors import MatrixError, UsageError
from htsr.spectra.eigenvalues import gram
from htsr.spectra.esd import Windows, esd, esd_batch
from htsr.spectra.exact_products import exact_products

shapes = st.tuples(st.integers(1, 60), st.integers(1, 60))


def exact(matrix):
    return np.sort(np.linalg.svd(np.asarray(matrix, dtype=np.float64), compute_uv=False) ** 2)


@settings(max_examples=40)
@given(shapes, st.integers(0, 2**32 - 1), st.sampled_from(["auto", "gram", "svd"]))
def test_eigenvalues_are_squared_singular_values(shape, seed, route):
    W = np.random.default_rng(seed).standard_normal(shape)
    found = esd(W, route=route)
    assert found.eigenvalues == pytest.approx(exact(W), rel=1e-8, abs=1e-13 * exact(W)[-1])
    assert (found.M, found.N, found.pieces) == (min(shape), max(shape), 1)
    assert max(shape) / min(shape) == found.Q


@pytest.mark.parametrize("shape", [(700, 40), (40, 700), (2000, 600)])
def test_blocks_add_up_to_the_gram_matrix(random, monkeypatch, shape):
    monkeypatch.setattr("htsr.spectra.eigenvalues._CHUNK", 4096)
    W = random.standard_normal(shape).astype(np.float32)
    tall = W.astype(np.float64) if shape[0] > shape[1] else W.T.astype(np.float64)
    assert gram(W) == pytest.approx(tall.T @ tall, rel=1e-12)


@pytest.mark.parametrize("device", ["cpu", "cpu:0"])  # cpu:0 takes the torch route of accelerators
@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-11), ("float32", 5e-6)])
@pytest.mark.parametrize("route", ["gram", "svd"])
def test_every_route_and_precision(random, device, dtype, tolerance, route):
    W = random.standard_normal((96, 300)).astype(np.float32)
    found = esd(torch.from_numpy(W), route=route, dtype=dtype, device=device)
    assert found.eigenvalues == pytest.approx(exact(W), rel=tolerance)
    assert found.route == f"{route}/{dtype}"


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_large_matrices_take_the_same_values_from_torch(random, monkeypatch, dtype):
    W = random.standard_normal((80, 200))
    small = esd(W, dtype=dtype).eigenvalues
    monkeypatch.setattr("htsr.spectra.eigenvalues._TORCH_FROM", 80)
    assert esd(W, dtype=dtype).eigenvalues == pytest.approx(small, rel=2e-5 if dtype == "float32" else 1e-12)


@pytest.mark.parametrize("device", ["auto", "cpu", "cpu:0", "mps"])
def test_auto_is_float64_on_every_device(random, device):
    """On an accelerator it was float32: rank, entropy and Hill's α were others there."""
    assert esd(random.standard_normal((20, 30)).astype(np.float32), device=device).route == "gram/float64"


@pytest.mark.filterwarnings("error")
def test_arrays_that_torch_does_not_take_as_they_are(random):
    W = random.standard_normal((20, 30))
    W.flags.writeable = False
    for array in (W, W[::-1, ::-2]):
        expected = esd(np.array(array), device="cpu").eigenvalues
        assert esd(array, device="cpu:0").eigenvalues == pytest.approx(expected, rel=1e-9)


def test_products_are_exact_within_training(random):
    """TF32 and autocast are for the training around: no digit of a Gram matrix is lost to them."""
    W = torch.from_numpy(random.standard_normal((40, 60))).float()
    alone = esd(W, dtype="float32", device="cpu:0").eigenvalues
    torch.backends.cuda.matmul.fp32_precision = "tf32"  # by the newer switches only
    torch.set_float32_matmul_precision("medium")
    seen = []
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16), exact_products("cpu"):
            seen.append((torch.backends.cuda.matmul.fp32_precision, torch.get_float32_matmul_precision()))
        within = esd(W.requires_grad_(), dtype="float32", device="cpu:0").eigenvalues
        seen.append((torch.backends.cuda.matmul.fp32_precision, torch.get_float32_matmul_precision()))
        torch.set_float32_matmul_precision("highest")
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        with exact_products("cpu"):
            seen.append(torch.backends.cuda.matmul.fp32_precision)
        seen.append(torch.backends.cuda.matmul.fp32_precision)
    finally:
        torch.set_float32_matmul_precision("highest")
    assert np.array_equal(within, alone)
    assert seen[1:] == [("tf32", "medium"), seen[2], "tf32"]
    assert seen[0][1] == "highest"
    assert "tf32" not in (seen[0][0], seen[2])


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float64])
def test_every_stored_dtype_is_up_cast(random, kind):
    W = torch.from_numpy(random.standard_normal((24, 32))).to(kind)
    assert esd(W).eigenvalues == pytest.approx(exact(W.float() if kind != torch.float64 else W), rel=1e-10)


def test_rank_deficiency_is_seen_exactly(random):
    W = random.standard_normal((64, 20)) @ random.standard_normal((20, 100))
    found = esd(W)
    assert found.route == "svd/float64"  # the Gram matrix cannot tell 1e-30 from 1e-16
    assert found.positive.size == 20
    assert found.eigenvalues[:44].max() == 0.0
    assert esd(W, route="gram").positive.size == 20


@pytest.mark.parametrize("shape", [(9, 12, 30), (25, 40, 7), (5, 16, 1)])
def test_pieces_are_pooled(random, shape):
    stack = random.standard_normal(shape)
    found = esd(stack)
    assert found.eigenvalues == pytest.approx(np.sort(np.concatenate([exact(piece) for piece in stack])), rel=1e-9)
    assert (found.pieces, found.M) == (shape[0], min(shape[1:]))
    assert esd(torch.from_numpy(stack), device="cpu:0", dtype="float64").eigenvalues == pytest.approx(found.eigenvalues)


@settings(max_examples=200)
@given(shapes, st.integers(1, 80), st.integers(1, 6), st.sampled_from([0.5, 1.0, 2.0]))
def test_windows_are_equal_inside_and_reach_the_edges(shape, rows, count, aspect):
    slices = Windows(rows, count, aspect).slices(shape)
    sizes = {(r.stop - r.start, c.stop - c.start) for r, c in slices}
    assert len(sizes) == 1
    assert 1 <= len(slices) <= count**2
    assert all(r.start >= 0 and r.stop <= shape[0] and c.start >= 0 and c.stop <= shape[1] for r, c in slices)
    if count > 1:
        assert max(r.stop for r, _ in slices) == shape[0]
        assert max(c.stop for _, c in slices) == shape[1]


def test_windows_begin_where_farms_puts_them():
    slices = Windows(rows=100, count=9).slices((500, 900))
    assert sorted({r.start for r, _ in slices}) == [i * ((500 - 100) // 8) for i in range(9)]
    assert sorted({c.start for _, c in slices}) == [i * ((900 - 100) // 8) for i in range(9)]


def test_a_window_larger_than_the_matrix_shrinks_and_keeps_its_aspect():
    (window,) = Windows(rows=2000, count=1, aspect=2.0).slices((576, 600))
    assert window == (slice(0, 300), slice(0, 600))


def test_windowed_esd_is_that_of_the_windows(random):
    W = random.standard_normal((30, 50))
    windows = Windows(rows=10, count=3)
    expected = np.concatenate([exact(W[r, c]) for r, c in windows.slices(W.shape)])
    found = esd(W, windows=windows)
    assert found.eigenvalues == pytest.approx(np.sort(expected), rel=1e-9)
    assert (found.M, found.N, found.pieces) == (10, 10, 9)
    twice = esd(np.stack([W, W]), windows=windows)
    assert twice.pieces == 18
    assert twice.eigenvalues == pytest.approx(np.repeat(found.eigenvalues, 2))


@pytest.mark.parametrize("device", ["cpu", "cpu:0"])
@pytest.mark.parametrize("route", ["gram", "svd", "lanczos"])
@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_are_reported(random, device, route, poison):
    W = random.standard_normal((20, 30))
    W[3, 4] = poison
    with pytest.raises(MatrixError, match="NaN, infinite") as caught:
        esd(W, route=route, device=device)
    assert caught.value.status == "nan"


def test_wrong_use_is_said(random):
    W = random.standard_normal((20, 30))
    with pytest.raises(MatrixError, match="no entries"):
        esd(W[:0])
    with pytest.raises(UsageError, match="2 dimensions"):
        esd(W.ravel())
    with pytest.raises(UsageError, match="unknown route"):
        esd(W, route="qr")
    with pytest.raises(MatrixError, match="one whole matrix"):
        esd(W[None], route="lanczos")
    with pytest.raises(UsageError, match="rows ≥ 1"):
        Windows(0, 2)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("route", ["auto", "gram", "svd"])
def test_a_batch_gives_what_each_matrix_gives(random, dtype, route):
    matrices = [random.standard_normal((30, 44)) for _ in range(5)]
    matrices[1] = matrices[1] @ np.diag(np.arange(44) < 9)  # rank 9
    for one, many in zip(matrices, esd_batch(matrices, route=route, dtype=dtype), strict=True):
        single = esd(one, route=route, dtype=dtype)
        assert np.array_equal(single.eigenvalues, many.eigenvalues)
        assert single.route == many.route


def test_one_bad_matrix_does_not_spoil_its_batch(random):
    matrices = [random.standard_normal((30, 44)) for _ in range(3)]
    matrices[1][2, 2] = np.nan
    good, bad, also_good = esd_batch(matrices)
    assert bad.status == "nan"
    assert np.array_equal(good.eigenvalues, esd(matrices[0]).eigenvalues)
    assert np.array_equal(also_good.eigenvalues, esd(matrices[2]).eigenvalues)
