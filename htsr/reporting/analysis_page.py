"""The report of an analysis: heat map, spectrum and numbers of each matrix, table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any
from urllib.parse import quote

from htsr.arrays import Vector
from htsr.reporting import figures
from htsr.reporting.html import Document, cells_html, chips_html, facts_html, fragment, heat_html, spectra_html
from htsr.reporting.page_data import about_data, heat_data, line_data, marks_data, spectra_data, table_data
from htsr.reporting.text import visible
from htsr.results import Record, Table

_FIRST = 8  # standouts that are seen without a click
_BESIDE = '<label>beside <select id="beside"><option value="">no other</option></select></label>'


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
        standouts: matrices to look at first, the clearest first, each with the reason why.
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
    standouts: Sequence[tuple[str, str]] = ()
    xmax: float | None = None


def analysis_document(page: AnalysisPage) -> Document:
    """The report, ready to be written."""
    body = fragment(
        "analysis.html",
        standouts=_standouts(page),
        summary=cells_html(page.summary),
        notes=chips_html(page.notes) or "<p>No notes.</p>",
        heat=heat_html(),
        matrix=spectra_html(_BESIDE),
        table=fragment("table.html"),
    )
    header = fragment("analysis-header.html", facts=facts_html(page.facts), caution=escape(page.caution))
    scripts = ("filters.js", "table.js", "heat.js", "spectra.js", "matrix.js", "analysis.js")
    return Document(page.title, header, body, content(page), scripts)


def content(page: AnalysisPage) -> dict[str, Any]:
    """What the scripts draw. Lists that are one per matrix are in the order of the records.

    ============ =====================================================================================
    labels       short names of the fields that people look at first
    about        what each field is
    standouts    positions of the matrices to look at first, the clearest first
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
        "standouts": [index for index, _ in _placed(page)],
        "table": table,
        "heat": heat_data(rows, page.numeric),
        "spectra": spectra_data(
            [spectra.get(row["name"]) for spectra in (page.eigenvalues, page.permuted) for row in rows]
        ),
        "lines": [line_data(row, page.eigenvalues.get(row["name"]), page.xmax) for row in rows],
        "marks": [marks_data(row) for row in rows],
    }


def _placed(page: AnalysisPage) -> list[tuple[int, str]]:
    """The standouts by their positions in the records."""
    places = {row["name"]: i for i, row in enumerate(page.records)}
    return [(places[name], reason) for name, reason in page.standouts if name in places]


def _standouts(page: AnalysisPage) -> str:
    """Links to the matrices to look at first, those after the first few behind a click."""
    items = [_standout(page.records[index]["name"], index, reason) for index, reason in _placed(page)]
    if not items:
        return '<p class="hint">No matrix stands out against those of its role and shape, or against noise.</p>'
    first, more = (
        f'<ol class="standouts"{start}>{"".join(part)}</ol>'
        for start, part in (("", items[:_FIRST]), (f' start="{_FIRST + 1}"', items[_FIRST:]))
    )
    return first + (f"<details><summary>{len(items) - _FIRST} more</summary>{more}</details>" if items[_FIRST:] else "")


def _standout(name: str, index: int, reason: str) -> str:
    address = escape(quote(visible(name), safe=""))
    link = f'<a href="#{address}" data-index="{index}">{escape(visible(name))}</a>'
    return f"<li>{link} <span>{escape(visible(reason))}</span></li>"
