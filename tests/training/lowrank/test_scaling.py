"""APOLLO in the low-rank optimizer: against the authors' package where it is installed, a slow twin, and itself."""

import io
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from htsr.errors import UsageError
from htsr.training.lowrank.groups import low_rank_groups
from htsr.training.lowrank.optimizer import LowRankAdamW
from htsr.training.lowrank.scaling import random_basis
from htsr.training.lowrank.update import seed_of
from tests.reference import lowrank as reference
from tests.training.lowrank.test_optimizer import gradients, groups, make, parameters, same, take, train

EVERY = 5


def projection(G, rank, period, number=0, every=EVERY):
    return random_basis(G, rank, seed_of("projection", 0, number, period * every))


@settings(max_examples=20)
@given(
    rows=st.integers(2, 12),
    columns=st.integers(2, 12),
    rank=st.integers(1, 4),
    every=st.integers(1, 4),
    by=st.sampled_from(["channel", "tensor"]),
    weight_decay=st.sampled_from([0.0, 0.3]),
    seed=st.integers(0, 99),
)
def test_every_step_is_that_of_the_slow_twin(rows, columns, rank, every, by, weight_decay, seed):
    """Also for each matrix of a stack, with its own norms."""
    random, rank = np.random.default_rng(seed), min(rank, rows, columns)
    W, grads = random.standard_normal((2, rows, columns)), list(random.standard_normal((6, 2, rows, columns)))
    grads[0][1] = grads[2][1] = 0  # an expert without tokens: its next step is not limited by nothing
    flat, stack = nn.Parameter(torch.from_numpy(W[0].copy())), nn.Parameter(torch.from_numpy(W.copy()))
    optimizer = LowRankAdamW(
        [{"params": [flat, stack], "rank": rank}], lr=0.02, betas=(0.9, 0.99), weight_decay=weight_decay, scale=0.5,
        refresh_every=every, method="random", scaled_by=by,
    )  # fmt: skip
    numbers = {"lr": 0.02, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": weight_decay, "scale": 0.5}
    periods = range(math.ceil(6 / every))
    own = [projection(flat, rank, period, every=every).detach().numpy() for period in periods]
    stacked = [projection(stack, rank, period, 1, every).detach().numpy() for period in periods]
    expected = [
        reference.apollo(W[i], [G[i] for G in grads], P, every=every, by=by, **numbers)
        for i, P in ((0, own), (0, [P[0] for P in stacked]), (1, [P[1] for P in stacked]))
    ]
    for step, grad in enumerate(grads):
        take(optimizer, [flat, stack], [torch.from_numpy(grad[0]), torch.from_numpy(grad)])
        for ours, theirs in zip((flat, stack[0], stack[1]), expected, strict=True):
            np.testing.assert_allclose(ours.detach().numpy(), theirs[step], rtol=1e-9, atol=1e-10)
    assert set(optimizer.state[flat]) == {"step", "exp_avg", "exp_avg_sq", "update_norm"}  # no projection


@pytest.mark.parametrize(("by", "rank", "scale"), [("channel", 4, 1.0), ("tensor", 1, 128.0)])
def test_it_takes_the_steps_of_the_authors_package(by, rank, scale):
    package = pytest.importorskip("apollo_torch.apollo")
    lr, eps, decay, beta2 = 1e-2, 1e-6, 0.1, 0.999
    ours, theirs = parameters(torch.float64), parameters(torch.float64)
    # it decays after the update, and adds eps before the bias correction: see the test of galore-torch
    kept = 1 - lr * decay
    options = {"scaled_by": by, "method": "random", "scale": scale**0.5 * kept, "refresh_every": EVERY}
    mine = LowRankAdamW(groups(ours, rank, **options), lr=lr, weight_decay=decay)
    mine.param_groups[1]["lr"], mine.param_groups[1]["weight_decay"] = lr * kept, decay / kept
    own = {"proj": "random", "update_proj_gap": EVERY, "scale": scale, "scale_type": by, "proj_type": "std"}
    other = package.AdamW(groups(theirs, rank, **own), lr=lr, eps=eps, weight_decay=decay)
    start = [parameter.detach().clone() for parameter in ours]
    for step, grads in enumerate(gradients(14, torch.float64), 1):
        for number, parameter in enumerate(theirs[:-1]):  # with the projection that ours has
            G, period = parameter.detach(), (step - 1) // EVERY
            P = projection(G, rank, period, number)
            made = P.T if G.shape[0] >= G.shape[1] else P
            if "projector" not in other.state[parameter]:
                other.state[parameter]["projector"] = other._initialize_projector(
                    other.param_groups[0], other.state[parameter]
                )
            projector = other.state[parameter]["projector"]
            projector.get_orthogonal_matrix = lambda *_, made=made, **__: made
        for group in mine.param_groups:
            group["eps"] = eps / (1 - beta2**step) ** 0.5
        take(mine, ours, grads)
        take(other, theirs, grads)
        for a, b, before in zip(ours, theirs, start, strict=True):
            torch.testing.assert_close(a - before, b - before, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("dtype", "state_dtype"), [(torch.float32, "float32"), (torch.bfloat16, "8bit")])
def test_a_resumed_run_and_updates_during_backward_change_nothing(dtype, state_dtype):
    """Bit for bit, over a refresh, with experts, and with rounded weights."""
    options = {"method": "random", "scaled_by": "channel", "refresh_every": 3, "lr": 0.01, "weight_decay": 0.1}
    options |= {"state_dtype": state_dtype}

    def start(**more):
        model = make(dtype=dtype, experts=2)
        return model, LowRankAdamW(low_rank_groups(model, 4), **options, **more)

    (whole, plain), (resumed, first), (released, early) = start(), start(), start(gradients="update")
    train(whole, plain, 8)
    train(released, early, 8)
    train(resumed, first, 4)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    _, second = start()
    second = LowRankAdamW(low_rank_groups(resumed, 4), **options)
    second.load_state_dict(torch.load(file, weights_only=True))
    train(resumed, second, 4, start=4)
    assert same(whole, resumed)
    assert same(whole, released)


def test_the_limiter_lets_an_update_grow_by_a_hundredth():
    """Adam's uncorrected direction for a gradient that stays grows by a third from the first step to the second."""
    W = nn.Parameter(torch.zeros(6, 4, dtype=torch.float64))
    optimizer = LowRankAdamW([{"params": [W], "rank": 1}], lr=1.0, scaled_by="tensor", method="random")
    G, lengths = torch.ones(6, 4, dtype=torch.float64), []
    for step in range(1, 21):
        before = W.detach().clone()
        take(optimizer, [W], [G])
        lengths.append((W - before).norm().item() * (1 - 0.9**step) / (1 - 0.999**step) ** 0.5)
    np.testing.assert_allclose(np.array(lengths[1:]) / np.array(lengths[:-1]), 1.01, rtol=1e-6)


@pytest.mark.parametrize("in_group", [False, True])
def test_what_is_not_named_is_what_the_method_takes(in_group):
    for by, method, scale in ((None, "randomized", 1), ("channel", "random", 1), ("tensor", "random", math.sqrt(128))):
        own = {"scaled_by": by}
        made = LowRankAdamW(groups(parameters(), 1, **(own if in_group else {})), **({} if in_group else own))
        low = next(group for group in made.param_groups if group["rank"])
        assert (low["method"], low["scale"]) == (method, scale)


def test_what_has_no_meaning_is_refused():
    for options, sentence in (
        ({"scaled_by": "row"}, "unknown scaled_by 'row': one of None, channel, tensor"),
        ({"method": "random"}, "not for scaled_by None"),
        ({"method": "random", "scaled_by": "tensor", "moments": "rotate"}, "not for moments 'rotate'"),
        ({"scaled_by": "tensor", "gradients": "project"}, "whole gradient"),
    ):
        with pytest.raises(UsageError, match=sentence):
            LowRankAdamW(groups(parameters()), **options)
    params = parameters()
    optimizer = LowRankAdamW(groups(params), scaled_by="tensor", method="random")
    take(optimizer, params, gradients(1)[0])
    optimizer.param_groups[0]["rank"] = 2
    with pytest.raises(UsageError, match="has moments of rank 4, and its group now has rank 2"):
        take(optimizer, params, gradients(1)[0])
