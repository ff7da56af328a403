"""Plots for notebooks and papers, drawn with matplotlib: one ESD with its fit, heat maps, distributions by block."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from htsr.arrays import Vector
from htsr.errors import MissingDependencyError, UsageError
from htsr.files import check_writable, written
from htsr.reporting import figures
from htsr.reporting.text import visible
from htsr.results import Record

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's colours, apart for every kind of colour vision
_BLUE, _GREY, _VERMILION, _GREEN, _PURPLE = "#0072b2", "#8a8f98", "#d55e00", "#009e73", "#9b4f96"
_LINES = {
    "lambda_min": (r"$\lambda_{\min}$", _VERMILION, "--"),
    "lambda_erg": (r"$\lambda_{\mathrm{ERG}}$", _GREEN, "-."),
    "bulk_edge": ("bulk edge", _PURPLE, ":"),
}


_FEW_BLOCKS = 16
PICTURES = (".png", ".svg", ".pdf")


def check_picture(path: Path) -> None:
    """Know before any work that a picture can be drawn at `path`.

    Raises:
        UsageError: the suffix stands for no format of pictures.
        HtsrError: the file cannot be written.
        MissingDependencyError: matplotlib is not installed.
    """
    if path.suffix.lower() not in PICTURES:
        raise UsageError(f"the picture {path} is one of {', '.join(PICTURES)}")
    check_writable(path)
    if find_spec("matplotlib") is None:
        raise MissingDependencyError("the picture needs matplotlib: pip install 'htsr[report]'")


def plot_esd(
    row: Record,
    eigenvalues: Vector | None,
    permuted: Vector | None = None,
    *,
    xmax: float | None = None,
    ax: Any = None,
) -> Axes:
    """The ESD of one matrix on logarithmic axes, with the power law, λ_min, λ_ERG and the bulk edge where there are.

    Args:
        row: record of the matrix.
        eigenvalues: its spectrum, (K,) ascending; None where it has none.
        permuted: spectrum of the permuted matrix, likewise (K,).
        xmax: largest eigenvalue that took part in the fit; None for all.
        ax: matplotlib axes to draw on; new ones by default.

    Raises:
        UsageError: the matrix has no eigenvalues to plot.
        MissingDependencyError: matplotlib is not installed.
    """
    histogram = None if eigenvalues is None else figures.log_histogram(eigenvalues)
    if eigenvalues is None or histogram is None:
        raise UsageError(f"{row['name']} has no positive eigenvalues to plot: {row['warning'] or row['status']}")
    ax = _axes(ax, (6.4, 4.4))
    if permuted is not None and (noise := figures.log_histogram(permuted)):
        ax.stairs(_gaps(noise.density), noise.edges, color=_GREY, label="permuted")
    ax.stairs(_gaps(histogram.density), histogram.edges, color=_BLUE, fill=True, alpha=0.3)
    ax.stairs(_gaps(histogram.density), histogram.edges, color=_BLUE, label="ESD")
    if line := figures.fitted_line(row, eigenvalues, xmax):
        ends = [line.low, line.high]
        label = rf"power law, $\alpha$ = {line.alpha:.2f}"
        ax.plot(ends, [line.density(x) for x in ends], color=_VERMILION, linewidth=2, label=label)
    for place, value in figures.marks(row).items():
        label, colour, dashes = _LINES[place]
        ax.axvline(value, color=colour, linestyle=dashes, linewidth=1.2, label=f"{label} = {value:.3g}")
    shown = histogram.density[histogram.density > 0]
    ax.set(xscale="log", yscale="log", xlabel=r"eigenvalue $\lambda$", ylabel="density")
    ax.set_xlim(min([histogram.edges[1] / 1.5, *(v / 1.2 for v in figures.marks(row).values())]), None)
    ax.set_ylim(shown.min() / 2, shown.max() * 2)
    ax.set_title(visible(row["name"]), fontsize="medium", parse_math=False)
    ax.legend(fontsize="small", frameon=False)
    return ax


def plot_heat_map(
    rows: Sequence[Record], metric: str, *, title: str | None = None, numbers: bool = False, ax: Any = None
) -> Axes:
    """Heat map of a metric by role and block; several matrices in one cell are averaged.

    Args:
        rows: records, one for each matrix, with ``role`` and ``block``.
        metric: name of the field that is drawn; its values are numbers or None.
        title: title of the axes; the metric by role and block, if None.
        numbers: whether the cells hold their numbers, where there are few blocks.
        ax: matplotlib axes to draw on; new ones by default.

    Raises:
        UsageError: no row has such a number.
        MissingDependencyError: matplotlib is not installed.
    """
    cells = figures.grid(rows)
    values = cells.means(rows, metric)
    if not np.isfinite(values).any():
        raise UsageError(f"no matrix has {metric}")
    scale = figures.colour_scale(values, metric)
    ax = _axes(ax, (min(14.0, 3.0 + 0.35 * len(cells.blocks)), 1.8 + 0.32 * len(cells.roles)))
    colours = "viridis" if scale.centre is None else "PuOr_r"
    image = ax.imshow(values, cmap=colours, vmin=scale.low, vmax=scale.high, aspect="auto", interpolation="nearest")
    step = max(1, len(cells.blocks) // 30)
    ax.set_xticks(range(0, len(cells.blocks), step), ["–" if b is None else str(b) for b in cells.blocks[::step]])
    ax.set_yticks(range(len(cells.roles)), cells.roles, parse_math=False)
    if numbers and len(cells.blocks) <= _FEW_BLOCKS:
        middle = (scale.low + scale.high) / 2
        for (i, j), value in np.ndenumerate(values):
            if np.isfinite(value):
                colour = "black" if value > middle else "white"
                ax.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize="small", color=colour)
    label = figures.LABELS.get(metric, metric)
    ax.set(xlabel="block", title=title or f"{label} by role and block")
    ax.figure.colorbar(image, ax=ax, label=label, extend="both")
    return ax


def plot_distributions(distributions: Mapping[str, Vector], title: str, *, ax: Any = None) -> Axes:
    """Sampling probabilities D_l/ΣD by block, one line per distribution that has any.

    Args:
        distributions: distributions D_l by name, (blocks,) each.
        title: title of the axes.
        ax: matplotlib axes to draw on; new ones by default.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    ax = _axes(ax, (8, 4))
    for name, share in distributions.items():
        if share.sum() > 0:
            ax.plot(np.arange(len(share)), share / share.sum(), marker="o", markersize=3, label=name)
    blocks = max(map(len, distributions.values()))
    ax.axhline(1 / blocks, color="grey", linewidth=0.8, linestyle="--", label="uniform")
    ax.set(xlabel="block", ylabel="$D_l / \\sum D$")
    ax.set_title(visible(title), parse_math=False)
    ax.set_ylim(bottom=0)
    ax.legend(frameon=False, fontsize="small")
    return ax


def write_picture(axes: Axes, path: Path) -> None:
    """The figure of `axes` as a file; the suffix tells the format (`PICTURES`).

    Raises:
        HtsrError: the file cannot be written.
    """
    from matplotlib import pyplot

    figure: Any = axes.figure
    try:
        with written(path) as temporary:
            figure.savefig(temporary, dpi=150)
    finally:
        pyplot.close(figure)


def _axes(ax: Any, size: tuple[float, float]) -> Any:
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise MissingDependencyError("plots need matplotlib: pip install 'htsr[report]'") from error
    return pyplot.subplots(figsize=size, layout="constrained")[1] if ax is None else ax


def _gaps(density: Vector) -> Vector:
    """Empty bins as NaN: a logarithmic axis has no place for 0."""
    return np.where(density > 0, density, np.nan)
