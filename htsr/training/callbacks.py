"""Layerwise learning rates and layer sampling under the transformers Trainer."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from htsr.errors import UsageError
from htsr.training.layerwise.hooks import engine_of
from htsr.training.layerwise.policy import PolicyLike, make_policy
from htsr.training.layerwise.wrapper import layerwise, log_values
from htsr.training.sampling.sampler import LayerSampler
from htsr.training.trainer_log import Log, log_of_trainer

if TYPE_CHECKING:
    from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments


class LayerwiseCallback(TrainerCallback):
    """Layerwise learning rates under the Trainer (and TRL's trainers), around the optimizer that it makes itself.

        trainer = Trainer(model, arguments, train_dataset=…)
        trainer.add_callback(LayerwiseCallback(trainer))

    Learning rate, weight decay, betas and scheduler are those of the Trainer's arguments, and its checkpoints resume.
    An optimizer that was given to the Trainer is made layerwise as well, unless it is already. Each time that the
    Trainer logs, which it does with the lr of its first group, the user's own, this adds what
    `htsr.log_values` returns.

    Args:
        trainer: Trainer that the callback is added to, before `train`.
        policy: policy that `htsr.layerwise` takes: a name, a `Policy` or fixed multipliers.
        distributed: whether the ranks of a process group train one model, as in `htsr.layerwise`.
        **changes: fields of `htsr.Policy` to be changed.

    Raises:
        UsageError: there is no Trainer, or the policy has no meaning; later, from `train`, what `htsr.layerwise`
            refuses.
    """

    def __init__(
        self, trainer: Trainer, policy: PolicyLike = "llr", *, distributed: bool = True, **changes: Any
    ) -> None:
        if not callable(getattr(trainer, "create_optimizer", None)):
            raise UsageError(
                "LayerwiseCallback needs its Trainer: make the Trainer first, then "
                "trainer.add_callback(htsr.LayerwiseCallback(trainer, 'llr'))"
            )
        self.trainer, self.policy, self.distributed = trainer, make_policy(policy, **changes), distributed
        self._create: Callable[..., Any] = trainer.create_optimizer
        setattr(trainer, "create_optimizer", self._create_layerwise)  # noqa: B010 - on this trainer, whatever its class

    def _create_layerwise(self, model: Any = None) -> Any:
        """Make the optimizer in place of the Trainer's own method, which gets a model where that is wrapped."""
        optimizer = self._create() if model is None else self._create(model)
        if engine_of(optimizer) is None:
            inner: Any = self.trainer.model if model is None else model
            layerwise(optimizer, inner, self.policy, distributed=self.distributed)
        return optimizer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Tell the engine how many steps the Trainer will do, of which its events take the policy's share."""
        engine = engine_of(kwargs.get("optimizer") or self.trainer.optimizer)
        if engine is not None and engine.total_steps is None and state.max_steps > 0:
            engine.total_steps = state.max_steps

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Log the layerwise values after each log of the training loss."""
        if logs is None or "loss" not in logs:
            return
        if values := log_values(kwargs.get("optimizer") or self.trainer.optimizer):
            self.trainer.log(values)


class LayerSamplerCallback(TrainerCallback):
    """Layer sampling under the Trainer (and TRL's trainers).

        sampler = LayerSampler(model, active=2)
        Trainer(model, args, callbacks=[LayerSamplerCallback(sampler)], …)

    Make the sampler before the Trainer, and set ``ddp_find_unused_parameters=True`` for several processes. Checkpoints
    need nothing more: the sampler's state is in the optimizer's.

    Args:
        sampler: sampler made with the model that the Trainer trains.
    """

    def __init__(self, sampler: LayerSampler) -> None:
        self.sampler = sampler
        self._log: Log | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Freeze what does not train now: the model is wrapped, the optimizer made and, when resuming, loaded.

        Raises:
            UsageError: `LayerSampler.attach` refuses the optimizer.
        """
        self.sampler.attach(kwargs["optimizer"])
        self._log = log_of_trainer()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        """Log the lowest block that trains; backward ends there when the embedding is frozen."""
        if logs is not None and "loss" in logs and self._log is not None:
            names = [self.sampler.names[index] for index in self.sampler.active]
            blocks = [self.sampler.blocks.index_of(f"{name}.") for name in names]  # None: embedding and head
            if lowest := [index for index in blocks if index is not None]:
                self._log({"lowest_active_block": min(lowest)}, state.global_step)
