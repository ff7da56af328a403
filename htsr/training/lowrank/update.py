"""Adam's update of many parameters together, low-rank or not: whole or of the part that this process holds.

Parameters that agree in device, dtypes, betas and eps go through each operation in one call (``torch._foreach_*``), at
most `PIECE` entries of gradients at a time; learning rate, decay, scale and step may differ between them.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple, Self, TypeAlias

import torch
from torch import Tensor

from htsr.training.lowrank import moments, rounding
from htsr.training.lowrank.moments import BLOCK
from htsr.training.lowrank.subspace import add_projected_back, local, projects_right

Group: TypeAlias = dict[str, Any]

PIECE = 2**22  # entries that are updated at a time, so that temporaries stay small beside an embedding


class Constants(NamedTuple):
    """The numbers of a group, as floats: a tensor on a device is read once a step."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    scale: float

    @classmethod
    def of(cls, group: Group) -> Self:
        """Those of a parameter group.

        Args:
            group: parameter group of `LowRankAdamW`.
        """
        names = ("eps", "weight_decay", "scale")
        return cls(float(group["lr"]), *map(float, group["betas"]), *(float(group[name]) for name in names))


class Pending(NamedTuple):
    """A parameter that is about to be updated.

    Attributes:
        parameter: parameter of any shape.
        state: state of the parameter; ``projector`` is there where the group has a rank.
        group: parameter group of `LowRankAdamW`.
        constants: the group's numbers.
        number: number of the parameter among all of the optimizer, a part of the seeds.
        done: number of steps that the parameter has made.
        R: gradient: its coordinates, (m, r) or (r, n), where the group has a rank, else in the parameter's shape. Of a
            parameter that is yet to be projected it is the whole gradient.
    """

    parameter: Tensor
    state: dict[str, Any]
    group: Group
    constants: Constants
    number: int
    done: int
    R: Tensor


def in_batches(pending: Iterable[Pending]) -> Iterator[list[Pending]]:
    """Those that `update` can take together, with at most `PIECE` entries of gradients, or one larger gradient.

    Args:
        pending: parameters in any order. They are taken one by one, so gradients may be projected as late as then.

    Yields:
        Each parameter once. Those of one batch agree in device, dtypes, betas and eps, and in whether they have a rank.
    """
    waiting: dict[Any, tuple[list[Pending], int]] = {}
    for one in pending:
        R, group, constants = one.R, one.group, one.constants
        adam = (constants.beta1, constants.beta2, constants.eps)
        key = (one.parameter.dtype, R.dtype, R.device, group["rank"] is None, adam)
        batch, entries = waiting.pop(key, ([], 0))
        if batch and entries + R.numel() > PIECE:
            yield batch
            batch, entries = [], 0
        batch.append(one)
        entries += R.numel()
        if entries < PIECE:
            waiting[key] = batch, entries
        else:
            yield batch
    for batch, _ in waiting.values():
        yield batch


def update(batch: list[Pending]) -> None:
    """One step of some parameters: decay and Adam's direction, projected back where their groups have a rank.

    Without a rank, and in float32 or float64, it is torch.optim.AdamW's. Narrow weights are computed in float32 and
    rounded once, as their group's ``rounding`` says.

    Args:
        batch: parameters that agree as those of `in_batches` do; they and their states are changed.

    Examples:
        >>> import torch
        >>> from htsr.training.lowrank.update import Constants, Pending, update
        >>> W, state = torch.ones(2), {}
        >>> constants = Constants(lr=0.1, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.0, scale=0.25)
        >>> group = {"rank": None, "state_dtype": "float32"}
        >>> update([Pending(W, state, group, constants, number=0, done=0, R=torch.tensor([4.0, -0.5]))])
        >>> W, state["step"].item()
        (tensor([0.9000, 1.1000]), 1.0)
    """
    for one in batch:
        if "exp_avg" not in one.state:
            one.state["step"] = torch.zeros(())
            moments.create(one.state, one.R, one.group["state_dtype"])
    # a tensor, since a number would be made one for each counter
    torch._foreach_add_([one.state["step"] for one in batch], torch.ones(()), alpha=1.0)
    steps = [one.done + 1 for one in batch]
    (_update_full if batch[0].group["rank"] is None else _update_low_rank)(batch, steps)


