"""The page of two models: what changed and where, and both spectra and the directions of each matrix."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from htsr.arrays import Vector
from htsr.reporting import figures
from htsr.reporting.html import Document, cells_html, facts_html, fragment, heat_html, spectra_html, write_document
from htsr.reporting.page_data import about_data, curve, heat_data, line_data, plain, spectra_data, table_data
from htsr.reporting.text import visible
from htsr.results import Record, Table

_MOVED = 12  # matrices in the list of those that moved most
_VECTORS = 40  # leading directions of a matrix that there is room for

_DISTANCES = {
    "relative": "‖A − B‖ / ‖A‖",
    "frobenius": "‖A − B‖",
    "cosine": "cosine",
    "cka": "CKA",
    "esd_distance": "ESD distance",
}
_DIRECTIONS = {
    "overlap_left": "left overlap",
    "overlap_right": "right overlap",
    "angle_left": "left angle°",
    "angle_right": "right angle°",
    "largest_angle_left": "largest left angle°",
    "largest_angle_right": "largest right angle°",
    "intruders": "intruders",
    "share_both": "change within a's leading subspaces",
    "share_left": "change within a's left subspace",
    "share_right": "change within a's right subspace",
    "share_scaling": "change that only rescales",
    "effective_rank": "effective rank of the change",
    "change_stable_rank": "stable rank of the change",
}
_LABELS = {"relative": _DISTANCES["relative"]} | _DIRECTIONS | _DISTANCES
"""What people look at first of a change, and what to call it."""

_LESS_IS_MORE = {"overlap_left", "overlap_right", "cosine", "cka"}  # they fall as a matrix moves
_MOVES = ("relative", "overlap_left", "overlap_right", "intruders", "angle_left", "effective_rank", "esd_distance")
_OF_THE_METRICS = ("alpha", "stable_rank", "trace_log", "log_norm")


@dataclass(frozen=True)
class Cosines:
    """The leading singular vectors of one matrix in both models, k of each.

    Attributes:
        cosines: |cosine| of each leading left singular vector of a (rows) with each of b (columns), (k, k) in [0, 1].
        values_a: leading singular values of a, (k,) descending.
        values_b: leading singular values of b, (k,) descending.
        nearest: largest |cosine| of each leading left singular vector of b with any of a, not only the leading, (k,);
            it is an intruder dimension where this is below some ε.
    """

    cosines: Vector
    values_a: Sequence[float]
    values_b: Sequence[float]
    nearest: Sequence[float]


@dataclass(frozen=True)
class ComparisonPage:
    """What the page shows.

    Attributes:
        title: title of the page.
        labels: names of the two models.
        facts: facts by name, as text; empty ones are not shown.
        remarks: sentences below the facts.
        records: one record for each pair, with ``name``, ``role`` and ``block``, all with the same fields.
        about: explanation of each field, by name; those of ``m_a``, ``m_b`` and ``m_delta`` may stand under ``m``.
        numeric: names of the fields that are numbers, in the order in which they are offered.
        table: short table of the records, in their order.
        means: table of the means of both models.
        eigenvalues_a: spectra of a by the names of the records, (K,) ascending.
        eigenvalues_b: spectra of b, likewise.
        cosines: leading directions of both models, by the names of the records.
        heads: numbers of each attention head, one record a head with ``head`` and numbers of the change, by the names
            of the records.
        xmax: largest eigenvalue that took part in the fits; None for all.
    """

    title: str
    labels: tuple[str, str]
    facts: Mapping[str, str]
    remarks: Sequence[str]
    records: Sequence[Record]
    about: Mapping[str, str]
    numeric: Sequence[str]
    table: Table
    means: Table
    eigenvalues_a: Mapping[str, Vector] = field(default_factory=dict)
    eigenvalues_b: Mapping[str, Vector] = field(default_factory=dict)
    cosines: Mapping[str, Cosines] = field(default_factory=dict)
    heads: Mapping[str, Sequence[Record]] = field(default_factory=dict)
    xmax: float | None = None


def write_comparison(page: ComparisonPage, path: Path) -> None:
    """Write the page to `path`: one self-contained HTML file, whole or not at all.

    Raises:
        MissingDependencyError: plotly is not installed.
        HtsrError: the file cannot be written.
    """
    write_document(comparison_document(page), path)


def comparison_document(page: ComparisonPage) -> Document:
    """The page, ready to be written."""
    body = fragment(
        "comparison.html",
        means=cells_html(page.means),
        heat=heat_html(),
        matrix=spectra_html(),
        table=fragment("table.html"),
    )
    remarks = "".join(f'<p class="reading">{escape(visible(remark))}</p>' for remark in page.remarks)
    header = f'<dl class="facts">{facts_html(page.facts)}</dl>{remarks}'
    scripts = ("filters.js", "table.js", "heat.js", "spectra.js", "matrix.js", "comparison.js")
    return Document(page.title, header, body, content(page), scripts, ("comparison.css",))


def content(page: ComparisonPage) -> dict[str, Any]:
    """What the scripts draw. Lists that are one per pair are in the order of the records.

    ============ =====================================================================================
    models       names of the two models
    labels       short names of the fields that people look at first
    about        what each field is
    metrics      metrics of both models that people look at first
    distances    numbers of the change, likewise
    directions   numbers of directions, likewise
    table        rows and short table, `table_data`
    heat         numbers by role and block, `heat_data`
    moved        per measure of a change: positions of the pairs that moved most, first of all
    spectra      spectra of the first model, then of the second, `spectra_data`
    lines        ends of the fitted lines, likewise
    cosines      per pair: leading directions of both, None where they are not known
    heads        per pair: names of the numbers of a head, and these, one list a head
    ============ =====================================================================================
    """
    rows = page.records
    table = table_data(rows, page.numeric, page.table)
    labels = _labels(table["fields"])
    numeric = list(dict.fromkeys([*(name for name in labels if name in page.numeric), *page.numeric]))
    names = [row["name"] for row in rows]
    sides = [(page.eigenvalues_a, "a"), (page.eigenvalues_b, "b")]
    return {
        "models": [visible(label) for label in page.labels],
        "labels": labels,
        "about": about_data(_about(page.about, table["fields"]), table["fields"]),
        "metrics": [m for m in figures.LABELS if f"{m}_a" in table["fields"] or f"{m}_b" in table["fields"]],
        "distances": [name for name in _DISTANCES if name in table["fields"]],
        "directions": [name for name in _DIRECTIONS if name in table["fields"]],
        "table": table,
        "heat": _alike(heat_data(rows, numeric)),
        "moved": {name: order for name in _measures(labels) if (order := _moved(rows, name))},
        "spectra": spectra_data([spectra.get(name) for spectra, _ in sides for name in names]),
        "lines": [
            line_data(_side(row, side), spectra.get(row["name"]), page.xmax) for spectra, side in sides for row in rows
        ],
        "cosines": [_cosines(page.cosines.get(name)) for name in names],
        "heads": [_heads(page.heads.get(name, ())) for name in names],
    }


def _labels(fields: Sequence[str]) -> dict[str, str]:
    """Short names of the `fields` that people look at first: of the change, then of the metrics."""
    metrics = {
        f"{name}_{side}": word.format(title)
        for side, word in figures.OF_TWO.items()
        for name, title in figures.LABELS.items()
    }
    return {name: label for name, label in (_LABELS | metrics).items() if name in fields}


def _about(about: Mapping[str, str], fields: Sequence[str]) -> dict[str, str]:
    """What each of the `fields` is, with what is known of a metric beside those of both models."""
    sides = {"a": "in the first model", "b": "in the second model", "delta": "second model minus first"}
    found = dict(about)
    for name in fields:
        metric, _, side = name.rpartition("_")
        if name not in found and side in sides and metric in about:
            found[name] = f"{about[metric].rstrip('.')}; {sides[side]}"
    return found


def _alike(heat: dict[str, Any]) -> dict[str, Any]:
    """The same heat maps, with one scale for both models."""
    values = heat["values"]
    for name in [name for name in values if name.endswith("_a") and f"{name[:-2]}_b" in values]:
        both = [values[name], values[f"{name[:-2]}_b"]]
        low, high = min(x["low"] for x in both), max(x["high"] for x in both)
        for side in both:
            side.update(low=low, high=high)
    return heat


def _measures(labels: Mapping[str, str]) -> list[str]:
    return [name for name in (*_MOVES, *(f"{name}_delta" for name in _OF_THE_METRICS)) if name in labels]


def _moved(rows: Sequence[Record], measure: str) -> list[int]:
    """Positions of the rows that moved most by a measure, those that did not move left out."""
    sign = -1 if measure in _LESS_IS_MORE else 1
    values = {i: value for i, row in enumerate(rows) if (value := figures.number(row, measure)) is not None}
    rest = 1.0 if measure in _LESS_IS_MORE else 0.0
    moves = {i: sign * (value if sign < 0 else abs(value)) for i, value in values.items() if value != rest}
    return sorted(moves, key=lambda i: -moves[i])[:_MOVED]


def _side(row: Record, side: str) -> Record:
    """What a fitted line needs of one side of a pair."""
    return {name: row.get(f"{name}_{side}") for name in ("alpha", "lambda_min", "num_pl_tail", "num_fingers")}


def _cosines(found: Cosines | None) -> dict[str, Any] | None:
    if found is None:
        return None
    return {
        "k": len(found.values_b),
        "cosines": [[round(float(value), 3) for value in line[:_VECTORS]] for line in found.cosines[:_VECTORS]],
        "a": curve(found.values_a[:_VECTORS]),
        "b": curve(found.values_b[:_VECTORS]),
        "nearest": [round(float(value), 3) for value in found.nearest[:_VECTORS]],
    }


def _heads(heads: Sequence[Record]) -> dict[str, Any] | None:
    if not heads:
        return None
    fields = [name for name in ("head", *_LABELS) if any(head.get(name) is not None for head in heads)]
    return {"fields": fields, "values": [[plain(head.get(name)) for name in fields] for head in heads]}
