"""A layerwise plan as text, and as a picture."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from htsr.errors import MissingDependencyError
from htsr.files import written
from htsr.reporting.plots import check_picture
from htsr.reporting.tables import _fitted_table
from htsr.reporting.text import in_csv, in_markdown, plain_console, visible
from htsr.training.layerwise.plan import Plan, PlanRow

if TYPE_CHECKING:
    from rich.table import Table

_CELLS: dict[str, Callable[[PlanRow], str]] = {
    "matrix": lambda row: row.name,
    "role": lambda row: row.role,
    "shape": lambda row: f"{row.rows}×{row.columns}" + (f" ({row.parts} parts)" if row.parts > 1 else ""),
    "score": lambda row: "" if row.score is None else f"{row.score:.3f}",
    "multiplier": lambda row: f"{row.multiplier:.3f}",
    "note": lambda row: "" if row.why == "measured" else row.why,
}


def plan_table(plan: Plan, width: int) -> Table:
    """The plan as a rich table of at most `width` characters."""
    shown = [(header, [cell(row) for row in plan]) for header, cell in _CELLS.items()]
    return _fitted_table(shown, width, ("shape", "role", "note"))


def closing(plan: Plan) -> str:
    """One line about what is not in the table."""
    what = {"lr": "learning rate", "weight_decay": "weight decay"}[plan.policy.sets]
    return (
        f"{visible(plan.label)}: multipliers of the {what} at step 1; parameters of no matrix stay at 1 unless pinned"
    )


def as_json(plan: Plan) -> str:
    """Strict JSON."""
    content = {"model": plan.label, "policy": json.loads(plan.policy.describe()), "rows": [asdict(r) for r in plan]}
    return json.dumps(content, indent=1) + "\n"


def as_csv(plan: Plan) -> str:
    """Comma-separated, one line a tensor."""
    lines = [asdict(row) for row in plan]
    out = io.StringIO()
    writer = csv.DictWriter(out, fieldnames=list(lines[0]) if lines else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: in_csv(value) for key, value in line.items()} for line in lines)
    return out.getvalue()


def as_markdown(plan: Plan) -> str:
    """The table in Markdown."""
    lines = [list(_CELLS), ["---"] * len(_CELLS), *([cell(row) for cell in _CELLS.values()] for row in plan)]
    return "".join("| " + " | ".join(map(in_markdown, line)) + " |\n" for line in lines)


def as_text(plan: Plan, width: int = 200) -> str:
    """The terminal's table without colours."""
    out = io.StringIO()
    console = plain_console(file=out, width=width)
    console.print(plan_table(plan, width))
    console.print(closing(plan))
    return out.getvalue()


def plot_plan(plan: Plan, ax: Any = None) -> Any:
    """Heat map of the multipliers by role and block.

    Args:
        plan: what to draw.
        ax: matplotlib axes; new ones by default.

    Returns:
        The axes.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    import numpy as np

    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise MissingDependencyError("the picture needs matplotlib: pip install 'htsr[report]'") from error
    roles = list(dict.fromkeys(row.role for row in plan))
    blocks = sorted({row.block for row in plan}, key=lambda block: (block is not None, block or 0))
    sums, counts = np.zeros((2, len(roles), len(blocks)))
    for row in plan:
        cell = roles.index(row.role), blocks.index(row.block)
        sums[cell] += row.multiplier
        counts[cell] += 1
    values = np.divide(sums, counts, out=np.full_like(sums, np.nan), where=counts > 0)
    if ax is None:
        size = (min(14.0, 3.6 + 0.6 * len(blocks)), 1.8 + 0.36 * len(roles))
        ax = pyplot.subplots(figsize=size, layout="constrained")[1]
    image = ax.imshow(values, cmap="viridis", aspect="auto", interpolation="nearest")
    step = max(1, len(blocks) // 30)
    ax.set_xticks(range(0, len(blocks), step), ["–" if b is None else str(b) for b in blocks[::step]])
    ax.set_yticks(range(len(roles)), roles, parse_math=False)
    if len(blocks) <= 16:
        middle = (np.nanmin(values) + np.nanmax(values)) / 2
        for (i, j), value in np.ndenumerate(values):
            if np.isfinite(value):
                colour = "black" if value > middle else "white"
                ax.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize="small", color=colour)
    what = {"lr": "learning rate", "weight_decay": "weight decay"}[plan.policy.sets]
    ax.set(xlabel="block", title=f"multiplier of the {what}")
    ax.figure.colorbar(image, ax=ax)
    return ax


def write_picture(plan: Plan, path: Path) -> None:
    """`plot_plan` as a file; the suffix tells the format (.png, .svg, .pdf).

    Raises:
        UsageError: another suffix.
        HtsrError: the file cannot be written.
        MissingDependencyError: matplotlib is not installed.
    """
    check_picture(path)
    axes = plot_plan(plan)
    try:
        with written(path) as temporary:
            axes.figure.savefig(temporary, dpi=130)
    finally:
        from matplotlib import pyplot

        pyplot.close(axes.figure)
