"""How training loops of other libraries call a monitor: those of transformers and TRL, and Lightning's."""

from __future__ import annotations

import weakref
from abc import abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from htsr.errors import UsageError
from htsr.training.trainer_log import Log, calling_trainers, log_of_trainer

if TYPE_CHECKING:
    import torch
    from transformers import Trainer


class Hooks(TrainerCallback):
    """A callback of the transformers Trainer and of Lightning at once, which is not imported.

    Lightning calls every hook that it knows on every callback, and which there are depends on its version: what is not
    defined here does nothing.
    """

    state_key = _legacy_state_key = "htsr.SpectralMonitor"
    _seen = 0  # steps that Lightning has told
    _trainer: weakref.ref[Trainer] | None = None  # that is training
    _followed: str | None = None  # the loss that is followed, where there are evaluations of several data sets

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
        """Begin; the Trainer calls it.

        Raises:
            UsageError: another Trainer is in the midst of a training with this monitor.
        """
        callers = calling_trainers()
        if self._trainer is not None and any(one is self._trainer() for one in callers[1:]):
            raise UsageError(
                "this monitor is in use by a training that goes on: give each Trainer a monitor of its own"
            )
        self._trainer = weakref.ref(callers[0]) if callers else None
        self._followed = _loss_of_best(args.metric_for_best_model)
        self._begin(kwargs["model"], state.global_step, args.output_dir, log_of_trainer())
        for entry in state.log_history:
            self._follow(entry)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Go on; the Trainer calls it after each step of the optimizer."""
        due = control.should_log
        self.step(state.global_step)
        control.should_log = due  # a log of our own does not stand for that of the loss

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        """Take down the loss; the Trainer calls it."""
        self._follow(metrics or {})

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
        self._trainer = None
        self.close()

    def _follow(self, metrics: Any) -> None:
        """Take down one loss of an evaluation: of several data sets, it is that of the best model, or the first."""
        losses = [name for name in metrics if name.startswith("eval_") and name.endswith("_loss")]
        if self._followed is None and losses:
            self._followed = "eval_loss" if "eval_loss" in losses else losses[0]
        if self._followed is not None:
            self._evaluated_by(metrics, self._followed)

    def _evaluated_by(self, metrics: Any, name: str) -> None:
        if name in metrics:
            self.evaluated(float(metrics[name]))


def _loss_of_best(metric: str | None) -> str | None:
    """The loss that names the best model; None where that is another metric, or there is none."""
    if metric is None or not metric.endswith("loss"):
        return None
    return metric if metric.startswith("eval_") else f"eval_{metric}"


def _nothing(*_: Any, **__: Any) -> None:
    pass
