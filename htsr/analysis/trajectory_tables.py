"""The tables of a trajectory that people look at."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from htsr.analysis.movement import Move
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
    _mean("‖ΔW‖/‖W‖", "relative", ".4f"),
)


def sources_table(summary: Mapping[str, Mapping[str, float]], steps: Sequence[int]) -> Table:
    """Means of every source of a trajectory, one line each; of models those with the smallest α first.

    Args:
        summary: means by metric of each source, with the number of ``matrices``.
        steps: step of each source; empty where they are models.
    """
    numbers: Sequence[int | None] = steps or [None] * len(summary)
    lines = [(source, step, means) for (source, means), step in zip(summary.items(), numbers, strict=True)]
    if not steps:
        lines.sort(key=lambda line: line[2].get("alpha", math.inf))
    return tabulate(lines, _SOURCES, spare=("entropy", "log ‖W‖²", "matrices", "stable rank"))


_MOVED: tuple[tuple[Column, Callable[[Move], Value]], ...] = (
    (Column("moved most", text=True), lambda move: move.name),
    (Column("role", text=True), lambda move: move.role),
    (Column("first α", ".2f"), lambda move: move.first),
    (Column("last α", ".2f"), lambda move: move.last),
    (Column("Δα", "+.2f"), lambda move: move.change),
    (Column("|Δα|/σ", ".1f"), lambda move: move.beyond),
    (Column("‖ΔW‖/‖W‖", ".4f", optional=True), lambda move: move.relative),
)


def moved_table(moves: Sequence[Move]) -> Table:
    """One line for each of these `moves` of α."""
    return tabulate(moves, _MOVED, spare=("role", "Δα"))
