"""The page of reports/rounding, from its results."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

from reports import common

BYTES = {"float32": "4 in place of 2", "nearest": "0", "stochastic": "0", "kahan": "2", "master": "4"}


def write_up(results: dict[str, Any], folder: Path) -> None:
    """README.md: who wins, the table by method, what was too small to tell."""
    runs: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for run in results["runs"]:
        runs[run["method"], run["arm"]].append(run)
    methods = list(dict.fromkeys(method for method, _ in runs))
    size = results["size"]
    text = f"""# How narrow weights are rounded

`python -m reports.rounding` makes this page. {common.facts(results["machine"])}

{" ".join(verdict(runs, method) for method in methods)}

SmolLM2-135M-Instruct on questions of ARC-Easy and OpenBookQA with their answers, {size["steps"]} steps of {size["batch"]} × {size["tokens"]} tokens at a constant
learning rate, that of the recipes; loss on {size["evaluation"]} held-out questions. LISA and OwLore train {results["methods"]["lisa"]["active"]} of 30 blocks for {size["interval"]} steps at a
time. Weights are bfloat16, products and gradients float32, so that arms differ in nothing but how weights are rounded.
That is **short**: a few steps of one small model. It tells which arm follows float32; it does not tell how models trained to
the end compare.
"""
    for method in methods:
        text += f"\n## {method}, learning rate {results['methods'][method]['lr']:g}\n\n"
        cells = []
        for arm in BYTES:
            if found := runs.get((method, arm)):
                cells.append([
                    arm, BYTES[arm], len(found), _spread([r["before"] - r["loss"] for r in found], 4),
                    f"{100 * common.median([part(r, runs) for r in found]):.0f} %",
                    f"{100 * common.median([r['still'] for r in found]):.1f} %",
                    common.median([r["distance"] for r in found]),
                ])  # fmt: skip
        head = [
            "weights",
            "bytes more a weight",
            "seeds",
            "loss falls by (least … largest)",
            "of float32's fall",
            "entries that never moved",
            "distance from float32",
        ]
        text += common.table(head, cells)
    text += """
"Of float32's fall" is the median over seeds of the fall beside that of float32 with the same seed. "Never moved" is of the
parameters that were trained. The distance is the norm of the difference of the final weights from float32's, as a part of how
far those have moved: stochastic rounding adds noise to every entry, which makes it far in norm and right on average.
"""
    (folder / "README.md").write_text(text)


def part(run: dict[str, Any], runs: dict[tuple[str, str], list[dict[str, Any]]]) -> float:
    """The fall of the loss as a part of float32's with the same seed."""
    same = next(r for r in runs[run["method"], "float32"] if r["seed"] == run["seed"])
    return (run["before"] - run["loss"]) / (same["before"] - same["loss"])


def verdict(runs: dict[tuple[str, str], list[dict[str, Any]]], method: str) -> str:
    """One sentence: the arms by how much of float32's fall they keep, best first."""
    parts = {
        arm: common.median([part(r, runs) for r in runs[method, arm]])
        for arm in list(BYTES)[1:]
        if (method, arm) in runs
    }
    ranked = sorted(parts.items(), key=lambda item: -item[1])
    said = ", ".join(f"{arm} {100 * value:.0f} %" for arm, value in ranked)
    return f"**{method}**: of float32's fall of the loss remain {said}."


def _spread(values: list[float], digits: int) -> str:
    low, high = min(values), max(values)
    return f"{common.median(values):.{digits}f} ({low:.{digits}f} … {high:.{digits}f})"
