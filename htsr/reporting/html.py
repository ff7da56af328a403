"""The report: one HTML file that needs nothing else, not even a network.

Python computes everything that is drawn and leaves it as JSON in the page; `report.js` only draws. Names come from
files of strangers: they are escaped here, set as text there, and a content security policy lets nothing run but the
two scripts of the page, by their hashes, and nothing load at all.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from string import Template
from typing import Any

from htsr._version import __version__
from htsr.arrays import Vector
from htsr.errors import MissingDependencyError
from htsr.files import written
from htsr.reporting import figures
from htsr.reporting.text import visible
from htsr.results import Record, Table

_DIGITS = 6  # of the numbers of a row
_CURVE_DIGITS = 4  # of the points of a curve


@dataclass(frozen=True)
class Page:
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


def require_plotly() -> None:
    """Make sure that a report can be written, without importing plotly.

    Raises:
        MissingDependencyError: plotly is not installed.
    """
    if find_spec("plotly") is None:
        raise MissingDependencyError("the report needs plotly: pip install 'htsr[report]'")


def write_page(page: Page, path: Path) -> None:
    """Write the report to `path`: one self-contained HTML file, whole or not at all.

    Raises:
        MissingDependencyError: plotly is not installed.
        HtsrError: the file cannot be written.
    """
    require_plotly()
    from plotly.offline import get_plotlyjs

    text = render(page, get_plotlyjs())
    with written(path) as temporary:
        temporary.write_bytes(text.encode("utf-8", "replace"))  # a path may hold what UTF-8 cannot say


def render(page: Page, plotly: str) -> str:
    """The text of the page, with the source of plotly.js put in."""
    scripts = [_script(plotly), _script(_asset("report.js"))]
    hashes = " ".join(f"'sha256-{_digest(script)}'" for script in scripts)
    return Template(_asset("report.html")).substitute(
        hashes=hashes,
        title=escape(visible(page.title)),
        version=escape(__version__),
        style=_asset("report.css"),
        facts=_facts(page.facts),
        notes=_notes(page.notes),
        caution=escape(page.caution),
        summary=_cells(page.summary),
        data=_json(content(page)),
        plotly=scripts[0],
        script=scripts[1],
    )


def content(page: Page) -> dict[str, Any]:
    """What `report.js` draws, ready for JSON. Lists that are one per matrix are in the order of the records.

    ============ =====================================================================================
    fields       names of the metrics that some matrix has
    rows         their values, one list per matrix, None where there is no number
    about        what each metric is
    labels       short names of those people look at first
    metrics      those that are numbers, in the order of the select box
    short        headers and cells of the short table
    styles       class of each row, by status and α
    grid         roles, blocks and members of the heat map
    heat         per metric: values (roles, blocks) and limits of the colours
    ranks        how many eigenvalues are at least as large as each point of a survival function, by their number
    spectra      per matrix: the curves of its ESD, None without eigenvalues
    permuted     the same of the permuted matrix
    lines        per matrix: ends of the fitted line
    marks        per matrix: where the vertical lines stand
    ============ =====================================================================================
    """
    rows = page.records
    shown = [name for name in (rows[0] if rows else ()) if any(row[name] not in (None, "") for row in rows)]
    first, *others, note = range(len(page.table.columns))
    short = [first, note, *others]  # what qualifies the numbers is never off the screen
    cells = figures.grid(rows)
    metrics = figures.metrics_of(rows, page.numeric)
    spectra = [_spectrum(page.eigenvalues.get(row["name"])) for row in rows]
    permuted = [_spectrum(page.permuted.get(row["name"])) for row in rows]
    return {
        "fields": shown,
        "rows": [[_plain(row[name]) for name in shown] for row in rows],
        "about": {name: page.about.get(name, "") for name in shown},
        "labels": figures.LABELS,
        "metrics": metrics,
        "numeric": [name for name in shown if name in page.numeric or name == "block"],
        "short": {
            "headers": [page.table.columns[i].header for i in short],
            "cells": [[visible(line[i]) for i in short] for line in page.table.cells()],
        },
        "styles": [tone or "plain" for tone in page.table.tones],
        "grid": {
            "roles": cells.roles,
            "blocks": ["–" if block is None else str(block) for block in cells.blocks],
            "members": cells.members,
        },
        "heat": {metric: _heat(cells, rows, metric) for metric in metrics},
        "ranks": {s["positive"]: figures.tail_ranks(s["positive"]).tolist() for s in (*spectra, *permuted) if s},
        "spectra": spectra,
        "permuted": permuted,
        "lines": [_line(row, page.eigenvalues.get(row["name"]), page.xmax) for row in rows],
        "marks": [{name: _round(value) for name, value in figures.marks(row).items()} for row in rows],
    }


def _spectrum(eigenvalues: Vector | None) -> dict[str, Any] | None:
    histogram = None if eigenvalues is None else figures.log_histogram(eigenvalues)
    if eigenvalues is None or histogram is None:
        return None
    values, ranks = figures.survival(eigenvalues)
    return {
        "size": eigenvalues.size,
        "positive": int(ranks[-1]),
        "edges": _curve(histogram.edges),
        "density": _curve(histogram.density),
        "values": _curve(values),
    }


def _heat(cells: figures.Grid, rows: Sequence[Record], metric: str) -> dict[str, Any]:
    values = cells.means(rows, metric)
    scale = figures.colour_scale(values, metric)
    return {
        "values": [_curve(line) for line in values],
        "low": _round(scale.low),
        "high": _round(scale.high),
        "centre": scale.centre,
    }


def _line(row: Record, eigenvalues: Vector | None, xmax: float | None) -> dict[str, Any] | None:
    line = None if eigenvalues is None else figures.fitted_line(row, eigenvalues, xmax)
    if line is None:
        return None
    ends = (line.low, line.high)
    return {
        "x": _curve(ends),
        "density": _curve(line.density(x) for x in ends),
        "survival": _curve(line.survival(x) for x in ends),
    }


def _round(value: float, digits: int = _DIGITS) -> float | None:
    return float(f"{value:.{digits}g}") if math.isfinite(value) else None


def _curve(values: Iterable[float]) -> list[float | None]:
    return [_round(value, _CURVE_DIGITS) for value in values]


def _plain(value: Any) -> Any:
    return _round(value) if isinstance(value, float) else visible(value) if isinstance(value, str) else value


def _facts(facts: Mapping[str, str]) -> str:
    return "".join(f"<div><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>" for k, v in facts.items() if v)


def _notes(notes: Iterable[tuple[str, int]]) -> str:
    """The notes as buttons that filter the table."""
    buttons = (
        f'<button type="button" class="chip" data-filter="{escape(text)}">{escape(text)} <b>{count}</b></button>'
        for text, count in notes
    )
    return "".join(buttons) or "<p>No notes.</p>"


def _cells(table: Table) -> str:
    """Head and body of a table."""
    head = "".join(f'<th scope="col">{escape(column.header)}</th>' for column in table.columns)
    body = "".join(
        f'<tr><th scope="row">{escape(visible(first))}</th>' + "".join(f"<td>{escape(c)}</td>" for c in cells) + "</tr>"
        for first, *cells in table.cells()
    )
    return f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody>"


def table_html(caption: str, table: Table) -> str:
    """What a notebook shows of a result."""
    return f"<p>{escape(caption)}</p><table>{_cells(table)}</table>"


def _asset(name: str) -> str:
    return files("htsr.reporting").joinpath(name).read_text(encoding="utf-8")


def _json(value: Any) -> str:
    """JSON that is inert inside of a script element."""
    return json.dumps(value, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


def _script(source: str) -> str:
    """JavaScript as it may stand in a script element, with the line ends that a browser hashes."""
    source = source.replace("\r\n", "\n").replace("\r", "\n")
    return source.replace("</script", "<\\/script").replace("<!--", "<\\!--")


def _digest(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode("utf-8", "replace")).digest()).decode()
