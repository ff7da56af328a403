"""The best model of a run: kept to its end, also where a run goes on from a checkpoint, and early stopping."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import EarlyStoppingCallback, TrainerCallback

from htsr.errors import SourceError


class KeptBest(TrainerCallback):
    """Where the best checkpoint so far is: its folder may have another name than when it was written."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Look for the best checkpoint of the run that goes on.

        Args:
            args: arguments of the Trainer.
            state: state of the Trainer, whose path is put right.
            control: control of the Trainer.
            kwargs: what else the Trainer passes to callbacks.

        Raises:
            SourceError: it is not there; the Trainer would go on to keep the last model in its place.
        """
        if state.best_model_checkpoint is None:
            return
        best = Path(args.output_dir) / Path(state.best_model_checkpoint).name
        if not best.is_dir():
            raise SourceError(f"{best}, the best checkpoint so far, is not there; name another output to begin anew")
        state.best_model_checkpoint = str(best)


class EarlyStopping(EarlyStoppingCallback):
    """transformers' callback, whose patience goes on from a checkpoint where it was."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take up the count of evaluations without an improvement.

        Args:
            args: arguments of the Trainer.
            state: state of the Trainer, in which a checkpoint keeps the count.
            control: control of the Trainer.
            kwargs: what else the Trainer passes to callbacks.
        """
        super().on_train_begin(args, state, control, **kwargs)  # type: ignore[no-untyped-call]
        kept = state.stateful_callbacks.get(type(self).__name__)
        if isinstance(kept, dict):
            self.early_stopping_patience_counter = int(kept["attributes"]["early_stopping_patience_counter"])


def best_step(state: Any) -> int | None:
    """Step of the best checkpoint as the Trainer's `state` has it; None where none was kept.

    Examples:
        >>> from types import SimpleNamespace
        >>> from htsr.finetuning.stopping import best_step
        >>> best_step(SimpleNamespace(best_model_checkpoint="runs/first/checkpoint-40"))
        40
    """
    path = state.best_model_checkpoint
    return None if path is None else int(Path(path).name.rpartition("-")[2])
