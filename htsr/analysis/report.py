"""What the HTML report of an analysis shows, in plain values: `htsr.reporting` draws it and knows no analysis."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, fields
from typing import Any

from htsr._version import __version__
from htsr.analysis.standouts import Standout, by_kind, standouts
from htsr.arrays import Vector
from htsr.reporting.analysis_page import AnalysisPage
from htsr.results import Table
from htsr.spectra.metrics import NUMERIC, LayerMetrics, Options
from htsr.spectra.notes import CAUTION, kind_of


def page_of(
    label: str,
    rows: Sequence[LayerMetrics],
    options: Options,
    meta: Mapping[str, Any],
    tables: Sequence[Table],
    eigenvalues: Mapping[str, Vector],
    permuted: Mapping[str, Vector],
) -> AnalysisPage:
    """The page of the HTML report of an analysis.

    Args:
        label: name of the model.
        rows: rows of the analysis.
        options: options that say what was computed, and how.
        meta: version of htsr, and seconds that the analysis took.
        tables: short table of the rows, and table of their means.
        eigenvalues: spectra by matrix name, (K,) ascending.
        permuted: spectra of the permuted matrices, likewise (K,).
    """
    return AnalysisPage(
        title=label,
        facts=_facts(rows, options, meta),
        notes=_notes(rows),
        caution=CAUTION,
        records=[asdict(row) for row in rows],
        about=described(LayerMetrics),
        numeric=NUMERIC,
        table=tables[0],
        summary=tables[1],
        eigenvalues=eigenvalues,
        permuted=permuted,
        standouts=[[(found.name, _sentence(found)) for found in alike] for alike in by_kind(standouts(rows))],
        xmax=options.xmax,
    )


def _sentence(found: Standout) -> str:
    """Why a matrix stands out, and by how much."""
    return f"{found.reason} ({found.score:.2g} σ)" if math.isfinite(found.score) else found.reason


def described(*kinds: type) -> dict[str, str]:
    """What each field is, from the docstrings of dataclasses; nothing where Python runs without docstrings.

    Args:
        *kinds: dataclasses whose docstrings have a section of attributes.

    Examples:
        >>> from htsr.analysis.distance import Distance
        >>> from htsr.analysis.report import described
        >>> list(described(Distance))
        ['frobenius', 'relative', 'cosine', 'cka']
    """
    text = "\n".join((kind.__doc__ or "").partition("Attributes:")[2].replace("`", "") for kind in kinds)
    return dict(re.findall(r"^ {4,8}(\w+): (.+)$", text, re.MULTILINE))


def _facts(rows: Sequence[LayerMetrics], options: Options, meta: Mapping[str, Any]) -> dict[str, str]:
    parameters = sum(
        (row.rows or 0) * (row.columns or 0) * ((row.pieces or 1) if row.kind in ("conv", "stack") else 1)
        for row in rows
    )
    routes = sorted({row.route for row in rows if row.route})
    return {
        "matrices": f"{len(rows):,}",
        "parameters in them": f"{parameters:,}",
        "without a fit": f"{sum(row.alpha is None for row in rows):,}",
        "fit": options.fit,
        "eigenvalues": f"{options.route} ({', '.join(routes)})" if routes else options.route,
        "device": options.device,
        "further options": _further(options),
        "htsr": str(meta.get("htsr", __version__)),
        "computed in": f"{meta['seconds']:.1f} s" if "seconds" in meta else "",
    }


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


def _notes(rows: Iterable[LayerMetrics]) -> list[tuple[str, int]]:
    """How often each kind of note and each status occurs."""
    counts: Counter[str] = Counter()
    for row in rows:
        counts.update(dict.fromkeys(map(kind_of, row.warning.split("; ")) if row.status == "ok" else [row.status], 1))
    del counts[""]
    return counts.most_common()
