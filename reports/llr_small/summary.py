"""From runs to numbers: best learning rates, means and spreads over seeds, paired differences, steps saved."""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np

from reports.llr_small.arms import ARMS
from reports.llr_small.search import GRID, Runs, best, losses
from reports.llr_small.training import Size

BASE = "uniform"


def summarise(
    runs: Runs, size: Size, arms: Sequence[str], known: Mapping[str, Any] = MappingProxyType({})
) -> dict[str, Any]:
    """One point of the study: every arm that has a run at this size, and of the others what is `known` already."""
    runs = [run for run in runs if run["name"] == size.name]
    done = [arm for arm in arms if losses(runs, arm, size, 0)]
    summary = {**known, **{arm: _arm(runs, arm, size) for arm in done}} if done else {}
    if BASE in summary:
        for arm in done:
            summary[arm] |= _against(summary[arm], summary[BASE], _curves(runs, arm, summary[arm]))
    return summary


def _arm(runs: Runs, arm: str, size: Size) -> dict[str, Any]:
    tried = losses(runs, arm, size, 0)
    index = min(tried, key=lambda k: (tried[k], k))
    lr = GRID[index]
    mine = sorted((r for r in runs if r["arm"] == arm and r["lr"] == lr), key=lambda r: r["seed"])
    finals = {r["seed"]: r["loss"] for r in mine if r["loss"] is not None}
    first = mine[0]
    values = list(finals.values())
    return {
        "title": ARMS[arm].title,
        "best_lr": lr,
        "bracketed": best(tried) is not None and 0 < index < len(GRID) - 1,
        "between": _between(tried, index),
        "grid": {f"{GRID[k]:g}": None if math.isinf(v) else v for k, v in sorted(tried.items())},
        "losses": finals,
        "hours": sum(r["seconds"][k] for r in runs if r["arm"] == arm for k in ("training", "evaluation")) / 3600,
        "mean": float(np.mean(values)),
        "sd": float(np.std(values, ddof=1)) if len(values) > 1 else None,
        "perplexity": math.exp(float(np.mean(values))),
        "multipliers": first["multipliers"],
        "alpha": [(step, {role: round(a, 3) for role, a in values.items()}) for step, values in first["alpha"]],
        "curve": np.mean([r["curve"] for r in mine], axis=0).round(4).tolist(),
        "seconds": first["seconds"],
    }


def _between(tried: dict[int, float], index: int) -> dict[str, float] | None:
    """Minimum of the parabola in log2 lr through the best point and its neighbours."""
    around = [tried.get(index + k, math.inf) for k in (-1, 0, 1)]
    if not all(map(math.isfinite, around)):
        return None
    left, middle, right = around
    curvature = left - 2 * middle + right
    shift = 0.5 * (left - right) / curvature
    return {"lr": GRID[index] * 2**shift, "loss": middle - 0.125 * (left - right) ** 2 / curvature}


def _curves(runs: Runs, arm: str, summary: dict[str, Any]) -> dict[int, list[list[float]]]:
    return {r["seed"]: r["curve"] for r in runs if r["arm"] == arm and r["lr"] == summary["best_lr"]}


def _against(arm: dict[str, Any], base: dict[str, Any], curves: dict[int, list[list[float]]]) -> dict[str, Any]:
    """Differences by seed to uniform, and at which step the arm reaches uniform's last loss on the same windows."""
    differences = paired(arm, base)
    values = list(differences.values())
    target = base["curve"][-1][1]
    reached = [first_below(curve, target) for curve in curves.values()]
    return {
        "differences": differences,
        "difference": float(np.mean(values)) if values else None,
        "difference_sd": float(np.std(values, ddof=1)) if len(values) > 1 else None,
        "steps_to_uniform": [None if r is None else round(r) for r in reached],
    }


def paired(arm: Mapping[str, Any], base: Mapping[str, Any]) -> dict[str, float]:
    """Final losses of one arm less those of another, by seed (a text, as JSON has it)."""
    theirs = {str(seed): loss for seed, loss in base["losses"].items()}
    return {str(seed): loss - theirs[str(seed)] for seed, loss in arm["losses"].items() if str(seed) in theirs}


def significance(differences: Collection[float]) -> float | None:
    """p of a paired t-test that the mean difference is 0; None with fewer than three seeds."""
    from scipy import stats

    return float(stats.ttest_1samp(list(differences), 0.0).pvalue) if len(differences) > 2 else None


def first_below(curve: list[list[float]], target: float) -> float | None:
    """The step at which a curve of (step, loss) first falls to `target`, linear between points; None if never."""
    for (a, x), (b, y) in itertools.pairwise(curve):
        if y <= target:
            return a + (b - a) * (x - target) / (x - y) if x > target else a
    return None
