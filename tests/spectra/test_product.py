"""Matrices that are kept as two factors: r eigenvalues, the ones that the product has in exact arithmetic."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import htsr
from htsr.arrays import Product
from htsr.matrices.sources import open_model
from htsr.spectra.esd import Windows, esd


@settings(max_examples=40)
@given(
    m=st.integers(1, 40), n=st.integers(1, 40), r=st.integers(1, 12), pieces=st.integers(0, 3), seed=st.integers(0, 99)
)
def test_eigenvalues_are_those_of_the_product(m, n, r, pieces, seed):
    random = np.random.default_rng(seed)
    stack = (pieces,) if pieces else ()
    left = random.standard_normal((*stack, m, r)).astype(np.float32)
    right = random.standard_normal((*stack, r, n)).astype(np.float32)
    product = Product(left, right)
    found = esd(product)
    true = np.sort(np.linalg.svd(left.astype(float) @ right.astype(float), compute_uv=False).ravel() ** 2)
    assert (found.M, found.N, found.pieces) == (*sorted((m, n)), pieces or 1)
    assert found.route == "factors/float64"
    np.testing.assert_allclose(found.eigenvalues, true, rtol=1e-9, atol=1e-12 * true[-1])
    assert np.count_nonzero(found.eigenvalues) == (pieces or 1) * min(m, n, r) == (pieces or 1) * product.rank


def test_windows_and_other_routes_multiply_it_out():
    random = np.random.default_rng(0)
    product = Product(random.standard_normal((30, 4)), random.standard_normal((4, 50)))
    dense = product.left @ product.right
    windows = Windows(rows=10, count=2)
    np.testing.assert_allclose(
        esd(product, windows=windows).eigenvalues, esd(dense, windows=windows).eigenvalues, atol=1e-10
    )
    assert esd(product, route="gram").route == "gram/float64"
    np.testing.assert_array_equal(product[3:9].dense(), dense[3:9])
    np.testing.assert_array_equal(product[3:9, 2:4].dense(), dense[3:9, 2:4])


def test_factors_that_are_no_numbers():
    with pytest.raises(htsr.MatrixError, match="NaN, infinite"):
        esd(Product(np.full((3, 1), np.nan), np.ones((1, 4))))
    assert not esd(Product(np.zeros((3, 1)), np.ones((1, 4)))).eigenvalues.any()


@pytest.mark.parametrize("size", [64, 200])
def test_the_change_of_an_adapter_has_r_eigenvalues(tmp_path, size):
    """Below M = 1024 the rounding of the float32 product was taken for M - r eigenvalues more."""
    import json

    import torch
    from safetensors.torch import save_file

    torch.manual_seed(0)
    A, B = torch.randn(16, size) / size**0.5, torch.randn(size, 16) * 0.02
    q = "base_model.model.model.layers.0.self_attn.q_proj."
    save_file({q + "lora_A.weight": A, q + "lora_B.weight": B}, tmp_path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 16, "lora_alpha": 32, "target_modules": ["q_proj"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    true = np.linalg.svd((2 * (B.double() @ A.double())).numpy(), compute_uv=False)[:16][::-1] ** 2
    p = true / true.sum()
    analysis = htsr.analyze(str(tmp_path), device="cpu")
    (row,) = analysis
    np.testing.assert_allclose(analysis.eigenvalues[row.name][-16:], true, rtol=1e-6)
    assert (row.matrix_rank, row.num_eigenvalues) == (16, size)
    assert row.entropy == pytest.approx(-(p * np.log(p)).sum() / np.log(16), rel=1e-6)
    assert row.alpha == pytest.approx(htsr.fit_power_law(true).alpha, rel=1e-5)
    (matrix,) = open_model(str(tmp_path))
    np.testing.assert_allclose(matrix.read(), matrix.opened().dense(), atol=1e-6)
