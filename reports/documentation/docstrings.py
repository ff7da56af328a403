"""Tables in docstrings are those of reStructuredText, which read well in a terminal; the site wants Markdown's."""

from __future__ import annotations

import re
from typing import Any

import griffe

_TABLE = re.compile(r"^( *)(=+(?: +=+)+)\n((?:.*\n)*?)\1\2[ ]*$", re.MULTILINE)


class Tables(griffe.Extension):
    """Turns the tables of every docstring."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """An object and its docstring were read."""
        if obj.docstring:
            obj.docstring.value = with_markdown_tables(obj.docstring.value)


def with_markdown_tables(text: str) -> str:
    """`text` with each simple table, which has no head, as one of Markdown."""
    return _TABLE.sub(lambda found: _markdown(found[1], found[2], found[3]), text)


def _markdown(indent: str, rule: str, body: str) -> str:
    starts = [len(indent) + found.start() for found in re.finditer("=+", rule)]
    rows: list[list[str]] = []
    for line in body.splitlines():
        ends = [*starts[1:], len(line)]
        cells = [line[start:end].strip() for start, end in zip(starts, ends, strict=True)]
        if cells[0] or not rows:
            rows.append(cells)
        else:  # goes on with the row above
            rows[-1] = [f"{above} {cell}".strip() for above, cell in zip(rows[-1], cells, strict=True)]
    columns = len(starts)
    lines = ["| " * columns + "|", "| --- " * columns + "|"]
    lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join(indent + line for line in lines)
