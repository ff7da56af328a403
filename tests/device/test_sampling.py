"""Sampled training on the device takes the steps of the CPU, waits at draws only, and moves state as it says."""

import copy

import pytest
import torch

import htsr
from tests.device.agree import assert_agree
from tests.device.runs import loss_of, model_on, state_of, train, within

INTERVAL = 2


def sampled(model, optimizer=None, **options):
    sampler = htsr.LayerSampler(model, **{"active": 1, "interval": INTERVAL, "seed": 3} | options)
    made = torch.optim.AdamW(model.parameters(), lr=1e-3) if optimizer is None else optimizer(model)
    sampler.attach(made)
    return sampler, made


def low_rank(**options):
    def make(model):
        groups = htsr.low_rank_groups(model, rank=8)
        return htsr.LowRankAdamW(groups, lr=1e-3, refresh_every=3, **options)

    return make


@pytest.mark.parametrize("frozen_state", ["drop", "keep", "offload"])
@pytest.mark.parametrize("embedding", ["freeze", "train", "sampled"])
def test_steps(device, synchronisations, frozen_state, embedding):
    options = {"frozen_state": frozen_state, "embedding": embedding}
    here, there = model_on("cpu"), model_on(device)
    ours, theirs = sampled(here, **options), sampled(there, **options)
    train(here, ours[1], range(9))
    waited = train(there, theirs[1], range(9), synchronisations)
    assert ours[0].active == theirs[0].active
    assert_agree(here.state_dict(), there.state_dict(), 1e-6)
    for step, names in enumerate(waited, 1):
        assert not names or step % INTERVAL == 0, waited
        assert not names or frozen_state == "offload", waited
    active = {id(parameter) for parameter in theirs[0].drawn()}
    for parameter, state in theirs[1].state.items():
        offloaded = frozen_state == "offload" and not parameter.requires_grad
        assert state["step"].device.type == "cpu"
        assert state["exp_avg"].device.type == ("cpu" if offloaded else device.type)
        assert frozen_state != "drop" or parameter.requires_grad or id(parameter) in active


def test_offloaded_state_lies_in_pinned_memory(device):
    model = model_on(device)
    _, optimizer = sampled(model, frozen_state="offload")
    train(model, optimizer, range(9))
    away = [state for parameter, state in optimizer.state.items() if not parameter.requires_grad and state]
    assert away
    assert all(value.is_pinned() for state in away for name, value in state.items() if name != "step")


@pytest.mark.parametrize("frozen_state", ["drop", "keep", "offload"])
@pytest.mark.parametrize("gradients", ["keep", "project", "update"])
def test_with_low_rank(device, frozen_state, gradients):
    models = [model_on("cpu"), model_on(device)]
    for model in models:
        _, optimizer = sampled(model, low_rank(gradients=gradients), frozen_state=frozen_state)
        train(model, optimizer, range(7))
    assert_agree(*(model.state_dict() for model in models), within(device, 1e-5))


