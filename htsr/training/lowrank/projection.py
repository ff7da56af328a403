"""A gradient in its parameter's subspace, which is renewed every ``refresh_every`` steps (GaLore, algorithm 2)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, ExitStack, nullcontext

import torch
from torch import Tensor

from htsr.errors import HtsrError, UsageError
from htsr.training.lowrank import moments
from htsr.training.lowrank.groups import told
from htsr.training.lowrank.scaling import random_basis
from htsr.training.lowrank.subspace import NOT_FINITE, first_not_finite, is_distributed, project, projector, rotated
from htsr.training.lowrank.update import Pending, noise_seed, seed_of
from htsr.training.steps import is_captured


def is_due(one: Pending) -> bool:
    """Whether this step computes the parameter's subspace anew from its gradient.

    Args:
        one: parameter of a group with a rank.
    """
    if one.group["method"] == "random":
        return False
    return one.done % one.group["refresh_every"] == 0 or "projector" not in one.state


def insist_on_finite(pending: Iterable[Pending]) -> None:
    """Refuse gradients with NaN or Inf from which a subspace is to be computed, before anything is changed.

    Sharded ones are looked at when they are gathered.

    Args:
        pending: parameters that are due, with their whole gradients.

    Raises:
        HtsrError: a gradient has NaN or Inf.
    """
    due = [one for one in pending if not is_distributed(one.R)]
    if due and (bad := first_not_finite([one.R for one in due])) is not None:
        raise HtsrError(f"{_place(due[bad])}: {NOT_FINITE}")


def coordinates(
    one: Pending, average: Callable[[Tensor], Tensor], *, anew: bool, checked: bool, keeps: bool = True
) -> Tensor:
    """A gradient in its subspace.

    Args:
        one: parameter of a group with a rank, with its whole gradient; its state is changed.
        average: function that averages a gradient over processes with copies of the model.
        anew: whether the subspace is computed from this gradient.
        checked: whether the gradient is known to be finite.
        keeps: whether a new subspace goes into the state; not where the gradient may change until the step.

    Returns:
        (m, r) or (r, n) coordinates, not averaged.

    Raises:
        HtsrError: the gradient has NaN or Inf.
        UsageError: the parameter is no matrix any more.
    """
    return project(one.R, basis(one, average, anew=anew, checked=checked, keeps=keeps))


def basis(
    one: Pending, average: Callable[[Tensor], Tensor], *, anew: bool, checked: bool, keeps: bool = True
) -> Tensor:
    """The basis of a gradient's subspace.

    Args:
        one: parameter of a group with a rank, with its whole gradient; its state is changed.
        average: function that averages a gradient over processes with copies of the model.
        anew: whether the subspace is computed from this gradient.
        checked: whether the gradient is known to be finite.
        keeps: whether a new subspace goes into the state; not where the gradient may change until the step.

    Returns:
        (min(m, n), r) basis P, of a stack (E, min(m, n), r).

    Raises:
        HtsrError: the gradient has NaN or Inf.
        UsageError: the parameter is no matrix any more.
    """
    G, state, group = one.R, one.state, one.group
    if G.ndim < 2:
        raise UsageError(
            f"{told(group, one.parameter, one.number)} of a group with rank has become flat, {tuple(G.shape)}: "
            "DeepSpeed's ZeRO and FSDP1 leave no matrix to project; take DDP or FSDP2"
        )
    if group["method"] == "random":
        # not of the number of drops: the projection stays what it is when another's state is dropped
        since = one.done - one.done % group["refresh_every"]
        return random_basis(G, group["rank"], seed_of("projection", group["seed"], one.number, since))
    old: Tensor | None = state.get("projector")
    if not anew:
        assert old is not None
        return old
    G = average(G)
    generator = torch.Generator().manual_seed(noise_seed("subspace", group, one.number, one.done))
    try:
        new = projector(G, group["rank"], group["method"], old, generator, checked)
    except HtsrError as error:
        raise type(error)(f"{_place(one)}: {error}") from error
    if keeps:
        state["projector"] = new
        if group["moments"] == "rotate" and old is not None and "exp_avg" in state:
            old_moments = moments.read(state, "exp_avg"), moments.read(state, "exp_avg_sq")
            for name, value in zip(("exp_avg", "exp_avg_sq"), rotated(*old_moments, old, new, G.shape), strict=True):
                moments.write(state, name, value)
    return new


def without_autocast(parameters: Iterable[Tensor]) -> AbstractContextManager[object]:
    """Within, compute in the precision of the operands, also where backward or step runs under ``torch.autocast``.

    Args:
        parameters: tensors of any shape, on all devices that compute.
    """
    devices = [device for device in {p.device.type for p in parameters} if torch.is_autocast_enabled(device)]
    if not devices:
        return nullcontext()
    stack = ExitStack()
    for device in devices:
        stack.enter_context(torch.autocast(device, enabled=False))
    return stack


def refuse_capture() -> None:
    """Refuse to be captured in a CUDA graph, which would repeat one step's corrections, rounding and subspace.

    Raises:
        UsageError: a graph is being captured.
    """
    if is_captured():
        raise UsageError(
            "LowRankAdamW cannot be captured in a CUDA graph, since no two of its steps are alike: capture forward and "
            "backward with gradients='keep', and call step outside"
        )


def _place(one: Pending) -> str:
    return f"{told(one.group, one.parameter, one.number)} ({'×'.join(map(str, one.R.shape))}) at step {one.done + 1}"
