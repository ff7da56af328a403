"""What the HTML page of a trajectory shows, in plain values: `htsr.reporting` draws it and knows no trajectory."""

from __future__ import annotations

from collections.abc import Sequence

from htsr._version import __version__
from htsr.analysis.report import described
from htsr.analysis.trajectory_file import Header
from htsr.reporting.trajectory_page import TrajectoryPage
from htsr.results import Record, Table
from htsr.spectra.metrics import NUMERIC, LayerMetrics


def page_of(header: Header, records: Sequence[Record], table: Table, remarks: Sequence[str]) -> TrajectoryPage:
    """The page of a trajectory.

    Args:
        header: what holds for the whole.
        records: records of its points.
        table: table of the means of its sources.
        remarks: sentences on what the numbers say, and on each source that could not be read.
    """
    sources = {record["source"]: record["step"] for record in records}
    relative = f"length of the change against {header.reference}, over that of its weights" if header.reference else ""
    return TrajectoryPage(
        title=header.label,
        facts={
            "models" if None in sources.values() else "checkpoints": f"{len(sources):,}",
            "matrices": f"{len({record['name'] for record in records}):,}",
            "measurements": f"{len(records):,}",
            "spectra of the change against": header.against or "",
            "fit": header.options.fit,
            "htsr": __version__,
        },
        remarks=remarks,
        records=records,
        about=described(LayerMetrics) | {"relative": relative},
        numeric=("relative", *NUMERIC),
        table=table,
    )
