"""Outliers as a table for the terminal and as a picture."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from htsr.errors import MissingDependencyError
from htsr.reporting.text import visible

if TYPE_CHECKING:
    from rich.table import Table

    from htsr.calibration.outliers import Outliers

_BAR = 24


def outlier_table(outliers: Outliers) -> Table:
    """One line per block: D_l in per cent at every threshold, and at the highest that has outliers p_l with a bar."""
    from rich import box
    from rich.table import Table

    shares = [outliers.distribution(threshold) for threshold in outliers.thresholds]
    with_any = [i for i, share in enumerate(shares) if share.sum() > 0]
    shown = with_any[-1] if with_any else 0
    p = shares[shown] / max(float(shares[shown].sum()), 1e-300)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
    table.add_column("block")
    for threshold in outliers.thresholds:
        table.add_column(f"D {threshold:g} %", justify="right")
    table.add_column(f"p {outliers.thresholds[shown]:g}", justify="right")
    table.add_column("")
    for index, name in enumerate(outliers.blocks):
        bar = "█" * round(_BAR * float(p[index] / max(p.max(), 1e-300)))
        table.add_row(visible(name), *(f"{100 * share[index]:.4f}" for share in shares), f"{p[index]:.4f}", bar)
    return table


def plot_outliers(outliers: Outliers, ax: Any = None) -> Any:
    """Sampling probabilities D_l/ΣD by block, one line per threshold that has outliers; returns the matplotlib axes.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    if ax is None:
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise MissingDependencyError("the picture needs matplotlib: pip install 'htsr[report]'") from error
        ax = Figure(figsize=(8, 4), layout="constrained").add_subplot()
    for threshold in outliers.thresholds:
        share = outliers.distribution(threshold)
        if share.sum() > 0:
            ax.plot(np.arange(len(share)), share / share.sum(), marker="o", markersize=3, label=f"τ = {threshold:g}")
    ax.axhline(1 / len(outliers.blocks), color="grey", linewidth=0.8, linestyle="--", label="uniform")
    ax.set(xlabel="block", ylabel="$D_l / \\sum D$")
    ax.set_title(f"{visible(outliers.label)}: outlier distribution", parse_math=False)
    ax.set_ylim(bottom=0)
    ax.legend(frameon=False, fontsize="small")
    return ax
