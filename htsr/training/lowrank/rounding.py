"""Stochastic rounding of weights to bfloat16 and float16.

Between two neighbours of a narrow type a number is rounded up with the probability of its place between them, so the
expectation of what is stored is what was computed: an update of a tenth of a unit in the last place moves every tenth
entry, where rounding to nearest moves none, step after step.

The noise is a function of a seed and of an entry's place in the whole tensor alone: it is the same on every device,
whichever part of the tensor a process holds, and no random state of torch is read or changed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from htsr.training.lowrank.subspace import is_distributed

NARROW = (torch.bfloat16, torch.float16)

_FLOAT16_NORMAL, _FLOAT16_QUANTUM = 2.0**-14, 2.0**-24  # least normal number, distance of those below it


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
    bits = x.view(torch.int32) + (noise >> (16 - dropped))
    rounded = bits.bitwise_and_(-(1 << dropped)).view(torch.float32)
    if dtype == torch.float16:
        # below its normal numbers float16 is equally spaced, which the bits of float32 are not
        small = (x / _FLOAT16_QUANTUM + noise / 2**16).floor_().mul_(_FLOAT16_QUANTUM)
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
    return (x >> 16).bitwise_and_(0xFFFF)
