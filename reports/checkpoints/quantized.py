"""What quantisation does to each number, matrix by matrix, of a model that was trained and stored in float32."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from htsr.matrices.models import Model
from reports.checkpoints.measuring import METRICS, Matrix, Row, cached, changed, column, measured, spearman
from reports.checkpoints.quantizing import FORMATS


def study(model: Model, original: list[Row], work: Path) -> dict[str, Any]:
    """By format: the error in the weights, and of each number the shift, its size against the spread of the layers."""
    return {
        "formats": {name: shifts(original, *_quantized(model, name, work)) for name in FORMATS},
        "half": half_rank(model, work),
    }


def _quantized(model: Model, name: str, work: Path) -> tuple[list[Row], list[float]]:
    errors: list[float] = []

    def change(_: str, W: Matrix) -> Matrix:
        result = FORMATS[name](W)
        errors.append(float(np.linalg.norm(result - W) / np.linalg.norm(W)))
        return result

    def compute() -> list[Any]:
        quantised = measured(changed(model, change))
        print(f"{name}: relative error of the weights {np.median(errors):.2g}", flush=True)
        return [quantised, errors]

    rows, kept = cached(work / f"quantised-{name.replace(' ', '-')}.json", compute)
    return rows, kept


def shifts(original: list[Row], quantised: list[Row], errors: list[float]) -> Row:
    """Quantiles of the shift of each number over the matrices that have one."""
    pairs = [(a, b) for a, b in zip(original, quantised, strict=True) if a["fitted"] and b["fitted"]]
    before, after = [a for a, _ in pairs], [b for _, b in pairs]
    numbers = {}
    for key in METRICS:
        x, y = column(before, key), column(after, key)
        shift = y - x
        inner = np.quantile(x, 0.75) - np.quantile(x, 0.25)
        numbers[key] = {
            "median": float(np.median(shift)),
            "size": [float(q) for q in np.quantile(np.abs(shift), [0.5, 0.9, 1.0])],
            "of_spread": float(np.median(np.abs(shift)) / inner),
            "order": spearman(x, y),
        }
    return {
        "error": float(np.median(errors)),
        "matrices": len(pairs),
        "numbers": numbers,
        "beyond_sigma": float(
            np.mean(np.abs(column(after, "alpha") - column(before, "alpha")) > column(before, "sigma"))
        ),
        "random_like": [sum(r["random_like"] for r in before), sum(r["random_like"] for r in after)],
        "rank": [int(sum(r["rank"] for r in before)), int(sum(r["rank"] for r in after))],
        "pooler": {
            k: next(r[k] for r in quantised if r["name"].endswith("pooler.dense")) for k in ("random_like", "alpha")
        },
    }


def half_rank(model: Model, work: Path) -> list[Row]:
    """Square matrices cut to half of their rank and quantised: what hard rank and the floor then say."""
    some = Model("half", tuple(m for m in model if m.shape[0] == m.shape[1] and m.block == 0))

    def cut(W: Matrix) -> Matrix:
        U, s, V = np.linalg.svd(W.astype(np.float64), full_matrices=False)
        kept = s.size // 2
        return (U[:, :kept] * s[:kept]) @ V[:kept]

    def compute() -> list[Row]:
        formats = {"cut, float64": lambda W: W, "cut, float32": lambda W: W.astype(np.float32), **FORMATS}
        lines = []
        for name, change in formats.items():
            rows = measured(changed(some, partial(lambda f, n, W: f(cut(W)), change)), windows=False)
            lines.append({
                "format": name, "rank": column(rows, "rank").mean() / column(rows, "M").mean(),
                **{k: float(np.median(column(rows, k))) for k in ("alpha", "hill", "trace_log", "stable_rank_share", "floor")},
                "energy_999": float((column(rows, "energy_999") / column(rows, "M")).mean()),
            })  # fmt: skip
        return lines

    lines: list[Row] = cached(work / "half-rank.json", compute)
    return lines