def adam_denominators(
    R: list[Tensor],
    exp_avg: list[Tensor],
    exp_avg_sq: list[Tensor],
    steps: list[int],
    betas: tuple[float, float],
    eps: float,
) -> list[Tensor]:
    """Adam's moments after gradients R, in place, and √v̂ + eps: the direction is ``exp_avg``/(1 - β₁ᵗ) divided by it.

    Args:
        R: gradients, of any shapes.
        exp_avg: first moments before the step, in the shapes and dtypes of R; changed.
        exp_avg_sq: second moments, in the same shapes and dtypes; changed.
        steps: number t of this step for each gradient, counted from 1.
        betas: decay rates β₁ and β₂ of the moments.
        eps: number that is added to the corrected root, as in torch.

    Returns:
        The denominators, in the shapes and dtypes of R.

    Examples:
        At the first step the direction is the sign of the gradient:

        >>> import torch
        >>> from htsr.training.lowrank.update import adam_denominators
        >>> G, m, v = torch.tensor([4.0, -0.5, 0.0]), torch.zeros(3), torch.zeros(3)
        >>> (denominator,) = adam_denominators([G], [m], [v], [1], betas=(0.9, 0.999), eps=1e-8)
        >>> (m / (1 - 0.9) / denominator).round(decimals=3)
        tensor([ 1., -1.,  0.])

    Source: Adam (Kingma & Ba, arXiv 1412.6980), algorithm 1.
    """
    beta1, beta2 = betas
    torch._foreach_lerp_(exp_avg, R, 1 - beta1)
    torch._foreach_mul_(exp_avg_sq, beta2)
    torch._foreach_addcmul_(exp_avg_sq, R, R, 1 - beta2)
    denominators = list(torch._foreach_sqrt(exp_avg_sq))
    torch._foreach_div_(denominators, [math.sqrt(1 - beta2**step) for step in steps])
    torch._foreach_add_(denominators, eps)
    return denominators


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


def _update_full(batch: list[Pending], steps: list[int]) -> None:
    sizes, keys, moment_keys = _step_sizes(batch, steps), _noise_keys(batch, steps), _moment_keys(batch, steps)
    for rows in _pieces(local(batch[0].parameter), BLOCK) if len(batch) == 1 else [...]:
        exp_avg, denominators = _adam(batch, steps, moment_keys, rows)
        W = [_part(one.parameter, rows) if keys is None else _wide(one, rows) for one in batch]
        if any(one.constants.weight_decay for one in batch):
            torch._foreach_mul_(W, [_kept(one) for one in batch])
        torch._foreach_addcdiv_(W, exp_avg, denominators, sizes)
        if keys is not None:
            for one, new, own in zip(batch, W, keys, strict=True):
                _round(one, new, own, rows)


def _update_low_rank(batch: list[Pending], steps: list[int]) -> None:
    exp_avg, denominators = _adam(batch, steps, _moment_keys(batch, steps))
    sizes, keys = _step_sizes(batch, steps), _noise_keys(batch, steps)
    for i, (one, m, d) in enumerate(zip(batch, exp_avg, denominators, strict=True)):
        D, kept, factor = torch.div(m, d, out=d), _kept(one), sizes[i] * one.constants.scale
        W, P, right = local(one.parameter), local(one.state["projector"]), projects_right(one.parameter.shape)
        if keys is not None:
            _add_rounded(one, D.float(), P.float(), right, kept, factor, keys[i])
        else:
            add_projected_back(W, D if D.dtype == W.dtype else D.to(W.dtype), P, right, kept, factor)


