"""Slow, obvious twin of the updates: one parameter after the other, one operation after the other."""

import torch

from htsr.training.lowrank import moments, rounding
from htsr.training.lowrank.subspace import projects_right
from htsr.training.lowrank.update import noise_seed


def step(optimizer):
    """The step of a `LowRankAdamW` with the gradients that its parameters have."""
    with torch.no_grad():
        for one in optimizer._pending():
            one = optimizer._projected(one)
            update(one.parameter, one.state, one.group, one.R, one.number)


def update(W, state, group, R, number):
    if "exp_avg" not in state:
        state["step"] = torch.zeros(())
        moments.create(state, R, group["state_dtype"])
    state["step"] += 1
    t, lr, low_rank = int(state["step"].item()), group["lr"], group["rank"] is not None
    direction = adam(state, R, t, group, moments.keys_of(state, lambda: noise_seed("moments", group, number, t)))
    narrow, how = W.dtype in rounding.NARROW, group["rounding"]
    if narrow:
        rounding.create(state, W, how)
        new = rounding.read([W], [state], how)[0]
    else:
        new = W.clone()
    new = new * (1 - lr * group["weight_decay"])
    if low_rank:
        P = state["projector"].to(new.dtype)
        D = direction.to(new.dtype)
        full = D @ P.mT if projects_right(W.shape) else P @ D
        new = new - lr * group["scale"] * full
    else:
        new = (new - lr * direction).to(new.dtype)
    if narrow:
        keys = None
        if how == "stochastic":
            keys = rounding.axis_keys(W, noise_seed("rounding", group, number, t))
        rounding.write([W], [state], how, new[None], keys)
    else:
        W.copy_(new)


def adam(state, R, t, group, keys):
    """m̂/(√v̂ + eps)."""
    beta1, beta2 = group["betas"]
    m, v = moments.read(state, "exp_avg"), moments.read(state, "exp_avg_sq")
    R = R.to(m.dtype)
    m = m + (1 - beta1) * (R - m)
    v = beta2 * v + (1 - beta2) * R * R
    moments.write(state, "exp_avg", m)
    moments.write(state, "exp_avg_sq", v, keys=keys)
    return m / ((v / (1 - beta2**t)).sqrt() + group["eps"]) / (1 - beta1**t)
