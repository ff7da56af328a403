"""What the page of two models shows, in plain values: `htsr.reporting` draws it and knows no comparison."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from htsr._version import __version__
from htsr.analysis.direction_rows import Heads, described_columns
from htsr.analysis.distance import Distance
from htsr.analysis.report import described
from htsr.analysis.result import Analysis
from htsr.analysis.tables import changes_table
from htsr.reporting.comparison_page import ComparisonPage, Cosines
from htsr.reporting.figures import LABELS
from htsr.results import Tabular
from htsr.spectra.direction_numbers import Directions
from htsr.spectra.metrics import LayerMetrics

_NO_NUMBERS = ("name", "name_b", "role", "block", "status_a", "status_b", "note")
_ABOUT = {
    "esd_distance": "Jensen-Shannon distance between the ESDs, in [0, √ln 2]",
    "note": "what a reader of the distance and the directions should know",
    "name_b": "name of the matrix in the second model",
}


def comparison_page(
    comparison: Tabular,
    a: Analysis,
    b: Analysis,
    pairs: Sequence[tuple[str, str, Directions | None]],
    summary: Mapping[str, tuple[float, float, float]],
    heads: Heads,
    apart: Mapping[str, int],
) -> ComparisonPage:
    """The page of two models.

    Args:
        comparison: comparison of the two: its rows, tables, types and remarks.
        a: analysis of the first model.
        b: analysis of the second model.
        pairs: names of each pair in the two models, and its directions.
        summary: means of the first model, of the second, and of the difference, by metric.
        heads: rows of attention heads.
        apart: numbers of matrices that are not compared, by the reason.
    """
    records = comparison.records()
    directed = next((found for _, _, found in pairs if found is not None), None)
    of_heads: dict[str, list[dict[str, Any]]] = {}
    for row in heads.records():
        of_heads.setdefault(row["name"], []).append(row)
    return ComparisonPage(
        title=comparison.label,
        labels=(a.label, b.label),
        facts={
            "matrices in both": f"{len(records):,}",
            **{reason: f"{count:,}" if count else "" for reason, count in apart.items()},
            "fit": a.options.fit,
            "leading directions": "" if directed is None else _numbers([found for _, _, found in pairs if found]),
            "htsr": __version__,
        },
        remarks=comparison.remarks(),
        records=records,
        about=described(LayerMetrics, Distance) | described_columns(described(Directions)) | _ABOUT,
        numeric=[name for name in (records[0] if records else {}) if name not in _NO_NUMBERS],
        table=comparison.tables()[0],
        means=changes_table(summary, LABELS),
        eigenvalues_a={name: a.eigenvalues[name] for name, _, _ in pairs if name in a.eigenvalues},
        eigenvalues_b={name: b.eigenvalues[other] for name, other, _ in pairs if other in b.eigenvalues},
        cosines={
            name: Cosines(found.cosines, found.base_values, found.values, found.nearest)
            for name, _, found in pairs
            if found is not None and found.cosines.ndim == 2
        },
        heads=of_heads,
        xmax=a.options.xmax,
    )


def _numbers(found: Sequence[Directions]) -> str:
    """How many leading directions were compared."""
    least, most = min(one.k for one in found), max(one.k for one in found)
    return str(most) if least == most else f"{least} to {most}"