def _add_rounded(
    one: Pending, D: Tensor, P: Tensor, right: bool, kept: float, factor: float, keys: list[Tensor] | None
) -> None:
    """What `add_projected_back` does, in float32 and rows at a time, to weights that are rounded."""
    stacked = D.ndim == 3
    for rows in _pieces(local(one.parameter), 1):
        new = _wide(one, rows)
        R = D[rows] if right or stacked else D
        add_projected_back(new, R, P if right and not stacked else P[rows], right, kept, factor)
        _round(one, new, keys, rows)


def _wide(one: Pending, rows: Any) -> Tensor:
    """These rows of a narrow weight in float32, to be updated."""
    return rounding.read(local(one.parameter), one.state, one.group["rounding"], rows)


def _round(one: Pending, new: Tensor, keys: list[Tensor] | None, rows: Any) -> None:
    rounding.write(local(one.parameter), one.state, one.group["rounding"], new, keys, rows)


def _adam(
    batch: list[Pending], steps: list[int], keys: list[list[Tensor] | None], rows: Any = ...
) -> tuple[list[Tensor], list[Tensor]]:
    """First moments after the step and Adam's denominators, for these rows; `keys` round the second moments."""
    states, constants = [one.state for one in batch], batch[0].constants
    exp_avg = [moments.read(state, "exp_avg", rows) for state in states]
    exp_avg_sq = [moments.read(state, "exp_avg_sq", rows) for state in states]
    R = [_part(one.R, rows) for one in batch]
    R = [G if G.dtype == m.dtype else G.to(m.dtype) for G, m in zip(R, exp_avg, strict=True)]
    betas = constants.beta1, constants.beta2
    denominators = adam_denominators(R, exp_avg, exp_avg_sq, steps, betas, constants.eps)
    for state, m, v, own in zip(states, exp_avg, exp_avg_sq, keys, strict=True):
        if m.dtype != state["exp_avg"].dtype:  # read into memory of its own
            moments.write(state, "exp_avg", m, rows)
            moments.write(state, "exp_avg_sq", v, rows, own)
    return exp_avg, denominators


def _moment_keys(batch: list[Pending], steps: list[int]) -> list[list[Tensor] | None]:
    """The keys of the noise that rounds second moments, where these need it."""
    return [
        None
        if one.state["exp_avg_sq"].dtype != torch.bfloat16
        else moments.keys_of(one.state, seed_of("moments", one.group["seed"], one.number, step))
        for one, step in zip(batch, steps, strict=True)
    ]


def _noise_keys(batch: list[Pending], steps: list[int]) -> list[list[Tensor] | None] | None:
    """None for wide weights. Else what their roundings keep is made, and the keys of the noise of stochastic ones."""
    if batch[0].parameter.dtype not in rounding.NARROW:
        return None
    keys = list[list[Tensor] | None]()
    for one, step in zip(batch, steps, strict=True):
        how = one.group["rounding"]
        rounding.create(one.state, one.parameter, how)
        seed = seed_of("rounding", one.group["seed"], one.number, step)
        keys.append(rounding.axis_keys(one.parameter, seed) if how == "stochastic" else None)
    return keys


def _step_sizes(batch: list[Pending], steps: list[int]) -> list[float]:
    """-lr/(1 - β₁ᵗ), with the operations of torch.optim.AdamW."""
    return [one.constants.lr / (1 - one.constants.beta1**step) * -1 for one, step in zip(batch, steps, strict=True)]


def _kept(one: Pending) -> float:
    return 1 - one.constants.lr * one.constants.weight_decay


def _part(tensor: Tensor, rows: Any) -> Tensor:
    """These rows of what this process holds of a tensor."""
    return local(tensor) if rows is ... else local(tensor)[rows]


def _pieces(W: Tensor, multiple: int) -> list[Any]:
    """Slices of the first axis of about `PIECE` entries, the number of rows in each a multiple of `multiple`."""
    if W.numel() <= PIECE:
        return [...]
    rows = max(PIECE // W[0].numel() // multiple, 1) * multiple
    return [slice(start, start + rows) for start in range(0, W.shape[0], rows)]
