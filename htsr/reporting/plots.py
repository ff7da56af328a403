"""Plots for notebooks and papers, drawn with matplotlib: one ESD with its fit, and the heat map of a model."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from htsr.arrays import Vector
from htsr.errors import MissingDependencyError, UsageError
from htsr.files import check_writable
from htsr.reporting import figures
from htsr.reporting.text import visible
from htsr.spectra.metrics import NUMERIC

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from htsr.analysis.analyze import Analysis

# Okabe and Ito's colours, apart for every kind of colour vision
_BLUE, _GREY, _VERMILION, _GREEN, _PURPLE = "#0072b2", "#8a8f98", "#d55e00", "#009e73", "#9b4f96"
_LINES = {
    "lambda_min": (r"$\lambda_{\min}$", _VERMILION, "--"),
    "lambda_erg": (r"$\lambda_{\mathrm{ERG}}$", _GREEN, "-."),
    "bulk_edge": ("bulk edge", _PURPLE, ":"),
}


PICTURES = (".png", ".svg", ".pdf")


def check_picture(path: Path) -> None:
    """Know before any work that a picture can be drawn at `path`.

    Raises:
        UsageError: the suffix tells no format.
        HtsrError: the file cannot be written.
        MissingDependencyError: matplotlib is not installed.
    """
    if path.suffix.lower() not in PICTURES:
        raise UsageError(f"the picture {path} is one of {', '.join(PICTURES)}")
    check_writable(path)
    if find_spec("matplotlib") is None:
        raise MissingDependencyError("the picture needs matplotlib: pip install 'htsr[report]'")


def plot_esd(analysis: Analysis, name: str, ax: Any = None) -> Axes:
    """The ESD of one matrix on logarithmic axes, with the power law, λ_min, λ_ERG and the bulk edge where there are.

    Args:
        analysis: where the matrix is from.
        name: the matrix.
        ax: matplotlib axes to draw on; new ones by default.

    Raises:
        KeyError: no such matrix.
        UsageError: the matrix has no eigenvalues to plot.
        MissingDependencyError: matplotlib is not installed.
    """
    row = analysis[name]
    eigenvalues = analysis.eigenvalues.get(row.name)
    histogram = None if eigenvalues is None else figures.log_histogram(eigenvalues)
    if eigenvalues is None or histogram is None:
        raise UsageError(f"{row.name} has no positive eigenvalues to plot: {row.warning or row.status}")
    ax = _axes(ax, (6.4, 4.4))
    if row.name in analysis.permuted and (noise := figures.log_histogram(analysis.permuted[row.name])):
        ax.stairs(_gaps(noise.density), noise.edges, color=_GREY, label="permuted")
    ax.stairs(_gaps(histogram.density), histogram.edges, color=_BLUE, fill=True, alpha=0.3)
    ax.stairs(_gaps(histogram.density), histogram.edges, color=_BLUE, label="ESD")
    if line := figures.fitted_line(row, eigenvalues, analysis.options.xmax):
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
    ax.set_title(visible(row.name), fontsize="medium", parse_math=False)
    ax.legend(fontsize="small", frameon=False)
    return ax


def plot_heat_map(analysis: Analysis, metric: str = "alpha", ax: Any = None) -> Axes:
    """Heat map of a metric by role and block; several matrices in one cell are averaged.

    Args:
        analysis: the model.
        metric: a numeric field of `htsr.LayerMetrics`.
        ax: matplotlib axes to draw on; new ones by default.

    Raises:
        UsageError: no row has such a number.
        MissingDependencyError: matplotlib is not installed.
    """
    if metric not in NUMERIC:
        raise UsageError(f"rows have no number {metric!r}; among others alpha, trace_log, stable_rank, log_norm")
    cells = figures.grid(analysis.rows)
    values = cells.means(analysis.rows, metric)
    if not np.isfinite(values).any():
        raise UsageError(f"no matrix of {analysis.label} has {metric}")
    scale = figures.colour_scale(values, metric)
    ax = _axes(ax, (min(14.0, 3.0 + 0.35 * len(cells.blocks)), 1.8 + 0.32 * len(cells.roles)))
    colours = "viridis" if scale.centre is None else "PuOr_r"
    image = ax.imshow(values, cmap=colours, vmin=scale.low, vmax=scale.high, aspect="auto", interpolation="nearest")
    step = max(1, len(cells.blocks) // 30)
    ax.set_xticks(range(0, len(cells.blocks), step), ["–" if b is None else str(b) for b in cells.blocks[::step]])
    ax.set_yticks(range(len(cells.roles)), cells.roles, parse_math=False)
    label = figures.LABELS.get(metric, metric)
    ax.set(xlabel="block", title=f"{label} by role and block")
    ax.figure.colorbar(image, ax=ax, label=label, extend="both")
    return ax


def _axes(ax: Any, size: tuple[float, float]) -> Any:
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise MissingDependencyError("plots need matplotlib: pip install 'htsr[report]'") from error
    return pyplot.subplots(figsize=size, layout="constrained")[1] if ax is None else ax


def _gaps(density: Vector) -> Vector:
    """Empty bins as NaN: a logarithmic axis has no place for 0."""
    return np.where(density > 0, density, np.nan)
