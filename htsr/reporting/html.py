"""HTML pages: one file each that needs nothing else, not even a network.

Python computes everything that is drawn and leaves it as JSON in the page; its script only draws. Names come from
files of strangers: they are escaped here, set as text there, and a content security policy lets nothing run but the
two scripts of the page, by their hashes, and nothing load at all.

A page is a `Document`: the HTML of its own sections, its data, and the assets beside this file that it is put
together from. `page.html`, `page.css` and `page.js` are in every one; `heat.*` draws numbers by role and block,
`table.*` a table that sorts and filters, `spectra.js` spectra, and `matrix.*` holds the matrix that is open.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from string import Template
from typing import Any

from htsr._version import __version__
from htsr.errors import MissingDependencyError
from htsr.files import written
from htsr.reporting.text import visible
from htsr.results import Table


@dataclass(frozen=True)
class Document:
    """A page, ready to be put together.

    Attributes:
        title: title of the page, as text.
        header: HTML below the title.
        body: HTML of the sections.
        data: what the scripts draw, ready for JSON.
        scripts: names of the assets that follow `page.js`, in their order; they share one scope.
        styles: names of the assets that follow `page.css`.
    """

    title: str
    header: str
    body: str
    data: Mapping[str, Any]
    scripts: Sequence[str]
    styles: Sequence[str] = ()


def require_plotly() -> None:
    """Make sure that a page can be written, without importing plotly.

    Raises:
        MissingDependencyError: plotly is not installed.
    """
    if find_spec("plotly") is None:
        raise MissingDependencyError("the report needs plotly: pip install 'htsr[report]'")


def write_document(document: Document, path: Path) -> None:
    """Write a page to `path`: one self-contained HTML file, whole or not at all.

    Raises:
        MissingDependencyError: plotly is not installed.
        HtsrError: the file cannot be written.
    """
    require_plotly()
    from plotly.offline import get_plotlyjs

    text = render(document, get_plotlyjs())
    with written(path) as temporary:
        temporary.write_bytes(text.encode("utf-8", "replace"))  # a path may hold what UTF-8 cannot say


def render(document: Document, plotly: str) -> str:
    """The text of a page, with the source of plotly.js put in."""
    own = "\n".join(map(_asset, ("page.js", *document.scripts)))
    scripts = [_script(plotly), _script(own)]
    return fragment(
        "page.html",
        hashes=" ".join(f"'sha256-{_digest(script)}'" for script in scripts),
        title=escape(visible(document.title)),
        version=escape(__version__),
        style="\n".join(map(_asset, ("page.css", *document.styles))),
        header=document.header,
        body=document.body,
        data=_json(document.data),
        plotly=scripts[0],
        script=scripts[1],
    )


def fragment(name: str, **values: str) -> str:
    """The HTML asset `name` with `values` put in, which are HTML themselves."""
    return Template(_asset(name)).substitute(values)


def heat_html() -> str:
    """The section of `heat.js`."""
    return fragment("heat.html", map=fragment("heat-map.html"))


def spectra_html(controls: str = "") -> str:
    """The section of `matrix.js` for a page that draws spectra, with further HTML beside the switch of the view."""
    switch = fragment("spectra.html")
    return fragment("matrix.html", controls=controls + switch, plot="Spectrum of the matrix on logarithmic axes")


def facts_html(facts: Mapping[str, str]) -> str:
    """Facts by name, those that are empty left out."""
    return "".join(f"<div><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>" for k, v in facts.items() if v)


def chips_html(counts: Iterable[tuple[str, int]]) -> str:
    """Texts with how often each occurs, as buttons that filter the table; nothing without any."""
    return "".join(
        f'<button type="button" class="chip" data-filter="{escape(text)}">{escape(text)} <b>{count}</b></button>'
        for text, count in counts
    )


def cells_html(table: Table) -> str:
    """Head and body of a table."""
    head = "".join(f'<th scope="col">{escape(column.header)}</th>' for column in table.columns)
    body = "".join(
        f'<tr><th scope="row">{escape(visible(first))}</th>' + "".join(f"<td>{escape(c)}</td>" for c in cells) + "</tr>"
        for first, *cells in table.cells()
    )
    return f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody>"


def table_html(caption: str, table: Table) -> str:
    """What a notebook shows of a result."""
    return f"<p>{escape(caption)}</p><table>{cells_html(table)}</table>"


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
