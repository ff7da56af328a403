"""Analyses and comparisons as text: terminal tables, JSON, CSV, Markdown, Parquet."""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from htsr.analysis.analyze import Analysis
from htsr.analysis.comparison import Comparison, Pair
from htsr.analysis.surgery import Operation
from htsr.errors import MissingDependencyError
from htsr.files import written
from htsr.matrices.models import Model, WeightMatrix
from htsr.reporting.text import encodable, in_csv, in_markdown, visible
from htsr.spectra.metrics import LayerMetrics
from htsr.training.memory.plan import PARTS, MemoryPlans, beside

if TYPE_CHECKING:
    from rich.table import Table

Column = tuple[str, Callable[[LayerMetrics], str]]


def _number(field: str, digits: int) -> Callable[[LayerMetrics], str]:
    def show(row: LayerMetrics) -> str:
        value = getattr(row, field)
        return "" if value is None else f"{value:.{digits}f}"

    return show


def _shape(row: LayerMetrics) -> str:
    kernel = f"·{row.pieces}" if row.kind in ("conv", "stack") and row.pieces and row.pieces > 1 else ""
    return f"{row.rows}×{row.columns}{kernel}"


def _note(row: LayerMetrics) -> str:
    return row.warning if row.status == "ok" else f"{row.status}: {row.warning}"


# header, cell; those with a field are shown only where some row has it
_ALWAYS: tuple[Column, ...] = (
    ("matrix", lambda row: row.name),
    ("role", lambda row: row.role),
    ("shape", _shape),
    ("α", _number("alpha", 2)),
    ("± σ", _number("sigma", 2)),
    ("D", _number("D", 3)),
    ("tail", _number("num_pl_tail", 0)),
    ("α null", _number("alpha_null", 1)),
    ("⟨ln λ̃⟩", _number("trace_log", 2)),
    ("stable rank", _number("stable_rank", 1)),
    ("log ‖W‖²", _number("log_norm", 2)),
)
_WHERE_PRESENT: tuple[tuple[str, str, int], ...] = (
    ("α low", "alpha_low", 2),
    ("α high", "alpha_high", 2),
    ("α error", "alpha_error", 2),
    ("spikes", "num_spikes", 0),
    ("traps", "num_traps", 0),
    ("to random", "rand_distance", 3),
)


def columns(rows: Sequence[LayerMetrics]) -> list[Column]:
    """Headers and cells of the short table of these rows."""
    extra = [(h, _number(f, d)) for h, f, d in _WHERE_PRESENT if any(getattr(r, f) is not None for r in rows)]
    laws = [("law", lambda r: r.best_law or "")] if any(r.best_law for r in rows) else []
    return [*_ALWAYS, *extra, *laws, ("note", _note)]


def style_of(row: LayerMetrics) -> str:
    """Colour of a row: by status, then by α."""
    if row.status != "ok":
        return "red"
    if "random-like" in row.warning:
        return "bright_black"
    if row.alpha is None:
        return ""
    return "magenta" if row.alpha < 2 else "green" if row.alpha <= 6 else "yellow"


def terminal_table(rows: Sequence[LayerMetrics], width: int) -> Table:
    """The rows as a rich table of at most `width` characters, coloured by status."""
    shown = [(header, [cell(row) for row in rows]) for header, cell in columns(rows)]
    order: tuple[str, ...] = ("D", "log ‖W‖²", "± σ", "stable rank", "role", "α null")
    order += ("to random", "law", "spikes", "shape", "traps", "tail", "note")
    styles = {"α": (colours := [style_of(row) for row in rows]), "note": colours}
    return _fitted_table(shown, width, order, styles)


