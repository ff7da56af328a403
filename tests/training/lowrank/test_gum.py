"""GUM: unbiased over all draws, against a slow twin and torch's Muon, and against itself taken another way."""

import io
import itertools

import numpy as np
import pytest
import torch
from torch import nn

from htsr.errors import UsageError
from htsr.training.layerwise.wrapper import layerwise
from htsr.training.lowrank import gum
from htsr.training.lowrank.gum import GUM
from htsr.training.lowrank.gum_groups import gum_groups
from htsr.training.lowrank.muon import orthogonalised
from htsr.training.lowrank.subspace import project_back
from htsr.training.sampling.sampler import LayerSampler
from tests.reference import gum as reference
from tests.training.lowrank.test_optimizer import batch, loss_of, make, same, train

SHAPES = [(12, 8), (8, 12), (8, 8), (12, 8)]


def matrices(seed=0, dtype=torch.float64):
    random = np.random.default_rng(seed)
    return [nn.Parameter(torch.from_numpy(random.standard_normal(shape)).to(dtype)) for shape in SHAPES]


def units(parameters, weights, **options):
    return [
        {"params": [p], "rank": 3, "unit": i, "weight": w, **options}
        for i, (p, w) in enumerate(zip(parameters, weights, strict=True))
    ]


def steps_with(optimizer, gradients):
    for step in gradients:
        for parameter, G in zip((p for group in optimizer.param_groups for p in group["params"]), step, strict=True):
            parameter.grad = G.detach().clone()
        optimizer.step()


def probabilities_of_sets(weights, active):
    """Of the sets that successive draws without replacement can give: by all orders in which they can come."""
    found = {}
    for order in itertools.permutations(range(len(weights)), active):
        left, probability = sum(weights), 1.0
        for i in order:
            probability *= weights[i] / left
            left -= weights[i]
        found[frozenset(order)] = found.get(frozenset(order), 0.0) + probability
    return found


