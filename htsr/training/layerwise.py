"""Layerwise learning rates and weight decay around any torch optimizer.

    optimizer = htsr.layerwise(torch.optim.AdamW(model.parameters(), lr=1e-3), model, total_steps=10_000)

The optimizer stays what it is. Its groups are split in place, one per matrix; before each step the learning rate (or
the weight decay) of a group is multiplied, and after the step it is put back exactly, so that every scheduler sees and
sets the user's own values:

    lr_i(t) = lr·b(t)·m_i(t),   m_i(t) = start + (target - start)·min(1, (t - e)/ramp)

with b the user's schedule and e the step of the last event. Events are at step 1, where the new multipliers hold at
once, and at the multiples of `interval` up to active_fraction·total_steps. t counts optimizer steps: a step that a
gradient scaler skips does not count.

All state is in the param groups (`htsr.training.groups`), so `optimizer.state_dict()` carries it.
"""

from __future__ import annotations

import logging
import sys
import time
from types import FrameType
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from htsr.errors import UsageError
from htsr.matrices.sharded import open_live
from htsr.training.groups import adapt_state_dict, parameter_names, require_fresh, split_groups
from htsr.training.policy import Policy, PolicyLike, make_policy
from htsr.training.scoring import live_scores, view_of
from htsr.training.slots import decide, fixed, matrix_slots, pinned

if TYPE_CHECKING:
    from torch import nn

logger = logging.getLogger(__name__)

OptimizerType = TypeVar("OptimizerType", bound=torch.optim.Optimizer)

_ENGINE = "_htsr_layerwise"


def layerwise(
    optimizer: OptimizerType,
    model: nn.Module,
    policy: PolicyLike = "llr",
    *,
    total_steps: int | None = None,
    **changes: Any,
) -> OptimizerType:
    """Give every matrix of `model` a learning rate (or weight decay) of its own; returns the same optimizer.

    Call it right after making the optimizer, before the scheduler and before loading a checkpoint. Call it on every
    rank of a distributed run; DDP and `fully_shard` come before it or after it.

    Args:
        optimizer: fresh, over parameters of `model`, in any groups; their hyper-parameters are kept.
        model: wrapped or not. It is kept, and read at events.
        policy: ``llr``, ``tempbalance``, ``alphadecay``, ``model_balancing``, a `Policy`, or a mapping of role or name
            patterns to fixed multipliers, as in ``{"attn.*": 4, "embed": 10}``.
        total_steps: optimizer steps of the whole training. Events end at the policy's `active_fraction` of it; without
            it they go on to the end.
        **changes: fields of `Policy` to be changed.

    Raises:
        UsageError: an optimizer with state or scheduler, one of another model, or a policy without meaning.
    """
    attach(Layerwise(optimizer, model, make_policy(policy, **changes), total_steps), optimizer)
    return optimizer


