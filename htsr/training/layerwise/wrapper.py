"""`layerwise`: learning rates and weight decay by matrix, around any torch optimizer.

    optimizer = htsr.layerwise(torch.optim.AdamW(model.parameters(), lr=1e-3), model, total_steps=10_000)

The optimizer stays what it is. Its groups are split in place, one per matrix; before each step the learning rate (or
the weight decay) of a group is multiplied, and after the step it is put back exactly, so that every scheduler sees and
sets the user's own values:

    lr_i(t) = lr·b(t)·m_i(t),   m_i(t) = start + (target - start)·min(1, (t - e)/ramp)

with b the user's schedule and e the step of the last event. Events are at step 1, where the new multipliers hold at
once, and at the multiples of `interval` up to active_fraction·total_steps. t counts optimizer steps: a step that a
gradient scaler skips does not count.

All state is in the param groups (`htsr.training.layerwise.groups`), so `optimizer.state_dict()` carries it.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeVar, overload

import torch

from htsr.errors import UsageError
from htsr.training.layerwise.engine import Layerwise
from htsr.training.layerwise.groups import is_layerwise, plain_state_dict, steps_itself
from htsr.training.layerwise.hooks import attach, detach, engine_of
from htsr.training.layerwise.policy import PolicyLike, make_policy

if TYPE_CHECKING:
    from torch import nn

OptimizerType = TypeVar("OptimizerType", bound=torch.optim.Optimizer)


def layerwise(
    optimizer: OptimizerType,
    model: nn.Module,
    policy: PolicyLike = "llr",
    *,
    total_steps: int | None = None,
    distributed: bool = True,
    **changes: Any,
) -> OptimizerType:
    """Give every matrix of `model` a learning rate (or weight decay) of its own; returns the same optimizer.

    Call it before making the scheduler and before loading a checkpoint of its own; in a distributed run on every rank.
    A parameter has one multiplier: of a fused tensor (GPT-2's c_attn, stacked experts) the parts are measured one by
    one and their scores averaged. Minimum, maximum and mean of the scores are those of the matrices in this optimizer,
    so that Muon beside AdamW takes two calls, one for each. What PEFT adds to a matrix follows it.

    Args:
        optimizer: optimizer that trains parameters of `model`, in any groups; their hyper-parameters and any state
            are kept. One that accelerate has prepared is fine.
        model: model, wrapped or not. It is kept, and read at events.
        policy: ``llr``, ``ends``, ``tempbalance``, ``alphadecay``, ``model_balancing``, a `Policy`, or a mapping of
            role or name patterns to fixed multipliers, as in ``{"attn.*": 4, "embed": 10}``.
        total_steps: optimizer steps of the whole training. Events end at the policy's `active_fraction` of it; without
            it they go on to the end.
        distributed: whether the ranks of a process group train one model and share its matrices; False where each
            trains a model of its own.
        **changes: fields of `Policy` to be changed.

    Returns:
        `optimizer`.

    Raises:
        UsageError: the optimizer has a scheduler, cannot have a learning rate for each matrix, steps through another
            optimizer or trains another model, or the policy has no meaning; the optimizer is left as it was. Later,
            from its `load_state_dict`: the checkpoint has other groups.
        HtsrError: later, from its `step`: processes do not come, hold other matrices or weights, or have another policy
            or total_steps, or a score of your own fails.

    Examples:
        Two matrices, one with a heavy tail (a low α, well trained), one of noise. At the first step the noise gets
        the largest multiplier and the heavy tail the least; a bias follows its matrix:

        >>> import htsr, torch
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 64))
        >>> with torch.no_grad():
        ...     _ = model[0].weight.mul_(torch.arange(1.0, 65.0) ** -1)  # columns that fall off by a power law
        >>> optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        >>> optimizer = htsr.layerwise(optimizer, model, "llr", embeddings="measured")
        >>> model(torch.ones(1, 64)).sum().backward()
        >>> optimizer.step()
        >>> htsr.multipliers(optimizer)
        {'0': 1.0, '1': 5.0}
        >>> [group["lr"] for group in optimizer.param_groups]  # put back after the step
        [0.001, 0.001]

    Source: LLR (arXiv 2605.22297), with the engine of TempBalance (arXiv 2312.00359) and AlphaDecay as other policies.
    """
    inner = steps_itself(optimizer)
    before = list(inner.param_groups)
    try:
        attach(Layerwise(inner, model, make_policy(policy, **changes), total_steps, distributed), inner)
    except BaseException:
        inner.param_groups[:] = before
        raise
    return optimizer


@overload
def remove_layerwise(optimizer: OptimizerType) -> OptimizerType: ...


@overload
def remove_layerwise(optimizer: Mapping[str, Any]) -> dict[str, Any]: ...


def remove_layerwise(optimizer: Any) -> Any:
    """Take `htsr.layerwise` off an optimizer, or out of its state dict.

    Args:
        optimizer: layerwise optimizer, also one that accelerate has wrapped, which gets its own groups back in place
            and keeps its state; or the state dict of one, of which a plain optimizer loads what is returned.

    Returns:
        The same optimizer; or a new state dict.

    Raises:
        UsageError: the optimizer has a scheduler, which counts on the groups, or it or the state dict is not layerwise.

    Examples:
        >>> import htsr, torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 64))
        >>> optimizer = htsr.layerwise(torch.optim.SGD(model.parameters(), lr=0.1), model)
        >>> len(optimizer.param_groups)
        2
        >>> len(htsr.remove_layerwise(optimizer).param_groups)
        1
    """
    if isinstance(optimizer, Mapping):
        if not is_layerwise(optimizer.get("param_groups", ())):
            raise UsageError("this is no state dict of a layerwise optimizer")
        return plain_state_dict(optimizer)
    engine, inner = engine_of(optimizer), steps_itself(optimizer)
    if engine is None:
        raise UsageError("this optimizer is not layerwise")
    if any("initial_lr" in group for group in inner.param_groups):
        raise UsageError(
            "this optimizer has a scheduler, which counts on its groups: load remove_layerwise(optimizer.state_dict()) "
            "into a new optimizer, and make the scheduler anew"
        )
    detach(inner)
    inner.param_groups[:] = plain_state_dict({"param_groups": inner.param_groups})["param_groups"]
    return optimizer


def multipliers(optimizer: Any) -> dict[str, float]:
    """The multiplier of each group at the last step.

    Args:
        optimizer: optimizer from `layerwise` or with a `LayerwiseLR`, also one that accelerate has wrapped.

    Returns:
        Multipliers by the group's name, which is the matrix in it or ``rest``; 1 before the first step. Empty where the
        optimizer is not layerwise.

    Raises:
        UsageError: it is no optimizer.

    Examples:
        >>> import htsr, torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.LayerNorm(64))
        >>> optimizer = htsr.layerwise(torch.optim.SGD(model.parameters(), lr=0.1), model)
        >>> htsr.multipliers(optimizer)
        {'0': 1.0, 'rest': 1.0}
    """
    return {group["name"]: group["multiplier"] for group in _groups(optimizer)}


def log_values(optimizer: Any) -> dict[str, float]:
    """What a tracker should see of the last step: the distribution of multipliers, and multiplier and score by role.

    Args:
        optimizer: optimizer that `multipliers` takes.

    Returns:
        Dictionary of ``layerwise/multiplier_min``, ``_median`` and ``_max``, over all groups that hold parameters, also
        what is left at 1 under the name ``rest``, and of ``layerwise/multiplier/ROLE`` and ``layerwise/score/ROLE``,
        which are means over the matrices of a role (the score of LLR is α). Empty where the optimizer is not layerwise.

    Raises:
        UsageError: it is no optimizer.

    Examples:
        >>> import htsr, torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 64))
        >>> optimizer = htsr.layerwise(torch.optim.SGD(model.parameters(), lr=0.1), model, {"0": 2.0, "1": 4.0})
        >>> optimizer.step()
        >>> htsr.log_values(optimizer)["layerwise/multiplier_median"]
        3.0
    """
    groups = [group for group in _groups(optimizer) if group["params"]]
    if not groups:
        return {}
    ordered = sorted(group["multiplier"] for group in groups)
    values = {
        "layerwise/multiplier_min": ordered[0],
        "layerwise/multiplier_median": statistics.median(ordered),
        "layerwise/multiplier_max": ordered[-1],
    }
    for key in ("multiplier", "score"):
        by_role: dict[str, list[float]] = {}
        for group in groups:
            if not math.isnan(group[key]):
                by_role.setdefault(group["role"], []).append(group[key])
        values |= {f"layerwise/{key}/{role}": statistics.fmean(found) for role, found in by_role.items()}
    return values


def _groups(optimizer: Any) -> list[dict[str, Any]]:
    """The groups that `layerwise` has made; none where the optimizer is not layerwise."""
    if not hasattr(optimizer, "param_groups"):
        raise UsageError(f"{type(optimizer).__name__} is no optimizer: this takes the one that htsr.layerwise returned")
    return [group for group in optimizer.param_groups if "htsr_step" in group]
