"""The tables of a trajectory that people look at."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from htsr.analysis.movement import Move
from htsr.results import Column, Table, Value, tabulate

LINES = 40  # checkpoints in a table for a terminal

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
    """Means of every source of a trajectory, one line each.

    Args:
        summary: means by metric of each source, with the number of ``matrices``.
        steps: step of each source; empty where they are models.
    """
    numbers: Sequence[int | None] = steps or [None] * len(summary)
    lines = [(source, step, means) for (source, means), step in zip(summary.items(), numbers, strict=True)]
    return tabulate(lines, _SOURCES, spare=("entropy", "log ‖W‖²", "matrices", "stable rank"))


def shown_table(summary: Mapping[str, Mapping[str, float]], steps: Sequence[int]) -> Table:
    """`sources_table` for a terminal: of models those with the smallest α first, of many steps `LINES`, evenly spaced.

    Args:
        summary: means by metric of each source, with the number of ``matrices``.
        steps: step of each source; empty where they are models.

    Examples:
        >>> from htsr.analysis.trajectory_tables import shown_table
        >>> models = {"a": {"matrices": 2, "alpha": 4.0}, "b": {"matrices": 2, "alpha": 3.0}}
        >>> shown_table(models, ()).cells()
        [['b', '2', '3.00'], ['a', '2', '4.00']]
    """
    names = list(summary)
    if not steps:
        names.sort(key=lambda name: summary[name].get("alpha", math.inf))
    elif len(names) > LINES:
        names = [names[i * (len(names) - 1) // (LINES - 1)] for i in range(LINES)]
    places = dict(zip(summary, steps, strict=False))
    return sources_table({name: summary[name] for name in names}, [places[name] for name in names if name in places])


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
