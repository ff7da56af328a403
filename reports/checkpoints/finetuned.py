"""What a brief fine-tuning moves: numbers of W, against a random change of the same size, and the spectrum of the change."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from htsr.arrays import as_numpy
from htsr.matrices.models import Model
from htsr.matrices.sources import open_model
from reports import common
from reports.checkpoints.measuring import Matrix, Row, cached, changed, column, generator, measured, spearman
from reports.checkpoints.training import ARMS, tuned

MOVED = ("alpha", "hill", "trace_log", "hill_trace_log", "stable_rank", "entropy", "log_norm", "edge_ratio")
CHANGE = (
    "relative_norm",
    "alpha",
    "hill",
    "stable_rank",
    "energy_90",
    "energy_999",
    "rank",
    "edge_ratio",
    "spike_share",
)
LEAST = 1e-7  # a relative change below it is rounding


def study(work: Path, before: list[Row], seeds: range, only_finished: bool) -> dict[str, Any]:
    """By run: what moved. By method: agreement of two seeds. And whether the method can be told."""
    runs = []
    for seed in seeds:
        for arm in ARMS:
            if only_finished and not (work / f"{arm}-{seed}" / "results.json").exists():
                continue
            runs.append({"arm": arm, "seed": seed, **run(arm, seed, work)})
            print(f"{arm}, seed {seed}: measured", flush=True)
    base = {row["name"]: row for row in before}
    return {
        "runs": [summary(r, base) for r in runs],
        "agreement": agreement(runs, base),
        "told": told(runs, base),
    }


def run(arm: str, seed: int, work: Path) -> dict[str, Any]:
    """Rows of the fine-tuned model, of its change, and of the base with a random change of the same size."""
    folder, metrics = tuned(arm, seed, work)
    base = open_model(common.smollm2(work))

    def compute() -> dict[str, Any]:
        delta = open_model(folder, against=common.smollm2(work))
        sizes = {m.name: float(np.linalg.norm(as_numpy(m.read()))) for m in delta}
        moved = {name for name, size in sizes.items() if size > 0}

        def random(name: str, W: Matrix) -> Matrix:
            noise = generator(name, 1000 + seed).standard_normal(W.shape)
            return (W + noise * (sizes[name] / np.linalg.norm(noise))).astype(np.float32)

        def only(model: Model) -> Model:
            return Model(model.label, tuple(m for m in model if m.name in moved and m.kind != "embedding"))

        return {
            "sizes": sizes,
            "after": measured(only(open_model(folder)), windows=False),
            "random": measured(changed(only(base), random), windows=False),
            "change": measured(only(delta), windows=False),
        }

    return {"metrics": metrics, **cached(work / f"rows-{arm}-{seed}.json", compute)}


def with_size(r: dict[str, Any], base: dict[str, Row]) -> list[Row]:
    """Rows of the change with its relative size."""
    sized = (
        row | {"relative_norm": r["sizes"][row["name"]] / base[row["name"]]["norm"] ** 0.5}
        for row in r["change"]
        if row["fitted"]
    )
    return [row for row in sized if row["relative_norm"] > LEAST]


def shift(rows: list[Row], base: dict[str, Row], key: str) -> np.ndarray[Any, np.dtype[np.float64]]:
    """After minus before."""
    return column(rows, key) - column([base[row["name"]] for row in rows], key)


def summary(r: dict[str, Any], base: dict[str, Row]) -> Row:
    """Quantiles of the shifts and of the numbers of the change."""
    real, random = ([row for row in r[k] if row["fitted"]] for k in ("after", "random"))
    change = with_size(r, base)
    sigma = column([base[row["name"]] for row in real], "sigma")
    return {
        "arm": r["arm"],
        "seed": r["seed"],
        "metrics": {k: r["metrics"].get(k) for k in ("train_loss", "eval_loss", "steps", "seconds_per_step")},
        "matrices": len(r["sizes"]),
        "moved": sum(size > 0 for size in r["sizes"].values()),
        "shifts": {
            key: {
                kind: [float(np.median(x)), *(float(q) for q in np.quantile(np.abs(x), [0.5, 0.9, 1.0]))]
                for kind, x in (("real", shift(real, base, key)), ("random", shift(random, base, key)))
            }
            for key in MOVED
        },
        "beyond_sigma": float(np.mean(np.abs(shift(real, base, "alpha")) > sigma)),
        "change": {key: [float(q) for q in np.quantile(column(change, key), [0.1, 0.5, 0.9])] for key in CHANGE},
        "change_random_like": float(np.mean([row["random_like"] for row in change])),
        "by_role": {
            role: {
                key: float(np.median(column([row for row in change if row["role"] == role], key)))
                for key in ("relative_norm", "stable_rank", "energy_90", "edge_ratio", "hill")
            }
            for role in dict.fromkeys(row["role"] for row in change)
        },
        "points": [
            [row["relative_norm"], row["energy_90"] / row["M"], row["stable_rank"] / row["M"], row["edge_ratio"]]
            for row in change
        ],
    }


def agreement(runs: list[dict[str, Any]], base: dict[str, Row]) -> list[Row]:
    """Spearman of the shifts of two seeds over matrices that both moved, and of two random changes of those sizes."""
    lines = []
    for arm in ARMS:
        pair = [r for r in runs if r["arm"] == arm][:2]
        if len(pair) < 2:
            continue
        line: Row = {"arm": arm, "numbers": {}}
        for kind in ("after", "random"):
            names = set.intersection(*({row["name"] for row in r[kind] if row["fitted"]} for r in pair))
            first, second = ([row for row in r[kind] if row["name"] in names] for r in pair)
            line["matrices"] = len(names)
            for key in MOVED:
                rho = spearman(shift(first, base, key), shift(second, base, key)) if len(names) > 4 else float("nan")
                line["numbers"].setdefault(key, {})[kind] = rho
        lines.append(line)
    return lines


def told(runs: list[dict[str, Any]], base: dict[str, Row]) -> Row:
    """Share of matrices whose method the nearest centroid of one seed's matrices names for the other seed's.

    Once from the shifts of the numbers of W, once from the numbers of the change; both without its size.
    """
    seeds = sorted({r["seed"] for r in runs})
    complete = [s for s in seeds if sum(r["seed"] == s for r in runs) == len(ARMS)]
    if len(complete) < 2:
        return {}

    def of_w(r: dict[str, Any]) -> Matrix:
        rows = [row for row in r["after"] if row["fitted"]]
        return np.stack([shift(rows, base, k) for k in MOVED], axis=1)

    def of_change(r: dict[str, Any]) -> Matrix:
        rows = with_size(r, base)
        shares = [np.log(column(rows, k) / column(rows, "M")) for k in ("stable_rank", "energy_90", "energy_999")]
        return np.stack([*shares, np.log(column(rows, "edge_ratio"))], axis=1)

    scores = {}
    for label, features in (("shifts of W", of_w), ("spectrum of the change", of_change)):
        right: list[float] = []
        for learn, test in ((complete[0], complete[1]), (complete[1], complete[0])):
            taught = {r["arm"]: features(r) for r in runs if r["seed"] == learn}
            everything = np.concatenate(list(taught.values()))
            scale = everything.std(axis=0) + 1e-12
            centres = np.stack([x.mean(axis=0) / scale for x in taught.values()])
            for number, arm in enumerate(taught):
                asked = features(next(r for r in runs if r["seed"] == test and r["arm"] == arm)) / scale
                named = np.linalg.norm(asked[:, None] - centres[None], axis=2).argmin(axis=1)
                right.append(float((named == number).mean()))
        scores[label] = float(np.mean(right))
    return scores | {"chance": 1 / len(ARMS)}
