"""What the plots and the report show, as plain numbers: histogram, survival function, fitted line, heat map.

K is the number of eigenvalues of a matrix. Those that are exactly 0 have no place on a logarithmic axis but count in K,
so that densities and shares stay comparable with the fitted line, which holds n/K of the eigenvalues.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from htsr.arrays import Vector
from htsr.results import Record

BINS = 100
POINTS = 200
_PER_BIN = 4  # eigenvalues there should be for each bin of a small matrix
_FIRST_BIN = 0.05  # share of the smallest eigenvalues, which may span many decades
_ROBUST = (0.02, 0.98)

LABELS = {
    "alpha": "α",
    "sigma": "± σ",
    "alpha_null": "α null",
    "alpha_minus_null": "α − null",
    "D": "KS distance D",
    "gof_p": "p of the fit",
    "num_pl_tail": "tail",
    "lambda_min": "λ_min",
    "trace_log": "⟨ln λ̃⟩",
    "delta_lambda_min": "Δλ_min",
    "lambda_erg": "λ_ERG",
    "erg_gap": "ERG gap",
    "stable_rank": "stable rank",
    "entropy": "entropy",
    "log_norm": "log ‖W‖²",
    "lambda_max": "λ_max",
    "alpha_hat": "α̂",
    "matrix_rank": "rank",
    "num_spikes": "spikes",
    "mp_softrank": "MP soft rank",
    "num_traps": "traps",
    "rand_distance": "distance to random",
    "best_law": "law",
    "relative": "‖ΔW‖ / ‖W‖",
}
"""What people look at first, and what to call it."""

OF_TWO = {"delta": "Δ {}", "a": "{} of a", "b": "{} of b"}
"""What to call ``m_delta``, ``m_a`` and ``m_b``, the difference and both sides of a metric m of two models."""


def label(metric: str) -> str:
    """What to call a metric, also one of two models.

    Examples:
        >>> from htsr.reporting.figures import label
        >>> label("alpha"), label("alpha_delta"), label("gof_p"), label("norm")
        ('α', 'Δ α', 'p of the fit', 'norm')
    """
    name, _, side = metric.rpartition("_")
    if metric not in LABELS and name in LABELS and side in OF_TWO:
        return OF_TWO[side].format(LABELS[name])
    return LABELS.get(metric, metric)


_ALPHA_CENTRE, _ALPHA_REACH = 4.0, (2.0, 4.0)  # 2 to 6 is heavy-tailed; colours end there or farther, but above 0
_AROUND_ZERO = {
    "alpha_minus_null",
    "trace_log",
    "delta_lambda_min",
    "log_lambda_ratio",
    "erg_gap",
    "erg_gap_fraction",
    "erg_logdet",
}


@dataclass(frozen=True)
class Histogram:
    """A density per bin.

    Attributes:
        edges: edges of the bins, (bins + 1,), ascending.
        density: density in each bin, (bins,); its integral is the share of eigenvalues that are not 0.
    """

    edges: Vector
    density: Vector


def log_histogram(eigenvalues: Vector) -> Histogram | None:
    """Density of the eigenvalues (K,), ascending, in bins of equal width in log λ; None if all are 0.

    The smallest 5 % share the first bin, whatever its width: in a square matrix they span more decades than all the
    others together.
    """
    positive = eigenvalues[eigenvalues > 0]
    if positive.size == 0:
        return None
    lowest, highest = float(positive[0]), float(positive[-1])
    if highest / lowest < 1 + 1e-6:
        edges = np.array([lowest * 0.99, highest * 1.01])
    else:
        start = float(np.quantile(positive, _FIRST_BIN))
        bins = min(BINS, max(4, positive.size // _PER_BIN))
        edges = np.concatenate([[lowest], np.geomspace(start, highest, bins)])
        if not np.all(np.diff(edges) > 0):  # the smallest are equal, or the rest is
            edges = np.geomspace(lowest, highest, bins + 1)
    counts, _ = np.histogram(positive, edges)
    return Histogram(edges, counts / (np.diff(edges) * eigenvalues.size))


def survival(eigenvalues: Vector) -> tuple[Vector, npt.NDArray[np.int64]]:
    """The complementary cumulative distribution of the eigenvalues (K,), ascending: what one judges a power law by.

    Returns:
        At most `POINTS` eigenvalues, descending, and how many are at least as large; dense where the tail is.
    """
    positive = eigenvalues[eigenvalues > 0]
    ranks = tail_ranks(positive.size)
    return positive[positive.size - ranks], ranks


def tail_ranks(size: int) -> npt.NDArray[np.int64]:
    """1 … `size` in steps that grow with the rank."""
    if size == 0:
        return np.empty(0, dtype=np.int64)
    return np.unique(np.geomspace(1, size, POINTS).round().astype(np.int64))


@dataclass(frozen=True)
class FittedLine:
    """The power law of a tail: straight on logarithmic axes, from `low` to `high`.

    Attributes:
        alpha: exponent of the power law.
        low: smallest eigenvalue of the tail, λ_min.
        high: largest eigenvalue of the fit.
        share: share of the eigenvalues that lie in the tail, n/K.
    """

    alpha: float
    low: float
    high: float
    share: float

    def density(self, value: float) -> float:
        """Density at λ = `value`, scaled to the tail's share."""
        return self.share * (self.alpha - 1) / self.low * _power(value / self.low, -self.alpha)

    def survival(self, value: float) -> float:
        """Share of all eigenvalues above λ = `value`."""
        return self.share * _power(value / self.low, 1 - self.alpha)


