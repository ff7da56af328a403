"""Names as text that is safe to show: they come from files of strangers."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console


def visible(text: str) -> str:
    """`text` on one line, what cannot be printed as its escape: no name moves a cursor or ends a table."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def encodable(text: str) -> str:
    """`text` with what UTF-8 cannot say as its escape: file names may hold such."""
    return text.encode("utf-8", "backslashreplace").decode()


def in_csv(value: Any) -> Any:
    """`value` for a cell of a CSV file; no text moves the cursor of a terminal, or is a formula to a spreadsheet."""
    if not isinstance(value, str):
        return value
    return "'" * value.startswith(("=", "+", "-", "@")) + visible(value)


def in_markdown(text: str) -> str:
    """`text` for a cell of a Markdown table, where it means itself."""
    return re.sub(r"[\\|<`*]|(?<!\w)_|_(?!\w)|(?<=\])(?=\()", r"\\\g<0>", visible(text))


def plain_console(**options: Any) -> Console:
    """A rich console that takes text as it is: no markup, no emoji codes, no colours of its own."""
    from rich.console import Console

    return Console(markup=False, emoji=False, highlight=False, **options)
