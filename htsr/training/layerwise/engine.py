"""The engine of layerwise learning rates: which multiplier each group has at each step.

    lr_i(t) = lr·b(t)·m_i(t),   m_i(t) = start + (target - start)·min(1, (t - e)/ramp)

with b the user's schedule and e the step of the last event. Events are at step 1, where the new multipliers hold at
once, and at the multiples of `interval` up to active_fraction·total_steps. t counts optimizer steps: a step that a
gradient scaler skips does not count.

All state is in the param groups (`htsr.training.layerwise.groups`), so `optimizer.state_dict()` carries it.
"""

from __future__ import annotations

import logging
import math
import time
from dataclasses import dataclass, replace
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch

from htsr.analysis.sharing import ADVICE
from htsr.errors import UsageError
from htsr.matrices.modules import whole_shape
from htsr.matrices.roles import stem
from htsr.matrices.sharded import open_live, refuse_flat
from htsr.ranks import Ranks
from htsr.training.layerwise.groups import adapt_state_dict, require_fresh, split_groups
from htsr.training.layerwise.live_scores import live_scores, view_of
from htsr.training.layerwise.names import adapter_names, parameter_names
from htsr.training.layerwise.policy import Policy, require_count
from htsr.training.layerwise.units import (
    Outcome,
    decide,
    fixed,
    has_tied_head,
    matrix_units,
    pinned_adapters,
    require_head,
    require_patterns,
    unit_of,
)
from htsr.training.steps import is_captured, running_steps, skipped_by_scaler

if TYPE_CHECKING:
    from torch import nn
    from torch.utils.hooks import RemovableHandle

logger = logging.getLogger(__name__)

_ROUNDING = 1e-6  # steps, by which a product of floating-point numbers may be off

Groups = list[tuple[int, dict[str, Any]]]


@dataclass(frozen=True)
class Event:
    """What was decided at a step.

    Attributes:
        step: optimizer step, counted from 1.
        outcome: scores and multipliers of the units.
        kept: units that keep the multipliers that they have, and why: they do not train now, or could not be measured
            through no fault of their weights.
    """

    step: int
    outcome: Outcome
    kept: dict[int, str]


