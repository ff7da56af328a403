"""What a fine-tuning run came to."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

from htsr.calibration.adapted import is_adapter_alone
from htsr.finetuning.progress import clock
from htsr.results import Column, Record, Table, Tabular, tabulate
from htsr.training.sampling.coverage import Coverage

BY_NORM = 3  # of what moved, the first so many are by the norm, the others by α
_BARS = "▁▂▃▄▅▆▇█"


@dataclass(frozen=True)
class Moved:
    """How far training has moved one matrix.

    Attributes:
        name: name of the matrix.
        relative: relative distance ‖W′ - W‖_F / ‖W‖_F; None where one of the two is zero or not finite.
        alpha_before: α of the matrix before training; None where it has none.
        alpha_after: α of the matrix after training; None where it has none.
    """

    name: str
    relative: float | None
    alpha_before: float | None
    alpha_after: float | None


@dataclass(frozen=True)
class Result(Tabular):
    """What a run came to; ``results.json`` holds the same.

    Attributes:
        output: folder of the model.
        metrics: ``train_loss`` (mean over all steps, those before a resume included), ``before_eval_loss`` and
            ``eval_loss`` (nats per token), ``before_accuracy`` and ``accuracy`` …, ``seconds`` and ``seconds_per_step``
            of the ``timed_steps`` (those since a resume, else all), ``steps``, ``best_step`` where the best model was
            kept, ``peak_mib`` (of ``peak_of``) and ``predicted_mib`` (of the same), both where this process trained,
            ``trainable_parameters``, and ``rounding`` where the weights that train are in bfloat16 or float16.
        coverage: how often each block trained, where blocks were sampled.
        losses: step and training loss of each log, the mean since the log before.
        moved: the matrices that moved most: the three of the largest relative distance, then the three whose α changed
            most; empty where spectra were not measured.
        model: path or hub id of the model that was fine-tuned.
    """

    output: str
    metrics: dict[str, Any]
    coverage: tuple[Coverage, ...] = ()
    losses: tuple[tuple[int, float], ...] = ()
    moved: tuple[Moved, ...] = ()
    model: str = ""

    @property
    def label(self) -> str:  # type: ignore[override]
        """The folder of the model."""
        return self.output

    def records(self) -> list[Record]:
        """One dictionary: the folder and the metrics."""
        return [{"output": self.output, **self.metrics}]

    def tables(self) -> tuple[Table, ...]:
        """The metrics in words and units, and what moved most."""
        left = dict(self.metrics)
        rows = [*_losses(left, self.losses), *_accuracy(left), *_memory(left), *_time(left)]
        rows += [(key.replace("_", " "), _shown(value)) for key, value in left.items()]
        columns = (Column("metric", text=True), Column("value", text=True))
        told = Table(columns, (*rows, ("model", self.output)))
        return (told, _moved(self.moved)) if self.moved else (told,)

    def facts(self) -> dict[str, Any]:
        """The folder, the model that was fine-tuned, how often each block trained, the losses, and what moved most."""
        return {
            "output": self.output,
            "model": self.model,
            "coverage": [asdict(block) for block in self.coverage],
            "losses": [list(point) for point in self.losses],
            "moved": [asdict(matrix) for matrix in self.moved],
        }

    def remarks(self) -> tuple[str, ...]:
        """How to go on with the model.

        Examples:
            >>> from htsr.finetuning.result import Moved, Result
            >>> Result("runs/my model", {}).remarks()[0]
            "talk to it: htsr chat 'runs/my model'"
            >>> moved = (Moved("lm_head", 0.1, 3.0, 3.1),)
            >>> Result("runs/mine", {}, moved=moved, model="a/base").remarks()[-1]
            'matrix by matrix: htsr compare a/base runs/mine'
        """
        folder = shlex.quote(self.output)
        # of an adapter transformers' own classes lose DoRA's magnitudes
        kind = "peft.AutoPeftModelForCausalLM" if is_adapter_alone(self.output) else "AutoModelForCausalLM"
        said = [f"talk to it: htsr chat {folder}", f'in Python: {kind}.from_pretrained("{self.output}")']
        if self.moved and self.model:
            said.append(f"matrix by matrix: htsr compare {shlex.quote(self.model)} {folder}")
        return tuple(said)


def _losses(left: dict[str, Any], losses: Sequence[tuple[int, float]]) -> list[tuple[str, str]]:
    """The rows of the losses, whose metrics are taken from those that are `left`."""
    rows = []
    if len(losses) > 1:
        first, last = losses[0][1], losses[-1][1]
        rows.append(("training loss", f"{first:.4g} {sparkline([loss for _, loss in losses])} {last:.4g}"))
    if left.get("train_loss") is not None:
        rows.append(("mean training loss", _shown(left["train_loss"])))
    left.pop("train_loss", None)
    before, after = left.pop("before_eval_loss", None), left.pop("eval_loss", None)
    if after is not None:
        rows.append(("evaluation loss", _shown(after) if before is None else f"{_shown(before)} → {_shown(after)}"))
    if "best_step" in left:
        rows.append(("best model", f"of step {left.pop('best_step')}"))
    return rows


def _accuracy(left: dict[str, Any]) -> list[tuple[str, str]]:
    if "accuracy" not in left:
        return []
    rows = []
    error, before_error = left.pop("standard_error", None), left.pop("before_standard_error", None)
    for key, spread, spread_before in (("accuracy", error, before_error), ("per_character", None, None)):
        before, after = left.pop(f"before_{key}", None), left.pop(key, None)
        if after is not None:
            pair = [(before, spread_before), (after, spread)] if before is not None else [(after, spread)]
            words = [f"{value:.4f}" + (f" ± {of:.4f}" if of is not None else "") for value, of in pair]
            rows.append((key.replace("per_character", "accuracy per character"), " → ".join(words)))
    left.pop("before_questions", None)
    if "questions" in left:
        rows.append(("questions", _shown(left.pop("questions"))))
    return rows


def _memory(left: dict[str, Any]) -> list[tuple[str, str]]:
    predicted, used, of = left.pop("predicted_mib", None), left.pop("peak_mib", None), left.pop("peak_of", "")
    words = [f"{used:.0f} MiB ({of})"] if used is not None else []
    words += [f"{predicted:.0f} MiB predicted"] if predicted is not None else []
    return [("peak memory", ", ".join(words))] if words else []


def _time(left: dict[str, Any]) -> list[tuple[str, str]]:
    seconds, step = left.pop("seconds", None), left.pop("seconds_per_step", None)
    words = [clock(seconds)] if seconds is not None else []
    words += [f"{step:.4g} s a step"] if step is not None else []
    timed = left.pop("timed_steps", None)
    if words and timed is not None and timed < left.get("steps", timed):
        words.append(f"of the last {f'{timed} steps' if timed > 1 else 'step'}, since the run went on")
    return [("training time", ", ".join(words))] if words else []


def _moved(matrices: Sequence[Moved]) -> Table:
    """What moved most: by the length of the change first, where it is known, then by α."""
    first = [place < BY_NORM and matrix.relative is not None for place, matrix in enumerate(matrices)]
    columns = (
        (Column("what moved most", text=True), lambda row: row[1].name),
        (Column("‖ΔW‖/‖W‖", "#.3g", "%"), lambda row: None if row[1].relative is None else 100 * row[1].relative),
        (Column("α before", ".3f"), lambda row: row[1].alpha_before),
        (Column("α after", ".3f"), lambda row: row[1].alpha_after),
        (Column("by", text=True), lambda row: "‖ΔW‖/‖W‖" if row[0] else "α"),
    )
    return tabulate(zip(first, matrices, strict=True), columns, spare=("by",), elsewhere="results.json has all")


def sparkline(values: Sequence[float], width: int = 24) -> str:
    """A curve of at most `width` characters, each the mean of a stretch of `values`; a gap where one is not finite.

    Examples:
        >>> from htsr.finetuning.result import sparkline
        >>> sparkline([4.0, 3.0, 2.0, 1.5, 1.2, 1.0, 1.0, 1.0])
        '█▆▃▂▁▁▁▁'
        >>> sparkline([2.0, 2.0])
        '▁▁'
    """
    count = min(width, len(values))
    edges = [len(values) * i // count for i in range(count + 1)] if count else []
    means = [sum(values[a:b]) / (b - a) for a, b in pairwise(edges)]
    finite = [mean for mean in means if abs(mean) < float("inf")]
    low, high = min(finite, default=0.0), max(finite, default=0.0)
    step = (high - low) / (len(_BARS) - 1) or 1.0
    return "".join(_BARS[round((mean - low) / step)] if abs(mean) < float("inf") else " " for mean in means)


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)
