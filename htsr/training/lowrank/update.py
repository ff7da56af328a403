"""Adam's update of many parameters together, low-rank or not: whole or of the part that this process holds.

Parameters that agree in device, dtypes, betas and eps go through each operation in one call (``torch._foreach_*``), at
most `BATCH` entries of gradients at a time; learning rate, decay, scale and step may differ between them.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple, Self, TypeAlias

import torch
from torch import Tensor

from htsr.training import adam
from htsr.training.lowrank import moments, rounding
from htsr.training.lowrank.moments import BLOCK
from htsr.training.lowrank.scaling import limited, scaling
from htsr.training.lowrank.subspace import add_projected_back, local, projects_right

Group: TypeAlias = dict[str, Any]

PIECE = 2**22  # entries that are updated at a time, so that temporaries stay small beside an embedding
BATCH = 2**20  # entries of gradients of several parameters that are taken together; more leave a processor's cache
STACK = 2**18  # entries of narrow weights of one shape that are rounded together; with more, calls cost nothing


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
        beta1, beta2 = group["betas"]
        lr, eps, decay, scale = group["lr"], group["eps"], group["weight_decay"], group["scale"]
        return cls(float(lr), float(beta1), float(beta2), float(eps), float(decay), float(scale))


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
        G: whole gradient beside its coordinates, where the group scales it; else None.
    """

    parameter: Tensor
    state: dict[str, Any]
    group: Group
    constants: Constants
    number: int
    done: int
    R: Tensor
    G: Tensor | None = None


def in_batches(pending: Iterable[Pending]) -> Iterator[list[Pending]]:
    """Those that `update` can take together, with at most `BATCH` entries of gradients, or one larger gradient.

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
        if batch and entries + R.numel() > BATCH:
            yield batch
            batch, entries = [], 0
        batch.append(one)
        entries += R.numel()
        if entries < BATCH:
            waiting[key] = batch, entries
        else:
            yield batch
    for batch, _ in waiting.values():
        yield batch


def update(batch: list[Pending]) -> None:
    """One step of some parameters: decay and Adam's direction, projected back or scaled where their groups have a rank.

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
            one.state["step"] = torch.zeros((), device="cpu")
            moments.create(one.state, one.R, one.group["state_dtype"])
    adam.count([one.state["step"] for one in batch])
    steps = [one.done + 1 for one in batch]
    (_update_full if batch[0].group["rank"] is None else _update_low_rank)(batch, steps)


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


def noise_seed(kind: str, group: Group, number: int, step: int) -> int:
    """The seed of one parameter's noise at one of its steps.

    Steps begin anew where a state is dropped, so the drops are a part of it: the same noise in each life of a state
    would round the same entries up every time, and others never.

    Args:
        kind: what the noise is for.
        group: parameter group of `LowRankAdamW`, with its ``seed`` and ``drops``.
        number: number of the parameter among all of the optimizer.
        step: steps that its state has made.
    """
    return seed_of(kind, group["seed"], number, group["drops"], step)


def _update_full(batch: list[Pending], steps: list[int]) -> None:
    sizes, moment_keys, narrow = _step_sizes(batch, steps), _moment_keys(batch, steps), _narrow(batch, steps)
    for rows in _pieces(local(batch[0].parameter), BLOCK) if len(batch) == 1 else [...]:
        _update_rows(batch, steps, sizes, moment_keys, narrow, rows)


def _update_rows(
    batch: list[Pending],
    steps: list[int],
    sizes: list[float],
    moment_keys: list[list[Tensor] | None],
    narrow: list[_Narrow],
    rows: Any,
) -> None:
    """A function, so that the temporaries of some rows are gone before those of the next are made."""
    exp_avg, denominators = _adam(batch, steps, moment_keys, rows)
    for some in narrow:
        _add_full_narrow(some, batch, exp_avg, denominators, sizes, rows)
    if not narrow:
        _add_full([_part(one.parameter, rows) for one in batch], batch, exp_avg, denominators, sizes)


