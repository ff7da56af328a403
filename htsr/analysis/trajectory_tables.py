"""The tables of a trajectory that people look at."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from htsr.results import Column, Table, Value, tabulate

_Line = tuple[str, int | None, Mapping[str, float]]


def _mean(title: str, field: str, format: str) -> tuple[Column, Callable[[_Line], Value]]:
    return Column(title, format, optional=True), lambda line: line[2].get(field)


_SOURCES: tuple[tuple[Column, Callable[[_Line], Value]], ...] = (
    (Column("source", text=True), lambda line: line[0]),
    (Column("step", ".0f", optional=True), lambda line: line[1]),
    (Column("matrices", ".0f"), lambda line: line[2]["matrices"]),
    _mean("α", "alpha", ".2f"),
    _mean("⟨ln λ̃⟩", "trace_log", ".2f"),
    _mean("stable rank", "stable_rank", ".1f"),
    _mean("entropy", "entropy", ".3f"),
    _mean("log ‖W‖²", "log_norm", ".2f"),
    _mean("change", "relative", ".4f"),
)


def sources_table(summary: Mapping[str, Mapping[str, float]], steps: Sequence[int]) -> Table:
    """Means of every source of a trajectory, one line each.

    Args:
        summary: means by metric of each source, with the number of ``matrices``.
        steps: step of each source; empty where they are no steps.
    """
    numbers: Sequence[int | None] = steps or [None] * len(summary)
    lines = [(source, step, means) for (source, means), step in zip(summary.items(), numbers, strict=True)]
    return tabulate(lines, _SOURCES, spare=("entropy", "log ‖W‖²", "matrices"))
