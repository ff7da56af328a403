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
import math
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from htsr.errors import UsageError
from htsr.matrices.entries import base_names
from htsr.matrices.modules import whole_shape
from htsr.matrices.sharded import open_live, refuse_flat
from htsr.training.groups import adapt_state_dict, parameter_names, require_fresh, split_groups
from htsr.training.policy import Policy, PolicyLike, make_policy
from htsr.training.scoring import live_scores, view_of
from htsr.training.slots import Outcome, decide, fixed, has_tied_head, matrix_slots, pinned, slot_of

if TYPE_CHECKING:
    from torch import nn

logger = logging.getLogger(__name__)

OptimizerType = TypeVar("OptimizerType", bound=torch.optim.Optimizer)

_ENGINE = "_htsr_layerwise"
_ROUNDING = 1e-6  # of a step
_WRAPPER = torch.optim.Optimizer.profile_hook_step(lambda: None).__code__


def layerwise(
    optimizer: OptimizerType,
    model: nn.Module,
    policy: PolicyLike = "llr",
    *,
    total_steps: int | None = None,
    **changes: Any,
) -> OptimizerType:
    """Give every matrix of `model` a learning rate (or weight decay) of its own; returns the same optimizer.

    Call it right after making the optimizer, before the scheduler and before loading a checkpoint; in a distributed run
    on every rank. A parameter has one multiplier: of a fused tensor (GPT-2's c_attn, stacked experts) the parts are
    measured one by one and their scores averaged. Minimum, maximum and mean of the scores are those of the matrices in
    this optimizer, so that Muon beside AdamW takes two calls, one for each.

    Args:
        optimizer: fresh, over parameters of `model`, in any groups; their hyper-parameters are kept.
        model: wrapped or not. It is kept, and read at events.
        policy: ``llr``, ``tempbalance``, ``alphadecay``, ``model_balancing``, a `Policy`, or a mapping of role or name
            patterns to fixed multipliers, as in ``{"attn.*": 4, "embed": 10}``.
        total_steps: optimizer steps of the whole training. Events end at the policy's `active_fraction` of it; without
            it they go on to the end.
        **changes: fields of `Policy` to be changed.

    Returns:
        `optimizer`.

    Raises:
        UsageError: an optimizer with state or scheduler, one of another model, or a policy without meaning. Later, from
            its `load_state_dict`: a checkpoint of other groups.
        HtsrError: later, from its `step`: ranks that do not hold the same matrices.

    Source: LLR (arXiv 2605.22297), with the engine of TempBalance (arXiv 2312.00359) and AlphaDecay as other policies.
    """
    attach(Layerwise(optimizer, model, make_policy(policy, **changes), total_steps), optimizer)
    return optimizer


Groups = list[tuple[int, dict[str, Any]]]


@dataclass(frozen=True)
class Event:
    """What was decided at a step.

    Attributes:
        step: counted from 1.
        outcome: by slot.
        frozen: slots that do not train now, and keep the multipliers that they have.
    """

    step: int
    outcome: Outcome
    frozen: frozenset[int]


