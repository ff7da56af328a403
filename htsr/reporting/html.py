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
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import fields
from html import escape
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from string import Template
from typing import Any

from htsr._version import __version__
from htsr.analysis.analyze import Analysis
from htsr.analysis.comparison import Comparison
from htsr.arrays import Vector
from htsr.errors import MissingDependencyError
from htsr.files import written
from htsr.reporting import figures, tables
from htsr.reporting.text import visible
from htsr.spectra.metrics import NUMERIC, LayerMetrics, Options
from htsr.spectra.notes import CAUTION, kind_of

_DIGITS = 6  # of the numbers of a row
_CURVE_DIGITS = 4  # of the points of a curve
_CLASSES = {"red": "failed", "bright_black": "random", "magenta": "heavy", "green": "middle", "yellow": "light"}


def require_plotly() -> None:
    """Make sure that a report can be written, without importing plotly.

    Raises:
        MissingDependencyError: plotly is not installed.
    """
    if find_spec("plotly") is None:
        raise MissingDependencyError("the report needs plotly: pip install 'htsr[report]'")


def write_report(analysis: Analysis, path: Path) -> None:
    """Write the report of `analysis` to `path`: one self-contained HTML file, whole or not at all.

    Raises:
        MissingDependencyError: plotly is not installed.
        HtsrError: the file cannot be written.
    """
    require_plotly()
    from plotly.offline import get_plotlyjs

    page = render(analysis, get_plotlyjs())
    with written(path) as temporary:
        temporary.write_bytes(page.encode("utf-8", "replace"))  # a path may hold what UTF-8 cannot say


def render(analysis: Analysis, plotly: str) -> str:
    """The page, with the source of plotly.js put in."""
    scripts = [_script(plotly), _script(_asset("report.js"))]
    hashes = " ".join(f"'sha256-{_digest(script)}'" for script in scripts)
    return Template(_asset("report.html")).substitute(
        hashes=hashes,
        title=escape(visible(analysis.label)),
        version=escape(__version__),
        style=_asset("report.css"),
        facts=_facts(analysis),
        notes=_notes(analysis.rows),
        caution=escape(CAUTION),
        summary=_summary(analysis),
        data=_json(content(analysis)),
        plotly=scripts[0],
        script=scripts[1],
    )


