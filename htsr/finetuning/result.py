"""What a fine-tuning run came to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from htsr.training.sampling.coverage import Coverage


@dataclass(frozen=True)
class Result:
    """What a run came to; ``results.json`` holds the same.

    Attributes:
        output: folder of the model.
        metrics: ``train_loss`` (mean over all steps, those before a resume included) and ``eval_loss`` (nats per
            token), ``accuracy`` and ``before_accuracy`` …, ``seconds_per_step`` (of the steps since a resume),
            ``steps``, ``peak_mib`` (of ``peak_of``), ``trainable_parameters``.
        coverage: how often each block trained, where blocks were sampled.
    """

    output: str
    metrics: dict[str, Any]
    coverage: tuple[Coverage, ...] = ()