class Layerwise:
    """What hangs on the optimizer: the policy, which group has which slot, and nothing that a checkpoint would need."""

    def __init__(
        self, optimizer: torch.optim.Optimizer, model: nn.Module, policy: Policy, total_steps: int | None
    ) -> None:
        require_fresh(optimizer)
        if total_steps is not None and total_steps < 1:
            raise UsageError(f"total_steps is at least 1, not {total_steps}")
        self.model, self.policy, self.total_steps = model, policy, total_steps
        matrices = matrix_slots(open_live(model).matrices)
        moving = [(slot, value) for slot, value in zip(matrices, fixed(policy, matrices), strict=True) if value != 1.0]
        self.slots = [slot for slot, _ in moving]
        self.of_group = split_groups(optimizer, parameter_names(model), self.slots, policy.pin, policy.describe())
        others = [pinned(slot, policy.pin) for slot in self.slots[len(moving) :]]
        self.settled = [value for _, value in moving] + [1.0 if value is None else value for value in others]
        self._saved: list[tuple[dict[str, Any], str, Any]] = []
        self._outermost: FrameType | None = None
        self.seconds = 0.0

    def multiplier(self, group: dict[str, Any], step: int) -> float:
        """m_i(t) of a group."""
        start, target, ramp = group["htsr_start"], group["htsr_target"], self.policy.ramp
        elapsed = step - group["htsr_event"]
        if start == target or elapsed >= ramp:
            return float(target)
        return float(start + (target - start) * (elapsed / ramp))

    def event_at(self, step: int) -> bool:
        """Whether multipliers are decided anew at this step, counted from 1."""
        if step == 1:
            return True
        interval = self.policy.interval
        if self.policy.static or interval is None or step % interval:
            return False
        return self.total_steps is None or step <= self.policy.active_fraction * self.total_steps

    def event(self, optimizer: torch.optim.Optimizer, step: int) -> None:
        """Measure, decide, and set off towards the new multipliers."""
        began = time.perf_counter()
        groups = self._groups(optimizer)
        trained = {slot for slot, group in groups if any(parameter.requires_grad for parameter in group["params"])}
        settled, wanted = list(self.settled), set()
        for index, group in groups:
            if settled[index] is None and index not in trained:
                settled[index] = self.multiplier(group, step)  # frozen: nothing to decide, nothing to decompose
        present = {index for index, _ in groups}
        for index, slot in enumerate(self.slots):
            if index not in present:
                settled[index] = 1.0  # in another optimizer, or in none
            elif settled[index] is None:
                wanted.update(slot.parts)
        found = live_scores(self.model, self.policy, wanted, view_of(self.policy.spectrum, optimizer)) if wanted else {}
        outcome = decide(self.policy, self.slots, settled, found)
        for index, group in groups:
            new = outcome.multipliers[index]
            group["htsr_start"] = new if step == 1 else self.multiplier(group, step)
            group["htsr_target"] = new
            group["score"] = outcome.scores[index]
        for _, group in groups:
            group["htsr_event"] = step
        self.seconds += time.perf_counter() - began
        logger.info("step %d: %d matrices scored in %.2f s", step, len(found), time.perf_counter() - began)

    def advance(self, optimizer: torch.optim.Optimizer, step: int) -> list[float]:
        """Hold the event of this step, if there is one; the multiplier of every group of the optimizer."""
        if self.event_at(step):
            self.event(optimizer, step)
        for _, group in self._groups(optimizer):
            group["multiplier"] = self.multiplier(group, step)
        return [group.get("multiplier", 1.0) for group in optimizer.param_groups]

    def before_step(self, optimizer: torch.optim.Optimizer, _args: Any, _kwargs: Any) -> None:
        """Multiply. The step pre-hook."""
        caller = sys._getframe(1)
        if self._outermost is not None and _is_below(self._outermost, caller):
            return  # the step of a subclass has called its parent's, and torch runs the hooks for both
        self.restore()  # where the last step raised
        self._outermost = caller
        groups = self._groups(optimizer)
        if not groups or _skipped_by_scaler(optimizer):
            return
        self.advance(optimizer, groups[0][1]["htsr_step"] + 1)
        for _, group in groups:
            if (m := group["multiplier"]) == 1.0:
                continue
            self._scale(group, self.policy.sets, m)
            if self.policy.decouple_weight_decay and m > 0 and group.get("weight_decay"):
                self._scale(group, "weight_decay", 1 / m)

    def after_step(self, optimizer: torch.optim.Optimizer, _args: Any, _kwargs: Any) -> None:
        """Put everything back, and count. The step post-hook."""
        if sys._getframe(1) is not self._outermost:
            return
        self._outermost = None
        self.restore()
        if not _skipped_by_scaler(optimizer):
            for _, group in self._groups(optimizer):
                group["htsr_step"] += 1

    def restore(self) -> None:
        """The user's own values, exactly; tensors stay the objects that they were."""
        while self._saved:
            group, key, value = self._saved.pop()
            if isinstance(group[key], torch.Tensor):
                group[key].copy_(value)
            else:
                group[key] = value

    def _scale(self, group: dict[str, Any], key: str, factor: float) -> None:
        value = group[key]
        if isinstance(value, torch.Tensor):
            self._saved.append((group, key, value.clone()))
            value.mul_(factor)
        else:
            self._saved.append((group, key, value))
            group[key] = value * factor

    def _groups(self, optimizer: torch.optim.Optimizer) -> list[tuple[int, dict[str, Any]]]:
        """Slot and group of each group that was split here; loading a checkpoint makes new ones, so none is kept."""
        return [(slot, g) for slot, g in zip(self.of_group, optimizer.param_groups, strict=False) if "htsr_step" in g]


def attach(engine: Layerwise, optimizer: torch.optim.Optimizer) -> None:
    """Hang the engine on the optimizer's hooks."""
    optimizer.register_step_pre_hook(engine.before_step)
    optimizer.register_step_post_hook(engine.after_step)
    optimizer.register_state_dict_pre_hook(lambda _: engine.restore())
    optimizer.register_load_state_dict_pre_hook(adapt_state_dict)
    setattr(optimizer, _ENGINE, engine)


def engine_of(optimizer: Any) -> Layerwise | None:
    """The engine of an optimizer, also of one that accelerate has wrapped; None where there is none."""
    while optimizer is not None and not hasattr(optimizer, _ENGINE):
        optimizer = getattr(optimizer, "optimizer", None)
    return getattr(optimizer, _ENGINE, None)


def multipliers(optimizer: Any) -> dict[str, float]:
    """The multiplier of each group at the last step, by the group's name (1 before the first)."""
    return {group["name"]: group["multiplier"] for group in optimizer.param_groups if "htsr_step" in group}


def _skipped_by_scaler(optimizer: Any) -> bool:
    """Whether a fused optimizer was called by a GradScaler with gradients that overflowed, and will do nothing."""
    found = getattr(optimizer, "found_inf", None)
    return found is not None and bool(found.item())


def _is_below(frame: FrameType, top: FrameType) -> bool:
    """Whether `frame` is still running, below `top` on the stack."""
    current: FrameType | None = top.f_back
    while current is not None and current is not frame:
        current = current.f_back
    return current is frame
