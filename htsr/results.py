"""What all results have in common: rows of plain values, and the tables that people look at.

A result says what is in it (`Tabular`) and knows no format; `htsr.reporting` writes every format from that and knows no
result.

    rows, small = result.records(), result.tables()[0]
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, TypeVar, get_args, get_type_hints

import numpy as np

from htsr._version import __version__

if TYPE_CHECKING:
    import pandas

Record: TypeAlias = dict[str, Any]
"""A row with all its columns: text, numbers, truth values or None by field."""
Value: TypeAlias = str | float | None
Row = TypeVar("Row")


class _Named(Protocol):
    @property
    def name(self) -> str: ...


NamedRow = TypeVar("NamedRow", bound=_Named)


@dataclass(frozen=True)
class Column:
    """A column that people look at.

    Attributes:
        title: title of the column, unique in its table.
        format: format of its numbers, as in ``.2f``.
        unit: unit of its numbers; empty for none.
        text: whether it holds words, which stand on the left.
        optional: whether it is left out where no row has anything in it.
        bar: whether it holds shares from 0 to 1 that a terminal draws as bars; no other format has the column.
        field: field of the records that it shows; empty where it is none of them.
        beside: title of the column that it qualifies, as a null does a number: a narrow terminal that leaves out that
            one leaves out both.
    """

    title: str
    format: str = ""
    unit: str = ""
    text: bool = False
    optional: bool = False
    bar: bool = False
    field: str = ""
    beside: str = ""

    @property
    def header(self) -> str:
        """Title and unit."""
        return f"{self.title} {self.unit}".rstrip()

    def cell(self, value: Value) -> str:
        """`value` as it stands in the table; nothing for None.

        Examples:
            >>> from htsr.results import Column
            >>> Column("α", ".2f").cell(2.0)
            '2.00'
        """
        return "" if value is None else value if isinstance(value, str) else format(value, self.format)


@dataclass(frozen=True)
class Table:
    """Rows as people look at them: a selection, in words and rounded numbers.

    Attributes:
        columns: the columns; the first one names the row.
        rows: the rows, each with one value for each column.
        spare: titles of the columns that a narrow terminal leaves out, the least useful first.
        tones: kind of each row (``failed``, ``total`` …), which a terminal colours; empty for plain rows.
        toned: titles of the columns that are coloured; empty for all.
        elsewhere: hint where all columns are to be found.
    """

    columns: tuple[Column, ...]
    rows: tuple[tuple[Value, ...], ...]
    spare: tuple[str, ...] = ()
    tones: tuple[str, ...] = ()
    toned: tuple[str, ...] = ()
    elsewhere: str = "--format csv has all"

    def cells(self) -> list[list[str]]:
        """The rows as text."""
        return [[c.cell(value) for c, value in zip(self.columns, row, strict=True)] for row in self.rows]

    def in_print(self) -> Table:
        """The same without what only a terminal draws."""
        kept = [i for i, column in enumerate(self.columns) if not column.bar]
        rows = tuple(tuple(row[i] for i in kept) for row in self.rows)
        return Table(tuple(self.columns[i] for i in kept), rows, self.spare, self.tones, self.toned, self.elsewhere)


def tabulate(things: Iterable[Row], columns: Sequence[tuple[Column, Callable[[Row], Value]]], **looks: Any) -> Table:
    """The table of `things`, each value read by the function beside its column, without optional columns in vain.

    Args:
        things: objects that become a row each.
        columns: columns, each with the function that reads its value from a thing.
        **looks: further fields of `Table`.

    Examples:
        >>> from htsr.results import Column, tabulate
        >>> name, note = Column("name", text=True), Column("note", optional=True)
        >>> columns = [(name, lambda n: f"layer {n}"), (note, lambda n: None)]
        >>> tabulate(range(2), columns).cells()
        [['layer 0'], ['layer 1']]
    """
    rows = [[read(thing) for _, read in columns] for thing in things]
    kept = [i for i, (c, _) in enumerate(columns) if not c.optional or any(row[i] not in (None, "") for row in rows)]
    return Table(tuple(columns[i][0] for i in kept), tuple(tuple(row[i] for i in kept) for row in rows), **looks)


class Tabular:
    """A result as rows.

    Attributes:
        label: name of what the result is about, such as the model.

    Examples:
        >>> import htsr, torch
        >>> analysis = htsr.analyze({"up_proj.weight": torch.diag(torch.arange(1.0, 31.0))}, null=False)
        >>> analysis.records()[0]["stable_rank"] == analysis[0].stable_rank
        True
        >>> analysis.to_pandas()[["name", "M", "N"]]
              name   M   N
        0  up_proj  30  30
    """

    label: str

    def records(self) -> list[Record]:
        """All rows with all their columns, as plain values, one dictionary a row; the keys are the same in all."""
        raise NotImplementedError

    def types(self) -> dict[str, type]:
        """The types of columns that may be empty, by name: str, int, float or bool; values tell those of the others."""
        return {}

    def tables(self) -> tuple[Table, ...]:
        """What people look at: first the rows, then means or sums of them where there are."""
        raise NotImplementedError

    def facts(self) -> dict[str, Any]:
        """What is true of the whole and in no row, as plain values: what was asked for, means …"""
        return {"model": self.label}

    def remarks(self) -> tuple[str, ...]:
        """Sentences that belong beside a table and are no data."""
        return ()

    def to_pandas(self) -> pandas.DataFrame:
        """All rows as a table of pandas, one column a field."""
        import pandas as pd

        return pd.DataFrame(self.records())


def counted(number: int, one: str, several: str) -> str:
    """A number and what there is that many of.

    Args:
        number: how many there are.
        one: word for one of them.
        several: word for any other number.

    Examples:
        >>> from htsr.results import counted
        >>> counted(1, "matrix", "matrices"), counted(0, "matrix", "matrices")
        ('1 matrix', '0 matrices')
    """
    return f"{number} {one if number == 1 else several}"


def by_key(rows: tuple[NamedRow, ...], key: str | int | slice, label: str) -> NamedRow | tuple[NamedRow, ...]:
    """The row of a result by name or position, or the rows of a slice.

    Args:
        rows: rows that have a ``name``.
        key: name, position or slice.
        label: what has no such row, for the message.

    Raises:
        KeyError: no row has this name; the message has the nearest one.
        TypeError: the key is neither a name nor a position nor a slice.
    """
    if isinstance(key, (slice, int, np.integer)):
        return rows[key]
    if not isinstance(key, str):
        raise TypeError(f"rows go by name, position or slice, not by {type(key).__name__}")
    for row in rows:
        if row.name == key:
            return row
    near = get_close_matches(key, [row.name for row in rows], n=1, cutoff=0)
    raise KeyError(f"{label} has no matrix {key}" + "".join(f"; the nearest is {name}" for name in near))


def column_types(row: type) -> dict[str, type]:
    """The types of the columns that a dataclass of plain fields becomes; None beside a type is no type of its own.

    Args:
        row: dataclass whose fields are text, numbers, truth values, or one of these and None.

    Examples:
        >>> from htsr.results import column_types
        >>> from htsr.spectra.metrics import LayerMetrics
        >>> types = column_types(LayerMetrics)
        >>> types["name"], types["block"], types["gof_p"]
        (<class 'str'>, <class 'int'>, <class 'float'>)
    """
    hints = get_type_hints(row)
    return {f.name: next(iter(get_args(hints[f.name])), hints[f.name]) for f in fields(row)}


def envelope(result: Tabular, command: str | None = None, options: dict[str, Any] | None = None) -> dict[str, Any]:
    """A result as one JSON object, the same for all: ``htsr``, ``command``, ``label``, ``options``, facts, ``rows``.

    Args:
        result: the result.
        command: name of the command that found it.
        options: options that the command was given. Those that the result itself knows take their place.

    Examples:
        >>> import torch, htsr
        >>> from htsr.results import envelope
        >>> model = htsr.describe({"up.weight": torch.zeros(4, 8)})
        >>> sorted(envelope(model, "describe", {"block": None}))
        ['command', 'htsr', 'label', 'model', 'options', 'rows']
    """
    facts = result.facts()
    asked = (options or {}) | facts.pop("options", {})
    start = {"htsr": __version__, "command": command, "label": result.label}
    return start | facts | {"options": asked, "rows": result.records()}
