"""How training loops of other libraries call a monitor: those of transformers and TRL, and Lightning's."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from htsr.training.trainer_log import Log, log_of_trainer

if TYPE_CHECKING:
    import torch


class Hooks(TrainerCallback):
    """A callback of the transformers Trainer and of Lightning at once, which is not imported.

    Lightning calls every hook that it knows on every callback, and which there are depends on its version: what is not
    defined here does nothing.
    """

    state_key = _legacy_state_key = "htsr.SpectralMonitor"
    _seen = 0  # steps that Lightning has told

    def __getattr__(self, name: str) -> Callable[..., None]:
        if name.startswith("on_") or name in ("setup", "teardown"):
            return _nothing
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")

    @abstractmethod
    def _begin(
        self, model: torch.nn.Module, steps: int, folder: str | Path | None = None, log: Log | None = None
    ) -> None:
        """Look at the weights before the first step.

        Args:
            model: model in training.
            steps: optimizer steps that its run has done before.
            folder: folder of the run; None where there is none.
            log: function that logs values at a step, to be called on all processes.
        """

    @abstractmethod
    def step(self, steps: int | None = None) -> None:
        """Measure, if it is time to.

        Args:
            steps: optimizer steps that are done.
        """

    @abstractmethod
    def evaluated(self, loss: float) -> None:
        """Take down an evaluation.

        Args:
            loss: loss on data that the model does not train on.
        """

    @abstractmethod
    def close(self) -> None:
        """End the monitoring."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin; the Trainer calls it."""
        self._begin(kwargs["model"], state.global_step, args.output_dir, log_of_trainer())
        for entry in state.log_history:
            self._evaluated_by(entry, "eval_loss")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Go on; the Trainer calls it after each step of the optimizer."""
        due = control.should_log
        self.step(state.global_step)
        control.should_log = due  # a log of our own does not stand for that of the loss

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        """Take down the loss; the Trainer calls it."""
        self._evaluated_by(metrics or {}, "eval_loss")

    def on_train_start(self, trainer: Any, module: Any) -> None:
        """Begin; Lightning calls it."""
        folder = trainer.log_dir if trainer.loggers else None
        self._seen = trainer.global_step

        def log(values: dict[str, float], step: int) -> None:
            for logger in trainer.loggers:
                logger.log_metrics(values, step)

        self._begin(module, trainer.global_step, folder, log)

    def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
        """Go on where the optimizer has made a step; Lightning calls it after each batch."""
        if trainer.global_step != self._seen:
            self._seen = trainer.global_step
            self.step(trainer.global_step)

    def on_validation_end(self, trainer: Any, module: Any) -> None:
        """Take down what the module logs as ``val_loss``; Lightning calls it."""
        if not trainer.sanity_checking:
            self._evaluated_by(trainer.callback_metrics, "val_loss")

    def on_train_end(self, *_: Any, **__: Any) -> None:
        """End; the Trainer and Lightning call it, each with arguments of its own."""
        self.close()

    def _evaluated_by(self, metrics: Any, name: str) -> None:
        if name in metrics:
            self.evaluated(float(metrics[name]))


def _nothing(*_: Any, **__: Any) -> None:
    pass
