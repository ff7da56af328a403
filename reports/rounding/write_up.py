"""The page of reports/rounding, from its results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from reports import common

BYTES = {"float32": "", "nearest": "0", "stochastic": "0", "kahan": "2", "master": "4"}


def write_up(results: dict[str, Any], folder: Path) -> None:
    """README.md: who wins, the table by method, what was too small to tell."""
    size, longer = results["size"], results.get("longer")
    text = f"""# How narrow weights are rounded

`python -m reports.rounding` makes this page. {common.facts(results["machine"])}

{verdicts(results["runs"])}

## SmolLM2-135M, {size["steps"]} steps

SmolLM2-135M-Instruct on questions of ARC-Easy and OpenBookQA with their answers, {size["steps"]} steps of {size["batch"]} × {size["tokens"]} tokens at the constant
learning rates of the recipes; loss on {size["evaluation"]} held-out questions. LISA and OwLore train {results["methods"]["lisa"]["active"]} of 30 blocks for {size["interval"]} steps at a time.
Weights are bfloat16, products and gradients float32, so that arms differ in nothing but how weights are rounded. That is **short**:
it tells which arm follows float32 from the first steps, not how models trained to the end compare.

{tables(results)}"""
    if longer:
        size = longer["size"]
        text += f"""
## A small model, {size["steps"]} steps

{verdicts(longer["runs"])}

A LLaMA of 6 blocks and width 64, trained on one chain of words and then on another; {size["steps"]} steps of {size["batch"]} × {size["tokens"]} tokens. LISA trains
{longer["methods"]["lisa"]["active"]} blocks for {size["interval"]} steps at a time.

{tables(longer)}"""
    text += """
## How to read it

"Of float32's fall" is the median over seeds of the fall of the loss beside that of float32 with the same seed. "Never moved" is of the
parameters that were trained. The distance is the norm of the difference of the final weights from float32's, as a part of how far those
have moved.

- Stochastic rounding is far in norm, since it moves single entries by a whole unit where float32 moves all of them by a part of one, and
  right on average, which is what the loss sees.
- A remainder (`kahan`) or a master holds every update, but the model computes with the rounded weights: until an update has come to
  half a unit, it is not there. Where LISA and OwLore drop the state of a block, what they hold is rounded stochastically into the
  weight; the runs above end with such a draw.
"""
    if before := results.get("dropped"):
        parts = ", ".join(
            f"{method} {100 * kept(before, method, 'master'):.0f} %"
            for method in dict.fromkeys(run["method"] for run in before)
        )
        text += f"""- What they hold must not be dropped. Before the sampler put it into the weight, the same runs with a master kept of float32's fall: {parts}
  (remainders alike). Those runs are in results.json under `dropped`; kahan and master were run again after it, on as many seeds as the tables say.
"""
    text += """- The fall of the loss does not tell whether the noise is independent. In earlier runs it was the same in each interval in which a block
  trains, so that over many intervals most entries would never have moved, and their losses were those of this page within two hundredths of the fall.
  All lines above that draw noise were run again without that fault, OwLore's others too, on as many seeds as the tables say.
"""
    text += "\nThe default of all recipes is `stochastic`: it costs no memory and is as near to float32 as a master in every line here.\n"
    (folder / "README.md").write_text(text)


def tables(part: dict[str, Any]) -> str:
    """One table per method."""
    text = ""
    for method, options in part["methods"].items():
        cells = []
        for arm, more in BYTES.items():
            if found := of(part["runs"], method, arm):
                cells.append([
                    arm, more, len(found), _spread([r["before"] - r["loss"] for r in found]),
                    f"{100 * kept(part['runs'], method, arm):.0f} %",
                    f"{100 * common.median([r['still'] for r in found]):.1f} %",
                    common.median([r["distance"] for r in found]),
                ])  # fmt: skip
        head = [
            "weights",
            "bytes more a weight",
            "seeds",
            "loss falls by (least … largest)",
            "of float32's fall",
            "never moved",
            "distance from float32",
        ]
        if cells:
            text += f"{method}, learning rate {options['lr']:g}:\n\n{common.table(head, cells)}\n"
    return text


def verdicts(runs: list[dict[str, Any]]) -> str:
    """One sentence per method: the arms by how much of float32's fall they keep, best first."""
    said = []
    for method in dict.fromkeys(run["method"] for run in runs):
        parts = {arm: kept(runs, method, arm) for arm in BYTES if arm != "float32" and of(runs, method, arm)}
        ranked = sorted(parts.items(), key=lambda item: -item[1])
        said.append(
            f"**{method}** keeps of float32's fall of the loss: "
            + ", ".join(f"{arm} {100 * value:.0f} %" for arm, value in ranked)
            + "."
        )
    return " ".join(said)


def of(runs: list[dict[str, Any]], method: str, arm: str) -> list[dict[str, Any]]:
    """The runs of one arm."""
    return [run for run in runs if (run["method"], run["arm"]) == (method, arm)]


def kept(runs: list[dict[str, Any]], method: str, arm: str) -> float:
    """The fall of the loss as a part of float32's with the same seed; the median of the seeds."""
    full = {run["seed"]: run["before"] - run["loss"] for run in of(runs, method, "float32")}
    return common.median([(run["before"] - run["loss"]) / full[run["seed"]] for run in of(runs, method, arm)])


def _spread(values: list[float]) -> str:
    return f"{common.median(values):.4f} ({min(values):.4f} … {max(values):.4f})"
