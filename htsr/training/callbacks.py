"""Callbacks of transformers' Trainer."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from htsr.training.sampling import LayerSampler


class LayerSamplerCallback(TrainerCallback):
    """Layer sampling under the Trainer (and TRL's trainers).

        sampler = LayerSampler(model, active=2)
        Trainer(model, args, callbacks=[LayerSamplerCallback(sampler)], …)

    Make the sampler before the Trainer, and set ``ddp_find_unused_parameters=True`` for several processes. Checkpoints
    need nothing more: the sampler's state is in the optimizer's.
    """

    def __init__(self, sampler: LayerSampler) -> None:
        self.sampler = sampler

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The model is wrapped, the optimizer made and, when resuming, loaded: freeze what does not train now."""
        self.sampler.attach(kwargs["optimizer"])

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        """Log the lowest block that trains; backward ends there when the embedding is frozen."""
        if logs is not None and "loss" in logs:
            logs["lowest_active_block"] = self.sampler.active[0]
