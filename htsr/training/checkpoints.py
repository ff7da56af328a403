"""Checkpoints of a fine-tuning run: which can be gone on from, how far they are, and the loss so far."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from htsr.errors import SourceError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that the Trainer wrote whole.

    Attributes:
        path: of its folder.
        step: optimizer steps done.
        loss: sum of the training loss over `loss_steps` steps.
        loss_steps: steps that the sum is over; fewer than `step` where an older version of htsr began the run.
    """

    path: Path
    step: int
    loss: float
    loss_steps: int


def last_checkpoint(output: Path) -> Checkpoint | None:
    """The last in the folder `output` that training can go on from; None where there are no checkpoints.

    Folders with other names than ``checkpoint-STEP``, and those without the state that the Trainer writes last, are not
    counted.

    Raises:
        SourceError: there are checkpoints, and none has the optimizer's state.
    """
    found = [folder for folder in output.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", folder.name)]
    whole = [checkpoint for folder in found if (checkpoint := _read(folder)) is not None]
    resumable = [checkpoint for checkpoint in whole if _has_optimizer(checkpoint.path)]
    if whole and not resumable:
        raise SourceError(
            f"{max(whole, key=lambda c: c.step).path} has no state of the optimizer (save_only_model?), without which "
            "the run cannot go on as it was; name another output to begin anew"
        )
    return max(resumable, key=lambda checkpoint: checkpoint.step, default=None)


def _read(folder: Path) -> Checkpoint | None:
    try:
        state: Any = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
        step = int(state["global_step"])
        losses = (state.get("stateful_callbacks") or {}).get(LossSum.__name__) or {}
        kept = losses.get("attributes") or {}
        return Checkpoint(folder, step, float(kept.get("total", 0.0)), int(kept.get("steps", 0)))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _has_optimizer(folder: Path) -> bool:
    return any(True for pattern in ("optimizer*", "global_step*") for _ in folder.glob(pattern))


class LossSum(TrainerCallback, ExportableState):
    """The sum of the training loss over all steps, kept in checkpoints: the Trainer's own mean is that of one piece.

    Args:
        checkpoint: the one that training goes on from.
    """

    def __init__(self, checkpoint: Checkpoint | None) -> None:
        self._before = checkpoint.loss if checkpoint else 0.0
        self._steps = checkpoint.loss_steps if checkpoint else 0
        self._new: torch.Tensor | None = None  # on the device, so that no step waits for it

    def add(self, loss: torch.Tensor) -> None:
        """Add the `loss` of one backward pass, a scalar, already divided by the accumulation steps."""
        self._new = loss.detach().double() if self._new is None else self._new + loss.detach()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """One more optimizer step.

        Args:
            args: as in the Trainer.
            state: likewise.
            control: likewise.
            kwargs: likewise.
        """
        self._steps += 1

    @property
    def total(self) -> float:
        """Σ loss in nats per token."""
        return self._before + (self._new.item() if self._new is not None else 0.0)

    def mean(self) -> float | None:
        """Mean over the steps that are known; None before the first."""
        return self.total / self._steps if self._steps else None

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"args": {}, "attributes": {"total": self.total, "steps": self._steps}}