@pytest.mark.parametrize("weights", [[1, 1, 1, 1], [0.1, 0.2, 0.3, 0.4]])
def test_the_gradient_that_is_used_has_the_gradient_as_its_expectation(weights, monkeypatch):
    gradients = matrices(seed=1)
    expected = [torch.zeros_like(G) for G in gradients]
    for drawn, probability in probabilities_of_sets(weights, 2).items():
        monkeypatch.setattr(gum, "_draw", lambda *_, drawn=drawn: drawn)
        parameters = matrices()
        optimizer = GUM(units(parameters, weights), method="svd", active=2)
        for parameter, G in zip(parameters, gradients, strict=True):
            parameter.grad = G.detach().clone()
        used = (optimizer._reweighted(optimizer._projected(one)) for one in optimizer._pending())
        for one, total in zip(used, expected, strict=True):
            assert (one.number in drawn) == (one.R.shape == total.shape)
            back = one.R if one.number in drawn else project_back(one.R, one.state["projector"], total.shape)
            total += probability * back
    for total, G in zip(expected, gradients, strict=True):
        torch.testing.assert_close(total, G.detach(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("base", ["adamw", "muon"])
def test_every_step_is_that_of_the_slow_twin(base):
    parameters, gradients = matrices(), [matrices(seed=s) for s in range(1, 8)]
    weights = [0.1, 0.2, 0.3, 0.4]
    options = {"active": 2, "refresh_every": 3, "seed": 5, "nesterov": False}
    optimizer = GUM(units(parameters, weights), lr=0.01, base=base, method="svd", **options)
    begun = [p.detach().numpy().copy() for p in parameters]
    q, drawn = gum._inclusion(tuple(weights), 2), []
    for i, step in enumerate(gradients):
        drawn += [optimizer.drawn] if i % 3 == 0 else []
        steps_with(optimizer, [step])
    assert len(set(drawn)) > 1
    for i, (parameter, W) in enumerate(zip(parameters, begun, strict=True)):
        Gs = [step[i].detach().numpy() for step in gradients]
        expected = reference.gum(W, Gs, 0.01, 3, 3, [i in one for one in drawn], q[i], base)[-1]
        np.testing.assert_allclose(parameter.detach().numpy(), expected, rtol=1e-6, atol=1e-9)


def test_muon_in_the_whole_space_is_torchs():
    mine, other = matrices(dtype=torch.float32), matrices(dtype=torch.float32)
    optimizer = GUM(units(mine, [1, 1, 1, 1]), lr=0.1, weight_decay=0.1, base="muon", active=1, reweight="gradient")
    for group in optimizer.param_groups:
        group["rank"] = 8  # all of the smaller side: nothing lies outside
    drawn = optimizer.drawn
    torchs = torch.optim.Muon(other, lr=0.1, adjust_lr_fn="match_rms_adamw")
    begun = [p.detach().clone() for p in mine]
    for seed in range(1, 4):
        for a, b, G in zip(mine, other, matrices(seed, torch.float32), strict=True):
            a.grad, b.grad = G.detach().clone(), G.detach().clone()
        optimizer.step()
        torchs.step()
    for i, (a, b, W) in enumerate(zip(mine, other, begun, strict=True)):
        if i not in drawn:  # torch's is computed in bfloat16
            assert torch.linalg.norm(a - b) < 0.02 * torch.linalg.norm(b - W)
    stack = torch.stack([matrices(seed, torch.float32)[0].detach() for seed in (1, 2)])
    torch.testing.assert_close(orthogonalised(stack)[1], orthogonalised(stack[1]))


def test_a_reweighted_update_of_muon_has_muons_own_as_its_expectation(monkeypatch):
    """With U·Vᵀ itself in place of Newton and Schulz's, which lies near."""
    weights = [0.1, 0.2, 0.3, 0.4]
    gradients = [G.detach() for G in matrices(1)]
    expected = [torch.zeros_like(G) for G in gradients]
    monkeypatch.setattr("htsr.training.lowrank.muon.orthogonalised", exactly)
    for drawn, probability in probabilities_of_sets(weights, 2).items():
        monkeypatch.setattr(gum, "_draw", lambda *_, drawn=drawn: drawn)
        parameters = matrices()
        begun = [p.detach().clone() for p in parameters]
        optimizer = GUM(units(parameters, weights), lr=1.0, base="muon", reweight="update", active=2, method="svd")
        steps_with(optimizer, [gradients])
        for total, p, W in zip(expected, parameters, begun, strict=True):
            total += probability * (p.detach() - W)
    for total, G in zip(expected, gradients, strict=True):
        torch.testing.assert_close(total, -0.2 * max(G.shape) ** 0.5 * exactly(G), rtol=1e-7, atol=1e-7)


def exactly(M):
    U, s, Vh = torch.linalg.svd(M, full_matrices=False)
    return U[..., :, s > 1e-9] @ Vh[..., s > 1e-9, :]


def start(mode="keep", dtype=torch.float32, base="adamw", **options):
    model = make(dtype=dtype, blocks=3)
    options = {"active": 1, "refresh_every": 3, "gradients": mode, "base": base, **options}
    groups = gum_groups(model, 4, strategy="increase")
    return model, GUM(groups, lr=0.01, weight_decay=0.1, **options)


@pytest.mark.parametrize("base", ["adamw", "muon"])
def test_releasing_gradients_during_backward_changes_nothing(base):
    ends = []
    for mode in ("keep", "project", "update"):
        model, optimizer = start(mode, torch.float64, base)
        train(model, optimizer, 7)
        ends.append(model.state_dict())
    for other in ends[1:]:
        for name, value in ends[0].items():
            torch.testing.assert_close(other[name], value, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("mode", "dtype", "options"),
    [
        ("keep", torch.float32, {"base": "muon", "reweight": "update"}),
        ("update", torch.bfloat16, {"base": "muon", "state_dtype": "8bit"}),
        ("project", torch.bfloat16, {"state_dtype": "bfloat16", "rounding": "kahan"}),
    ],
)
def test_resumed_is_uninterrupted_bit_for_bit(mode, dtype, options):
    """Also where a step with a new subspace comes next, and where layerwise has split the groups."""

    def begin(**changes):
        model, optimizer = start(mode, dtype, **options, **changes)
        if mode == "keep":
            layerwise(optimizer, model, "ends")
        return model, optimizer

    whole, optimizer = begin()
    saved = {}
    for step in range(7):
        if step in (3, 4):
            saved[step] = io.BytesIO()
            torch.save((whole.state_dict(), optimizer.state_dict()), saved[step])
        train(whole, optimizer, 1, start=step)
    for step, file in saved.items():
        file.seek(0)
        weights, state = torch.load(file, weights_only=True)
        again, optimizer = begin(seed=9)
        again.load_state_dict(weights)
        optimizer.load_state_dict(state)
        train(again, optimizer, 7 - step, start=step)
        assert same(whole, again)


def test_draws_are_those_of_the_layer_sampler_and_only_drawn_blocks_have_full_states():
    model, optimizer = start(seed=3)
    sampler = LayerSampler(make(blocks=3), "increase", active=1, seed=3)
    seen = set()
    for step in range(30):
        train(model, optimizer, 1, start=step)
        seen |= optimizer.drawn
        if (step + 1) % 3:
            assert optimizer.drawn == set(sampler.draw(step // 3))
            for i, block in enumerate(model.layers):
                full = optimizer.state[block.mlp["up_proj"].weight]["exp_avg"].shape == (48, 16)
                assert full == (i in optimizer.drawn)
        else:
            assert "exp_avg" not in optimizer.state[model.layers[0].mlp["up_proj"].weight]
    assert seen == {0, 1, 2}


def moments_of_full_size(optimizer):
    states = [optimizer.state[p] for group in optimizer.param_groups for p in group["params"] if p.ndim == 2]
    return sum("exp_avg" in s and 3 not in s["exp_avg"].shape for s in states)


def test_a_group_that_is_added_is_drawn_with_the_others():
    parameters, gradients = matrices(), [matrices(seed=s) for s in range(20)]
    *first, last = units(parameters, [1, 1, 1, 1])
    optimizer = GUM(first, active=1, refresh_every=5)
    steps_with(optimizer, [step[:3] for step in gradients[:3]])
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(4))]})
    with pytest.raises(UsageError, match="after 3 steps, amid those of one draw"):
        optimizer.add_param_group(dict(last))
    assert len(optimizer.param_groups) == 4
    steps_with(optimizer, [[*step[:3], torch.ones(4)] for step in gradients[3:5]])
    optimizer.add_param_group(last)
    assert {group["steps"] for group in optimizer.param_groups} == {5}
    drawn = set()
    for step in gradients:
        steps_with(optimizer, [[*step[:3], torch.ones(4), step[3]]])
        drawn |= optimizer.drawn
        assert moments_of_full_size(optimizer) == (optimizer.param_groups[0]["steps"] % 5 != 0)
    assert 3 in drawn