def _fitted_table(
    shown: list[tuple[str, list[str]]],
    width: int,
    least_telling_first: Sequence[str],
    styles: dict[str, list[str]] | None = None,
    elsewhere: str = "; --format csv has all",
) -> Table:
    """A table that never cuts a number.

    Without room names lose their middle, notes their end, and then whole columns go; the caption says which.
    """
    from rich.text import Text

    (first, names), *rest = ((header, [visible(cell) for cell in cells]) for header, cells in shown)
    longest = max(map(len, names), default=0)
    left_out: list[str] = []
    for header in (*least_telling_first, None):
        widths = [max(len(h), *map(len, cells), 0) for h, cells in rest]
        least = [min(w, _LEAST_NOTE) if h == "note" else w for (h, _), w in zip(rest, widths, strict=True)]
        room = width - _GAP - sum(w + _GAP for w in least)
        if room >= min(longest, _LEAST_NAME) or header is None:
            break
        left_out += [h for h, _ in rest if h == header]
        rest = [column for column in rest if column[0] != header]
    note = max(room - longest, 0) + _LEAST_NOTE  # what the names leave
    rest = [(h, [_first_kinds(cell, note) for cell in cells] if h == "note" else cells) for h, cells in rest]
    table = _table([first, *(header for header, _ in rest)])
    for i, name in enumerate(names):
        cells = [Text(values[i], style=(styles or {}).get(header, [""] * (i + 1))[i]) for header, values in rest]
        table.add_row(_shortened(name, max(room, 8)), *cells)
    if left_out:
        table.caption = Text(f"left out for width: {', '.join(left_out)}{elsewhere}", style="dim")
        table.caption_justify = "left"
    return table


_GAP = 3  # between columns
_LEAST_NAME = 24
_LEAST_NOTE = 12  # of "random-like…"


def _first_kinds(note: str, room: int) -> str:
    """As many of the notes of a row as there is room for, what qualifies all numbers before the rest."""
    if len(note) <= room:
        return note
    kinds = sorted(note.split("; "), key=lambda kind: kind != "random-like")
    fitting = [text for i in range(len(kinds), 0, -1) if len(text := "; ".join(kinds[:i])) < room]
    return f"{fitting[0] if fitting else kinds[0][: room - 1].rstrip()}…"


def _shortened(name: str, room: int) -> str:
    """`name` without its middle, or, where that has the number of the block, without its beginning."""
    if len(name) <= room:
        return name
    numbered = re.search(r"\d+\..*", name)
    if numbered and len(numbered[0]) < room:
        return f"…{name[len(name) - (room - 1) :]}"
    head = (room - 1) // 3
    return f"{name[:head]}…{name[len(name) - (room - 1 - head) :]}"


def summary_table(analysis: Analysis, width: int = 1000) -> Table:
    """Means by role, and of the whole model in the last line, in at most `width` characters."""
    shown: tuple[tuple[str, str, int], ...] = (
        ("α", "alpha", 2),
        ("α null", "alpha_null", 1),
        ("⟨ln λ̃⟩", "trace_log", 2),
        ("stable rank", "stable_rank", 1),
        ("entropy", "entropy", 3),
        ("log ‖W‖²", "log_norm", 2),
        ("log λ_max", "log_spectral_norm", 2),
        ("α̂", "alpha_hat", 2),
        ("spikes", "num_spikes", 1),
        ("traps", "num_traps", 1),
    )
    whole = analysis.summary()
    shown = tuple(column for column in shown if column[1] in whole)
    groups: dict[str, dict[str, float]] = {**analysis.summary_by("role"), "all": whole}
    lines = [("role", list(groups)), ("matrices", [f"{means['matrices']:.0f}" for means in groups.values()])]
    for header, field, digits in shown:
        lines.append((header, [f"{means[field]:.{digits}f}" if field in means else "" for means in groups.values()]))
    order = ("log ‖W‖²", "log λ_max", "entropy", "α̂", "stable rank", "matrices", "α null", "traps", "spikes")
    table = _fitted_table(lines, width, order, elsewhere="; --format json has all")
    table.rows[-1].style = "bold"
    return table


