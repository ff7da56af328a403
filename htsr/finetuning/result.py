"""What a fine-tuning run came to."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from htsr.results import Column, Record, Table, Tabular
from htsr.training.sampling.coverage import Coverage


@dataclass(frozen=True)
class Result(Tabular):
    """What a run came to; ``results.json`` holds the same.

    Attributes:
        output: folder of the model.
        metrics: ``train_loss`` (mean over all steps, those before a resume included) and ``eval_loss`` (nats per
            token), ``accuracy`` and ``before_accuracy`` …, ``seconds_per_step`` (of the steps since a resume),
            ``steps``, ``peak_mib`` (of ``peak_of``), ``trainable_parameters``, and ``rounding`` where the weights that
            train are in bfloat16 or float16.
        coverage: how often each block trained, where blocks were sampled.
    """

    output: str
    metrics: dict[str, Any]
    coverage: tuple[Coverage, ...] = ()

    @property
    def label(self) -> str:  # type: ignore[override]
        """The folder of the model."""
        return self.output

    def records(self) -> list[Record]:
        """One dictionary: the folder and the metrics."""
        return [{"output": self.output, **self.metrics}]

    def tables(self) -> tuple[Table, ...]:
        """The metrics in words and units."""
        rows = [(key.replace("_", " "), _shown(value)) for key, value in self.metrics.items() if "peak" not in key]
        if "peak_mib" in self.metrics:
            rows.append(("peak memory", f"{self.metrics['peak_mib']:.0f} MiB ({self.metrics['peak_of']})"))
        columns = (Column("metric", text=True), Column("value", text=True))
        return (Table(columns, (*rows, ("model", self.output))),)

    def facts(self) -> dict[str, Any]:
        """The folder, and how often each block trained."""
        return {"output": self.output, "coverage": [asdict(block) for block in self.coverage]}


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)
