"""Rows for other programs, and tables for documents: JSON, CSV, Parquet, Markdown."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from htsr.errors import MissingDependencyError
from htsr.files import written
from htsr.reporting.text import encodable, in_csv, in_markdown
from htsr.results import Record, Table


def as_json(content: Mapping[str, Any]) -> str:
    """Strict JSON: NaN and infinities are null.

    Examples:
        >>> from htsr.reporting.formats import as_json
        >>> print(as_json({"alpha": float("nan")}), end="")
        {
         "alpha": null
        }
    """
    return json.dumps(_strict(content), indent=1, allow_nan=False) + "\n"


def as_csv(records: Sequence[Record]) -> str:
    """Comma-separated, all columns; None is empty.

    Examples:
        >>> from htsr.reporting.formats import as_csv
        >>> print(as_csv([{"name": "up", "alpha": 2.5, "block": None}]), end="")
        name,alpha,block
        up,2.5,
    """
    out = io.StringIO()
    writer = csv.DictWriter(out, fieldnames=list(records[0]) if records else [], lineterminator="\n")
    writer.writerow({key: in_csv(key) for key in writer.fieldnames})
    writer.writerows({key: in_csv(value) for key, value in record.items()} for record in records)
    return out.getvalue()


def as_markdown(table: Table) -> str:
    """The table in Markdown, numbers on the right.

    Examples:
        >>> from htsr.reporting.formats import as_markdown
        >>> from htsr.results import Column, Table
        >>> print(as_markdown(Table((Column("matrix", text=True), Column("α", ".2f")), (("mlp.up", 2.5),))), end="")
        | matrix | α |
        | --- | --: |
        | mlp.up | 2.50 |
    """
    table = table.in_print()
    rules = ["---" if column.text else "--:" for column in table.columns]
    lines = [[column.header for column in table.columns], rules, *table.cells()]
    return "".join("| " + " | ".join(map(in_markdown, line)) + " |\n" for line in lines)


def write_parquet(records: Sequence[Record], path: Path, types: Mapping[str, type] | None = None) -> None:
    """All columns as Parquet, whole numbers as such. Needs the ``report`` extra.

    Files of one kind of result have the same types, so that they can be read together.

    Args:
        records: rows with all their columns.
        path: file to write.
        types: types of columns, by name. Of others values tell, and one without values holds floats.

    Raises:
        MissingDependencyError: pyarrow is not installed.
        HtsrError: the file cannot be written.
    """
    require_pyarrow()
    import pyarrow
    from pyarrow import parquet

    lines = [
        {key: encodable(value) if isinstance(value, str) else value for key, value in record.items()}
        for record in records
    ]
    known = {str: pyarrow.string(), int: pyarrow.int64(), float: pyarrow.float64(), bool: pyarrow.bool_()}
    types = types or {}
    columns = {}
    for name in lines[0] if lines else types:
        column = pyarrow.array([line[name] for line in lines], known[types[name]] if name in types else None)
        columns[name] = column.cast(pyarrow.float64()) if column.type == pyarrow.null() else column
    with written(path) as temporary:
        parquet.write_table(pyarrow.table(columns), temporary)


def require_pyarrow() -> None:
    """Make sure that Parquet can be written, without importing pyarrow.

    Raises:
        MissingDependencyError: pyarrow is not installed.
    """
    if find_spec("pyarrow") is None:
        raise MissingDependencyError("parquet needs pyarrow: pip install 'htsr[report]'")


def _strict(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _strict(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_strict(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