def fitted_line(row: Record, eigenvalues: Vector, xmax: float | None = None) -> FittedLine | None:
    """The fit of a row over its eigenvalues (K,), ascending; None where there is no fit. `xmax` as in the options."""
    alpha, lambda_min, in_tail = row["alpha"], row["lambda_min"], row["num_pl_tail"]
    if alpha is None or lambda_min is None or in_tail is None or not (math.isfinite(alpha) and lambda_min > 0):
        return None
    fitted = eigenvalues if xmax is None else eigenvalues[eigenvalues <= xmax]
    dropped = row["num_fingers"] or 0
    if fitted.size <= dropped:
        return None
    return FittedLine(alpha, lambda_min, float(fitted[-1 - dropped]), in_tail / eigenvalues.size)


def marks(row: Record) -> dict[str, float]:
    """Where the vertical lines of an ESD stand: ``lambda_min``, ``lambda_erg``, ``bulk_edge``, those there are."""
    edge = row["lambda_plus"] if row["bulk_threshold"] is None else row["bulk_threshold"]
    places = {"lambda_min": row["lambda_min"], "lambda_erg": row["lambda_erg"], "bulk_edge": edge}
    return {name: value for name, value in places.items() if value is not None and 0 < value < math.inf}


@dataclass(frozen=True)
class Grid:
    """The matrices of a model by role and block.

    Attributes:
        roles: roles of the matrices, in the model's order.
        blocks: indices of the blocks, ascending; None comes first, where some matrices are in no block.
        members: positions of the matrices in each cell, (roles, blocks): none, one, or several (experts, kernels).
    """

    roles: tuple[str, ...]
    blocks: tuple[int | None, ...]
    members: tuple[tuple[tuple[int, ...], ...], ...]

    def means(self, rows: Sequence[Record], metric: str) -> Vector:
        """(roles, blocks) mean of `metric` over each cell, NaN where it has none."""
        return np.array([[_mean([rows[i] for i in cell], metric) for cell in line] for line in self.members])


def grid(rows: Sequence[Record]) -> Grid:
    """The cells of the heat map of `rows`."""
    roles = tuple(dict.fromkeys(row["role"] for row in rows))
    blocks: list[int | None] = [*sorted({row["block"] for row in rows if row["block"] is not None})]
    if any(row["block"] is None for row in rows):
        blocks.insert(0, None)
    cells: dict[tuple[str, int | None], list[int]] = {}
    for i, row in enumerate(rows):
        cells.setdefault((row["role"], row["block"]), []).append(i)
    members = tuple(tuple(tuple(cells.get((role, block), ())) for block in blocks) for role in roles)
    return Grid(roles, tuple(blocks), members)


def metrics_of(rows: Sequence[Record], numeric: Sequence[str]) -> list[str]:
    """The `numeric` fields that some row has, those people look at first in front."""
    ordered = dict.fromkeys([*(name for name in LABELS if name in numeric), *numeric])
    return [name for name in ordered if any(number(row, name) is not None for row in rows)]


@dataclass(frozen=True)
class Scale:
    """Where colours begin and end.

    Attributes:
        low: value of the first colour.
        high: value of the last colour.
        centre: neutral value between the two; None for metrics that have none.
    """

    low: float
    high: float
    centre: float | None


def colour_scale(values: Vector, metric: str) -> Scale:
    """Limits of the colours of `values`, any shape, NaN left out: their 2 % and 98 % quantiles, about the centre.

    ``m_a`` and ``m_b`` are the metric m of one of two models, ``m_delta`` is its difference, as in a comparison.
    """
    metric = metric.removesuffix("_a").removesuffix("_b")
    finite = values[np.isfinite(values)]
    low, high = (float(q) for q in np.quantile(finite, _ROBUST)) if finite.size else (0.0, 1.0)
    if metric == "alpha":
        reach = float(np.clip(max(_ALPHA_CENTRE - low, high - _ALPHA_CENTRE), *_ALPHA_REACH))
        return Scale(_ALPHA_CENTRE - reach, _ALPHA_CENTRE + reach, _ALPHA_CENTRE)
    if metric in _AROUND_ZERO or metric.endswith("_delta"):
        reach = max(abs(low), abs(high)) or 1.0
        return Scale(-reach, reach, 0.0)
    return Scale(low, high, None) if high > low else Scale(low - 0.5, low + 0.5, None)


def number(row: Record, metric: str) -> float | None:
    """A metric of a row as a float, None if it is missing or not finite."""
    value = row[metric]
    return float(value) if value is not None and math.isfinite(value) else None


def _power(base: float, exponent: float) -> float:
    try:
        return float(base**exponent)
    except (OverflowError, ZeroDivisionError):
        return math.inf


def _mean(rows: Sequence[Record], metric: str) -> float:
    values = [value for row in rows if (value := number(row, metric)) is not None]
    return sum(values) / len(values) if values else math.nan
