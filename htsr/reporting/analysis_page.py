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
        standouts: matrices to look at first, each with the reason why; groups of a kind, the clearest first.
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
    standouts: Sequence[Sequence[tuple[str, str]]] = ()
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
    standouts    positions of the matrices to look at first, those of the clearest kind first
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
        "standouts": [index for kind in _placed(page) for index, _ in kind],
        "table": table,
        "heat": heat_data(rows, page.numeric),
        "spectra": spectra_data(
            [spectra.get(row["name"]) for spectra in (page.eigenvalues, page.permuted) for row in rows]
        ),
        "lines": [line_data(row, page.eigenvalues.get(row["name"]), page.xmax) for row in rows],
        "marks": [marks_data(row) for row in rows],
    }


def _placed(page: AnalysisPage) -> list[list[tuple[int, str]]]:
    """The standouts by their positions in the records."""
    places = {row["name"]: i for i, row in enumerate(page.records)}
    return [[(places[name], reason) for name, reason in kind] for kind in page.standouts]


def _standouts(page: AnalysisPage) -> str:
    """Links to the matrices to look at first; behind a click those like another, and those after the first few."""
    items = [f"<li>{_kind(page, kind)}</li>" for kind in _placed(page)]
    if not items:
        return '<p class="hint">No matrix stands out against those of its role and shape, or against noise.</p>'
    first = f'<ol class="standouts">{"".join(items[:_FIRST])}</ol>'
    rest = f'<ol class="standouts" start="{_FIRST + 1}">{"".join(items[_FIRST:])}</ol>'
    return first + (_folded(f"{len(items) - _FIRST} more", rest) if items[_FIRST:] else "")


def _kind(page: AnalysisPage, kind: Sequence[tuple[int, str]]) -> str:
    first, *others = (_standout(page.records[index]["name"], index, reason) for index, reason in kind)
    like = "".join(f"<li>{other}</li>" for other in others)
    return first + (_folded(f"{len(others)} more like it", f"<ul>{like}</ul>") if others else "")


def _folded(summary: str, content: str) -> str:
    return f"<details><summary>{summary}</summary>{content}</details>"


def _standout(name: str, index: int, reason: str) -> str:
    address = escape(quote(visible(name), safe=""))
    link = f'<a href="#{address}" data-index="{index}">{escape(visible(name))}</a>'
    return f"{link} <span>{escape(visible(reason))}</span>"
