"""What the page of many checkpoints or models shows: every metric of every matrix, from the first to the last."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from htsr.arrays import Vector
from htsr.reporting import figures
from htsr.reporting.html import Document, cells_html, facts_html, fragment, write_document
from htsr.reporting.page_data import about_data, grid_data, rounded
from htsr.reporting.text import visible
from htsr.reporting.trajectories import Pivot, pivot
from htsr.results import Record, Table

_SIGMA = "sigma"
_MOST = 1_000_000  # numbers that a page holds, some 8 MB
_PLACE = {"source", "step", "name", "role", "block"}


@dataclass(frozen=True)
class TrajectoryPage:
    """What the page shows.

    Attributes:
        title: title of the page.
        facts: facts by name, as text; empty ones are not shown.
        remarks: sentences below the facts.
        records: one record for each measured matrix of each source, with ``source``, ``step``, ``name``, ``role`` and
            ``block``; fields that are missing, None or not finite are no number. Sources with a step each are shown as
            a run in the order of their steps, others as models in the order of the records.
        about: explanation of each field, by name.
        numeric: names of the fields that are numbers, in the order in which they are offered.
        table: one line for each source, in the same order: means of the metrics that people look at first.
    """

    title: str
    facts: Mapping[str, str]
    remarks: Sequence[str]
    records: Sequence[Record]
    about: Mapping[str, str]
    numeric: Sequence[str]
    table: Table


def write_trajectory_page(page: TrajectoryPage, path: Path) -> None:
    """Write the page to `path`: one self-contained HTML file, whole or not at all.

    Raises:
        MissingDependencyError: plotly is not installed.
        HtsrError: the file cannot be written.
    """
    write_document(trajectory_document(page), path)


def trajectory_document(page: TrajectoryPage) -> Document:
    """The page, ready to be written."""
    points = pivot(page.records)
    sources = fragment("trajectory-sources.html", title=_kind(points).capitalize() + "s", table=cells_html(page.table))
    body = fragment(
        "trajectory.html",
        kind=_kind(points),
        change="change since the first" if points.steps else "difference from the first",
        means=f"Means of each group{', of what was measured by then' if points.steps else ''}.",
        first="" if points.steps else sources,  # of models one wants the ranking
        then=sources if points.steps else "",
        last=str(max(len(points.sources) - 1, 0)),
        heat=fragment("heat-map.html"),
        matrix=fragment("matrix.html", controls="", plot="The metric of the matrix over the sources"),
        table=fragment("table.html"),
    )
    metrics = _metrics(page, points)
    shown = _room(metrics, len(page.records))
    few = f"Of {len(page.records):,} points, this page has {len(shown)} of {len(metrics)} metrics."
    said = [*page.remarks, *([few] if shown != metrics else [])]
    remarks = "".join(f'<p class="reading">{escape(visible(remark))}</p>' for remark in said)
    header = f'<dl class="facts">{facts_html(page.facts)}</dl>{remarks}'
    scripts = ("filters.js", "table.js", "heat.js", "matrix.js", "series.js", "lines.js", "moved.js", "trajectory.js")
    return Document(page.title, header, body, content(page, points, shown), scripts, ("trajectory.css",))


def _kind(points: Pivot) -> str:
    return "model" if points.steps is None else "checkpoint"


def content(page: TrajectoryPage, points: Pivot, metrics: Sequence[str]) -> dict[str, Any]:
    """What the scripts draw of the named metrics.

    ============ =====================================================================================
    kind         ``checkpoint`` or ``model``
    sources      names of the sources
    steps        their steps, None where they have none
    matrices     name, role and block of each matrix
    labels       short names of the fields that people look at first
    about        what each metric is
    places       per point: index of its source and of its matrix
    values       per metric: its number at each point, None where it has none
    heat         roles, blocks and matrices of the heat map, `grid_data`
    scales       per metric: limits of the colours of its numbers, and of their change since the first
    ============ =====================================================================================
    """
    return {
        "kind": _kind(points),
        "sources": [visible(source) for source in points.sources],
        "steps": points.steps,
        "matrices": [
            {"name": visible(m["name"]), "role": visible(m["role"]), "block": m["block"]} for m in points.matrices
        ],
        "labels": figures.LABELS,
        "about": about_data(page.about, metrics),
        "places": points.places.T.tolist(),
        "values": {metric: [rounded(value) for value in points.column(metric)] for metric in metrics},
        "heat": grid_data(figures.grid(points.matrices))
        | {"metrics": [metric for metric in metrics if metric != _SIGMA]},
        "scales": {metric: _scales(points, metric) for metric in metrics},
    }


def _metrics(page: TrajectoryPage, points: Pivot) -> list[str]:
    """The metrics of the points: those that people look at first, and others that differ between checkpoints."""
    found = [name for name in dict.fromkeys([*figures.LABELS, *page.numeric]) if name in page.numeric]
    found = [name for name in found if name not in _PLACE and np.isfinite(points.column(name)).any()]
    if points.steps is not None:
        found = [name for name in found if name in figures.LABELS or np.nan_to_num(points.changes(name)).any()]
    return found


def _room(metrics: Sequence[str], points: int) -> list[str]:
    """The metrics that there is room for: of very many points, those that people look at first."""
    if len(metrics) * points <= _MOST:
        return list(metrics)
    return [name for name in metrics if name in figures.LABELS]


def _scales(points: Pivot, metric: str) -> dict[str, Any]:
    return {
        "value": _scale(points.latest(metric), metric),
        "change": _scale(points.changes(metric), f"{metric}_delta"),
    }


def _scale(values: Vector, metric: str) -> dict[str, Any]:
    scale = figures.colour_scale(values, metric)
    return {"low": rounded(scale.low), "high": rounded(scale.high), "centre": scale.centre}
