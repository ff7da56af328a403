"""What trains together on a device: nudged spectra, adapters by scores, and a scaler of gradients."""

import pytest
import torch
from peft import get_peft_model

import htsr
from tests.device.agree import assert_agree
from tests.device.runs import loss_of, model_on, train, within
from tests.transformer import llama


def test_spectral_projection(device, synchronisations):
    models, waited = [model_on("cpu"), model_on(device)], []
    for model in models:
        optimizer = htsr.spectral_projection(torch.optim.AdamW(model.parameters(), lr=1e-3), model, interval=3)
        waited = train(model, optimizer, range(7), synchronisations)
    assert_agree(*(model.state_dict() for model in models), 1e-6)
    assert [names for step, names in enumerate(waited, 1) if step % 3 and names] == []


def test_adapters_by_scores(device):
    models = [llama(2, 64), llama(2, 64).to(device)]
    analyses = [htsr.analyze(model, fit="hill") for model in models]
    configs = [htsr.lora_config(*pair, rank=4) for pair in zip(models, analyses, strict=True)]
    assert configs[0].rank_pattern == configs[1].rank_pattern
    assert configs[0].alpha_pattern == configs[1].alpha_pattern
    adapted = get_peft_model(models[1], configs[1])
    sampler = htsr.LayerSampler(adapted, active=1, interval=1)
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)
    sampler.attach(optimizer)
    tokens = torch.arange(4, 24).reshape(2, 10).to(device)
    losses = []
    for _ in range(6):
        loss = adapted(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def made(kind, model):
    if kind == "layerwise":
        return htsr.layerwise(torch.optim.AdamW(model.parameters(), lr=1e-3), model, interval=3, ramp=2)
    if kind == "LowRankAdamW":
        return htsr.LowRankAdamW(htsr.low_rank_groups(model, rank=8), lr=1e-3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    htsr.LayerSampler(model, active=1, interval=2).attach(optimizer)
    return optimizer


@pytest.mark.parametrize("kind", ["layerwise", "LowRankAdamW", "LayerSampler"])
def test_a_gradient_scaler(device, kind):
    """A step that the scaler skips is none, and the next is that of the CPU."""
    models = [model_on("cpu", torch.float32), model_on(device, torch.float32)]
    counted = []
    for model in models:
        place = next(model.parameters()).device
        optimizer, scaler = made(kind, model), torch.amp.GradScaler(place.type, init_scale=1024.0)
        for number in range(4):
            loss = loss_of(model, number) * (torch.inf if number == 1 else 1.0)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        assert scaler.get_scale() == 512
        counted.append([float(state["step"]) for state in optimizer.state.values() if "step" in state])
    assert counted[0] == counted[1]
    assert_agree(*(model.state_dict() for model in models), within(device, 1e-2))