def _add_full_narrow(
    some: _Narrow,
    batch: list[Pending],
    exp_avg: list[Tensor],
    denominators: list[Tensor],
    sizes: list[float],
    rows: Any,
) -> None:
    wide = some.read(rows)
    values = zip(*((batch[i], exp_avg[i], denominators[i], sizes[i]) for i in some.places), strict=True)
    _add_full(list(wide.unbind(0)), *map(list, values))  # type: ignore[arg-type]
    some.write(wide, rows)


def _add_full(
    W: list[Tensor], batch: list[Pending], exp_avg: list[Tensor], denominators: list[Tensor], sizes: list[float]
) -> None:
    """W ← (1 - lr·weight_decay)·W + size·exp_avg/denominator, with the operations of torch.optim.AdamW."""
    if any(one.constants.weight_decay for one in batch):
        torch._foreach_mul_(W, [_kept(one) for one in batch])
    torch._foreach_addcdiv_(W, exp_avg, denominators, sizes)


def _update_low_rank(batch: list[Pending], steps: list[int]) -> None:
    exp_avg, denominators = _adam(batch, steps, _moment_keys(batch, steps))
    directions = [torch.div(m, d, out=d) for m, d in zip(exp_avg, denominators, strict=True)]
    for i, (one, step) in enumerate(zip(batch, steps, strict=True)):
        if one.G is not None:
            lengths = scaling(one.G, one.R, directions[i], one.group["scaled_by"])
            directions[i] = limited(one.state, one.G, lengths, (1 - one.constants.beta2**step) ** 0.5)
    sizes = _step_sizes(batch, steps)
    factors = [size * one.constants.scale for one, size in zip(batch, sizes, strict=True)]
    add_directions(batch, steps, directions, factors)


def add_directions(batch: list[Pending], steps: list[int], directions: list[Tensor], factors: list[float]) -> None:
    """W ← (1 - lr·weight_decay)·W + factor·D of each parameter, D projected back where it is in a subspace.

    Where a group scales whole gradients, what is added is factor·D·G.

    Narrow weights are computed in float32 and rounded once, as their group's ``rounding`` says.

    Args:
        batch: parameters that agree as those of `in_batches` do; they, and what their roundings keep, are changed.
        steps: number of this step for each of them, counted from 1.
        directions: D of each, in the shape of this process's part of its R; or factors of its G, from `scaling`.
        factors: factor of each.
    """
    narrow = _narrow(batch, steps)
    for some in narrow:
        for rows in _pieces(local(batch[some.places[0]].parameter), 1) if len(some.places) == 1 else [...]:
            _add_narrow(some, batch, directions, factors, rows)
    if not narrow:
        for one, D, factor in zip(batch, directions, factors, strict=True):
            _add(one, local(one.parameter), D, factor)


def _add_narrow(some: _Narrow, batch: list[Pending], directions: list[Tensor], factors: list[float], rows: Any) -> None:
    """A function for the reason of `_update_rows`."""
    wide = some.read(rows)
    for i, W in zip(some.places, wide.unbind(0), strict=True):
        _add(batch[i], W, directions[i], factors[i], rows)
    some.write(wide, rows)


def _add(one: Pending, W: Tensor, D: Tensor, factor: float, rows: Any = ...) -> None:
    """W ← (1 - lr·weight_decay)·W + factor·D, projected back or times G, for these rows of both."""
    if one.G is not None:
        D = D.mul(factor).to(W.dtype)
        W.mul_(_kept(one)).addcmul_(_part(one.G, rows).to(W.dtype), D if rows is ... or len(D) == 1 else D[rows])
        return
    if one.group["rank"] is None:
        W.mul_(_kept(one)).add_(D if rows is ... else D[rows], alpha=factor)
        return
    right, P = projects_right(one.parameter.shape), local(one.state["projector"])
    if rows is not ...:
        D = D[rows] if right or D.ndim == 3 else D
        P = P if right and P.ndim == 2 else P[rows]
    if D.dtype != W.dtype:
        D = D.to(W.dtype)
    add_projected_back(W, D, P if P.dtype == W.dtype else P.to(W.dtype), right, _kept(one), factor)