class Layerwise:
    """What hangs on the optimizer: the policy, which group has which slot, and nothing that a checkpoint would need.

    Args:
        optimizer: fresh; its groups are split in place.
        model: wrapped or not.
        policy: the rules.
        total_steps: optimizer steps of the whole training; None where not known.

    Raises:
        UsageError: as `layerwise`.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, model: nn.Module, policy: Policy, total_steps: int | None
    ) -> None:
        require_fresh(optimizer)
        refuse_flat(model)
        if total_steps is not None and total_steps < 1:
            raise UsageError(f"total_steps is at least 1, not {total_steps}")
        self.model, self.policy, self.total_steps = model, policy, total_steps
        matrices = matrix_slots(open_live(model).matrices)
        values = fixed(policy, matrices, tied=has_tied_head(model))
        moving = [(slot, value) for slot, value in zip(matrices, values, strict=True) if value != 1.0]
        self.slots = [slot for slot, _ in moving]
        self.of_group = split_groups(optimizer, parameter_names(model), self.slots, policy.pin, policy.describe())
        others = [pinned(slot, policy.pin) for slot in self.slots[len(moving) :]]
        settled = [value for _, value in moving] + [1.0 if value is None else value for value in others]
        here = {
            slot
            for slot, group in zip(self.of_group, optimizer.param_groups, strict=True)
            if any(len(whole_shape(parameter)) > 1 for parameter in group["params"])
        }
        # a matrix in another optimizer takes no part here, and a bias without its matrix stays at 1
        self.settled = [1.0 if v is None and slot not in here else v for slot, v in enumerate(settled)]
        self._event: Event | None = None
        self._saved: list[tuple[dict[str, Any], str, Any]] = []
        self._outermost: FrameType | None = None
        self.seconds = 0.0

    def multiplier(self, group: dict[str, Any], step: int) -> float:
        """m_i(t) of a `group` at the optimizer step `step`, counted from 1."""
        start, target, ramp = group["htsr_start"], group["htsr_target"], self.policy.ramp
        elapsed = step - group["htsr_event"]
        if start == target or elapsed >= ramp:
            return float(target)
        return float(start + (target - start) * (elapsed / ramp))

    def event_at(self, step: int) -> bool:
        """Whether multipliers are decided anew at this `step`, counted from 1."""
        if step == 1:
            return True
        interval = self.policy.interval
        if self.policy.static or interval is None or step % interval:
            return False
        if self.total_steps is None:
            return True
        return step <= self.policy.active_fraction * self.total_steps + _ROUNDING  # 0.29·100 is 28.999…

    def event(self, optimizer: torch.optim.Optimizer, step: int) -> Event:
        """Measure and decide at this `step` of `optimizer`.

        Raises:
            HtsrError: the ranks do not hold the same matrices.
        """
        began = time.perf_counter()
        index = {slot.name: i for i, slot in enumerate(self.slots)}
        parameters = dict(self.model.named_parameters(remove_duplicate=False))
        names = base_names(parameters)
        trained = {slot_of(names[name], index) for name, p in parameters.items() if p.requires_grad}
        frozen = frozenset(i for i, value in enumerate(self.settled) if value is None and i not in trained)
        settled = [1.0 if i in frozen else value for i, value in enumerate(self.settled)]
        wanted = {part for slot, value in zip(self.slots, settled, strict=True) if value is None for part in slot.parts}
        found = live_scores(self.model, self.policy, wanted, view_of(self.policy.spectrum, optimizer)) if wanted else {}
        outcome = decide(self.policy, self.slots, settled, found)
        self.seconds += time.perf_counter() - began
        logger.info("step %d: %d matrices scored in %.2f s", step, len(found), time.perf_counter() - began)
        return Event(step, outcome, frozen)

    def advance(self, optimizer: torch.optim.Optimizer, groups: Groups, step: int) -> None:
        """Set the multipliers of these `groups` of the `optimizer` at this `step`; at an event decide them anew.

        One event is for all groups, whether they come together or, as under DeepSpeed's ZeRO, one after the other.
        """
        if self.event_at(step):
            if self._event is None or self._event.step != step:
                self._event = self.event(optimizer, step)
            for slot, group in groups:
                now = self.multiplier(group, step)
                new = now if slot in self._event.frozen else self._event.outcome.multipliers[slot]
                group["htsr_start"] = new if step == 1 else now
                group["htsr_target"] = new
                group["htsr_event"] = step
                group["score"] = self._event.outcome.scores[slot]
        for _, group in groups:
            group["multiplier"] = self.multiplier(group, step)

    def before_step(self, optimizer: torch.optim.Optimizer, _args: Any, _kwargs: Any) -> None:
        """Multiply, in the groups of `optimizer`. The step pre-hook."""
        running = _running_steps()
        if self._outermost in running[1:]:
            return  # the step of a subclass has called its parent's, and torch runs the hooks for both
        self.restore()  # where the last step raised
        self._outermost = running[0]
        groups = self._stepped(optimizer)
        if not groups or _skipped_by_scaler(optimizer):
            return
        self.advance(optimizer, groups, groups[0][1]["htsr_step"] + 1)
        for _, group in groups:
            if (m := group["multiplier"]) == 1.0:
                continue
            self._scale(group, self.policy.sets, m)
            if self.policy.decouple_weight_decay and m > 0 and group.get("weight_decay"):
                self._scale(group, "weight_decay", 1 / m)

    def after_step(self, optimizer: torch.optim.Optimizer, _args: Any, _kwargs: Any) -> None:
        """Put everything back in the groups of `optimizer`, and count. The step post-hook."""
        if _running_steps()[0] is not self._outermost:
            return
        self._outermost = None
        self.restore()
        if not _skipped_by_scaler(optimizer):
            for _, group in self._stepped(optimizer):
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

    def groups(self, optimizer: torch.optim.Optimizer) -> Groups:
        """Slot and group of those of `optimizer` that were split here; a loaded checkpoint makes new ones."""
        return [(self.of_group[g["htsr_place"]], g) for g in optimizer.param_groups if "htsr_step" in g]

    def _stepped(self, optimizer: torch.optim.Optimizer) -> Groups:
        """Those that a step of the `optimizer` moves now.

        DeepSpeed's ZeRO calls a step for each: stages 1 and 2 show the optimizer one group, stage 3 empties the others.
        """
        return [(slot, group) for slot, group in self.groups(optimizer) if group["params"]]

    def before_load(self, optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any] | None:
        """What `optimizer` is to load in place of `state_dict`, if anything; what was decided before does not hold."""
        self.restore()
        self._event = None
        return adapt_state_dict(optimizer, state_dict)


def attach(engine: Layerwise, optimizer: torch.optim.Optimizer) -> None:
    """Hang the `engine` on the hooks of its `optimizer`."""
    untraced: Callable[[Any], Any] = torch.compiler.disable
    optimizer.register_step_pre_hook(untraced(engine.before_step))
    optimizer.register_step_post_hook(untraced(engine.after_step))
    optimizer.register_state_dict_pre_hook(lambda _: engine.restore())
    optimizer.register_load_state_dict_pre_hook(engine.before_load)
    setattr(optimizer, _ENGINE, engine)


def engine_of(optimizer: Any) -> Layerwise | None:
    """The engine of an `optimizer`, also of one that accelerate has wrapped; None where there is none."""
    while optimizer is not None and not hasattr(optimizer, _ENGINE):
        optimizer = getattr(optimizer, "optimizer", None)
    return getattr(optimizer, _ENGINE, None)


def multipliers(optimizer: Any) -> dict[str, float]:
    """The multiplier of each group at the last step.

    Args:
        optimizer: from `layerwise` or with a `LayerwiseLR`, also as accelerate wraps it.

    Returns:
        By the group's name, the matrix in it or ``rest``; 1 before the first step. Empty where the optimizer is not
        layerwise.
    """
    return {group["name"]: group["multiplier"] for group in optimizer.param_groups if "htsr_step" in group}


def log_values(optimizer: Any) -> dict[str, float]:
    """What a tracker should see of the last step: the distribution of multipliers, and multiplier and score by role.

    Args:
        optimizer: as for `multipliers`.

    Returns:
        ``layerwise/multiplier_min``, ``_median``, ``_max``; ``layerwise/multiplier/ROLE`` and ``layerwise/score/ROLE``,
        means over the role's matrices (the score of LLR is α). Empty where the optimizer is not layerwise.
    """
    groups = [group for group in optimizer.param_groups if "htsr_step" in group and group["role"] != "rest"]
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


def _skipped_by_scaler(optimizer: Any) -> bool:
    """Whether a fused optimizer was called by a GradScaler with gradients that overflowed, and will do nothing."""
    found = getattr(optimizer, "found_inf", None)
    return found is not None and bool(found.item())


def _running_steps() -> list[FrameType | None]:
    """The calls of torch's wrapper around `Optimizer.step` that are running, innermost first.

    A step that raised leaves no trace but what it left undone, so the stack alone tells it from one that still runs.
    """
    found: list[FrameType | None] = []
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_filename == _WRAPPER.co_filename and frame.f_code.co_name == _WRAPPER.co_name:
            found.append(frame)
        frame = frame.f_back
    return found or [None]
