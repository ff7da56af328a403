"""Directions as rows of plain values: of each pair of matrices, of each head, and of each intruder dimension."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from htsr.analysis.tables import heads_table
from htsr.results import Record, Table, Tabular, column_types
from htsr.spectra.direction_numbers import EPSILON, EPSILONS, Directions

_RENAMED = {"k": "directions", "gap": "directions_gap", "error": "directions_error"}
_ELSEWHERE = ("relative", "notes", "cosines", "nearest", "values", "base_values")  # in other columns, or no numbers
_COUNTS = {"intruder_counts": "intruders_{}", "intruder_counts_null": "intruders_{}_null"}


def columns() -> dict[str, type]:
    """The columns that `Directions` become, each number followed by its null, with their types.

    Examples:
        >>> from htsr.analysis.direction_rows import columns
        >>> list(columns())[:3], columns()["intruders_0.5"]
        (['directions', 'overlap_left', 'overlap_left_null'], <class 'int'>)
    """
    kinds = column_types(Directions)
    found: dict[str, type] = {}
    for name in [f.name for f in fields(Directions) if not f.name.endswith("_null") and f.name not in _ELSEWHERE]:
        for field, kind in ((name, kinds[name]), (f"{name}_null", float)):
            if field in _COUNTS:
                found |= {_COUNTS[field].format(epsilon): int if field == name else float for epsilon in EPSILONS}
            elif field in kinds:
                found[_RENAMED.get(field, field)] = kind
    return found


def described_columns(fields: Mapping[str, str]) -> dict[str, str]:
    """What each column is, by what each field of `Directions` is.

    Args:
        fields: explanations by name of the field.

    Examples:
        >>> from htsr.analysis.direction_rows import described_columns
        >>> described_columns({"k": "number of vectors", "intruder_counts": "number of intruders"})["directions"]
        'number of vectors'
    """
    found = {_RENAMED.get(name, name): text for name, text in fields.items() if name not in _COUNTS}
    for field, column in _COUNTS.items():
        of_null = " of a Gaussian change of the same norm" * field.endswith("_null")
        for epsilon in EPSILONS:
            found[column.format(epsilon)] = f"intruders whose largest |cosine| is below {epsilon}{of_null}"
    return found


def record(found: Directions | None) -> Record:
    """The numbers of a matrix by column; None in all where there are none.

    Args:
        found: directions of the matrix; None where there are none.

    Examples:
        >>> import numpy as np
        >>> from htsr.analysis.direction_rows import record
        >>> from htsr.spectra.subspaces import directions
        >>> row = record(directions(np.diag([3.0, 2.0, 1.0]), np.diag([1.0, 2.0, 3.0]), k=1))
        >>> row["directions"], row["overlap_left"], row["intruders_0.5"]
        (1, 0.0, 0)
    """
    row: Record = dict.fromkeys(columns())
    if found is None:
        return row
    for f in fields(Directions):
        value = getattr(found, f.name)
        if f.name in _COUNTS:
            counts = value or [None] * len(EPSILONS)
            row |= {_COUNTS[f.name].format(epsilon): count for epsilon, count in zip(EPSILONS, counts, strict=True)}
        elif f.name not in _ELSEWHERE:
            row[_RENAMED.get(f.name, f.name)] = value
    return row


def means(found: Iterable[Directions]) -> dict[str, float]:
    """Mean of each column over those that have it.

    Args:
        found: directions of several matrices.

    Examples:
        >>> import numpy as np
        >>> from htsr.analysis.direction_rows import means
        >>> from htsr.spectra.subspaces import directions
        >>> A, B = np.diag([3.0, 2.0, 1.0]), np.diag([1.0, 2.0, 3.0])
        >>> means([directions(A, A, k=1), directions(A, B, k=1)])["overlap_left"]
        0.5
    """
    rows = [record(one) for one in found]
    values = {name: [row[name] for row in rows if row[name] is not None] for name in columns()}
    return {name: float(np.mean(some)) for name, some in values.items() if some}


def intruders(name: str, found: Directions | None) -> list[Record]:
    """The intruder dimensions at ε = 0.5 of a matrix: rank from 1 (None in a stack), singular value, largest |cosine|.

    Args:
        name: name of the matrix.
        found: its directions; None where there are none.
    """
    if found is None:
        return []
    stacked = found.cosines.ndim == 3
    return [
        {"name": name, "rank": None if stacked else rank, "value": value, "nearest": nearest}
        for rank, (value, nearest) in enumerate(zip(found.values, found.nearest, strict=True), 1)
        if nearest < EPSILON
    ]


@dataclass(frozen=True)
class Head:
    """One attention head in both models.

    Attributes:
        name: name of the matrix in the first model.
        role: role of the matrix.
        block: index of the block that it lies in; None outside of all.
        head: index of the head, from 0; of k and v that of the key and value head.
        directions: its directions in the second model beside those in the first.
    """

    name: str
    role: str
    block: int | None
    head: int
    directions: Directions


@dataclass(frozen=True, repr=False)
class Heads(Tabular):
    """The attention heads of two models, one row a head of each q, k, v and o.

    Attributes:
        label: names of both models.
        rows: the heads, in the order of the first model.
    """

    label: str
    rows: tuple[Head, ...]

    def __repr__(self) -> str:
        return f"<Heads of {self.label}: {len(self.rows)}>"

    def __len__(self) -> int:
        return len(self.rows)

    def records(self) -> list[Record]:
        """One dictionary a head: name, role, block, head, the size of the change, and the columns of directions."""
        return [
            {"name": row.name, "role": row.role, "block": row.block, "head": row.head}
            | {"relative": row.directions.relative}
            | record(row.directions)
            for row in self.rows
        ]

    def types(self) -> dict[str, type]:
        """The types of all columns that may be empty."""
        return {"block": int, "relative": float, **columns()}

    def tables(self) -> tuple[Table, ...]:
        """The heads."""
        return (heads_table(self.records()),)


def heads_of(label: str, pairs: Sequence[Any]) -> Heads:
    """The heads of all pairs of a comparison.

    Args:
        label: names of both models.
        pairs: pairs of the comparison, which have a name, a row of the first model, and heads.
    """
    return Heads(
        label,
        tuple(
            Head(pair.name, pair.a.role, pair.a.block, head, found)
            for pair in pairs
            for head, found in enumerate(pair.heads)
        ),
    )
