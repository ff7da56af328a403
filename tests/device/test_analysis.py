"""Every number of an analysis on the device is that of the CPU."""

import numpy as np
import pytest
import torch

import htsr
from tests.device.agree import assert_agree
from tests.models import heavy_matrix, state_dict


def moved(state, device):
    return {name: tensor.to(device) for name, tensor in state.items()}


@pytest.mark.parametrize(
    "options",
    [
        {"route": route, "dtype": dtype}
        for route in ("auto", "gram", "svd", "lanczos")
        for dtype in ("auto", "float64", "float32")
    ]
    + [{"windows": htsr.Windows(40, 5)}, {"windows": htsr.Windows(40, 5), "dtype": "float32"}],
    ids=str,
)
@pytest.mark.parametrize("stored", ["float64", "float32", "bfloat16"])
def test_spectra(device, options, stored):
    W = heavy_matrix(np.random.default_rng(0), 130, 90).to(getattr(torch, stored))
    here, there = htsr.esd(W, **options), htsr.esd(W.to(device), device=str(device), **options)
    assert here.route == there.route
    relative = 1e-4 if options.get("route") == "lanczos" else 1e-5 if options.get("dtype") == "float32" else 1e-9
    assert_agree(here, there, relative)


def test_spectra_of_pieces_and_of_wide_matrices(device):
    random = np.random.default_rng(1)
    for matrix in (
        torch.stack([heavy_matrix(random, 30, 40) for _ in range(4)]),
        heavy_matrix(random, 60, 400),
        torch.eye(50),
        torch.outer(torch.arange(1.0, 41), torch.ones(60)),
    ):
        assert_agree(htsr.esd(matrix), htsr.esd(matrix.to(device), device=str(device)), 1e-9)


@pytest.mark.parametrize("problem", ["nan", "empty", "underflow"])
def test_matrices_without_a_spectrum(device, problem):
    W = {"nan": torch.full((30, 20), torch.nan), "empty": torch.ones(0, 20), "underflow": torch.full((30, 20), 1e-30)}
    options = {"dtype": "float32"} if problem == "underflow" else {}
    refused = []
    for given, place in ((W[problem], "cpu"), (W[problem].to(device), str(device))):
        with pytest.raises(htsr.MatrixError) as error:
            htsr.esd(given, device=place, **options)
        refused.append((error.value.status, str(error.value)))
    assert refused[0] == refused[1]
    assert refused[0][0] == problem


@pytest.mark.parametrize("width", [64])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"fit": "hill"},
        {"full": True, "bootstrap": 10, "gof": 10},
        {"dtype": "float32"},
        {"dtype": "float32", "full": True},
        {"windows": htsr.Windows(30, 4)},
        {"bulk": True, "quality": True, "permuted": True, "seed": 3},
        {"route": "svd"},
        {"route": "lanczos"},
    ],
    ids=str,
)
def test_rows(device, options, width):
    state = state_dict(1, width)
    state["model.layers.0.mlp.half.weight"] = state["model.layers.0.mlp.up_proj.weight"].bfloat16()
    state["model.layers.0.mlp.zero.weight"] = torch.zeros(60, 70)
    state["model.layers.0.mlp.nan.weight"] = torch.full((60, 70), torch.nan)
    here = htsr.analyze(state, device="cpu", **options)
    there = htsr.analyze(moved(state, device), device=str(device), **options)
    assert_agree(here.rows, there.rows, 1e-4)
    assert_agree(here.eigenvalues, there.eigenvalues, 1e-5)


def test_full_rank_matrices_have_no_false_rank_loss(device):
    """In float32 a third of these eigenvalues is not resolved, which no row may show as loss of rank."""
    torch.manual_seed(0)
    state = {"layers.0.mlp.up_proj.weight": torch.randn(300, 300)}
    for options in ({}, {"dtype": "float32"}):
        row = htsr.analyze(moved(state, device), device=str(device), **options).rows[0]
        assert (row.matrix_rank, row.rank_loss) in ((300, 0), (None, None))


def test_a_module_is_analyzed_where_it_is(device):
    module = torch.nn.TransformerEncoderLayer(d_model=64, nhead=2, dim_feedforward=96)
    here = htsr.analyze(module, device="cpu")
    there = htsr.analyze(module.to(device), device=str(device))
    assert_agree(here.rows, there.rows)
    assert_agree(here.rows, htsr.analyze(module, device="cpu").rows)
    assert_agree(here.rows, htsr.analyze(module).rows)


def test_layers_on_two_devices(device):
    module = torch.nn.Sequential(torch.nn.Linear(70, 60), torch.nn.Linear(60, 70))
    here = htsr.analyze(module, device="cpu")
    module[1].to(device)
    assert_agree(here.rows, htsr.analyze(module, device=str(device)).rows)
    assert_agree(here.rows, htsr.analyze(module).rows)


def test_comparison(device):
    base, tuned = state_dict(1, 64), state_dict(1, 64, seed=1)
    here = htsr.compare(base, tuned, device="cpu")
    there = htsr.compare(moved(base, device), moved(tuned, device), device=str(device))
    assert_agree(here.records(), there.records())
    mixed = htsr.compare(base, moved(tuned, device), device=str(device))
    assert_agree(here.records(), mixed.records())


def test_surgery_of_one_matrix(device):
    W = heavy_matrix(np.random.default_rng(0), 90, 70)
    for change in (htsr.remove_traps, lambda matrix: htsr.project_tail(matrix, 8)):
        here, there = change(W), change(W.to(device))
        assert_agree(here, there, 1e-4)


def test_a_constant_matrix_has_no_mean_shift(device):
    """Its spread was a difference whose rounding each device had its own of: none on the CPU, 7e7 on another."""
    state = {"layers.0.up.weight": torch.ones(60, 70), "layers.1.up.weight": torch.full((60, 70), 0.3)}
    state["layers.2.up.weight"] = 1 + 1e-4 * torch.randn(60, 70, generator=torch.Generator().manual_seed(0))
    for options in ({}, {"route": "svd"}, {"dtype": "float32"}, {"windows": htsr.Windows(30, 4)}):
        for place in ("cpu", str(device)):
            found = htsr.analyze(state, device=place, permuted=True, **options)
            shifts = [row.mean_shift for row in found]
            values = state["layers.2.up.weight"].double()
            assert shifts == [None, None, pytest.approx(float(values.mean() / values.std(correction=0)), rel=1e-4)]


def test_a_device_may_be_given_as_torch_has_it(device):
    state = {"layers.0.up.weight": heavy_matrix(np.random.default_rng(0), 60, 70)}
    assert htsr.analyze(state, device=device).options.device == str(device)
    assert htsr.esd(torch.eye(3), device=device).route == "gram/float64"
