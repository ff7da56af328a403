"""Bytes of an optimizer's states and of its temporaries, by their formulas."""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch
from torch import Tensor

from htsr.training.lowrank.groups import is_low_rank
from htsr.training.lowrank.moments import BLOCK
from htsr.training.lowrank.rounding import NARROW
from htsr.training.lowrank.subspace import OVERSAMPLING
from htsr.training.memory.plan import LOW_RANK, Setting

Kind: TypeAlias = Literal["full", "low", "drawn"]  # what of a parameter's gradient goes into the moments


def has_rank(name: str, parameter: Tensor, setting: Setting) -> bool:
    """Whether a parameter has states of low rank under this setting.

    Args:
        name: name of the parameter.
        parameter: parameter that trains, of any shape.
        setting: what decides about memory.
    """
    low = setting.method in LOW_RANK
    return low and is_low_rank(name, parameter.shape, setting.rank, setting.embeddings == "lowrank")


def states(trained: dict[str, Tensor], kinds: dict[str, Kind], setting: Setting) -> dict[str, int]:
    """Bytes of moments, of what rounding keeps, and of projectors.

    Args:
        trained: parameters that train, each of any shape, by name.
        kinds: what of their gradients goes into the moments, by name.
        setting: what decides about memory.
    """
    moments = projectors = 0
    for name, parameter in trained.items():
        entries = entries_of(parameter, kinds[name], setting)
        number = 1 if setting.base == "muon" and kinds[name] != "full" else 2
        if setting.state_dtype == "8bit":
            moments += number * (entries + 4 * -(-entries // BLOCK))
        else:
            dtype = getattr(torch, setting.state_dtype) if setting.state_dtype else parameter.dtype
            moments += number * entries * dtype.itemsize
        if parameter.dtype in NARROW:
            moments += {"kahan": 2, "master": 4}.get(setting.rounding, 0) * parameter.numel()
        if kinds[name] != "full" and setting.projector != "random":
            projectors += parameter.numel() // max(parameter.shape[-2:]) * setting.rank * parameter.element_size()
    return {"optimizer": moments, "projectors": projectors}


def entries_of(parameter: Tensor, kind: Kind, setting: Setting) -> int:
    """Number of entries of what goes into the moments.

    Args:
        parameter: parameter that trains, of any shape.
        kind: what of its gradient goes into the moments.
        setting: what decides about memory.
    """
    return parameter.numel() // min(parameter.shape[-2:]) * setting.rank if kind == "low" else parameter.numel()


def to_step(parameter: Tensor, kind: Kind, setting: Setting) -> int:
    """Temporaries of projecting and updating one parameter by `LowRankAdamW`; torch's fused AdamW has none.

    Args:
        parameter: parameter that trains, of any shape.
        kind: what of its gradient goes into the moments.
        setting: what decides about memory.
    """
    return max(to_project(parameter, kind, setting), to_update([parameter], kind, setting))


def to_project(parameter: Tensor, kind: Kind, setting: Setting) -> int:
    """Temporaries of a refresh, or of a random projection with what it is made of; matrix by matrix in a stack.

    Of a randomised refresh a float32 copy of a float16 gradient, the products with the basis, and four bases (start,
    QR, next, Ritz vectors); of an exact one a float32 copy of a narrow gradient, LAPACK's own, and both sides' vectors.

    Args:
        parameter: parameter that trains, of any shape.
        kind: what of its gradient goes into the moments.
        setting: what decides about memory.
    """
    if setting.method not in LOW_RANK or kind == "full":
        return 0
    small, large = sorted(parameter.shape[-2:])
    if setting.projector == "random":
        return 16 * parameter.numel() // large * min(setting.rank, small)
    width = min(small, setting.rank + OVERSAMPLING)
    wide = 4 * small * large if parameter.dtype == torch.float16 else 0
    refresh = wide + 4 * width * (2 * large + 4 * small)
    if setting.projector == "svd":
        refresh = 4 * (2 + (parameter.dtype in NARROW)) * small * large + 4 * small * small
    stack = parameter.numel() // (small * large)
    bases = 2 * stack * small * setting.rank * parameter.element_size()  # one by one, and together
    return refresh if stack == 1 else bases + refresh


def to_update(parameters: list[Tensor], kind: Kind, setting: Setting) -> int:
    """Temporaries of updating parameters in batches, of a large one in pieces, by `LowRankAdamW`.

    Gradients in float32 (under apollo the whole one, too, for its norms), moments in float32 where they are narrower,
    and Adam's denominators; then new weights in float32, a stack at a time, and what rounds them.

    Args:
        parameters: parameters that train, each of any shape.
        kind: what of their gradients goes into the moments.
        setting: what decides about memory.
    """
    from htsr.training.lowrank.update import BATCH, PIECE, STACK

    narrow = any(parameter.dtype in NARROW for parameter in parameters)
    if setting.base == "muon" and kind != "full":
        return max((_to_orthogonalise(parameter, kind, setting) for parameter in parameters), default=0)
    if not parameters or (setting.method not in LOW_RANK and (not narrow or setting.rounding == "nearest")):
        return 0

    def at_once(sizes: list[int], most: int) -> int:
        return max(min(sum(sizes), most), min(max(sizes), PIECE))

    whole = [parameter.numel() for parameter in parameters]
    sizes = [entries_of(parameter, kind, setting) for parameter in parameters]
    batch, one, stack = at_once(sizes, BATCH), min(max(sizes), PIECE), at_once(whole, STACK)
    state = setting.state_dtype or str(parameters[0].dtype).removeprefix("torch.")
    own, noise = 2 * (state != "float32"), 13 * (state in ("bfloat16", "float16"))
    moments = 4 * (1 + own + narrow) * batch + noise * one
    rounded = narrow * {"stochastic": 17, "master": 11}.get(setting.rounding, 4) * stack
    projected = (kind == "low") * parameters[0].element_size() * batch
    if kind == "low" and narrow and setting.method == "apollo":
        projected += 4 * max(whole)
    if kind == "drawn":  # the complements, of those that are taken together
        projected = parameters[0].element_size() * max(min(sum(sizes), BATCH), max(sizes))
    return projected + max(moments, 4 * (1 + own // 2) * batch + rounded)


def _to_orthogonalise(parameter: Tensor, kind: Kind, setting: Setting) -> int:
    """Temporaries of one update by Muon.

    What is orthogonalised, momentum and direction in float32, and of Newton and Schulz two iterates and three products
    of the smaller side; then new weights in float32, and what rounds them.
    """
    from htsr.training.lowrank.update import PIECE

    entries, each, narrow = entries_of(parameter, kind, setting), parameter.element_size(), parameter.dtype in NARROW
    small = setting.rank if kind == "low" else min(parameter.shape[-2:])
    stack = parameter.numel() // (parameter.shape[-1] * parameter.shape[-2])
    own = setting.state_dtype not in (None, "float32")
    iterates = each * (3 * entries + 3 * stack * small**2)
    rounded = narrow * {"stochastic": 17, "master": 11}.get(setting.rounding, 4) * min(parameter.numel(), PIECE)
    return each * entries + 4 * entries * (own + narrow) + max(4 * entries + iterates, each * entries + rounded)
