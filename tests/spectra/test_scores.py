"""Scores: what each is, what float32 does to them, and where there is none."""

import numpy as np
import pytest
import torch

import htsr
from htsr.errors import MatrixError, UsageError
from htsr.spectra.esd import esd
from htsr.spectra.measure import measure
from htsr.spectra.metrics import LayerMetrics, Options
from htsr.spectra.scores import null_of_shape, score
from htsr.spectra.windows import Windows
from tests.models import heavy_matrix
from tests.reference.layerwise import hill_alpha


@pytest.fixture
def matrix(random):
    return heavy_matrix(random, 150, 90).numpy()


def test_alpha_is_the_hill_formula(matrix):
    assert score(esd(matrix), "alpha") == pytest.approx(hill_alpha(matrix), rel=1e-10)
    single = esd(matrix, route="gram", dtype="float32")
    assert score(single, "alpha") == pytest.approx(hill_alpha(matrix), rel=1e-5)


def test_the_median_is_that_of_all_eigenvalues(random):
    """Those that drown in float32 are not read, but counted: the tail begins at index M/2 all the same."""
    matrix = random.standard_normal((300, 300))
    matrix[:, :20] *= 1e-5
    single = esd(matrix, route="gram", dtype="float32")
    assert (single.eigenvalues[:20] == 0.0).all()
    assert score(single, "alpha") == pytest.approx(hill_alpha(matrix), rel=1e-5)


@pytest.mark.parametrize(
    ("name", "field"),
    [("erg_gap", "erg_gap_fraction"), ("trace_log", "trace_log"), ("stable_rank", "stable_rank"), ("alpha", "alpha")],
)
def test_scores_are_the_analyzers_numbers(matrix, name, field):
    row = measure(lambda: matrix, LayerMetrics(name="W"), Options(fit="ks")).row
    assert score(esd(matrix), name, "ks") == pytest.approx(getattr(row, field), rel=1e-12)


def test_null_depends_on_the_shape_alone(random):
    assert null_of_shape((768, 768)) == pytest.approx(2.12, abs=0.02)
    assert null_of_shape((768, 3072)) == null_of_shape((3072, 768)) == pytest.approx(3.46, abs=0.04)
    windows = Windows(rows=100, count=3)
    assert null_of_shape((300, 400), windows=windows) == pytest.approx(null_of_shape((100, 100), 9))
    noise = random.standard_normal((400, 800))
    assert score(esd(noise), "alpha_minus_null") == pytest.approx(0.0, abs=0.05)


def test_low_rank_matrices_are_scored_on_their_spectrum(random):
    W = random.standard_normal((100, 10)) @ random.standard_normal((10, 80))
    values = np.linalg.svd(W, compute_uv=False)[:10][::-1] ** 2
    tail = values[5:]
    assert score(esd(W), "alpha") == pytest.approx(1 + 5 / np.log(tail / tail[0]).sum(), rel=1e-6)


def test_no_score():
    with pytest.raises(MatrixError):
        score(esd(np.eye(60)), "alpha")
    with pytest.raises(UsageError, match="unknown score"):
        score(esd(np.diag(np.arange(1.0, 61))), "beta")


@pytest.mark.parametrize("rank", [20, 50])
def test_low_rank_is_scored_as_it_is_analyzed(random, rank):
    W = torch.from_numpy(random.standard_normal((64, rank)) @ random.standard_normal((rank, 80))).float()
    assert score(esd(W), "alpha") == pytest.approx(htsr.analyze({"w": W}, fit="hill")["w"].alpha, rel=1e-9)


def test_what_has_no_tail_has_no_score(random):
    flat = torch.nn.init.orthogonal_(torch.empty(64, 64))
    thin = torch.from_numpy(random.standard_normal((64, 4)) @ random.standard_normal((4, 64))).float()
    for W, status in ((flat, "degenerate"), (thin, "tiny")):
        for name in ("alpha", "alpha_minus_null", "erg_gap", "trace_log"):
            with pytest.raises(htsr.MatrixError) as caught:
                score(esd(W), name)
            assert caught.value.status == status
        assert np.isfinite(score(esd(W), "stable_rank"))
