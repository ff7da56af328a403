"""What the page of many checkpoints or models shows: every metric of every matrix, from the first to the last."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from htsr.results import Record, Table


@dataclass(frozen=True)
class TrajectoryPage:
    """What the page shows.

    Attributes:
        title: title of the page.
        facts: facts by name, as text; empty ones are not shown.
        remarks: sentences below the facts.
        sources: names of the checkpoints or models, in their order.
        steps: step of each source; None where the sources are models and no steps of one training.
        records: one record for each measured matrix of each source, with ``source``, ``name``, ``role`` and ``block``;
            fields that are missing, None or not finite are no number.
        about: explanation of each field, by name.
        numeric: names of the fields that are numbers, in the order in which they are offered.
        table: one line for each source, in their order: means of the metrics that people look at first.
    """

    title: str
    facts: Mapping[str, str]
    remarks: Sequence[str]
    sources: Sequence[str]
    steps: Sequence[int] | None
    records: Sequence[Record]
    about: Mapping[str, str]
    numeric: Sequence[str]
    table: Table