class Layerwise:
    """What is attached to the optimizer: the policy, which group has which unit, and nothing that a checkpoint needs.

    Args:
        optimizer: optimizer without a scheduler; its groups are split in place.
        model: model, wrapped or not.
        policy: policy that the multipliers follow.
        total_steps: optimizer steps of the whole training; None where not known.
        distributed: whether the ranks of the default process group share one model.

    Raises:
        UsageError: `htsr.layerwise` refuses the arguments.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        model: nn.Module,
        policy: Policy,
        total_steps: int | None,
        distributed: bool = True,
    ) -> None:
        require_fresh(optimizer, policy)
        refuse_flat(model)
        if total_steps is not None:
            require_count("total_steps", total_steps, 1)
        self.model, self.policy, self.total_steps, self.distributed = model, policy, total_steps, distributed
        live = open_live(model)
        if live.shards and not distributed:
            raise UsageError(
                "the model is sharded over the processes, and distributed=False is for a whole one in each"
            )
        matrices = matrix_units(live.matrices)
        names, adapters = parameter_names(model), adapter_names(model)
        places = {unit.name: i for i, unit in enumerate(matrices)}
        vectors = [name for name in names.values() if unit_of(name, places) is None]
        require_patterns(policy, matrices, vectors, type(model).__name__, adapters.values())
        require_head(policy, matrices, type(model).__name__)
        tied = has_tied_head(model)
        values = fixed(policy, matrices, tied=tied)
        of_any_size = fixed(replace(policy, min_size=0), matrices, tied=tied)
        small = [
            unit.name
            for unit, value, at_any_size in zip(matrices, values, of_any_size, strict=True)
            if value is not None and at_any_size is None
        ]
        if small:
            logger.info(
                "%d of %d matrices have fewer eigenvalues than min_size, %d, and stay at 1: %s%s",
                *(len(small), len(matrices), policy.min_size),
                *(", ".join(small[:3]), ", …" if len(small) > 3 else ""),
            )
        # units that stay at 1 need no group of their own: their parameters go with the rest
        moving = [(unit, value) for unit, value in zip(matrices, values, strict=True) if value != 1.0]
        self.units = [unit for unit, _ in moving]  # split_groups appends those of parameters without a matrix
        own = pinned_adapters(adapters, matrices, policy.pin)
        self.of_group, others = split_groups(optimizer, names, self.units, own, policy.pin, policy.describe())
        settled = [value for _, value in moving] + others
        here = {
            i
            for i, group in zip(self.of_group, optimizer.param_groups, strict=True)
            if any(len(whole_shape(p)) > 1 or stem(names.get(id(p), "")) == self.units[i].name for p in group["params"])
        }
        # a matrix in another optimizer takes no part here, and a bias without its matrix stays at 1
        self.settled = [1.0 if value is None and i not in here else value for i, value in enumerate(settled)]
        self._told: set[str] = set()
        if self.is_idle:
            self._tell("nothing", "layerwise has nothing to set: no parameter is of a matrix that it measures or pins")
        self.handles: list[RemovableHandle] = []
        self.seconds = 0.0
        self._event: Event | None = None
        self._has_met = False
        self._saved: list[tuple[dict[str, Any], str, Any]] = []
        self._outermost: FrameType | None = None
        self._states_before = len(optimizer.state)

    def __getstate__(self) -> dict[str, Any]:
        """State of a copy, without hooks and running steps, which belong to the one optimizer."""
        return {**self.__dict__, "handles": [], "_saved": [], "_outermost": None}

    @property
    def is_idle(self) -> bool:
        """Whether every multiplier stays at 1."""
        return all(self.settled[i] == 1.0 for i in self.of_group)

    def multiplier(self, group: dict[str, Any], step: int) -> float:
        """m_i(t) of a `group` at the optimizer step `step`, counted from 1."""
        start, target, ramp = group["htsr_start"], group["htsr_target"], self.policy.ramp
        if start == target or (elapsed := step - group["htsr_event"]) >= ramp:
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

    def _later_events(self) -> list[str]:
        """What the steps of later events depend on beside the policy, in a line: ranks that differ would not meet."""
        return [] if self.policy.static or self.policy.interval is None else [f"with total_steps {self.total_steps}"]

    def event(self, optimizer: torch.optim.Optimizer, step: int) -> Event:
        """Measure and decide at this `step` of `optimizer`.

        Raises:
            HtsrError: the processes do not hold the same matrices, or some do not come.
        """
        began = time.perf_counter()
        ranks = Ranks.running() if self.distributed else Ranks()
        names = parameter_names(self.model)
        index = {unit.name: i for i, unit in enumerate(self.units)}
        trained = {unit_of(names[id(p)], index) for p in self.model.parameters() if p.requires_grad}
        kept = {i: "frozen" for i, value in enumerate(self.settled) if value is None and i not in trained}
        settled = [1.0 if i in kept else value for i, value in enumerate(self.settled)]
        wanted = {part for unit, value in zip(self.units, settled, strict=True) if value is None for part in unit.parts}
        if wanted and not self._has_met:  # the first event shows whether all ranks are layerwise
            ranks.meet("htsr.layerwise", ADVICE)
            self._has_met = True
        view, rules = view_of(self.policy.spectrum, optimizer), [f"step {step}", *self._later_events()]
        found = live_scores(self.model, self.policy, wanted, view, ranks, rules) if wanted else {}
        known = {name: value for name, value in found.items() if isinstance(value, float)}
        measured = [i for i, value in enumerate(settled) if value is None]
        for i in measured:
            if failed := [part for part in self.units[i].parts if part not in known]:
                kept[i] = str(found[failed[0]])
                known |= dict.fromkeys(self.units[i].parts, math.nan)
                logger.warning("%s keeps its multiplier, step %d could not measure it: %s", failed[0], step, kept[i])
        if measured and all(i in kept for i in measured):  # and so nothing is known of the largest
            kept |= {i: "no matrix could be measured" for i, v in enumerate(settled) if v is not None and math.isnan(v)}
        outcome = decide(self.policy, self.units, settled, known)
        self.seconds += time.perf_counter() - began
        logger.info("step %d: %d matrices scored in %.2f s", step, len(found), time.perf_counter() - began)
        if step > 1 and self.total_steps is None and self.policy.active_fraction < 1:
            part = f"{self.policy.active_fraction:.0%}"
            self._tell("endless", f"without total_steps layerwise measures to the end, not for {part} of the training")
        return Event(step, outcome, kept)

    def advance(self, optimizer: torch.optim.Optimizer, groups: Groups, step: int) -> None:
        """Set the multipliers of these `groups` of the `optimizer` at this `step`; at an event decide them anew.

        One event is for all groups, whether they come together or, as under DeepSpeed's ZeRO, one after the other.
        """
        if self.event_at(step):
            if self._event is None or self._event.step != step:
                self._event = self.event(optimizer, step)
            for i, group in groups:
                now = self.multiplier(group, step)
                new = now if i in self._event.kept else self._event.outcome.multipliers[i]
                group["htsr_start"] = new if step == 1 else now
                group["htsr_target"] = new
                group["htsr_event"] = step
                group["score"] = self._event.outcome.scores[i]
                group["status"] = self._event.kept.get(i, "ok")
        for _, group in groups:
            target = group["htsr_target"]
            group["multiplier"] = target if group["htsr_start"] == target else self.multiplier(group, step)

    def before_step(self, optimizer: torch.optim.Optimizer, _args: Any, _kwargs: Any) -> None:
        """Set the multiplied values in the groups of `optimizer`. The step pre-hook.

        Raises:
            UsageError: the step is captured into a CUDA graph.
            HtsrError: processes do not come, or hold other matrices; a score that is a function fails.
        """
        running = running_steps()
        if self._outermost in running[1:]:
            return  # the step of a subclass has called its parent's, and torch runs the hooks for both
        self.restore()  # where the last step raised
        if is_captured():
            raise UsageError(
                "a layerwise step cannot be captured into a CUDA graph, which would repeat this step's multipliers for "
                "ever: capture forward and backward, and call optimizer.step() after the replay"
            )
        self._outermost = running[0]
        groups = self._stepped(optimizer)
        if not groups or skipped_by_scaler(optimizer):
            return
        if later := sum([len(group["params"]) for group in optimizer.param_groups if "htsr_step" not in group]):
            self._tell("later", f"{later} parameters came to the optimizer after htsr.layerwise, and stay at 1")
        self.advance(optimizer, groups, groups[0][1]["htsr_step"] + 1)
        sets, decouples = self.policy.sets, self.policy.decouple_weight_decay
        for _, group in groups:
            if (m := group["multiplier"]) == 1.0:
                continue
            self._scale(group, sets, m)
            if decouples and m > 0 and group.get("weight_decay"):
                self._scale(group, "weight_decay", 1 / m)

    def after_step(self, optimizer: torch.optim.Optimizer, _args: Any, _kwargs: Any) -> None:
        """Put everything back in the groups of `optimizer`, and count. The step post-hook."""
        if running_steps()[0] is not self._outermost:
            return
        self._outermost = None
        self.restore()
        if not skipped_by_scaler(optimizer):
            for group in optimizer.param_groups:
                if "htsr_step" in group and group["params"]:
                    group["htsr_step"] += 1

    def restore(self) -> None:
        """Put the user's own values back, exactly; tensors stay the objects that they were."""
        saved, self._saved = self._saved, []
        for group, key, value in reversed(saved):
            if isinstance(value, torch.Tensor):
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
        """The groups of `optimizer` that were split here, each with the index of its unit.

        They are looked up anew each time, since loading a checkpoint makes new ones.
        """
        return [(self.of_group[g["htsr_place"]], g) for g in optimizer.param_groups if "htsr_step" in g]

    def _stepped(self, optimizer: torch.optim.Optimizer) -> Groups:
        """The groups that a step of the `optimizer` moves now.

        DeepSpeed's ZeRO calls a step for each: stages 1 and 2 show the optimizer one group, stage 3 empties the others.
        """
        of_group = self.of_group
        return [(of_group[g["htsr_place"]], g) for g in optimizer.param_groups if "htsr_step" in g and g["params"]]

    def before_state_dict(self, optimizer: torch.optim.Optimizer) -> None:
        """Have the user's own values saved; and warn of an `optimizer` that has trained without calling its hooks."""
        self.restore()
        counted = any(group["htsr_step"] for _, group in self.groups(optimizer))
        if not counted and len(optimizer.state) > self._states_before:
            kind = type(optimizer).__name__
            self._tell("unused", f"this {kind} has trained without the hooks of its step: no multiplier was ever set")

    def _tell(self, key: str, sentence: str) -> None:
        """Warn once of each `key`."""
        if key not in self._told:
            self._told.add(key)
            logger.warning(sentence)

    def before_load(self, optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any] | None:
        """The state that `optimizer` is to load in place of `state_dict`, if any; forgets the last event."""
        self.restore()
        self._event = None
        self._states_before = len(state_dict["state"])
        return adapt_state_dict(optimizer, state_dict)
