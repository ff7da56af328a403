"""Weights in bfloat16 and float16: their updates are computed in float32, and what rounding cuts off need not be lost.

============== ==================================================================== ====================================
`rounding`     what is stored                                                       bytes a weight
============== ==================================================================== ====================================
``nearest``    the nearest number: an update below half a unit in the last place is 0
               lost, at every step
``stochastic`` one of the two neighbours, drawn so that the expectation is exact    0
``kahan``      the nearest number, and in ``compensation`` what that cut off, in    2
               the weight's own dtype
``master``     the nearest number to ``master``, which is the weight in float32     4
============== ==================================================================== ====================================

``kahan`` and ``master`` ride in the optimizer's state of the parameter, sharded like it. Where a weight is not what its
master rounds to, it has been changed from outside (loaded, projected, set to 0), and the master begins anew from it; a
compensation is at most half a unit in the last place of the weight that it was left by, whatever became of that.

Stochastic rounding: between two neighbours of a narrow type a number is rounded up with the probability of its place
between them, so the expectation of what is stored is what was computed: an update of a tenth of a unit in the last
place moves every tenth entry, where rounding to nearest moves none, step after step.

The noise is a function of a seed and of an entry's place in the whole tensor alone: it is the same on every device,
whichever part of the tensor a process holds, and no random state of torch is read or changed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor

from htsr.training.lowrank.subspace import is_distributed, local

Rounding: TypeAlias = Literal["stochastic", "kahan", "master", "nearest"]

ROUNDINGS: tuple[Rounding, ...] = get_args(Rounding)
NARROW = (torch.bfloat16, torch.float16)
_LOOKED_AT = 2**14  # about so many entries of a parameter, evenly spaced, tell what is lost of it
STATE = {"kahan": "compensation", "master": "master"}  # what a rounding keeps for each parameter

_FLOAT16_NORMAL, _FLOAT16_QUANTUM = 2.0**-14, 2.0**-24  # least normal number, distance of those below it


def create(state: dict[str, Any], parameter: Tensor, rounding: Rounding) -> None:
    """Put what a rounding keeps of a narrow parameter into its state where it is missing; `settle` another's before.

    Args:
        state: state of one parameter, changed.
        parameter: parameter of any shape; of a DTensor the state is sharded like it.
        rounding: how its group rounds.

    Examples:
        >>> import torch
        >>> from htsr.training.lowrank.rounding import create
        >>> state = {}
        >>> create(state, torch.ones(3, dtype=torch.bfloat16), "master")
        >>> {name: value.dtype for name, value in state.items()}
        {'master': torch.float32}
    """
    name = STATE.get(rounding)
    if name and name not in state:  # a master of 0 begins as the weight, see `read`
        state[name] = torch.zeros_like(parameter, dtype=torch.float32 if rounding == "master" else None)


def read(weights: list[Tensor], states: list[dict[str, Any]], rounding: Rounding, rows: Any = ...) -> Tensor:
    """The numbers that narrow weights stand for, in float32 and memory of their own: what updates are added to.

    Args:
        weights: B weights of one shape and dtype; of DTensors this process's parts.
        states: states of their parameters, from `create`.
        rounding: how their groups round.
        rows: a slice of the first axis, or all.

    Returns:
        (B, …) float32 numbers, those of each weight in the shape of these rows.
    """
    parts = _parts(weights, rows)
    wide = weights[0].new_empty((len(parts), *parts[0].shape), dtype=torch.float32)
    own = list(wide.unbind(0))
    torch._foreach_copy_(own, parts)
    if rounding == "kahan":
        torch._foreach_add_(own, _parts([local(state["compensation"]) for state in states], rows))
    elif rounding == "master":
        for new, W, master in zip(own, parts, _parts([local(state["master"]) for state in states], rows), strict=True):
            new.copy_(torch.where(master.to(W.dtype) == W, master, new))
    return wide


def write(
    weights: list[Tensor],
    states: list[dict[str, Any]],
    rounding: Rounding,
    new: Tensor,
    keys: list[Tensor] | None = None,
    rows: Any = ...,
) -> None:
    """Store what `read` gave, updated, in narrow weights and in what their rounding keeps.

    Args:
        weights: B weights of one shape and dtype, changed; of DTensors this process's parts.
        states: states of their parameters, from `create`, changed.
        rounding: how their groups round.
        new: (B, …) float32 numbers in the shape of these rows; changed.
        keys: numbers from `axis_keys` for B seeds, (B, n_i) for axis i, which ``stochastic`` needs.
        rows: a slice of the first axis, or all.

    Examples:
        Four updates of a fifth of a unit in the last place of 1, which is 2⁻⁷:

        >>> import torch
        >>> from htsr.training.lowrank.rounding import create, read, write
        >>> for rounding in ("nearest", "kahan", "master"):
        ...     W, state = torch.ones((), dtype=torch.bfloat16), {}
        ...     create(state, W, rounding)
        ...     for step in range(4):
        ...         write([W], [state], rounding, read([W], [state], rounding) + 2**-7 / 5)
        ...     print(rounding, W.item(), round(read([W], [state], rounding).item(), 4))
        nearest 1.0 1.0
        kahan 1.0078125 1.0062
        master 1.0078125 1.0062
    """
    parts = _parts(weights, rows)
    if rounding == "stochastic":
        assert keys is not None
        rounded = stochastically_rounded(new, weights[0].dtype, entry_noise(keys, rows).view(new.shape))
        torch._foreach_copy_(parts, list(rounded.unbind(0)))
        return
    own = list(new.unbind(0))
    torch._foreach_copy_(parts, own)
    if rounding == "kahan":
        torch._foreach_sub_(own, parts)
        new.nan_to_num_(0.0, 0.0, 0.0)  # beyond the largest number the weight is infinite, and nothing is kept of that
    if rounding in STATE:
        torch._foreach_copy_(_parts([local(state[STATE[rounding]]) for state in states], rows), own)


def settle(parameter: Tensor, state: dict[str, Any], seed: int) -> None:
    """Put what a rounding has kept of a narrow parameter into it, rounded stochastically, before its state is dropped.

    To nearest, all would be lost that has not yet moved a weight by half a unit in the last place.

    Args:
        parameter: parameter of any shape, changed.
        state: state of the parameter; what a rounding keeps goes.
        seed: seed of the rounding, the same on all processes.

    Examples:
        >>> import torch
        >>> from htsr.training.lowrank.rounding import create, read, settle, write
        >>> W, state = torch.ones(100_000, dtype=torch.bfloat16), {}
        >>> create(state, W, "kahan")
        >>> write([W], [state], "kahan", read([W], [state], "kahan") + 0.001)
        >>> before = W.float().mean().item()
        >>> settle(W, state, seed=0)
        >>> before, round(W.float().mean().item(), 4), state
        (1.0, 1.001, {})
    """
    for rounding, name in STATE.items():
        if parameter.dtype in NARROW and name in state:
            W = local(parameter)
            new = read([W], [state], rounding)  # type: ignore[arg-type]
            write([W], [state], "stochastic", new, axis_keys(parameter, [seed]))
            del state[name]


def _parts(tensors: list[Tensor], rows: Any) -> list[Tensor]:
    return tensors if rows is ... else [tensor[rows] for tensor in tensors]


def share_lost(parameters: Iterable[Tensor], lr: float) -> float:
    """Share of narrow weights that no update as large as the learning rate changes if it is rounded to nearest.

    Adam's update of a weight is about the learning rate while its gradients agree, and less where they do not.

    Args:
        parameters: parameters of any shape; those in wider dtypes do not count, and of a large one some entries do.
        lr: learning rate.

    Examples:
        Half a unit in the last place is 2⁻⁸ just above 1, and 2⁻⁹ just below:

        >>> import torch
        >>> from htsr.training.lowrank.rounding import share_lost
        >>> share_lost([torch.tensor([1.5, 0.75], dtype=torch.bfloat16)], lr=0.003)
        0.5
    """
    lost = looked_at = 0
    for parameter in parameters:
        if parameter.dtype in NARROW and parameter.numel():
            W = local(parameter.detach()).flatten()
            W = W[:: max(W.numel() // _LOOKED_AT, 1)]
            lost += int(((W.float() - lr).to(W.dtype) == W).sum())
            looked_at += W.numel()
    return lost / max(looked_at, 1)


def stochastically_rounded(x: Tensor, dtype: torch.dtype, noise: Tensor) -> Tensor:
    """Each entry of x as one of its two neighbours in `dtype`, the nearer one with the larger probability.

    With a < x < b neighbours of one sign, b = away from zero, the result is b with probability (x - a)/(b - a), to the
    resolution of the noise, 2⁻¹⁶; a number that `dtype` has stays what it is, and so do NaN and infinities. Beyond the
    largest number of `dtype` it is that number or infinity, as in rounding to nearest.

    Args:
        x: numbers in float32, of any shape.
        dtype: ``torch.bfloat16`` or ``torch.float16``.
        noise: int32 numbers in the same shape, uniform in [0, 2¹⁶): `entry_noise`.

    Returns:
        The rounded numbers, in the same shape and in `dtype`.

    Examples:
        1.001 lies between the bfloat16 numbers 1 and 1 + 2⁻⁷, and becomes the second 0.128 of the time:

        >>> import torch
        >>> from htsr.training.lowrank.rounding import axis_keys, entry_noise, stochastically_rounded
        >>> x = torch.full((100_000,), 1.001)
        >>> rounded = stochastically_rounded(x, torch.bfloat16, entry_noise(axis_keys(x, seed=0)))
        >>> rounded.unique().tolist(), round(rounded.double().mean().item(), 4)
        ([1.0, 1.0078125], 1.001)
        >>> x.bfloat16().unique().tolist()
        [1.0]
    """
    # Noise below the last bit that is kept carries into it with the probability of what is cut off. Neighbouring
    # numbers of one sign have neighbouring bit patterns, across powers of two as well, so integers can be added.
    dropped = 16 if dtype == torch.bfloat16 else 13  # last bits of float32 that dtype lacks
    bits = x.view(torch.int32) + (noise if dropped == 16 else noise >> (16 - dropped))
    rounded = bits.bitwise_and_(-(1 << dropped)).view(torch.float32)
    if dtype == torch.float16:
        # below its normal numbers float16 is equally spaced, which the bits of float32 are not
        small = (noise / 2**16).add_(x, alpha=1 / _FLOAT16_QUANTUM).floor_().mul_(_FLOAT16_QUANTUM)
        rounded = torch.where(x.abs() < _FLOAT16_NORMAL, small, rounded)
    return torch.where(x.isfinite(), rounded, x).to(dtype)


def axis_keys(tensor: Tensor, seed: int | list[int]) -> list[Tensor]:
    """Random numbers, one for each index of each axis of a tensor, from which `entry_noise` makes those of its entries.

    They are the first of the stream that SplitMix64 begins at the seed.

    Args:
        tensor: tensor of any shape; of a DTensor the keys are those of this process's part.
        seed: seed of the numbers, the same on all processes; or seeds of several tensors of this shape.

    Returns:
        One int32 vector for each axis, of its length, uniform over all of int32, on the tensor's device; for a scalar
        one number. For B seeds (B, n_i) of them.

    Source: SplitMix64 (Steele, Lea & Flood, OOPSLA 2014), with the multipliers of its reference implementation.
    """
    shape = tuple(tensor.shape) or (1,)
    begin = torch.tensor(seed, dtype=torch.int64, device="cpu").to(tensor.device, non_blocking=True)
    x = torch.arange(1, sum(shape) + 1, device=tensor.device) * -0x61C8864680B583EB + begin.unsqueeze(-1)  # int64 wraps
    x ^= (x >> 30).bitwise_and_((1 << 34) - 1)  # a shift without the sign
    x *= -0x40A7B892E31B1A47
    x ^= (x >> 27).bitwise_and_((1 << 37) - 1)
    x *= -0x6B2FB644ECCEEE15
    x ^= (x >> 31).bitwise_and_((1 << 33) - 1)
    keys = list(torch.split((x >> 32).to(torch.int32), list(shape), -1))
    if is_distributed(tensor):
        from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

        mesh, placements = tensor.device_mesh, tensor.placements  # type: ignore[attr-defined]
        sizes, offsets = compute_local_shape_and_global_offset(tensor.shape, mesh, placements)
        keys = [key[..., start : start + size] for key, size, start in zip(keys, sizes, offsets, strict=True)]
    return keys


def entry_noise(keys: list[Tensor], rows: Any = ...) -> Tensor:
    """Noise of all entries: exactly uniform, and independent for any two of them.

    The sum of an entry's keys has both properties, and goes through a one-to-one mixing of its bits (with the
    multipliers of MurmurHash3's finalizer), which leaves nothing of the sum's structure.

    Args:
        keys: numbers from `axis_keys`, (n_1,), (n_2,) …, or (B, n_1), (B, n_2) …
        rows: a slice of the first axis, or all.

    Returns:
        (n_1, n_2, …) or (B, n_1, n_2, …) int32 numbers in [0, 2¹⁶).

    Examples:
        Rows of the noise are the noise of these rows, whichever part of the tensor a process holds:

        >>> import torch
        >>> from htsr.training.lowrank.rounding import axis_keys, entry_noise
        >>> keys = axis_keys(torch.empty(4, 3), seed=0)
        >>> torch.equal(entry_noise(keys)[2:], entry_noise(keys, slice(2, 4)))
        True
    """
    x = _mixed(keys, rows)
    x >>= 16
    return x.bitwise_and_(0xFFFF)


def entry_normals(keys: list[Tensor]) -> Tensor:
    """Standard normal numbers for all entries, by Box and Muller from 32 bits each: none is beyond ±4.9.

    Args:
        keys: numbers from `axis_keys`, (n_1,), (n_2,) …

    Returns:
        (n_1, n_2, …) float32 numbers. Devices agree in all but the last bits.

    Examples:
        >>> import torch
        >>> from htsr.training.lowrank.rounding import axis_keys, entry_normals
        >>> x = entry_normals(axis_keys(torch.empty(1000, 100), seed=0))
        >>> round((x.abs() < 1).float().mean().item(), 2), round(x.std().item(), 2)
        (0.68, 1.0)
    """
    x = _mixed(keys)
    x ^= (x >> 16).bitwise_and_(0xFFFF)
    radius, angle = (x >> 16).bitwise_and_(0xFFFF).float(), x.bitwise_and_(0xFFFF).float()
    return radius.add_(0.5).div_(2**16).log_().mul_(-2).sqrt_().mul_(angle.mul_(math.tau / 2**16).cos_())


def _mixed(keys: list[Tensor], rows: Any = ...) -> Tensor:
    """int32 numbers of all entries, whose bits are mixed but for the last step of the finalizer."""
    x = keys[0] if rows is ... else keys[0][..., rows]
    for axis, key in enumerate(keys[1:], 1):
        x = x.unsqueeze(-1) + key.view(*key.shape[:-1], *[1] * axis, key.shape[-1])
    x = x * -2048144789  # int32 wraps
    x ^= (x >> 13).bitwise_and_(0x7FFFF)
    x *= -1028477387
    return x
