"""Weights that torch computes from others, read from files and from modules: the weight, not what it is made of."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn.utils import parametrizations, prune

import htsr
from htsr.arrays import as_numpy


def layers() -> dict[str, nn.Module]:
    return {
        "linear": nn.Linear(9, 12),
        "conv": nn.Conv2d(4, 6, 3),
        "transposed": nn.ConvTranspose1d(5, 7, 3),
        "embedding": nn.Embedding(20, 8),
        "square": nn.Linear(8, 8),
    }


def old(norm, **options):
    def apply(layer: nn.Module) -> nn.Module:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return norm(layer, **options)

    return apply


KINDS = {
    "weight norm": parametrizations.weight_norm,
    "weight norm, dim 1": lambda layer: parametrizations.weight_norm(layer, dim=1),
    "weight norm, whole": lambda layer: parametrizations.weight_norm(layer, dim=None),
    "old weight norm": old(nn.utils.weight_norm),
    "old weight norm, dim 1": old(nn.utils.weight_norm, dim=1),
    "old weight norm, whole": old(nn.utils.weight_norm, dim=None),
    "spectral norm": parametrizations.spectral_norm,
    "old spectral norm": old(nn.utils.spectral_norm),
    "pruned": lambda layer: prune.l1_unstructured(layer, "weight", 0.3),
}


def made(kind: str, layer: str) -> nn.Module:
    """A model of one layer, its numbers moved away from where they start."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"x": KINDS[kind](layers()[layer]), "plain": nn.Linear(8, 9)})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 1 + torch.rand_like(parameter)
    x = {
        "linear": torch.randn(2, 9), "conv": torch.randn(1, 4, 5, 5), "transposed": torch.randn(1, 5, 6),
        "embedding": torch.tensor([1]), "square": torch.randn(2, 8),
    }[layer]  # fmt: skip
    for _ in range(5):
        model["x"](x)  # spectral norm iterates
    model.eval()
    model["x"](x)  # the old style computes its weight here
    return model


def values(source) -> dict[str, np.ndarray]:
    return {matrix.name: np.array(as_numpy(matrix.read())) for matrix in htsr.describe(source)}


def write(path, model: nn.Module) -> str:
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, path / "model.safetensors")
    return str(path)


@pytest.mark.parametrize("layer", layers())
@pytest.mark.parametrize("kind", KINDS)
def test_a_file_gives_the_weight_that_torch_computes(tmp_path, kind, layer):
    model = made(kind, layer)
    plain = layers()[layer]
    with torch.no_grad():
        plain.weight.copy_(model["x"].weight)
    expected = values(nn.ModuleDict({"x": plain, "plain": model["plain"]}))
    for source in (write(tmp_path, model), dict(model.state_dict()), model):
        found = values(source)
        assert sorted(found) == ["plain", "x"]
        np.testing.assert_allclose(found["x"].reshape(-1), expected["x"].reshape(-1), rtol=2e-5, atol=1e-6)
    pairs = {pair.name: pair for pair in htsr.compare(str(tmp_path), model, device="cpu", null=False)}
    assert list(pairs) == ["plain", "x"]
    assert pairs["x"].distance.relative < 1e-5


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_analysis_changes_nothing_in_the_module(kind, training):
    model = made(kind, "conv").train(training)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    first, second = htsr.analyze(model, device="cpu", null=False), htsr.analyze(model, device="cpu", null=False)
    assert [row.norm for row in first] == [row.norm for row in second]
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert all(module.training == training for module in model.modules())


def test_what_a_file_does_not_say_is_told(tmp_path):
    class Doubled(nn.Module):
        def forward(self, W: torch.Tensor) -> torch.Tensor:
            return 2 * W

    model = nn.ModuleDict({name: nn.Linear(8, 9) for name in ("orthogonal", "own", "two", "plain")})
    parametrizations.orthogonal(model["orthogonal"])
    nn.utils.parametrize.register_parametrization(model["own"], "weight", Doubled())
    parametrizations.weight_norm(model["two"])
    parametrizations.spectral_norm(model["two"])
    rows = {row.name: row for row in htsr.analyze(write(tmp_path, model), device="cpu", null=False)}
    assert list(rows) == ["orthogonal", "own", "plain", "two"]
    assert {name: row.status for name, row in rows.items() if row.status != "ok"} == dict.fromkeys(
        ("orthogonal", "own", "two"), "parametrized"
    )
    assert "own.weight is computed by a parametrization that a file does not name" in rows["own"].warning
    live = values(model)
    for name in rows:
        np.testing.assert_allclose(live[name], model.eval()[name].weight.detach(), atol=1e-6)


@pytest.mark.parametrize(
    ("g", "v"), [((3, 1), (12, 9)), ((12, 9), (12, 9)), ((12,), (12, 9)), ((12, 1), (12,)), ((1, 12), (12, 9))]
)
def test_parts_that_do_not_fit_are_told(g, v):
    state = {"x.weight_g": torch.ones(g), "x.weight_v": torch.ones(v), "plain.weight": torch.randn(9, 8)}
    rows = {row.name: row for row in htsr.analyze(state, device="cpu", null=False)}
    assert rows["plain"].status == "ok"
    assert "x" not in rows or rows["x"].status == "parametrized"


def test_gates_of_recurrent_layers(tmp_path):
    lstm = old(nn.utils.weight_norm, name="weight_hh_l0")(nn.LSTM(6, 8))
    with torch.no_grad():
        lstm.weight_hh_l0_g *= 3
    lstm(torch.randn(2, 1, 6))
    found = values(write(tmp_path, nn.ModuleDict({"x": lstm})))
    joined = np.concatenate([value for name, value in found.items() if "hh" in name])
    assert joined.shape == (32, 8)
    np.testing.assert_allclose(joined, lstm.weight_hh_l0.detach(), rtol=1e-5)


class Own(nn.Parameter):
    """What a trainer may make of a parameter."""


def test_a_class_of_parameters_is_not_quantised():
    layer = nn.Linear(8, 9, bias=False)
    layer.weight = Own(layer.weight.detach())
    (matrix,) = htsr.describe(nn.ModuleDict({"x": layer}))
    assert (matrix.dtype, matrix.warning) == ("float32", "")
    (row,) = htsr.analyze(nn.ModuleDict({"x": layer}), device="cpu", null=False)
    assert row.stored == "float32"
    assert "de-quantised" not in row.warning
