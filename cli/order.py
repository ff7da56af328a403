"""`--sort` and `--top`: the order of the rows that a command writes, and how many."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import Any

from htsr.errors import UsageError
from htsr.results import Column, Record, Table, Tabular

_UP = ":up"
_ALIASES = {"note": "warning"}  # the header of the tables


@dataclass(frozen=True)
class Order:
    """An order of rows.

    Attributes:
        column: field of the records to sort by; None for the order of the result.
        up: whether the smallest comes first.
        top: number of rows; None for all.
    """

    column: str | None
    up: bool
    top: int | None

    def of(self, result: Tabular) -> Tabular:
        """`result` with its rows in this order.

        Raises:
            UsageError: its rows have no such column.
        """
        records = result.records()
        places = list(range(len(records)))
        if self.column is not None and records:
            insist_on(self.column, records[0])
            values = [record[self.column] for record in records]
            known = sorted(
                (i for i in places if values[i] is not None), key=lambda i: _key(values[i]), reverse=not self.up
            )
            places = known + [i for i in places if values[i] is None]
        return Ordered(result, tuple(places[: self.top]), self.column)


def parse_order(sort: str | None, top: int | None, known: Collection[str] | None = None) -> Order | None:
    """What `--sort` and `--top` say; None where they are not given.

    Args:
        sort: name of a column, with ``:up`` at its end for the smallest first.
        top: number of rows.
        known: names of the columns, where they are known beforehand.

    Raises:
        UsageError: there is no such column.
    """
    if sort is None and top is None:
        return None
    column = None if sort is None else sort.removesuffix(_UP)
    if known is not None and column is not None:
        column = column if column in known else _ALIASES.get(column, column)
        insist_on(column, known)
    return Order(column, sort is not None and sort.endswith(_UP), top)


def insist_on(column: str, known: Collection[str]) -> None:
    """Insist that rows have the column.

    Raises:
        UsageError: they have not.
    """
    if column not in known:
        near = get_close_matches(column, known, n=1, cutoff=0)
        raise UsageError(f"--sort: rows have no {column!r}; the nearest is {near[0] if near else 'none'}")


def _key(value: Any) -> Any:
    return value.lower() if isinstance(value, str) else float(value)


@dataclass(frozen=True)
class Ordered(Tabular):
    """A result whose rows are in another order, or some of them only. What is true of the whole is so still.

    Attributes:
        result: the result.
        places: places in it of the rows that are shown, in their order.
        column: field of the records that they are sorted by, which the table shows in any width; None for none.
    """

    result: Tabular
    places: Sequence[int]
    column: str | None = None

    @property
    def label(self) -> str:  # type: ignore[override]
        """Name of what the result is about."""
        return self.result.label

    def records(self) -> list[Record]:
        """The rows at these places."""
        records = self.result.records()
        return [records[i] for i in self.places]

    def types(self) -> dict[str, type]:
        """The types of columns that may be empty."""
        return self.result.types()

    def tables(self) -> tuple[Table, ...]:
        """The rows at these places, then the means or sums of all."""
        first, *rest = self.result.tables()
        tones = tuple(first.tones[i] for i in self.places) if first.tones else ()
        some = replace(first, rows=tuple(first.rows[i] for i in self.places), tones=tones)
        return self._with_column(some), *rest

    def _with_column(self, table: Table) -> Table:
        """The table with the column that its rows are sorted by: kept where it has it, else beside the names."""
        if self.column is None:
            return table
        shown = next((column for column in table.columns if column.field == self.column), None)
        if shown is not None:
            kept = (shown.title, shown.beside)
            return replace(table, spare=tuple(title for title in table.spare if title not in kept))
        values = [record[self.column] for record in self.records()]
        if all(value in (None, "") for value in values):
            return table
        text = any(isinstance(value, str) for value in values)
        column = Column(self.column, "" if text else ".4g", text=text, field=self.column)
        rows = tuple((row[0], value, *row[1:]) for row, value in zip(table.rows, values, strict=True))
        return replace(table, columns=(table.columns[0], column, *table.columns[1:]), rows=rows)

    def facts(self) -> dict[str, Any]:
        """What is true of the whole."""
        return self.result.facts()

    def remarks(self) -> tuple[str, ...]:
        """The sentences beside the result, and how many rows are shown."""
        total = len(self.result.records())
        some = (f"{len(self.places)} of {total} rows are shown",) if len(self.places) < total else ()
        return (*self.result.remarks(), *some)