def _adam(
    batch: list[Pending], steps: list[int], keys: list[list[Tensor] | None], rows: Any = ...
) -> tuple[list[Tensor], list[Tensor]]:
    """First moments after the step and Adam's denominators, for these rows; `keys` round the second moments."""
    states, constants = [one.state for one in batch], batch[0].constants
    exp_avg = [moments.read(state, "exp_avg", rows) for state in states]
    exp_avg_sq = [moments.read(state, "exp_avg_sq", rows) for state in states]
    R = [_part(one.R, rows) for one in batch]
    R = [G if G.dtype == m.dtype else G.to(m.dtype) for G, m in zip(R, exp_avg, strict=True)]
    adam.advance(exp_avg, exp_avg_sq, R, constants.beta1, constants.beta2)
    denominators = adam.denominators(exp_avg_sq, steps, constants.beta2, constants.eps)
    for state, m, v, own in zip(states, exp_avg, exp_avg_sq, keys, strict=True):
        if m.dtype != state["exp_avg"].dtype:  # read into memory of its own
            moments.write(state, "exp_avg", m, rows)
            moments.write(state, "exp_avg_sq", v, rows, own)
    return exp_avg, denominators


def _moment_keys(batch: list[Pending], steps: list[int]) -> list[list[Tensor] | None]:
    """The keys of the noise that rounds second moments, where these need it."""
    return [
        moments.keys_of(one.state, partial(noise_seed, "moments", one.group, one.number, step))
        for one, step in zip(batch, steps, strict=True)
    ]


class _Narrow(NamedTuple):
    """Weights of one shape and rounding in a batch: those at `places`."""

    places: list[int]
    weights: list[Tensor]
    states: list[dict[str, Any]]
    how: rounding.Rounding
    keys: list[Tensor] | None

    def read(self, rows: Any) -> Tensor:
        return rounding.read(self.weights, self.states, self.how, rows)

    def write(self, new: Tensor, rows: Any) -> None:
        rounding.write(self.weights, self.states, self.how, new, self.keys, rows)


def _narrow(batch: list[Pending], steps: list[int]) -> list[_Narrow]:
    """The weights of a batch by shape and rounding, at most `STACK` entries or one weight each; none if they are wide.

    What their roundings keep is in their states then.
    """
    if batch[0].parameter.dtype not in rounding.NARROW:
        return []
    alike = defaultdict[Any, list[int]](list)
    for place, one in enumerate(batch):
        how = one.group["rounding"]
        if any(name in one.state for other, name in rounding.STATE.items() if other != how):  # it was changed
            seed = noise_seed("settled", one.group, one.number, steps[place])
            rounding.settle(one.parameter, one.state, seed)
        rounding.create(one.state, one.parameter, how)
        alike[one.parameter.shape, how].append(place)
    found = []
    for (_, how), places in alike.items():
        each = max(STACK // max(local(batch[places[0]].parameter).numel(), 1), 1)
        for some in (places[i : i + each] for i in range(0, len(places), each)):
            keys = None
            if how == "stochastic":
                seeds = [noise_seed("rounding", batch[i].group, batch[i].number, steps[i]) for i in some]
                keys = rounding.axis_keys(batch[some[0]].parameter, seeds)
            weights, states = [local(batch[i].parameter) for i in some], [batch[i].state for i in some]
            found.append(_Narrow(some, weights, states, how, keys))
    return found


def _step_sizes(batch: list[Pending], steps: list[int]) -> list[float]:
    return adam.step_sizes([one.constants.lr for one in batch], steps, batch[0].constants.beta1)


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