@pytest.mark.parametrize("mode", ["keep", "project", "update"])
def test_what_would_change_a_draw_that_holds_is_refused_before_anything_is_updated(mode):
    model, optimizer = start(mode)
    train(model, optimizer, 1)
    before = [p.detach().clone() for p in model.parameters()]
    for group in optimizer.param_groups:
        group["active"] = 2
    with pytest.raises(UsageError, match="is drawn now, and was otherwise"):
        train(model, optimizer, 1, start=1)
    if mode != "update":  # which updates during backward, one by one
        assert all(map(torch.equal, before, model.parameters()))


@pytest.mark.parametrize("mode", ["project", "update"])
def test_the_norm_of_released_gradients_is_that_of_their_parts_before_they_are_divided(mode):
    norms = []
    for gradients in (mode, "keep"):
        model, optimizer = start(gradients, torch.float64)
        for step in range(4):
            loss_of(model, batch(step)).backward()
            if gradients == "keep":
                norms.append(optimizer.clip_grad_norm_(1e9))
                whole = torch.nn.utils.clip_grad_norm_(model.parameters(), float("inf"))
                assert 0.5 * whole < norms[-1] < whole
            else:
                norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), float("inf")))
            optimizer.step()
            optimizer.zero_grad()
    torch.testing.assert_close(norms[:4], norms[4:], rtol=1e-6, atol=0)


def test_units_of_a_model():
    model = make(blocks=3)
    by_matrix = gum_groups(model, 4, unit="matrix", strategy=[1, 1, 2], embeddings=True)
    third = pytest.approx(1 / 3)
    assert [group.get("weight") for group in by_matrix] == [third, *[0.25] * 6, *[0.5] * 3, third, None]
    assert len({group["unit"] for group in by_matrix[:-1]}) == 11
    by_block = gum_groups(model, 4, embeddings=True)
    assert [len(g["params"]) for g in by_block] == [2, 3, 3, 3, 3]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"active": 3}, "active is 3, and there are 3 units"),
        ({"active": 0}, "active is 0"),
        ({"base": "sgd"}, "unknown base 'sgd': one of adamw, muon"),
        ({"reweight": "loss"}, "unknown reweight"),
        ({"momentum": 1.0}, "momentum is 1.0"),
    ],
)
def test_bad_options_are_a_sentence(options, sentence):
    with pytest.raises(UsageError, match=sentence):
        start(**options)


def test_bad_groups_are_a_sentence():
    with pytest.raises(UsageError, match=r"layers\.1 has the weight 0"):
        gum_groups(make(blocks=3), 4, strategy=[1, 0, 1])
    with pytest.raises(UsageError, match="unknown unit 'head'"):
        gum_groups(make(), 4, unit="head")
    with pytest.raises(UsageError, match=r"take htsr\.gum_groups"):
        GUM([{"params": matrices()[:1], "rank": 3}])
    with pytest.raises(UsageError, match=r"rank 8 and a parameter of the shape \(12, 8\), of which nothing"):
        GUM([{"params": [p], "rank": 8, "unit": i} for i, p in enumerate(matrices())])
    with pytest.raises(UsageError, match="leave moments out"):
        GUM(gum_groups(make(blocks=3), 4, moments="rotate"))