def comparison_table(comparison: Comparison, width: int) -> Table:
    """The pairs as a rich table of at most `width` characters."""

    def number(value: float | None, digits: int) -> str:
        return "" if value is None else f"{value:.{digits}f}"

    def delta(pair: Pair) -> float | None:
        return None if pair.a.alpha is None or pair.b.alpha is None else pair.b.alpha - pair.a.alpha

    cells: dict[str, Callable[[Pair], str]] = {
        "matrix": lambda p: p.name,
        "role": lambda p: p.a.role,
        "α a": lambda p: number(p.a.alpha, 2),
        "α b": lambda p: number(p.b.alpha, 2),
        "Δα": lambda p: number(delta(p), 2),
        "⟨ln λ̃⟩ a": lambda p: number(p.a.trace_log, 2),
        "⟨ln λ̃⟩ b": lambda p: number(p.b.trace_log, 2),
        "‖A-B‖/‖A‖": lambda p: number(getattr(p.distance, "relative", None), 4),
        "cosine": lambda p: number(getattr(p.distance, "cosine", None), 4),
        "CKA": lambda p: number(getattr(p.distance, "cka", None), 4),
        "ESD dist.": lambda p: number(p.esd_distance, 4),
    }
    shown = [(header, [cell(pair) for pair in comparison]) for header, cell in cells.items()]
    shown = [column for column in shown if any(column[1])]
    return _fitted_table(shown, width, ("CKA", "role", "⟨ln λ̃⟩ a", "⟨ln λ̃⟩ b", "cosine", "ESD dist.", "α a"))


def description_table(model: Model, width: int) -> Table:
    """Matrices of a model that has not been read, in at most `width` characters."""
    cells: dict[str, Callable[[WeightMatrix], str]] = {
        "matrix": lambda m: m.name,
        "role": lambda m: m.role,
        "block": lambda m: "" if m.block is None else str(m.block),
        "kind": lambda m: m.kind,
        "shape": lambda m: f"{m.shape[0]}×{m.shape[1]}" + (f"·{m.pieces}" if m.pieces > 1 else ""),
        "Q": lambda m: f"{max(m.shape) / min(m.shape):.2f}",
        "parameters": lambda m: f"{m.parameters:,}",
        "stored": lambda m: m.dtype,
        "note": lambda m: m.problem[1] if m.problem else m.warning,
    }
    shown = [(header, [cell(matrix) for matrix in model]) for header, cell in cells.items()]
    shown = [column for column in shown if column[0] != "note" or any(column[1])]
    return _fitted_table(shown, width, ("Q", "kind", "block", "stored", "role", "note"))


def memory_table(memory: MemoryPlans) -> Table:
    """Parts of the peak, a column a method, in the binary unit in which the largest peak is at least 1."""
    peak = max((plan.total for plan in memory.plans), default=0)
    unit, size = next(((name, size) for name, size in _UNITS if peak >= size), _UNITS[-1])
    table = _table([f"{unit} at the peak", *(plan.method for plan in memory.plans)])
    for part in (*PARTS, "total"):
        sizes = [getattr(plan, part) / size for plan in memory.plans]
        table.add_row(part, *(f"{size:.2f}" for size in sizes), style="bold" if part == "total" else "")
    for part in ("process", "merging"):
        sizes = [beside(plan)[part] / size for plan in memory.plans]
        if any(sizes):
            table.add_row(f"on a CPU: {part}", *(f"+{size:.2f}" if size else "" for size in sizes), style="dim")
    table.add_row("peak in", *(plan.moment for plan in memory.plans), style="dim")
    table.add_row("trained", *(_millions(plan.trainable) for plan in memory.plans), style="dim")
    return table


_UNITS = (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10))


def _millions(parameters: int) -> str:
    return f"{parameters / 1e6:,.1f} M" if parameters >= 1e5 else f"{parameters:,}"


def surgery_table(operations: Sequence[Operation], width: int) -> Table:
    """What `htsr project` did to each matrix, as a rich table of at most `width` characters."""
    cells: dict[str, Callable[[Operation], str]] = {
        "matrix": lambda o: o.name,
        "role": lambda o: o.role,
        "shape": lambda o: f"{o.rows}×{o.columns}",
        "kept": lambda o: "" if o.kept is None else f"{o.kept}/{o.total}",
        "‖W‖² kept": lambda o: "" if o.norm_kept is None else f"{o.norm_kept:.4f}",
        "traps": lambda o: "" if o.traps_before is None else f"{o.traps_before}→{o.traps_after}",
        "mean": lambda o: f"{o.mean_removed:.2g}" if o.mean_removed else "",
        "clipped": lambda o: str(o.clipped) if o.clipped else "",
        "note": lambda o: "" if o.status == "ok" else o.warning,
    }
    shown = [(header, [cell(operation) for operation in operations]) for header, cell in cells.items()]
    filled = [column for column in shown if column[0] == "matrix" or any(column[1])]
    return _fitted_table(filled, width, ("role", "shape", "mean", "clipped"), elsewhere="")


