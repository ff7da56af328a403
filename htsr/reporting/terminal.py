"""Tables on a terminal: in its width, without a number cut."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from htsr.reporting.text import plain_console, visible
from htsr.results import Column, Table

if TYPE_CHECKING:
    from rich.table import Table as RichTable

STYLES = {
    "failed": "red",
    "random": "bright_black",
    "heavy": "magenta",
    "middle": "green",
    "light": "yellow",
    "total": "bold",
    "aside": "dim",
}
"""Colours by tone."""

WHOLE = 1_000_000
"""Characters in a line where there is no terminal: as many as a table needs."""

_GAP = 3  # between columns
_LEAST_NAME = 24
_LEAST_NOTE = 12  # of "random-like…"
_BAR = 24
_TOLD = {"heavy tail": "α", "light tail": "α", "tail of ": "tail"}  # kinds of notes by the column that has their number


def terminal_table(table: Table, width: int) -> RichTable:
    """`table` as a rich table of at most `width` characters that never cuts a number.

    Without room names lose their middle, notes their end, and then whole columns go; the caption says which. Of two
    columns of words the second, which may have a path, is folded and loses nothing.
    """
    from rich import box
    from rich.table import Table as RichTable
    from rich.text import Text

    columns = [(c, [visible(text) for text in texts]) for c, texts in _by_column(table)]
    (first, names), *rest = columns
    longest = max(map(len, names), default=0)
    rest, room, left_out = _fitting(rest, longest, width, table.spare)
    heading = visible(first.header)
    room = max(room, 8) if table.spare else max(longest, len(heading))  # short names of parts say more than their ends
    facts = len(rest) == 1 and rest[0][0].text
    drawn = RichTable(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
    for column in (first, *(column for column, _ in rest)):
        header = _shortened(heading, room) if column is first else visible(column.header)
        folds, side = facts and column is not first, "left" if column.text else "right"
        overflow: Any = "fold" if folds else "ellipsis"
        drawn.add_column(header, justify=side, no_wrap=not folds, overflow=overflow)  # type: ignore[arg-type]
    for i, name in enumerate(names):
        style = STYLES.get(table.tones[i], "") if table.tones else ""
        cells = (Text(cells[i], style=style if column.title in table.toned else "") for column, cells in rest)
        drawn.add_row(_shortened(name, room), *cells, style=None if table.toned else style)
    if left_out:
        elsewhere = f"; {table.elsewhere}" if table.elsewhere else ""
        drawn.caption = Text(f"left out for width: {', '.join(left_out)}{elsewhere}", style="dim")
        drawn.caption_justify = "left"
    return drawn


def as_text(tables: Iterable[Table], width: int = WHOLE) -> str:
    """The tables as a terminal of this width shows them, without colours."""
    out = io.StringIO()
    console = plain_console(file=out, width=width)
    for table in tables:
        console.print(terminal_table(table, width))
    return out.getvalue()


def _by_column(table: Table) -> list[tuple[Column, list[str]]]:
    """Columns with their cells, bars drawn."""
    found = []
    for i, column in enumerate(table.columns):
        values = [row[i] for row in table.rows]
        bars = ["█" * round(_BAR * float(value or 0)) for value in values] if column.bar else None
        found.append((column, bars or [column.cell(value) for value in values]))
    return found


_Columns = list[tuple[Column, list[str]]]


def _fitting(columns: _Columns, longest: int, width: int, spare: Sequence[str]) -> tuple[_Columns, int, list[str]]:
    """The columns that there is room for beside names, the room of the names, and the headers of those left out."""
    left_out: list[str] = []
    for title in (*spare, None):
        widths = [max(len(visible(c.header)), *map(len, cells), 0) for c, cells in columns]
        least = [min(w, _LEAST_NOTE) if c.title == "note" else w for (c, _), w in zip(columns, widths, strict=True)]
        room = width - _GAP - sum(w + _GAP for w in least)
        if room >= min(longest, _LEAST_NAME) or title is None:
            break
        goes = [c.title == title or (bool(c.beside) and c.beside == title) for c, _ in columns]
        left_out += [c.header for (c, _), out in zip(columns, goes, strict=True) if out and not c.bar]
        columns = [column for column, out in zip(columns, goes, strict=True) if not out]
    note = max(room - longest, 0) + _LEAST_NOTE  # what the names leave
    told = tuple(kind for kind, title in _TOLD.items() if title in {c.title for c, _ in columns})
    shown = [
        (c, [_first_kinds(cell, note, told) for cell in cells] if c.title == "note" else cells) for c, cells in columns
    ]
    return shown, room, left_out


def _first_kinds(note: str, room: int, told: tuple[str, ...] = ()) -> str:
    """As many of the notes of a row as there is room for, what qualifies all numbers before the rest.

    Kinds that begin with one of `told` stand in numbers beside, and nothing is missed without them.
    """
    if len(note) <= room:
        return note
    kinds = [kind for kind in note.split("; ") if not kind.startswith(told)] if told else note.split("; ")
    kinds.sort(key=lambda kind: kind != "random-like")
    if len(text := "; ".join(kinds)) > room:
        fitting = [text for i in range(len(kinds), 0, -1) if len(text := "; ".join(kinds[:i])) < room]
        return f"{fitting[0] if fitting else kinds[0][: room - 1].rstrip()}…"
    for kind in reversed(note.split("; ")):  # the size of a tail rather than on which side its α is
        if kind not in kinds and len("; ".join([*kinds, kind])) <= room:
            kinds.append(kind)
    return "; ".join(kinds)


def _shortened(name: str, room: int) -> str:
    """`name` without its middle, or, where that has the number of the block, without its beginning."""
    if len(name) <= room:
        return name
    numbered = re.search(r"\d+\..*", name)
    if numbered and len(numbered[0]) < room:
        return f"…{name[len(name) - (room - 1) :]}"
    head = (room - 1) // 3
    return f"{name[:head]}…{name[len(name) - (room - 1 - head) :]}"
