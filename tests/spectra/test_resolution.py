"""Rank and distinctness are judged by the precision that the numbers were stored in, not by that of the computation."""

import numpy as np
import pytest
import torch

import htsr
from htsr.arrays import Product
from htsr.spectra.esd import esd, esd_batch
from htsr.spectra.measure import measure
from htsr.spectra.metrics import LayerMetrics, Options
from htsr.spectra.resolution import distinct, equal_within

STORED = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
names = [str(dtype).removeprefix("torch.") for dtype in STORED]


def product(m, n, rank, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    kind = torch.float64 if dtype == torch.float64 else torch.float32
    A, B = (torch.randn(shape, generator=generator, dtype=kind) for shape in ((m, rank), (rank, n)))
    return (A @ B).to(dtype)


@pytest.mark.parametrize("dtype", STORED, ids=names)
@pytest.mark.parametrize(
    ("m", "n", "rank"), [(60, 60, 5), (256, 256, 16), (200, 500, 1), (384, 256, 200), (768, 768, 8)]
)
def test_a_product_has_the_rank_of_its_factors(dtype, m, n, rank):
    W = product(m, n, rank, dtype=dtype)
    found = esd(W)
    assert found.positive.size == rank
    exact = np.linalg.svd(W.double().numpy(), compute_uv=False)[:rank][::-1] ** 2
    assert found.positive == pytest.approx(exact, rel=1e-6)


@pytest.mark.parametrize("how", [{}, {"route": "svd"}, {"dtype": "float32"}, {"device": "cpu:0"}], ids=str)
def test_on_every_route(how):
    W = product(256, 300, 8)
    assert esd(W, **how).positive.size == 8
    batch = esd_batch([W, product(256, 300, 16, seed=1)], **how)
    assert [found.positive.size for found in batch] == [8, 16]
    assert htsr.analyze({"w": W}, null=False, **how)["w"].matrix_rank == 8


def test_one_rule_above_and_below_a_thousand():
    ranks = {M: htsr.analyze({"w": product(M, M, 24)}, null=False)["w"] for M in (800, 1100)}
    assert {row.matrix_rank for row in ranks.values()} == {24}
    assert {row.route for row in ranks.values()} == {"gram/float64"}


def test_the_fit_is_that_of_the_true_eigenvalues():
    W = product(768, 768, 8)
    row = htsr.analyze({"w": W})["w"]
    true = htsr.fit_power_law(np.linalg.svd(W.double().numpy(), compute_uv=False)[:8] ** 2)
    assert (row.alpha, row.num_pl_tail) == (pytest.approx(true.alpha, rel=1e-6), true.num_tail)
    assert (row.matrix_rank, row.rank_loss) == (8, 760)


def trained(random, m, n, share=0.9):
    """A Gaussian bulk under a power-law tail that holds most of the norm."""
    W = random.standard_normal((m, n))
    k = max(1, min(m, n) // 8)
    left, right = (np.linalg.qr(random.standard_normal((side, k)))[0] for side in (m, n))
    tail = (1 + np.arange(k)) ** -0.7
    tail *= (share / (1 - share) * m * n / (tail**2).sum()) ** 0.5
    return torch.from_numpy(W + (left * tail) @ right.T)


@pytest.mark.parametrize("dtype", STORED, ids=names)
@pytest.mark.parametrize("shape", [(64, 64), (300, 300), (300, 1200), (700, 700)])
@pytest.mark.parametrize("share", [0.0, 0.9, 0.99])
def test_a_matrix_of_full_rank_loses_nothing(dtype, shape, share):
    random = np.random.default_rng(1)
    W = trained(random, *shape, share) if share else torch.from_numpy(random.standard_normal(shape))
    found = esd(W.to(dtype))
    exact = np.linalg.svd(W.to(dtype).double().numpy(), compute_uv=False)[::-1] ** 2
    assert found.positive.size == min(shape)
    assert found.eigenvalues == pytest.approx(exact, rel=1e-3)


@pytest.mark.parametrize("dtype", STORED, ids=names)
@pytest.mark.parametrize("noise", [0.003, 0.01, 0.03])
@pytest.mark.parametrize("side", [64, 512])
def test_noise_above_the_rounding_is_no_rounding(random, dtype, side, noise):
    W = product(side, side, 16, dtype=torch.float64)
    W += noise * W.square().mean().sqrt() * torch.from_numpy(random.standard_normal((side, side)))
    exact, row = (htsr.analyze({"w": x}, null=False)["w"] for x in (W, W.to(dtype)))
    assert row.matrix_rank == side
    assert row.alpha == pytest.approx(exact.alpha, rel=0.05)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=names[2:])
@pytest.mark.parametrize("rank", [16, 512])
@pytest.mark.parametrize("axis", [0, 1])
def test_columns_of_any_size_change_no_rank(dtype, rank, axis):
    W = product(512, 512, rank, dtype=torch.float64)
    scale = torch.logspace(0, -2.5, 512, dtype=torch.float64)
    assert esd((W * scale.unsqueeze(axis)).to(dtype)).positive.size == rank
    small = product(64, 64, 64, dtype=torch.float64)
    small[:, 3] *= 300
    found = esd_batch([small.to(dtype), product(64, 64, 5, dtype=dtype)])
    assert [spectrum.positive.size for spectrum in found] == [64, 5]


def test_subnormal_numbers_have_the_rounding_of_their_steps():
    W = 1e-5 * product(512, 512, 16, dtype=torch.float64)
    assert esd(W.half()).positive.size == 16


def test_exact_zeros_are_told_in_every_precision(random):
    for dtype in STORED:
        padded = torch.from_numpy(random.standard_normal((100, 140))).to(dtype)
        padded[-3:] = 0
        assert esd(padded).positive.size == 97


def test_what_rounding_buries_is_not_resolved(random):
    """Singular values from 1 down to 1e-12: float32 has none below 6e-8, float64 has all."""
    left, right = (np.linalg.qr(random.standard_normal((120, 120)))[0] for _ in range(2))
    singular = np.logspace(0, -12, 120)
    W = torch.from_numpy((left * singular) @ right.T)
    assert esd(W).positive.size == 120
    assert 0.9 < esd(W.float()).positive.size / np.count_nonzero(singular > 2**-24) <= 1


def test_numbers_say_in_which_precision_they_were_stored():
    W = product(200, 200, 8, dtype=torch.bfloat16).float()
    assert esd(W).positive.size > 150  # float32 numbers that happen to be coarse
    assert esd(W, stored="bfloat16").positive.size == 8


def orthogonal(m, n, dtype=torch.float32):
    torch.manual_seed(0)
    return torch.nn.init.orthogonal_(torch.empty(m, n)).to(dtype)


@pytest.mark.parametrize("dtype", STORED, ids=names)
@pytest.mark.parametrize("shape", [(64, 64), (256, 512), (40, 2000), (512, 512)])
def test_orthogonal_matrices_have_no_exponent(dtype, shape):
    row = htsr.analyze({"w": 0.37 * orthogonal(*shape, dtype)}, null=False)["w"]
    assert (row.status, row.alpha, row.matrix_rank) == ("degenerate", None, min(shape))
    assert row.entropy == pytest.approx(1.0, abs=1e-4)


@pytest.mark.parametrize("dtype", STORED[1:], ids=names[1:])
def test_noise_keeps_its_exponent(random, dtype):
    for shape in ((60, 60), (64, 8000)):  # the flattest there is
        W = torch.from_numpy(random.standard_normal(shape))
        exact = htsr.fit_power_law(esd(W).positive, "hill").alpha
        assert htsr.analyze({"w": W.to(dtype)}, fit="hill")["w"].alpha == pytest.approx(exact, rel=0.01)


def test_a_little_noise_is_not_rounding(random):
    W = torch.eye(64) + 1e-3 * torch.from_numpy(random.standard_normal((64, 64))).float()
    assert htsr.analyze({"w": W}, fit="hill")["w"].alpha > 100


def test_distinct_values_are_counted_in_groups():
    values = np.array([1.0, 1.0 + 1e-9, 1.1, 1.1, 1.2, 5.0])
    assert distinct(values, 1e-6, 10) == 4
    assert distinct(values, 0.15, 10) == 3
    assert distinct(values, 1e-6, 2) == 2
    assert equal_within(100, 100, "bfloat16") > 2**-7 > equal_within(100, 10000, "bfloat16")


@pytest.mark.parametrize("dtype", STORED, ids=names)
@pytest.mark.parametrize("rank", [1, 16])
def test_a_merged_adapter_less_its_base_has_the_adapters_rank(dtype, rank):
    generator = torch.Generator().manual_seed(0)
    base = (0.02 * torch.randn(400, 512, generator=generator)).to(dtype)
    change = 5e-4 / rank**0.5 * product(400, 512, rank, dtype=torch.float64)
    merged = (base.double() + change.double()).to(dtype)
    row = htsr.analyze({"w": merged}, against={"w": base}, null=False)["w"]
    assert row.matrix_rank == rank
    assert row.norm == pytest.approx(float((change.double() ** 2).sum()), rel=0.02)


@pytest.mark.parametrize("dtype", STORED, ids=names)
@pytest.mark.parametrize("size", [5e-5, 5e-4, 5e-3])
def test_a_change_of_full_rank_keeps_it(random, dtype, size):
    base = torch.from_numpy(0.02 * random.standard_normal((300, 400))).to(dtype)
    change = torch.from_numpy(size * random.standard_normal((300, 400)))
    row = htsr.analyze({"w": (base.double() + change).to(dtype)}, against={"w": base}, null=False)["w"]
    assert row.matrix_rank == 300


def test_a_change_has_one_null_as_factors_and_merged():
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(96, 128, generator=generator)
    left, right = torch.randn(96, 16, generator=generator), torch.randn(16, 128, generator=generator)
    merged = htsr.analyze({"w": base + 0.05 * left @ right}, against={"w": base})["w"]
    factors = measure(lambda: Product(left.numpy(), right.numpy()), LayerMetrics(name="w"), Options()).row
    assert merged.matrix_rank == factors.matrix_rank == 16
    assert (merged.alpha_null, merged.alpha_null_sd) == (factors.alpha_null, factors.alpha_null_sd)
    assert merged.alpha == pytest.approx(factors.alpha, rel=1e-3)
