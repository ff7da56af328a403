"""Agreement with WeightWatcher 0.7.7 to 1e-6 wherever its definition is sound; the differences are intended ones.

The list of differences with their reasons is in reports/weightwatcher/README.md.
"""

import logging
import warnings

import numpy as np
import pytest
import torch

import htsr
from tests.models import heavy_matrix

SAME = {
    "alpha": "alpha",
    "sigma": "sigma",
    "D": "D",
    "lambda_min": "xmin",
    "num_pl_tail": "num_pl_spikes",
    "stable_rank": "stable_rank",
    "entropy": "entropy",
    "norm": "norm",
    "log_norm": "log_norm",
    "log_spectral_norm": "log_spectral_norm",
    "log_alpha_norm": "log_alpha_norm",
    "alpha_hat": "alpha_weighted",
    "matrix_rank": "matrix_rank",
    "erg_num": "detX_num",
    "lambda_erg": "detX_val",  # the reference names the raw value so, and the rescaled one "unrescaled"
    "lambda_erg_rescaled": "detX_val_unrescaled",
    "erg_gap": "ERG_gap",
    "Q": "Q",
}


def reference(model, **options):
    pytest.importorskip("weightwatcher")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import weightwatcher

        logging.getLogger("weightwatcher").setLevel(logging.ERROR)
        details = weightwatcher.WeightWatcher(model=model).analyze(ERG=True, plot=False, savefig=False, **options)
    return {row.longname: row for row in details.itertuples()}


def check(analysis, rows, fields=SAME):
    assert rows
    for name, row in rows.items():
        ours = analysis[name]
        for field, theirs in fields.items():
            found = getattr(ours, field)
            assert found == pytest.approx(getattr(row, theirs), rel=1e-6, abs=1e-9), (name, field)


@pytest.fixture(scope="module")
def module():
    random = np.random.default_rng(11)
    layers = [torch.nn.Linear(columns, rows, bias=False) for rows, columns in ((60, 60), (60, 150), (200, 40))]
    for layer in layers:
        layer.weight.data = heavy_matrix(random, *layer.weight.shape)
    return torch.nn.Sequential(*layers)


def test_linear_layers_agree(module):
    check(htsr.analyze(module, device="cpu"), reference(module))


def test_a_convolution_differs_by_the_factor_of_its_slices():
    torch.manual_seed(0)
    conv = torch.nn.Sequential(torch.nn.Conv2d(24, 40, 3))
    conv[0].weight.data *= torch.linspace(1, 8, 24)[:, None, None]
    scale_free = {k: SAME[k] for k in ("alpha", "D", "num_pl_tail", "stable_rank", "entropy", "erg_num")}
    analysis, rows = htsr.analyze(conv, device="cpu"), reference(conv)
    check(analysis, rows, scale_free)
    (row,) = rows.values()
    assert analysis[0].norm == pytest.approx(2 * row.norm, rel=1e-6)  # every slice is scaled by √0.5 there
    assert analysis[0].lambda_min == pytest.approx(2 * row.xmin, rel=1e-6)


def test_the_random_matrix_has_the_same_spectrum_on_average(module):
    rows = reference(module, randomize=True)
    analysis = htsr.analyze(module, device="cpu", permuted=True)
    for name, row in rows.items():  # other permutations of the same entries
        assert analysis[name].max_rand_eval == pytest.approx(row.max_rand_eval, rel=0.25)
        assert analysis[name].rand_distance == pytest.approx(row.rand_distance, rel=0.25)


def test_a_trained_encoder_agrees(minilm):
    from transformers import AutoModel

    model = AutoModel.from_pretrained(minilm)
    analysis, rows = htsr.analyze(minilm, device="cpu"), reference(model)
    check(analysis, rows)
    assert {row.name for row in analysis} - rows.keys() == {"embeddings.token_type_embeddings"}  # 2 × 384
    assert analysis["pooler.dense"].warning.startswith("random-like")  # this package's pooler was never trained
    assert sum("random-like" in row.warning for row in analysis) == 1


def test_single_slices_differ_by_half_their_number():
    torch.manual_seed(0)
    conv = torch.nn.Sequential(torch.nn.Conv2d(24, 40, 3, bias=False))
    pytest.importorskip("weightwatcher")
    import weightwatcher

    rows = weightwatcher.WeightWatcher(model=conv).analyze(pool=False, plot=False)
    for row, (i, j) in zip(rows.itertuples(), [(i, j) for i in range(3) for j in range(3)], strict=True):
        spectrum = htsr.esd(conv[0].weight[:, :, i, j])
        assert row.lambda_max == pytest.approx(4.5 * spectrum.eigenvalues[-1], rel=1e-5)
        assert row.stable_rank == pytest.approx(spectrum.eigenvalues.sum() / spectrum.eigenvalues[-1], rel=1e-5)


def test_products_of_layers_are_fitted_by_their_singular_values():
    random = np.random.default_rng(3)
    model = torch.nn.Sequential(torch.nn.Linear(90, 90, bias=False), torch.nn.Linear(90, 90, bias=False))
    for layer in model:
        layer.weight.data = heavy_matrix(random, 90, 90)
    (row,) = reference(model, intra=True, sparsify=False).values()
    first, second = (layer.weight.detach().double() for layer in model)
    alpha = htsr.fit_power_law(htsr.esd(first @ second).positive).alpha
    assert row.alpha == pytest.approx(2 * alpha - 1, rel=1e-5)
