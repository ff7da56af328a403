"""What the scripts of a page draw, ready for JSON: rows and their table, numbers by role and block, spectra.

Lists that are one per matrix are in the order of the records.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from htsr.arrays import Vector
from htsr.reporting import figures
from htsr.reporting.text import visible
from htsr.results import Record, Table

_DIGITS = 6  # of the numbers of a row
_CURVE_DIGITS = 4  # of the points of a curve


def table_data(records: Sequence[Record], numeric: Iterable[str], table: Table) -> dict[str, Any]:
    """What `table.js` shows.

    Args:
        records: one record for each matrix.
        numeric: names of the fields that are numbers.
        table: short table of the records, in their order; a last column of words qualifies the numbers.

    ============ =====================================================================================
    fields       names of the fields that some record has
    rows         their values, one list per matrix, None where there is no number
    numeric      names of those that are numbers
    short        headers and cells of the short table
    styles       class of each row, by status and α
    ============ =====================================================================================
    """
    shown = [name for name in (records[0] if records else ()) if any(row[name] not in (None, "") for row in records)]
    short = [*range(len(table.columns))]
    if table.columns[-1].text:
        short.insert(1, short.pop())  # what qualifies the numbers is never off the screen
    numbers = {*numeric, "block"}
    return {
        "fields": shown,
        "rows": [[plain(row[name]) for name in shown] for row in records],
        "numeric": [name for name in shown if name in numbers],
        "short": {
            "headers": [table.columns[i].header for i in short],
            "cells": [[visible(line[i]) for i in short] for line in table.cells()],
        },
        "styles": [tone or "plain" for tone in table.tones],
    }


def heat_data(records: Sequence[Record], numeric: Sequence[str]) -> dict[str, Any]:
    """What `heat.js` draws of records with ``role`` and ``block``.

    ============ =====================================================================================
    metrics      the `numeric` fields that some record has, in the order of the select box
    roles        roles of the matrices, in the model's order
    blocks       blocks as text
    members      positions of the matrices in each cell, (roles, blocks)
    values       per metric: means over each cell (roles, blocks) and limits of the colours
    ============ =====================================================================================
    """
    cells = figures.grid(records)
    metrics = figures.metrics_of(records, numeric)
    values = {metric: heat_values(cells.means(records, metric), metric) for metric in metrics}
    return {"metrics": metrics, **grid_data(cells), "values": values}


def grid_data(cells: figures.Grid) -> dict[str, Any]:
    """The axes and members of a heat map."""
    return {
        "roles": cells.roles,
        "blocks": ["–" if block is None else str(block) for block in cells.blocks],
        "members": cells.members,
    }


def heat_values(values: Vector, metric: str) -> dict[str, Any]:
    """The values (roles, blocks) of a heat map and the limits of their colours."""
    scale = figures.colour_scale(values, metric)
    return {
        "values": [curve(line) for line in values],
        "low": rounded(scale.low),
        "high": rounded(scale.high),
        "centre": scale.centre,
    }


def spectra_data(spectra: Sequence[Vector | None]) -> dict[str, Any]:
    """What `spectra.js` draws of eigenvalues (K,), ascending.

    ============ =====================================================================================
    curves       the curves of each ESD, None without eigenvalues
    ranks        how many eigenvalues are at least as large as each point of a survival function, by their number
    ============ =====================================================================================
    """
    curves = [_spectrum(eigenvalues) for eigenvalues in spectra]
    sizes = {spectrum["positive"] for spectrum in curves if spectrum}
    return {"curves": curves, "ranks": {size: figures.tail_ranks(size).tolist() for size in sizes}}


def _spectrum(eigenvalues: Vector | None) -> dict[str, Any] | None:
    histogram = None if eigenvalues is None else figures.log_histogram(eigenvalues)
    if eigenvalues is None or histogram is None:
        return None
    values, ranks = figures.survival(eigenvalues)
    return {
        "size": eigenvalues.size,
        "positive": int(ranks[-1]),
        "edges": curve(histogram.edges),
        "density": curve(histogram.density),
        "values": curve(values),
    }


def line_data(row: Record, eigenvalues: Vector | None, xmax: float | None = None) -> dict[str, Any] | None:
    """The ends of the fitted line of a row over its eigenvalues (K,), ascending; None where there is no fit."""
    line = None if eigenvalues is None else figures.fitted_line(row, eigenvalues, xmax)
    if line is None:
        return None
    ends = (line.low, line.high)
    return {
        "x": curve(ends),
        "density": curve(line.density(x) for x in ends),
        "survival": curve(line.survival(x) for x in ends),
    }


def marks_data(row: Record) -> dict[str, float | None]:
    """Where the vertical lines of the ESD of a row stand."""
    return {name: rounded(value) for name, value in figures.marks(row).items()}


def about_data(about: Mapping[str, str], names: Iterable[str]) -> dict[str, str]:
    """What each of the named fields is."""
    return {name: about.get(name, "") for name in names}


def rounded(value: float, digits: int = _DIGITS) -> float | None:
    """`value` to some digits, None where it is no number."""
    return float(f"{value:.{digits}g}") if math.isfinite(value) else None


def curve(values: Iterable[float]) -> list[float | None]:
    """The points of a curve, to the digits that can be seen."""
    return [rounded(value, _CURVE_DIGITS) for value in values]


def plain(value: Any) -> Any:
    """A value as it stands in a row."""
    return rounded(value) if isinstance(value, float) else visible(value) if isinstance(value, str) else value