def _table(headers: Sequence[str]) -> Table:
    from rich import box
    from rich.table import Table

    words = {*(f"{unit} at the peak" for unit, _ in _UNITS), "matrix", "role", "note", "kind", "stored", "law"}
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
    for header in headers:
        left = header in words
        table.add_column(header, justify="left" if left else "right", no_wrap=True, overflow="ellipsis")
    return table


def records(subject: Analysis | Comparison | Model | MemoryPlans) -> list[dict[str, Any]]:
    """One flat dictionary per line of the full table."""
    if isinstance(subject, Analysis):
        return [asdict(row) for row in subject.rows]
    if isinstance(subject, Comparison):
        return [{k: _plain(v) for k, v in line.items()} for line in subject.to_pandas().to_dict("records")]
    if isinstance(subject, MemoryPlans):
        return [asdict(plan) for plan in subject.plans]
    return [
        {
            "name": m.name,
            "role": m.role,
            "block": m.block,
            "kind": m.kind,
            "rows": m.shape[0],
            "columns": m.shape[1],
            "pieces": m.pieces,
            "parameters": m.parameters,
            "stored": m.dtype,
            "problem": m.problem[1] if m.problem else "",
        }
        for m in subject
    ]


def as_json(subject: Analysis | Comparison | Model | MemoryPlans) -> str:
    """Strict JSON: NaN and infinities are null."""
    content: dict[str, Any] = {}
    if isinstance(subject, Analysis):
        content = {
            "model": subject.label,
            "options": asdict(subject.options),
            "meta": dict(subject.meta),
            "summary": subject.summary(),
            "roles": subject.summary_by("role"),
        }
    elif isinstance(subject, Comparison):
        content = {
            "a": subject.a.label,
            "b": subject.b.label,
            "summary": {k: dict(zip(("a", "b", "delta"), v, strict=True)) for k, v in subject.summary().items()},
            "only_a": subject.only_a,
            "only_b": subject.only_b,
            "reshaped": subject.reshaped,
        }
    else:
        content = {"model": subject.label}
    return json.dumps(_strict(content | {"rows": records(subject)}), indent=1, allow_nan=False) + "\n"


def as_csv(subject: Analysis | Comparison | Model | MemoryPlans) -> str:
    """Comma-separated, one line a matrix, all columns."""
    lines = records(subject)
    out = io.StringIO()
    writer = csv.DictWriter(out, fieldnames=list(lines[0]) if lines else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: in_csv(value) for key, value in line.items()} for line in lines)
    return out.getvalue()


def as_markdown(subject: Analysis | Comparison | Model | MemoryPlans) -> str:
    """The short table in Markdown."""
    if isinstance(subject, Analysis):
        shown = columns(subject.rows)
        head = [header for header, _ in shown]
        body = [[cell(row) for _, cell in shown] for row in subject.rows]
    else:
        lines = records(subject)
        head = list(lines[0]) if lines else []
        body = [
            ["" if v is None else f"{v:.4g}" if isinstance(v, float) else str(v) for v in line.values()]
            for line in lines
        ]
    rows = [head, ["---"] * len(head), *body]
    return "".join("| " + " | ".join(map(in_markdown, row)) + " |\n" for row in rows)


def write_parquet(subject: Analysis | Comparison | Model | MemoryPlans, path: Path) -> None:
    """All columns as Parquet. Needs the ``report`` extra.

    Raises:
        MissingDependencyError: pyarrow is not installed.
        HtsrError: the file cannot be written.
    """
    require_pyarrow()
    import pandas as pd

    lines = [
        {key: encodable(value) if isinstance(value, str) else value for key, value in line.items()}
        for line in records(subject)
    ]
    with written(path) as temporary:
        pd.DataFrame(lines).to_parquet(temporary, index=False)


def require_pyarrow() -> None:
    """Make sure that Parquet can be written, without importing pyarrow.

    Raises:
        MissingDependencyError: pyarrow is not installed.
    """
    if find_spec("pyarrow") is None:
        raise MissingDependencyError("parquet needs pyarrow: pip install 'htsr[report]'")


def _plain(value: Any) -> Any:
    return value.item() if hasattr(value, "item") else value


def _strict(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _strict(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_strict(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
