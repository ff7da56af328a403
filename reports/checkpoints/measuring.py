"""A model's matrices, changed on the way, and the numbers that this study compares."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from htsr.analysis.analyze import analyze_model, make_options
from htsr.arrays import as_numpy
from htsr.matrices.models import Model
from htsr.spectra.bulk import tw_threshold
from htsr.spectra.esd import Windows
from htsr.spectra.null import ShapeNull, shape_null
from htsr.spectra.tail import fit_power_law

Matrix = npt.NDArray[np.floating[Any]]
Row = dict[str, Any]
WINDOWS = Windows(128, 4)

METRICS = {
    "alpha": "α (ks)",
    "minus_null": "α (ks) - null",
    "over_null": "α (ks) / null",
    "hill": "α (hill)",
    "hill_minus_null": "α (hill) - null",
    "farms": "α (FARMS, hill)",
    "trace_log": "trace_log",
    "hill_trace_log": "trace_log (hill tail)",
    "stable_rank_share": "stable rank / K",
    "entropy": "entropy",
    "edge_ratio": "λ_max / MP edge",
    "spike_share": "spikes / K",
    "log_norm": "log10 norm",
    "floor": "ln(λ_1 / mean λ)",
}


def changed(model: Model, change: Callable[[str, Matrix], Matrix]) -> Model:
    """The model with every matrix replaced by change(name, W), made when it is read."""

    def load(matrix: Any) -> Matrix:
        return change(matrix.name, as_numpy(matrix.read()))

    return replace(model, matrices=tuple(replace(m, load=partial(load, m)) for m in model), fingerprint=None)


def generator(name: str, seed: int) -> np.random.Generator:
    """A generator of its own for each matrix."""
    return np.random.default_rng((seed, *name.encode()))


def gaussian(name: str, W: Matrix, seed: int = 0) -> Matrix:
    """Independent N(0, σ²) entries of the shape and mean square of W."""
    return (generator(name, seed).standard_normal(W.shape) * np.sqrt(np.mean(np.square(W)))).astype(np.float32)


@lru_cache(maxsize=512)
def hill_null(M: int, N: int, pieces: int) -> ShapeNull:
    """α of ``hill`` in noise of that shape."""
    return shape_null(M, N, pieces, lambda values: fit_power_law(values, "hill").alpha, draws=4)


def measured(model: Model, *, windows: bool = True) -> list[Row]:
    """The numbers of every matrix; of those with too few eigenvalues only name and shape, `fitted` False."""
    analysis = analyze_model(model, make_options(device="cpu", bulk=True))
    farms: dict[str, float | None] = {}
    if windows:
        farms = {r.name: r.alpha for r in analyze_model(model, make_options(device="cpu", fit="hill", windows=WINDOWS))}
    rows = []
    for row in analysis:
        numbers: Row = {
            "name": row.name, "role": row.role, "block": row.block, "kind": row.kind, "M": row.M, "N": row.N,
            "Q": row.Q, "pieces": row.pieces, "fitted": row.alpha is not None,
        }  # fmt: skip
        if row.alpha is not None:
            numbers |= _numbers(row, analysis.eigenvalues[row.name]) | {"farms": farms.get(row.name)}
        rows.append(numbers)
    return rows


def _numbers(row: Any, values: npt.NDArray[np.float64]) -> Row:
    positive = values[values > 0]
    mean = values.mean()
    hill = fit_power_law(positive, "hill")
    null = hill_null(row.M, row.N, row.pieces)
    edge = tw_threshold((row.norm / (row.pieces * row.M * row.N)) ** 0.5, row.M, row.N, row.pieces)
    energy = np.cumsum(values[::-1]) / values.sum()
    return {
        "random_like": "random-like" in row.warning,
        "alpha": row.alpha,
        "sigma": row.sigma,
        "null": row.alpha_null,
        "null_sd": row.alpha_null_sd,
        "minus_null": row.alpha - row.alpha_null,
        "over_null": row.alpha / row.alpha_null,
        "tail": row.num_pl_tail,
        "hill": hill.alpha,
        "hill_null": null.alpha,
        "hill_minus_null": hill.alpha - null.alpha,
        "trace_log": row.trace_log,
        "hill_trace_log": float(np.mean(np.log(positive[positive >= hill.lambda_min] / mean))),
        "stable_rank": row.stable_rank,
        "stable_rank_share": row.stable_rank / values.size,
        "entropy": row.entropy,
        "edge_ratio": row.lambda_max / edge,
        "spike_share": row.num_spikes / values.size,
        "log_norm": row.log_norm,
        "norm": row.norm,
        "rank": row.matrix_rank,
        "floor": float(np.log(positive[0] / mean)),
        "energy_90": int(np.searchsorted(energy, 0.9) + 1),
        "energy_999": int(np.searchsorted(energy, 0.999) + 1),
    }


def cached(file: Path, compute: Callable[[], Any]) -> Any:
    """What `file` holds, computed and written where it does not exist."""
    if not file.exists():
        file.write_text(json.dumps(compute()))
    return json.loads(file.read_text())


def auc(low: npt.NDArray[np.float64], high: npt.NDArray[np.float64]) -> float:
    """Probability that a draw of `low` lies below one of `high`, ties half."""
    below = (low[:, None] < high[None, :]).mean()
    return float(below + 0.5 * (low[:, None] == high[None, :]).mean())


def column(rows: list[Row], key: str) -> npt.NDArray[np.float64]:
    """One number of all rows."""
    return np.array([row[key] for row in rows], dtype=float)


def rounded(value: Any, digits: int = 5) -> Any:
    """Floats to that many significant digits, through dictionaries and lists."""
    if isinstance(value, dict):
        return {key: rounded(item, digits) for key, item in value.items()}
    if isinstance(value, list):
        return [rounded(item, digits) for item in value]
    return float(f"{value:.{digits}g}") if isinstance(value, float) else value


def spearman(x: npt.NDArray[np.float64], y: npt.NDArray[np.float64]) -> float:
    """Spearman's rank correlation."""
    from scipy.stats import spearmanr

    return float(spearmanr(x, y).statistic)
