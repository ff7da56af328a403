"""Callbacks of the transformers Trainer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from htsr.training.hooks import engine_of
from htsr.training.layerwise import log_values
from htsr.training.sampling import LayerSampler

if TYPE_CHECKING:
    from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments


class LayerwiseCallback(TrainerCallback):
    """Logs the layerwise multipliers and scores, to whatever trackers the Trainer reports to.

        trainer = Trainer(model, arguments, train_dataset=…, optimizers=(htsr.layerwise(optimizer, model), None))
        trainer.add_callback(LayerwiseCallback(trainer))

    The Trainer logs the lr of its first group, which is the user's own; this adds, each time that it logs, what
    `htsr.training.layerwise.log_values` returns. It also tells the optimizer the number of steps, where `total_steps`
    was not given.

    Args:
        trainer: the one that the callback is added to.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Events end at the policy's share of the steps that the Trainer will do."""
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
        """After each log of the training loss, one of our own."""
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
        sampler: of the model that the Trainer trains.
    """

    def __init__(self, sampler: LayerSampler) -> None:
        self.sampler = sampler

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The model is wrapped, the optimizer made and, when resuming, loaded: freeze what does not train now.

        Raises:
            UsageError: as `LayerSampler.attach`.
        """
        self.sampler.attach(kwargs["optimizer"])

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        """Log the lowest block that trains; backward ends there when the embedding is frozen."""
        if logs is not None and "loss" in logs:
            logs["lowest_active_block"] = self.sampler.active[0]
