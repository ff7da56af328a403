"""The report of an analysis: heat map, spectrum and numbers of each matrix, table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from htsr.arrays import Vector
from htsr.reporting import figures
from htsr.reporting.html import Document, cells_html, chips_html, facts_html, fragment
from htsr.reporting.page_data import about_data, heat_data, line_data, marks_data, spectra_data, table_data
from htsr.results import Record, Table


@dataclass(frozen=True)
class AnalysisPage:
    """What the report shows.

    Attributes:
        title: title of the page.
        facts: facts by name, as text; empty ones are not shown.
        notes: kinds of notes, each with the number of rows that have it.
        caution: sentence below the notes.
        records: one record for each matrix, with ``name``, ``role``, ``block`` and the fields that `figures` draws.
        about: explanation of each field, by name.
        numeric: names of the fields that are numbers.
        table: short table of the records, in their order.
        summary: table of their means.
        eigenvalues: spectra by matrix name, (K,) ascending.
        permuted: spectra of the permuted matrices, likewise (K,).
        xmax: largest eigenvalue that took part in the fits; None for all.
    """

    title: str
    facts: Mapping[str, str]
    notes: Sequence[tuple[str, int]]
    caution: str
    records: Sequence[Record]
    about: Mapping[str, str]
    numeric: Sequence[str]
    table: Table
    summary: Table
    eigenvalues: Mapping[str, Vector]
    permuted: Mapping[str, Vector]
    xmax: float | None = None


def analysis_document(page: AnalysisPage) -> Document:
    """The report, ready to be written."""
    body = fragment(
        "analysis.html",
        summary=cells_html(page.summary),
        notes=chips_html(page.notes) or "<p>No notes.</p>",
        heat=fragment("heat.html"),
        matrix=fragment("matrix.html"),
        table=fragment("table.html"),
    )
    header = fragment("analysis-header.html", facts=facts_html(page.facts), caution=escape(page.caution))
    scripts = ("table.js", "heat.js", "spectra.js", "matrix.js", "analysis.js")
    return Document(page.title, header, body, content(page), scripts)


def content(page: AnalysisPage) -> dict[str, Any]:
    """What the scripts draw. Lists that are one per matrix are in the order of the records.

    ============ =====================================================================================
    labels       short names of the fields that people look at first
    about        what each field is
    table        rows and short table, `table_data`
    heat         numbers by role and block, `heat_data`
    spectra      spectra of the matrices, then of the permuted ones, `spectra_data`
    lines        per matrix: ends of the fitted line
    marks        per matrix: where the vertical lines stand
    ============ =====================================================================================
    """
    rows = page.records
    table = table_data(rows, page.numeric, page.table)
    return {
        "labels": figures.LABELS,
        "about": about_data(page.about, table["fields"]),
        "table": table,
        "heat": heat_data(rows, page.numeric),
        "spectra": spectra_data(
            [spectra.get(row["name"]) for spectra in (page.eigenvalues, page.permuted) for row in rows]
        ),
        "lines": [line_data(row, page.eigenvalues.get(row["name"]), page.xmax) for row in rows],
        "marks": [marks_data(row) for row in rows],
    }