def content(analysis: Analysis) -> dict[str, Any]:
    """What `report.js` draws, ready for JSON. Lists that are one per matrix are in the order of the rows.

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
    rows = analysis.rows
    shown = [f.name for f in fields(LayerMetrics) if any(getattr(row, f.name) not in (None, "") for row in rows)]
    name, role, *numbers, note = tables.columns(rows)
    short = [name, note, role, *numbers]  # what qualifies the numbers is never off the screen
    cells = figures.grid(rows)
    metrics = figures.metrics_of(rows)
    spectra = [_spectrum(analysis.eigenvalues.get(row.name)) for row in rows]
    permuted = [_spectrum(analysis.permuted.get(row.name)) for row in rows]
    about = _about()
    return {
        "fields": shown,
        "rows": [[_plain(getattr(row, name)) for name in shown] for row in rows],
        "about": {name: about.get(name, "") for name in shown},
        "labels": figures.LABELS,
        "metrics": metrics,
        "numeric": [name for name in shown if name in NUMERIC or name == "block"],
        "short": {
            "headers": [header for header, _ in short],
            "cells": [[visible(cell(r)) for _, cell in short] for r in rows],
        },
        "styles": [_CLASSES.get(tables.style_of(row), "plain") for row in rows],
        "grid": {
            "roles": cells.roles,
            "blocks": ["–" if block is None else str(block) for block in cells.blocks],
            "members": cells.members,
        },
        "heat": {metric: _heat(cells, rows, metric) for metric in metrics},
        "ranks": {s["positive"]: figures.tail_ranks(s["positive"]).tolist() for s in (*spectra, *permuted) if s},
        "spectra": spectra,
        "permuted": permuted,
        "lines": [_line(analysis, row) for row in rows],
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


def _heat(cells: figures.Grid, rows: tuple[LayerMetrics, ...], metric: str) -> dict[str, Any]:
    values = cells.means(rows, metric)
    scale = figures.colour_scale(values, metric)
    return {
        "values": [_curve(line) for line in values],
        "low": _round(scale.low),
        "high": _round(scale.high),
        "centre": scale.centre,
    }


def _line(analysis: Analysis, row: LayerMetrics) -> dict[str, Any] | None:
    eigenvalues = analysis.eigenvalues.get(row.name)
    line = None if eigenvalues is None else figures.fitted_line(row, eigenvalues, analysis.options.xmax)
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


def _about() -> dict[str, str]:
    """What each field is, from the docstring of `LayerMetrics`; nothing where Python runs without docstrings."""
    text = (LayerMetrics.__doc__ or "").partition("Attributes:")[2].replace("`", "")
    return dict(re.findall(r"^ {4,8}(\w+): (.+)$", text, re.MULTILINE))


def _facts(analysis: Analysis) -> str:
    rows, options = analysis.rows, analysis.options
    parameters = sum(
        (row.rows or 0) * (row.columns or 0) * ((row.pieces or 1) if row.kind in ("conv", "stack") else 1)
        for row in rows
    )
    routes = sorted({row.route for row in rows if row.route})
    facts = {
        "matrices": f"{len(rows):,}",
        "parameters in them": f"{parameters:,}",
        "without a fit": f"{sum(row.alpha is None for row in rows):,}",
        "fit": options.fit,
        "eigenvalues": f"{options.route} ({', '.join(routes)})" if routes else options.route,
        "device": options.device,
        "further options": _further(options),
        "htsr": str(analysis.meta.get("htsr", __version__)),
        "computed in": f"{analysis.meta['seconds']:.1f} s" if "seconds" in analysis.meta else "",
    }
    return "".join(f"<div><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>" for k, v in facts.items() if v)


def _further(options: Options) -> str:
    """What was asked for beyond the default, in the words of `Options`."""
    named = {"fit", "route", "device"}
    given: Mapping[str, Any] = {f.name: getattr(options, f.name) for f in fields(Options) if f.name not in named}
    usual = Options()
    return ", ".join(
        name if value is True else f"no {name}" if value is False else f"{name} {value}"
        for name, value in given.items()
        if value != getattr(usual, name)
    )


def _notes(rows: Iterable[LayerMetrics]) -> str:
    """How often each kind of note and each status occurs, as buttons that filter the table."""
    counts: Counter[str] = Counter()
    for row in rows:
        counts.update(dict.fromkeys(map(kind_of, row.warning.split("; ")) if row.status == "ok" else [row.status], 1))
    del counts[""]
    buttons = (
        f'<button type="button" class="chip" data-filter="{escape(text)}">{escape(text)} <b>{count}</b></button>'
        for text, count in counts.most_common()
    )
    return "".join(buttons) or "<p>No notes.</p>"


def _summary(analysis: Analysis) -> str:
    """`tables.summary_table` as HTML."""
    shown = tables.summary_table(analysis).columns
    head = "".join(f'<th scope="col">{escape(str(column.header))}</th>' for column in shown)
    lines = zip(*(column.cells for column in shown), strict=True)
    body = "".join(
        f'<tr><th scope="row">{escape(str(role))}</th>' + "".join(f"<td>{escape(str(c))}</td>" for c in cells) + "</tr>"
        for role, *cells in lines
    )
    return f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody>"


def summary_html(analysis: Analysis) -> str:
    """What a notebook shows of an analysis: means by role."""
    return f"<p>{escape(repr(analysis)[1:-1])}</p><table>{_summary(analysis)}</table>"


def comparison_html(comparison: Comparison) -> str:
    """What a notebook shows of a comparison: means of both, for the metrics that people look at first."""
    means = comparison.summary()
    lines = "".join(
        f'<tr><th scope="row">{escape(label)}</th>'
        + "".join(f"<td>{value:.4g}</td>" for value in means[name])
        + "</tr>"
        for name, label in figures.LABELS.items()
        if name in means
    )
    head = "".join(f'<th scope="col">{text}</th>' for text in ("mean", "a", "b", "b − a"))
    return f"<p>{escape(repr(comparison)[1:-1])}</p><table><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table>"


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
