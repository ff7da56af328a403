"""What the page of two models shows: what changed, where, and both spectra and directions of each matrix."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from htsr.arrays import Vector
from htsr.results import Record, Table


@dataclass(frozen=True)
class Cosines:
    """The leading singular vectors of one matrix in both models, k of each.

    Attributes:
        cosines: |cosine| of each leading left singular vector of a (rows) with each of b (columns), (k, k) in [0, 1].
        values_a: leading singular values of a, (k,) descending.
        values_b: leading singular values of b, (k,) descending.
        nearest: largest |cosine| of each leading left singular vector of b with any of a, also beyond the first k, (k,);
            it is an intruder dimension where this is below some ε.
    """

    cosines: Vector
    values_a: Sequence[float]
    values_b: Sequence[float]
    nearest: Sequence[float]


@dataclass(frozen=True)
class ComparisonPage:
    """What the page shows.

    Attributes:
        title: title of the page.
        labels: names of the two models.
        facts: facts by name, as text; empty ones are not shown.
        remarks: sentences below the facts.
        records: one record for each pair, with ``name``, ``role`` and ``block``, all with the same fields.
        about: explanation of each field, by name; those of ``m_a``, ``m_b`` and ``m_delta`` may stand under ``m``.
        numeric: names of the fields that are numbers, in the order in which they are offered.
        table: short table of the records, in their order.
        means: table of the means of both models.
        eigenvalues_a: spectra of a by the names of the records, (K,) ascending.
        eigenvalues_b: spectra of b, likewise.
        cosines: leading directions of both models, by the names of the records.
        heads: numbers of each attention head, one record a head with the same fields in all, by the names of the
            records.
    """

    title: str
    labels: tuple[str, str]
    facts: Mapping[str, str]
    remarks: Sequence[str]
    records: Sequence[Record]
    about: Mapping[str, str]
    numeric: Sequence[str]
    table: Table
    means: Table
    eigenvalues_a: Mapping[str, Vector] = field(default_factory=dict)
    eigenvalues_b: Mapping[str, Vector] = field(default_factory=dict)
    cosines: Mapping[str, Cosines] = field(default_factory=dict)
    heads: Mapping[str, Sequence[Record]] = field(default_factory=dict)