@pytest.mark.parametrize("rounding", ["stochastic", "kahan", "master"])
@pytest.mark.parametrize("frozen_state", ["drop", "offload"])
def test_with_narrow_weights(device, rounding, frozen_state):
    """What goes beside the weights (master, compensation) goes and comes with the other state."""
    model = model_on(device, torch.bfloat16)
    _, optimizer = sampled(model, low_rank(rounding=rounding), frozen_state=frozen_state)
    train(model, optimizer, range(9))
    for parameter, state in optimizer.state.items():
        offloaded = frozen_state == "offload" and not parameter.requires_grad
        for name, value in state.items():
            assert value.device.type == ("cpu" if offloaded or name == "step" else device.type), name
    assert all(parameter.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("optimizer", [None, low_rank()], ids=["AdamW", "LowRankAdamW"])
@pytest.mark.parametrize("frozen_state", ["drop", "keep", "offload"])
def test_resume(device, memory, synchronisations, frozen_state, optimizer):
    whole, first, second = model_on(device), model_on(device), model_on(device)
    train(whole, sampled(whole, optimizer, frozen_state=frozen_state)[1], range(10))
    _, saved = sampled(first, optimizer, frozen_state=frozen_state)
    train(first, saved, range(7))
    second.load_state_dict(first.state_dict())
    file = copy.deepcopy(saved.state_dict())
    for state in file["state"].values():
        for name, value in state.items():
            state[name] = value.cpu()
    _, resumed = sampled(second, optimizer, frozen_state=frozen_state)
    active = sum(
        value.numel() * value.element_size()
        for parameter, state in saved.state.items()
        if parameter.requires_grad or frozen_state == "keep"
        for name, value in state.items()
        if name != "step"
    )
    with memory() as used:
        resumed.load_state_dict(file)
    assert device.type != "pretended" or used.peak <= active, (used.peak, active)  # others round up what they give
    assert all(state["step"].device.type == "cpu" for state in state_of(resumed) if state)
    for parameter, state in resumed.state.items():
        if frozen_state == "offload" and not parameter.requires_grad:
            assert all(value.device.type == "cpu" for value in state.values())
    waited = train(second, resumed, range(7, 10), synchronisations)
    assert not waited[0] or optimizer is not None, waited
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), second.parameters(), strict=True))


@pytest.mark.parametrize("attached", ["LayerSampler", "layerwise"])
def test_step_counters_come_back_to_the_cpu(device, synchronisations, attached):
    """A checkpoint that was loaded onto the device, as several processes load it, has them there."""

    def made(model):
        if attached == "LayerSampler":
            return sampled(model, frozen_state="keep", interval=100)[1]
        return htsr.layerwise(torch.optim.AdamW(model.parameters(), lr=1e-3), model, interval=None)

    model, second = model_on(device), model_on(device)
    optimizer = made(model)
    train(model, optimizer, range(3))
    saved = copy.deepcopy(optimizer.state_dict())
    for state in saved["state"].values():
        state["step"] = state["step"].to(device)
    resumed = made(second)
    resumed.load_state_dict(saved)
    assert {state["step"].device.type for state in state_of(resumed) if state} == {"cpu"}
    assert not any(train(second, resumed, range(3, 5), synchronisations))


def test_resume_of_a_fused_optimizer(device, synchronisations):
    """Torch puts the step counters of a fused optimizer on the device; that is no reason to wait at each step."""

    def fused(model):
        return torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)

    model = model_on(device)
    _, optimizer = sampled(model, fused, frozen_state="keep")
    train(model, optimizer, range(5))
    saved = copy.deepcopy(optimizer.state_dict())
    second = model_on(device)
    _, resumed = sampled(second, fused, frozen_state="keep")
    resumed.load_state_dict(saved)
    waited = train(second, resumed, range(5, 8), synchronisations)
    assert not [names for step, names in enumerate(waited, 6) if step % INTERVAL and names], waited


def test_detaching_brings_the_state_back(device):
    model = model_on(device)
    sampler, optimizer = sampled(model, frozen_state="offload")
    train(model, optimizer, range(5))
    sampler.detach()
    assert all(state["exp_avg"].device == device for state in optimizer.state.values())
    loss_of(model, 0).backward()
    optimizer.step()


def test_composed_with_layerwise(device, synchronisations):
    models, waited = [model_on("cpu"), model_on(device)], []
    for model in models:
        made = low_rank()(model)
        made = htsr.layerwise(made, model, interval=4, ramp=2)
        sampler = htsr.LayerSampler(model, active=1, interval=INTERVAL, seed=3)
        sampler.attach(made)
        waited = train(model, made, range(8), synchronisations)
    assert_agree(*(model.state_dict() for model in models), within(device, 1e-4))
    assert all(isinstance(names, list) for names in waited)
