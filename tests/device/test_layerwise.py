"""Layerwise training on the device takes the steps of the CPU, and waits for the device at events only."""

import copy
import io

import pytest
import torch

import htsr
from tests.device.agree import assert_agree
from tests.device.runs import model_on, state_of, train


def layered(model, policy="llr", optimizer=torch.optim.AdamW, options=(), **changes):
    made = optimizer(model.parameters(), lr=1e-3, **dict(options))
    return htsr.layerwise(made, model, policy, total_steps=100, **{"interval": 3, "ramp": 2} | changes)


def both(device, make, numbers=range(7), counting=None):
    """Model and optimizer on the CPU, the same on the device, and what waited."""
    models = [model_on("cpu"), model_on(device)]
    optimizers = [make(model) for model in models]
    train(models[0], optimizers[0], numbers)
    waited = train(models[1], optimizers[1], numbers, counting)
    return models, optimizers, waited


@pytest.mark.parametrize("policy", ["llr", "tempbalance", "alphadecay", "model_balancing"])
def test_policies(device, synchronisations, policy):
    models, optimizers, waited = both(device, lambda model: layered(model, policy), counting=synchronisations)
    assert_agree(*(htsr.multipliers(optimizer) for optimizer in optimizers), 1e-6)
    assert_agree(*(model.state_dict() for model in models), 1e-6)
    assert [names for step, names in enumerate(waited, 1) if step not in (1, 3, 6) and names] == []


@pytest.mark.parametrize(
    "changes",
    [
        {"spectrum": "gradients"},
        {"spectrum": "momentum"},
        {"score": "erg_gap", "fit": "ks"},
        {"score": "stable_rank"},
        {"score": "alpha_minus_null", "fit": "ks"},
        {"windows": htsr.Windows(40, 3), "min_size": 10},
        {"unit": "block"},
        {"dtype": "float32"},
        {"embeddings": "measured"},
    ],
    ids=str,
)
def test_spectra_and_scores(device, synchronisations, changes):
    models, optimizers, waited = both(device, lambda model: layered(model, **changes), counting=synchronisations)
    assert_agree(*(htsr.multipliers(optimizer) for optimizer in optimizers), 1e-4)
    assert_agree(*(model.state_dict() for model in models), 1e-4)
    assert [names for step, names in enumerate(waited, 1) if step not in (1, 3, 6) and names] == []


@pytest.mark.parametrize("options", [{"fused": True}, {"foreach": True}, {"foreach": False}], ids=str)
def test_kinds_of_steps(device, synchronisations, options):
    models, _, waited = both(device, lambda model: layered(model, options=options.items()), counting=synchronisations)
    assert_agree(*(model.state_dict() for model in models), 1e-6)
    assert [names for step, names in enumerate(waited, 1) if step not in (1, 3, 6) and names] == []


def test_an_event_waits_as_often_as_it_decomposes(device, synchronisations):
    _, _, waited = both(device, layered, counting=synchronisations)
    matrices = 6
    assert len(waited[2]) <= 8 * matrices, waited[2]


@pytest.mark.parametrize("place", ["cpu", "device"])
def test_resume(device, place):
    whole, first, second = model_on(device), model_on(device), model_on(device)
    train(whole, layered(whole), range(8))
    optimizer = layered(first)
    train(first, optimizer, range(4))
    file = io.BytesIO()
    torch.save({"model": first.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, map_location=device if place == "device" else place)
    second.load_state_dict(saved["model"])
    resumed = layered(second)
    resumed.load_state_dict(saved["optimizer"])
    train(second, resumed, range(4, 8))
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), second.parameters(), strict=True))


def test_a_resumed_run_waits_no_more_than_before(device, synchronisations):
    model = model_on(device)
    optimizer = layered(model)
    train(model, optimizer, range(4))
    saved = copy.deepcopy(optimizer.state_dict())
    resumed = layered(model)
    resumed.load_state_dict(saved)
    assert all(state["step"].device.type == "cpu" for state in state_of(resumed))
    waited = train(model, resumed, range(4, 8), synchronisations)
    assert [names for step, names in enumerate(waited, 5) if step != 6 and names] == []


def test_a_scheduler(device, synchronisations):
    def make(model):
        optimizer = layered(model)
        optimizer.register_step_post_hook(lambda *_: scheduler.step())
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)
        return optimizer

    models, _, waited = both(device, make, counting=synchronisations)
    assert_agree(*(model.state_dict() for model in models), 1e-6)
    assert [names for step, names in enumerate(waited, 1) if step not in (1, 3, 6) and names] == []


def test_weights_that_are_not_finite_keep_their_multiplier(device):
    model = model_on(device)
    optimizer = layered(model)
    train(model, optimizer, range(2))
    with torch.no_grad():
        model.layers[0].mlp["up_proj"].weight.fill_(torch.nan)
    optimizer.zero_grad()
    optimizer.step()
    assert "layers.0.mlp.up_proj" in htsr.multipliers(optimizer)


def test_a_plan(device):
    assert_agree(htsr.layerwise_plan(model_on("cpu")).records(), htsr.layerwise_plan(model_on(device)).records())


@pytest.mark.parametrize("optimizer", [torch.optim.Adam, torch.optim.AdamW])
@pytest.mark.parametrize("options", [{}, {"foreach": True}, {"fused": True}, {"foreach": False}], ids=str)
def test_steps_under_a_default_device(device, optimizer, options):
    """The number by which steps are counted was made on the device, and those lie on the host."""
    models = [model_on(device), model_on(device)]
    optimizers = [layered(model, optimizer=optimizer, options=options.items()) for model in models]
    train(models[0], optimizers[0], range(4))
    with torch.device(device):
        train(models[1], optimizers[1], range(4))
    assert_agree(*(model.state_dict() for model in models), 1e-6)
