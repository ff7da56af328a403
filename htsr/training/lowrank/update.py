"""Adam's update of one parameter, low-rank or not: whole or of the part that this process holds."""

from __future__ import annotations

import hashlib
import math
from typing import Any, TypeAlias

import torch
from torch import Tensor

from htsr.training.lowrank import moments, rounding
from htsr.training.lowrank.moments import BLOCK
from htsr.training.lowrank.subspace import add_projected_back, local, projects_right

Group: TypeAlias = dict[str, Any]

PIECE = 2**22  # entries that are updated at a time, so that temporaries stay small beside an embedding


def adam_update(
    R: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, step: int, betas: tuple[float, float], eps: float
) -> Tensor:
    """Adam's direction m̂/(√v̂ + eps) for a gradient R at step 1, 2, …; both moments are updated in place.

    Args:
        R: gradient, of any shape.
        exp_avg: first moment before the step, in the shape and dtype of R; changed.
        exp_avg_sq: second moment, in the same shape and dtype; changed.
        step: number of this step, counted from 1.
        betas: decay rates β₁ and β₂ of the moments.
        eps: number that is added to the corrected root, as in torch.

    Returns:
        The direction, in the shape and dtype of R.

    Examples:
        At the first step it is the sign of the gradient:

        >>> import torch
        >>> from htsr.training.lowrank.update import adam_update
        >>> G = torch.tensor([4.0, -0.5, 0.0])
        >>> adam_update(G, torch.zeros(3), torch.zeros(3), step=1, betas=(0.9, 0.999), eps=1e-8).round(decimals=3)
        tensor([ 1., -1.,  0.])

    Source: Adam (Kingma & Ba, arXiv 1412.6980), algorithm 1.
    """
    beta1, beta2 = betas
    exp_avg.lerp_(R, 1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(R, R, value=1 - beta2)
    denominator = exp_avg_sq.sqrt().div_(math.sqrt(1 - beta2**step)).add_(eps)
    return torch.div(exp_avg, denominator, out=denominator).div_(1 - beta1**step)


def apply_update(parameter: Tensor, state: dict[str, Any], group: Group, R: Tensor, index: int) -> None:
    """One step of one parameter: decay and Adam's direction, projected back where the group has a rank.

    Narrow weights are computed in float32 and rounded once, as the group's ``rounding`` says.

    Args:
        parameter: parameter of any shape, changed; of a DTensor this process's part.
        state: state of the parameter, changed; ``projector`` is there where the group has a rank.
        group: parameter group of `LowRankAdamW`.
        R: gradient: its coordinates, (m, r) or (r, n), where the group has a rank, else in the parameter's shape.
        index: index of the parameter among all of the optimizer, a part of the rounding's seed.
    """
    if "exp_avg" not in state:
        state["step"] = torch.zeros(())
        moments.create(state, R, group["state_dtype"])
    state["step"] += 1
    step, lr, W, G = int(state["step"].item()), float(group["lr"]), local(parameter), local(R)
    keys = moments.keys_of(state, seed_of("moments", group["seed"], index, step))
    if W.dtype in rounding.NARROW:
        _update_narrow(parameter, state, group, G, step, index, keys)
        return
    if group["weight_decay"]:
        W.mul_(1 - lr * group["weight_decay"])
    if group["rank"] is not None:
        direction = _direction(state, group, G, step, keys)
        add_projected_back(parameter, direction.to(W.dtype), state["projector"], -lr * group["scale"])
        return
    for rows in _pieces(W, BLOCK):
        W[rows].add_(_direction(state, group, G, step, keys, rows), alpha=-lr)


def seed_of(*parts: object) -> int:
    """A seed, 63 bits, that is a function of its parts alone.

    Args:
        *parts: plain numbers and strings.

    Examples:
        Neighbouring parts give unrelated seeds, unlike their sum:

        >>> from htsr.training.lowrank.update import seed_of
        >>> seed_of("rounding", 0, 1) == seed_of("rounding", 0, 1)
        True
        >>> seed_of("rounding", 0, 1) == seed_of("rounding", 1, 0)
        False
    """
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest) >> 1


def _update_narrow(
    parameter: Tensor, state: dict[str, Any], group: Group, G: Tensor, step: int, index: int, keys: list[Tensor] | None
) -> None:
    """Update in float32, and round each entry once to the weight's own type; `keys` are of the second moment."""
    how, places = group["rounding"], None
    rounding.create(state, parameter, how)
    if how == "stochastic":
        places = rounding.axis_keys(parameter, seed_of("rounding", group["seed"], index, step))
    W, lr = local(parameter), float(group["lr"])
    low_rank = group["rank"] is not None
    R = P = torch.empty(0)
    if low_rank:
        R, P = _direction(state, group, G, step, keys).float(), local(state["projector"]).float()
    right = projects_right(parameter.shape) if low_rank else False
    for rows in _pieces(W, 1 if low_rank else BLOCK):
        new = rounding.read(W, state, how, rows).mul_(1 - lr * group["weight_decay"])
        if not low_rank:
            new.add_(_direction(state, group, G, step, keys, rows), alpha=-lr)
        elif W.ndim == 3:
            new.baddbmm_(*((R[rows], P[rows].mT) if right else (P[rows], R[rows])), alpha=-lr * group["scale"])
        else:
            new.addmm_(*((R[rows], P.mT) if right else (P[rows], R)), alpha=-lr * group["scale"])
        rounding.write(W, state, how, new, places, rows)


def _direction(
    state: dict[str, Any], group: Group, G: Tensor, step: int, keys: list[Tensor] | None, rows: Any = ...
) -> Tensor:
    """Adam's direction for these rows, whose moments are updated; `keys` round the second."""
    exp_avg, exp_avg_sq = moments.read(state, "exp_avg", rows), moments.read(state, "exp_avg_sq", rows)
    direction = adam_update(G[rows].to(exp_avg.dtype), exp_avg, exp_avg_sq, step, group["betas"], group["eps"])
    moments.write(state, "exp_avg", exp_avg, rows)
    moments.write(state, "exp_avg_sq", exp_avg_sq, rows, keys)
    return direction


def _pieces(W: Tensor, multiple: int) -> list[Any]:
    """Slices of the first axis of about `PIECE` entries, the number of rows in each a multiple of `multiple`."""
    if W.numel() <= PIECE:
        return [...]
    rows = max(PIECE // W[0].numel() // multiple, 1) * multiple
    return [slice(start, start + rows) for start in range(0, W.shape[0], rows)]
