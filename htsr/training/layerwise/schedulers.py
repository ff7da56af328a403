"""Layerwise learning rates as a scheduler of torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from htsr.errors import UsageError
from htsr.training.layerwise.engine import Layerwise
from htsr.training.layerwise.policy import PolicyLike, make_policy

if TYPE_CHECKING:
    from torch import nn


class LayerwiseLR(LRScheduler):
    """Sets lr_i(t) = lr·b(t)·m_i(t) in the param groups themselves, as schedulers of torch do.

    For those who want `get_last_lr()` to show the rates in force. It is the whole schedule: b is given as `schedule`,
    as in `LambdaLR`, and no other scheduler goes with it; `htsr.layerwise` goes with any. It counts its own steps, so
    call `scheduler.step()` after every `optimizer.step()`. The first event is when it is made.

    State is in the param groups and in the scheduler's own `state_dict()`: save and load both, the scheduler first.

    Args:
        optimizer: optimizer without a scheduler; its groups are split.
        model: model whose parameters the optimizer trains, wrapped or not.
        policy: policy that `htsr.layerwise` takes; it sets the learning rate.
        schedule: b, a function of the steps done (0 for the first step); constant by default.
        total_steps: optimizer steps of the whole training.
        distributed: whether the ranks of a process group train one model, as in `htsr.layerwise`.
        **changes: fields of `htsr.Policy` to be changed.

    Raises:
        UsageError: `htsr.layerwise` would refuse the arguments, or the policy sets the weight decay.

    Examples:
        >>> import htsr, torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 64))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> scheduler = htsr.LayerwiseLR(optimizer, model, {"0": 1.0, "1": 4.0}, schedule=lambda step: 0.5**step)
        >>> scheduler.get_last_lr()
        [0.1, 0.4]
        >>> optimizer.step()
        >>> scheduler.step()
        >>> scheduler.get_last_lr()
        [0.05, 0.2]
    """

    def __init__(
        self,
        optimizer: Optimizer,
        model: nn.Module,
        policy: PolicyLike = "llr",
        *,
        schedule: Callable[[int], float] | None = None,
        total_steps: int | None = None,
        distributed: bool = True,
        **changes: Any,
    ) -> None:
        chosen = make_policy(policy, **changes)
        if chosen.sets != "lr" or chosen.decouple_weight_decay:
            raise UsageError("a learning-rate scheduler sets no weight decay; use htsr.layerwise for this policy")
        self._engine = Layerwise(optimizer, model, chosen, total_steps, distributed)
        self._schedule = schedule
        super().__init__(optimizer)
        self._hang()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy: torch keeps no hooks in the optimizer that is copied with it."""
        self.__dict__.update(state)
        self._hang()

    def _hang(self) -> None:
        """Have the optimizer, once, show the engine what it is to load."""
        if self._engine.before_load not in self.optimizer._optimizer_load_state_dict_pre_hooks.values():
            self.optimizer.register_load_state_dict_pre_hook(self._engine.before_load)

    def get_lr(self) -> list[Any]:
        """The rates of the step to come, one for each group."""
        step = self.last_epoch + 1
        self._engine.advance(self.optimizer, self._engine.groups(self.optimizer), step)
        multipliers = [group.get("multiplier", 1.0) for group in self.optimizer.param_groups]
        factor = 1.0 if self._schedule is None else self._schedule(self.last_epoch)
        return [base * factor * m for base, m in zip(self.base_lrs, multipliers, strict=True)]

    def state_dict(self) -> dict[str, Any]:
        """Everything but the optimizer, the model and the schedule."""
        return {k: v for k, v in super().state_dict().items() if k not in ("_engine", "_schedule")}
