"""Adam's moments in the optimizer state: float32, bfloat16, or 8 bits in blocks of 256 (bitsandbytes).

In bfloat16 the second moment is rounded stochastically. To nearest it would never decay: a thousandth of it, 1 - β₂, is
less than half a unit in the last place, so that steps would stay as small as the largest gradients have made them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from htsr.errors import MissingDependencyError, UsageError
from htsr.training.lowrank.rounding import axis_keys, entry_noise, stochastically_rounded
from htsr.training.lowrank.subspace import is_distributed, local

StateDtype: TypeAlias = Literal["float32", "bfloat16", "8bit"]

STATE_DTYPES = ("float32", "bfloat16", "8bit")
BLOCK = 256  # entries that share a scale
_SIGNED = {"exp_avg": True, "exp_avg_sq": False}


def create(state: dict[str, Any], like: Tensor, dtype: StateDtype, second: bool = True) -> None:
    """Put zero moments for a gradient into its state; they are sharded like it.

    Where float32 is asked, the moments of a float64 gradient are float64.

    Args:
        state: state of one parameter; ``exp_avg``, ``exp_avg_sq`` and, in 8 bits, their ``_scale`` are put into it.
        like: the gradient, of any shape.
        dtype: ``float32``, ``bfloat16`` or ``8bit``.
        second: whether there is a second moment; Muon has none.

    Raises:
        UsageError: a sharded gradient is to have moments in 8 bits.
        MissingDependencyError: bitsandbytes, which 8 bits need, is not installed.
    """
    for name in _SIGNED if second else ("exp_avg",):
        if dtype == "8bit":
            if is_distributed(like):
                raise UsageError("8-bit states of sharded parameters are not supported; take state_dtype bfloat16")
            zeros = torch.zeros(like.shape, dtype=torch.float32, device=like.device)
            state[name] = torch.zeros(like.shape, dtype=torch.uint8, device=like.device)
            state[f"{name}_scale"] = torch.zeros(-(-like.numel() // BLOCK), device=like.device)
            write(state, name, zeros)
        else:
            wide = torch.promote_types(like.dtype, torch.float32)
            state[name] = torch.zeros_like(like, dtype=torch.bfloat16 if dtype == "bfloat16" else wide)


def read(state: dict[str, Any], name: str, rows: Any = ...) -> Tensor:
    """A moment in float32 (or float64); of a DTensor, this process's part.

    It lies in the state's own memory where that has this dtype, and need not be written back.

    Args:
        state: state of one parameter, from `create`.
        name: ``exp_avg`` or ``exp_avg_sq``.
        rows: all rows, or a slice of the first axis that begins at a multiple of 256.

    Returns:
        The moment in the shape of the gradient, or of these rows of it.

    Raises:
        MissingDependencyError: bitsandbytes, which 8 bits need, is not installed.

    Examples:
        >>> import torch
        >>> from htsr.training.lowrank.moments import create, read, write
        >>> state = {}
        >>> create(state, torch.zeros(2, 2), "bfloat16")
        >>> write(state, "exp_avg", torch.full((2, 2), 0.5))
        >>> state["exp_avg"].dtype, read(state, "exp_avg").dtype
        (torch.bfloat16, torch.float32)
    """
    moment = local(state[name])
    if moment.dtype == torch.float32 and rows is ...:
        return moment
    if moment.dtype == torch.uint8:
        code = _code(_SIGNED[name], moment.device)
        scale = state[f"{name}_scale"][_blocks(moment, rows)]
        return _bitsandbytes().dequantize_blockwise(  # type: ignore[no-any-return]
            moment[rows], absmax=scale, code=code, blocksize=BLOCK
        )
    return moment[rows].float() if moment.dtype == torch.bfloat16 else moment[rows]


def keys_of(state: dict[str, Any], seed: Callable[[], int]) -> list[Tensor] | None:
    """Random numbers that `write` needs to round the second moment, (n_i,) for axis i; None where its dtype needs none.

    Args:
        state: state of one parameter, from `create`.
        seed: function that gives the seed of the numbers, another at each step, the same on all processes.
    """
    moment = state["exp_avg_sq"]
    return axis_keys(moment, seed()) if moment.dtype == torch.bfloat16 else None


def write(state: dict[str, Any], name: str, value: Tensor, rows: Any = ..., keys: list[Tensor] | None = None) -> None:
    """Store a moment, or rows of it, in the dtype that its state has.

    Args:
        state: state of one parameter, from `create`.
        name: ``exp_avg`` or ``exp_avg_sq``.
        value: moment in float32 or float64, in the shape that `read` gives.
        rows: rows that were given to `read`.
        keys: numbers from `keys_of`, (n_i,) for axis i, for a second moment; without them it is rounded to nearest.

    Raises:
        MissingDependencyError: bitsandbytes, which 8 bits need, is not installed.
    """
    moment = local(state[name])
    if moment.dtype == torch.uint8:
        code = _code(_SIGNED[name], moment.device)
        quantised, how = _bitsandbytes().quantize_blockwise(value.contiguous(), code=code, blocksize=BLOCK)
        moment[rows] = quantised
        state[f"{name}_scale"][_blocks(moment, rows)] = how.absmax
    elif keys is not None:
        moment[rows] = stochastically_rounded(value, moment.dtype, entry_noise(keys, rows).view(value.shape))
    else:
        moment[rows] = value


def _blocks(moment: Tensor, rows: Any) -> Any:
    """The blocks of these rows; blocks run over the flattened tensor."""
    if rows is ...:
        return rows
    width = moment[0].numel()
    return slice(rows.start * width // BLOCK, -(-rows.stop * width // BLOCK))


def _bitsandbytes() -> Any:
    try:
        import bitsandbytes.functional
    except ImportError as error:
        raise MissingDependencyError("8-bit optimizer states need bitsandbytes: pip install bitsandbytes") from error
    return bitsandbytes.functional


@lru_cache
def _code(signed: bool, device: torch.device) -> Tensor:
    """The 256 values of Dettmers' dynamic data type (arXiv 2110.02861, §2.1)."""
    code: Tensor = _bitsandbytes().create_dynamic_map(signed=signed).to(device)
    return code
