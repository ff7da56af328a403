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
    """Put what a rounding keeps of a narrow parameter into its state where it is missing, and drop another's.

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
    for other, name in STATE.items():
        if other != rounding:
            state.pop(name, None)
        elif name not in state:  # a master of 0 begins as the weight, see `read`
            state[name] = torch.zeros_like(parameter, dtype=torch.float32 if rounding == "master" else None)


def read(W: Tensor, state: dict[str, Any], rounding: Rounding, rows: Any = ...) -> Tensor:
    """The number that a narrow weight stands for, in float32 and memory of its own: what an update is added to.

    Args:
        W: weight of any shape; of a DTensor this process's part.
        state: state of its parameter, from `create`.
        rounding: how its group rounds.
        rows: a slice of the first axis, or all.

    Returns:
        float32 numbers in the shape of these rows.
    """
    wide = W[rows].float()
    if rounding == "kahan":
        wide += local(state["compensation"])[rows]
    elif rounding == "master":
        master = local(state["master"])[rows]
        wide = torch.where(master.to(W.dtype) == W[rows], master, wide)
    return wide


def write(
    W: Tensor, state: dict[str, Any], rounding: Rounding, new: Tensor, keys: list[Tensor] | None = None, rows: Any = ...
) -> None:
    """Store what `read` gave, updated, in a narrow weight and in what its rounding keeps.

    Args:
        W: weight of any shape, changed; of a DTensor this process's part.
        state: state of its parameter, from `create`, changed.
        rounding: how its group rounds.
        new: float32 numbers in the shape of these rows.
        keys: numbers from `axis_keys`, which ``stochastic`` needs.
        rows: a slice of the first axis, or all.

    Examples:
        Four updates of a fifth of a unit in the last place of 1, which is 2⁻⁷:

        >>> import torch
        >>> from htsr.training.lowrank.rounding import create, read, write
        >>> for rounding in ("nearest", "kahan", "master"):
        ...     W, state = torch.ones((), dtype=torch.bfloat16), {}
        ...     create(state, W, rounding)
        ...     for step in range(4):
        ...         write(W, state, rounding, read(W, state, rounding) + 2**-7 / 5)
        ...     print(rounding, W.item(), round(read(W, state, rounding).item(), 4))
        nearest 1.0 1.0
        kahan 1.0078125 1.0062
        master 1.0078125 1.0062
    """
    if rounding == "stochastic":
        assert keys is not None
        W[rows] = stochastically_rounded(new, W.dtype, entry_noise(keys, rows).view(new.shape))
        return
    W[rows] = new
    if rounding == "kahan":
        local(state["compensation"])[rows] = new.sub_(W[rows])
    elif rounding == "master":
        local(state["master"])[rows] = new


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


def axis_keys(tensor: Tensor, seed: int) -> list[Tensor]:
    """Random numbers, one for each index of each axis of a tensor, from which `entry_noise` makes those of its entries.

    Args:
        tensor: tensor of any shape; of a DTensor the keys are those of this process's part.
        seed: seed of the numbers, the same on all processes.

    Returns:
        One int32 vector for each axis, of its length, uniform over all of int32, on the tensor's device; for a scalar
        one number.
    """
    generator = torch.Generator().manual_seed(seed)
    shape = tuple(tensor.shape) or (1,)
    keys = [torch.randint(-(2**31), 2**31, (n,), dtype=torch.int32, generator=generator) for n in shape]
    if is_distributed(tensor):
        from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

        mesh, placements = tensor.device_mesh, tensor.placements  # type: ignore[attr-defined]
        sizes, offsets = compute_local_shape_and_global_offset(tensor.shape, mesh, placements)
        keys = [key[start : start + size] for key, size, start in zip(keys, sizes, offsets, strict=True)]
    return [key.to(tensor.device, non_blocking=True) for key in keys]


def entry_noise(keys: list[Tensor], rows: Any = ...) -> Tensor:
    """Noise of all entries: exactly uniform, and independent for any two of them.

    The sum of an entry's keys has both properties, and goes through a one-to-one mixing of its bits (with the
    multipliers of MurmurHash3's finalizer), which leaves nothing of the sum's structure.

    Args:
        keys: numbers from `axis_keys`, (n_1,), (n_2,) …
        rows: a slice of the first axis, or all.

    Returns:
        (n_1, n_2, …) int32 numbers in [0, 2¹⁶).

    Examples:
        Rows of the noise are the noise of these rows, whichever part of the tensor a process holds:

        >>> import torch
        >>> from htsr.training.lowrank.rounding import axis_keys, entry_noise
        >>> keys = axis_keys(torch.empty(4, 3), seed=0)
        >>> torch.equal(entry_noise(keys)[2:], entry_noise(keys, slice(2, 4)))
        True
    """
    x = keys[0][rows]
    for key in keys[1:]:
        x = x.unsqueeze(-1) + key
    x = x * -2048144789  # int32 wraps
    x ^= (x >> 13).bitwise_and_(0x7FFFF)
    x *= -1028477387
    x >>= 16
    return x.bitwise_and_(0xFFFF)
