import copy

import numpy as np
import pytest
import torch
from torch import nn

import htsr
from htsr.errors import UsageError
from htsr.matrices.models import Filter
from htsr.training.spectral_projection import STEPS, nudge_model, spectral_projection
from tests.models import heavy_matrix


def model(seed=0):
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(80, 60), nn.ReLU(), nn.Linear(60, 70), nn.ReLU(), nn.Linear(70, 5))
    with torch.no_grad():
        net[0].weight.copy_(heavy_matrix(np.random.default_rng(seed), 60, 80))
        net[2].weight.copy_(heavy_matrix(np.random.default_rng(seed + 1), 70, 60))
    return net


def train(net, optimizer, steps, start=0):
    for step in range(start, start + steps):
        torch.manual_seed(100 + step)
        optimizer.zero_grad()
        net(torch.randn(8, 80)).square().mean().backward()
        optimizer.step()


def make(net, **options):
    adam = torch.optim.AdamW(net.parameters(), lr=1e-3)
    return spectral_projection(adam, net, **({"strength": 0.2, "interval": 3} | options))


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_it_is_the_same_optimizer_and_strength_zero_changes_nothing():
    plain, zero = model(), model()
    adam = torch.optim.AdamW(zero.parameters(), lr=1e-3)
    assert spectral_projection(adam, zero, strength=0.0, interval=1) is adam
    train(plain, torch.optim.AdamW(plain.parameters(), lr=1e-3), 7)
    train(zero, adam, 7)
    assert same(plain, zero)


def test_it_acts_every_interval_and_on_wanted_weights_only():
    plain, nudged = model(), model()
    plain_optimizer, optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-3), make(nudged)
    train(plain, plain_optimizer, 2)
    train(nudged, optimizer, 2)
    assert same(plain, nudged)
    train(plain, plain_optimizer, 1, start=2)
    train(nudged, optimizer, 1, start=2)
    changed = {k for k in plain.state_dict() if not torch.equal(plain.state_dict()[k], nudged.state_dict()[k])}
    assert changed == {"0.weight", "2.weight"}  # no biases, nor the head with five rows
    for name in changed:
        W, V = plain.state_dict()[name], nudged.state_dict()[name]
        assert float(V.norm()) == pytest.approx(float(W.norm()), rel=1e-5)
    expected, _ = htsr.spectra.nudge.nudge(plain[0].weight.detach(), 0.2)
    torch.testing.assert_close(nudged[0].weight.detach(), expected)


def test_alpha_and_the_trace_log_number_go_to_two_and_to_zero():
    net = model()
    optimizer = spectral_projection(
        torch.optim.SGD(net.parameters(), lr=0.0), net, interval=1, strength=0.1, fit="hill"
    )
    before = htsr.analyze(net, fit="hill", null=False)
    net(torch.randn(2, 80)).sum().backward()
    moved = nudge_model(optimizer, copy.deepcopy(net), 0.0, fit="hill")
    assert moved == {}  # the copy's weights are not the optimizer's
    for _ in range(40):
        optimizer.step()
    after = htsr.analyze(net, fit="hill", null=False)
    for name in ("0", "2"):
        assert abs(after[name].alpha - 2) < 0.2 * abs(before[name].alpha - 2)
        assert 0 <= after[name].trace_log < before[name].trace_log


def test_resumed_is_uninterrupted():
    straight = model()
    train(straight, make(straight), 10)
    first = model()
    optimizer = make(first)
    train(first, optimizer, 4)
    weights, state = copy.deepcopy(first.state_dict()), copy.deepcopy(optimizer.state_dict())
    assert state["param_groups"][0][STEPS] == 4
    resumed = model(seed=9)
    resumed.load_state_dict(weights)
    optimizer = make(resumed)
    optimizer.load_state_dict(state)
    train(resumed, optimizer, 6, start=4)
    assert same(straight, resumed)


def test_frozen_tied_and_fused_weights():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_layer=1, n_embd=64, n_head=2, vocab_size=90, n_positions=70)
    net = transformers.GPT2LMHeadModel(config)
    net.transformer.wpe.weight.requires_grad_(False)
    for parameter in net.parameters():
        if parameter.ndim == 2:
            rows, columns = parameter.shape
            parameter.data.copy_(heavy_matrix(np.random.default_rng(rows), rows, columns))
    before = copy.deepcopy(net.state_dict())
    moved = nudge_model(torch.optim.SGD(net.parameters(), lr=0.1), net, 0.5)
    assert "transformer.h.0.attn.c_attn[k]" in moved
    assert "transformer.wpe" not in moved
    assert "lm_head" not in moved
    assert torch.equal(net.transformer.wpe.weight, before["transformer.wpe.weight"])
    assert net.lm_head.weight is net.transformer.wte.weight
    k = slice(64, 128)
    part = before["transformer.h.0.attn.c_attn.weight"][:, k]
    expected, _ = htsr.spectra.nudge.nudge(part, 0.5)
    torch.testing.assert_close(net.transformer.h[0].attn.c_attn.weight.detach()[:, k], expected)


class Own(nn.Parameter):
    """As libraries derive them, to hang attributes on."""


def test_parameters_of_a_class_of_their_own_are_nudged():
    """0.1.0 took them for de-quantised and skipped them without a word."""
    net, plain = model(), model()
    net[0].weight = Own(net[0].weight.detach().clone())
    moved = nudge_model(torch.optim.SGD(net.parameters(), lr=0.1), net, 0.5)
    assert moved.keys() == nudge_model(torch.optim.SGD(plain.parameters(), lr=0.1), plain, 0.5).keys()
    assert "0" in moved
    assert same(net, plain)
    assert type(net[0].weight) is Own


def test_what_is_computed_from_a_parameter_is_left_alone():
    net = model()
    nn.utils.parametrizations.weight_norm(net[0])
    nn.utils.parametrizations.spectral_norm(net[2])
    adam = torch.optim.AdamW(net.parameters())
    before = copy.deepcopy(net.state_dict())
    assert nudge_model(adam, net, 0.5) == {}
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_wrong_usage_is_a_sentence():
    net = model()
    adam = torch.optim.AdamW(net.parameters())
    with pytest.raises(UsageError, match="strength"):
        spectral_projection(adam, net, strength=2)
    with pytest.raises(UsageError, match="interval"):
        spectral_projection(adam, net, interval=0)
    with pytest.raises(UsageError, match="trains no matrix"):
        spectral_projection(adam, model())
    with pytest.raises(UsageError, match="trains no matrix"):
        spectral_projection(adam, net, where=Filter(min_size=500))
