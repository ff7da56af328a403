"""Checkpoints of a fine-tuning run: from which a run can go on, how far they are, and the loss so far."""

from __future__ import annotations

import json
import re
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from htsr.errors import SourceError, reason_of

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that the Trainer has written completely.

    Attributes:
        path: path of its folder.
        step: number of optimizer steps done.
        loss: sum of the training loss over `loss_steps` steps.
        loss_steps: number of steps in that sum; fewer than `step` where an older version of htsr began the run.
        processes: number of processes that trained, see `count_processes`; None where an older version of htsr did.
        stopped: whether training had come to its end there, at the last step or by early stopping.
    """

    path: Path
    step: int
    loss: float
    loss_steps: int
    processes: int | None = None
    stopped: bool = False


def count_processes(arguments: Any) -> int:
    """The number of processes that train as TRL's `arguments` say; of one that trains on several GPUs, of those."""
    return int(arguments.world_size) * max(1, int(arguments.n_gpu))


def last_checkpoint(output: Path) -> Checkpoint | None:
    """The last checkpoint in the folder `output` from which training can go on; None where there are none.

    Folders with other names than ``checkpoint-STEP``, those without the state that the Trainer writes last, and those
    that lack a file without which the Trainer would go on as another run are not counted.

    Raises:
        SourceError: there are checkpoints, and none has all files; or a file of the last one is cut.
    """
    found = [folder for folder in output.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", folder.name)]
    whole = [checkpoint for folder in found if (checkpoint := _read(folder)) is not None]
    resumable = [checkpoint for checkpoint in whole if _lacking(checkpoint.path) is None]
    if whole and not resumable:
        last = max(whole, key=lambda checkpoint: checkpoint.step).path
        raise SourceError(
            f"{last} has no {_lacking(last)}, without which the run cannot go on as it was; name another output to "
            "begin anew"
        )
    last_whole = max(resumable, key=lambda checkpoint: checkpoint.step, default=None)
    if last_whole is not None:
        _check_files(last_whole.path)
    return last_whole


def _read(folder: Path) -> Checkpoint | None:
    try:
        state: Any = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
        step = int(state["global_step"])
        callbacks = state.get("stateful_callbacks") or {}
        control = (callbacks.get("TrainerControl") or {}).get("args") or {}
        losses = callbacks.get(LossSum.__name__) or {}
        kept = losses.get("attributes") or {}
        processes = kept.get("processes")
        return Checkpoint(
            folder,
            step,
            float(kept.get("total", 0.0)),
            int(kept.get("steps", 0)),
            None if processes is None else int(processes),
            bool(control.get("should_training_stop")),
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _lacking(folder: Path) -> str | None:
    """What a checkpoint lacks and the Trainer would silently do without; None where it is complete."""
    sharded = any(folder.glob("global_step*"))  # DeepSpeed's, of weights, optimizer and schedule
    for pattern, what in (
        ("optimizer*", "state of the optimizer (save_only_model?)"),
        ("scheduler.pt", "scheduler.pt"),
        ("*model*", "weights of the model"),
    ):
        if not sharded and not any(folder.glob(pattern)):
            return what
    return None if any(folder.glob("rng_state*.pth")) else "rng_state.pth"


def _check_files(folder: Path) -> None:
    """Insist that no file of a checkpoint is cut short, and that all shards are there."""
    from safetensors import SafetensorError, safe_open

    for path in sorted(folder.iterdir()):
        try:
            if path.name.endswith(".safetensors"):
                with safe_open(path, framework="pt"):
                    pass
            elif path.name.endswith(".index.json"):
                shards = set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values())
                if absent := sorted(shard for shard in shards if not (folder / shard).is_file()):
                    raise ValueError(f"{absent[0]} is not there")
            elif path.is_file() and path.name.startswith(("optimizer", "scheduler", "rng_state", "pytorch_model")):
                with zipfile.ZipFile(path):  # as torch saves
                    pass
        except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError, zipfile.BadZipFile) as error:
            raise SourceError(
                f"{path} is damaged ({reason_of(error, path)}): without the folder {folder.name}, --resume goes on "
                "from the checkpoint before it"
            ) from error


class LossSum(TrainerCallback, ExportableState):
    """The sum of the training loss over all steps, kept in checkpoints: the Trainer's own mean is that of one piece.

    Args:
        checkpoint: checkpoint from which training goes on; None at the beginning.
        processes: number of processes that train, which the checkpoints keep, too.
    """

    def __init__(self, checkpoint: Checkpoint | None, processes: int) -> None:
        self._processes = processes
        self._before = checkpoint.loss if checkpoint else 0.0
        self._steps = checkpoint.loss_steps if checkpoint else 0
        self._new: torch.Tensor | None = None  # on the device, so that no step waits for it

    def add(self, loss: torch.Tensor) -> None:
        """Add the `loss` of one backward pass, a scalar, already divided by the accumulation steps."""
        self._new = loss.detach().double() if self._new is None else self._new + loss.detach()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Count one more optimizer step.

        Args:
            args: arguments of the Trainer.
            state: the Trainer's state.
            control: the Trainer's control.
            kwargs: what else the Trainer passes to callbacks.
        """
        self._steps += 1

    @property
    def total(self) -> float:
        """Sum of the loss over the steps, in nats per token."""
        return self._before + (self._new.item() if self._new is not None else 0.0)

    def mean(self) -> float | None:
        """Mean loss over the steps that are known, in nats per token; None before the first."""
        return self.total / self._steps if self._steps else None

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"args": {}, "attributes": {"total": self.total, "steps": self._steps, "processes": self._processes}}
