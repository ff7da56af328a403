"""How a callback logs by the transformers Trainer that calls it."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from types import FrameType

    from transformers import Trainer

Log = Callable[[dict[str, float], int], Any]


def calling_trainers() -> list[Trainer]:
    """The transformers Trainers that call, the innermost first: one may train in a callback of another.

    Examples:
        >>> from htsr.training.trainer_log import calling_trainers
        >>> calling_trainers()
        []
    """
    from transformers import Trainer

    found: list[Trainer] = []
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code.co_varnames[:1] == ("self",) and hasattr(Trainer, code.co_name):  # f_locals of others outlive the call
            trainer = frame.f_locals.get("self")
            if isinstance(trainer, Trainer) and not any(trainer is one for one in found):
                found.append(trainer)
        frame = frame.f_back
    return found


def log_of_trainer() -> Log | None:
    """How the Trainer that calls logs values at a step, which is that of now; None where there is none.

    A callback is handed model and optimizer, and not the Trainer. To add values in `on_log` would be too late: trackers
    come before the callbacks of a user. TRL's trainers add means of what they have counted since their last log to
    whatever is logged, and begin again: their own `log` is passed by. A callback that is kept does not keep the
    Trainer, with its optimizer and data.

    Examples:
        >>> from htsr.training.trainer_log import log_of_trainer
        >>> log_of_trainer() is None  # no Trainer has called this
        True
    """
    from transformers import Trainer

    trainers = calling_trainers()
    if not trainers:
        return None
    of_trainer = weakref.ref(trainers[0])
    del trainers

    def log(values: dict[str, float], _: int) -> None:
        if (trainer := of_trainer()) is not None:
            Trainer.log(trainer, values)

    return log
