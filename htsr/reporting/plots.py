"""Plots for notebooks and papers, drawn with matplotlib: ESDs, heat maps, distributions by block, lines over steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import numpy as np

from htsr.arrays import Vector
from htsr.errors import MissingDependencyError, UsageError
from htsr.files import check_writable, written
from htsr.reporting import figures, trajectories
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
    label = figures.label(metric)
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
    _at_whole_numbers(ax)
    ax.set_title(visible(title), parse_math=False)
    ax.set_ylim(bottom=0)
    ax.legend(frameon=False, fontsize="small")
    return ax


def plot_two_esds(
    name: str,
    a: Vector | None,
    b: Vector | None,
    labels: tuple[str, str] = ("a", "b"),
    *,
    ax: Any = None,
) -> Axes:
    """The ESDs of one matrix in two models, laid over each other on logarithmic axes.

    Args:
        name: name of the matrix.
        a: spectrum of the first, (K,) ascending; None where it has none.
        b: spectrum of the second, likewise.
        labels: names of the two models.
        ax: matplotlib axes to draw on; new ones by default.

    Raises:
        UsageError: neither has positive eigenvalues to plot.
        MissingDependencyError: matplotlib is not installed.
    """
    drawn = [
        (label, colour, histogram)
        for label, colour, spectrum in zip(labels, (_BLUE, _VERMILION), (a, b), strict=True)
        if spectrum is not None and (histogram := figures.log_histogram(spectrum))
    ]
    if not drawn:
        raise UsageError(f"{name} has no positive eigenvalues to plot in either model")
    ax = _axes(ax, (6.4, 4.4))
    for label, colour, histogram in drawn:
        ax.stairs(_gaps(histogram.density), histogram.edges, color=colour, fill=True, alpha=0.2)
        ax.stairs(_gaps(histogram.density), histogram.edges, color=colour, label=_literal(visible(label)))
    shown = np.concatenate([histogram.density[histogram.density > 0] for *_, histogram in drawn])
    ax.set(xscale="log", yscale="log", xlabel=r"eigenvalue $\lambda$", ylabel="density")
    ax.set_xlim(min(histogram.edges[1] for *_, histogram in drawn) / 1.5, None)
    ax.set_ylim(shown.min() / 2, shown.max() * 2)
    ax.set_title(visible(name), fontsize="medium", parse_math=False)
    ax.legend(fontsize="small", frameon=False)
    return ax


def plot_trajectory(
    records: Sequence[Record], metric: str, by: trajectories.By = "role", *, title: str | None = None, ax: Any = None
) -> Axes:
    """A metric over the steps of a training, or from model to model: the mean of each role or block, or each matrix.

    Args:
        records: records of a trajectory, with ``source``, ``name``, ``role``, ``block`` and perhaps ``step``.
        metric: name of the field that is drawn.
        by: what each line stands for: ``role``, ``block`` or ``matrix``.
        title: title of the axes; the metric and `by`, if None.
        ax: matplotlib axes to draw on; new ones by default.

    Raises:
        UsageError: no record has such a number, or there is no such `by`.
        MissingDependencyError: matplotlib is not installed.
    """
    if by not in get_args(trajectories.By):
        raise UsageError(f"a trajectory is drawn by {', '.join(get_args(trajectories.By))}, not by {by!r}")
    points = trajectories.pivot(records)
    lines = points.lines(metric, by)
    if not lines:
        raise UsageError(f"no matrix has {metric}")
    ax = _axes(ax, (8, 4.4))
    places = range(len(points.sources)) if points.steps is None else points.steps
    colours = _by_depth(len(lines)) if by == "block" else [None] * len(lines)
    for (group, line), colour in zip(lines.items(), colours, strict=True):
        label = _literal(visible(group))
        ax.plot(places, line, label=label, color=colour, marker="o", markersize=3, linewidth=1.2)
    if points.steps is None:
        ax.set_xticks(places, [visible(source) for source in points.sources], rotation=30, ha="right", parse_math=False)
    else:
        _at_whole_numbers(ax)
    name = figures.label(metric)
    ax.set(xlabel="model" if points.steps is None else "step", ylabel=name, title=title or f"{name} by {by}")
    if len(lines) <= _FEW_BLOCKS:
        ax.legend(fontsize="small", frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    return ax


def _at_whole_numbers(ax: Axes) -> None:
    """Ticks of the horizontal axis where blocks and steps are: there is none at a half."""
    from matplotlib.ticker import MaxNLocator

    if ax.get_xscale() == "linear":
        ax.xaxis.set_major_locator(MaxNLocator("auto", integer=True, min_n_ticks=1))


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


def _literal(label: str) -> str:
    """A label that a legend shows as it is: it reads mathematics between dollars, and leaves out what begins with _."""
    return ("\u200b" if label.startswith("_") else "") + label.replace("$", r"\$")


def _by_depth(count: int) -> list[Any]:
    """Colours of blocks, from the first to the last."""
    from matplotlib import colormaps

    return list(colormaps["viridis"](np.linspace(0.0, 0.92, count)))
