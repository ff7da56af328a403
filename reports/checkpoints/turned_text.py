"""The section of README.md about directions, from the results; its verdict is the text of turned_verdict.md."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from reports import common
from reports.checkpoints.turned import ARMS, NUMBERS, STEPS, WINDOWS, K

VERDICT = Path(__file__).parent / "turned_verdict.md"
LABELS = {"full": "full", "lora": "LoRA", "owlore": "OwLore"}


def section(found: dict[str, Any]) -> str:
    """The section on directions."""
    if not found.get("runs"):
        return "## Directions\n\nNo run has been made for this section yet; nothing is claimed about it.\n"
    counts = ", ".join(f"{sum(r['arm'] == arm for r in found['runs'])} {LABELS[arm]}" for arm in ARMS)
    return f"""## Directions

`htsr compare BASE TUNED --directions {K}` on the small model of `reports/repair` (4 blocks of width 128, trained on the
sources of the standard library), fine-tuned for {STEPS} steps on the Python language reference at rates that forget: {counts}.
Where a name says so a number is divided by its null; 1 is what a Gaussian change of the same norm gives.

{VERDICT.read_text() if VERDICT.exists() else ""}
### What the methods leave

Median (10 %, 90 %) over matrices that changed.

{median_table(found["medians"])}
### Which number tells them apart

Area under the ROC curve between the matrices of two methods, 0.50 is chance; ↓ the first lies lower.

{told_table(found["told"])}
{named_text(found["named"])}
### Which goes with forgetting

Loss on {WINDOWS} windows of held-out sources, in nats per byte.

{forgetting_table(found["runs"])}
Spearman of a number and forgetting: over the runs, of its mean; and over the matrices of a run (mean over runs), with how
much the loss falls when the change of this matrix is undone.

{predictor_table(found)}"""


def median_table(medians: dict[str, Any]) -> str:
    """One line per number, one column per method."""
    arms = [arm for arm in ARMS if arm in medians]
    rows = [
        [label, *("{1:.2g} ({0:.2g}, {2:.2g})".format(*medians[arm][key]) for arm in arms)]
        for key, label in NUMBERS.items()
    ]
    return common.table(["number", *(LABELS[arm] for arm in arms)], rows)


def told_table(told: dict[str, Any]) -> str:
    """One line per number, one column per pair of methods."""

    def cell(value: float) -> str:
        return f"{max(value, 1 - value):.2f} {'↓' if value > 0.5 else '↑'}" if abs(value - 0.5) > 0.005 else "0.50"

    rows = [[label, *(cell(told[pair][key]) for pair in told)] for key, label in NUMBERS.items()]
    return common.table(["number", *(" / ".join(LABELS[arm] for arm in pair.split(" / ")) for pair in told)], rows)


def named_text(named: dict[str, float]) -> str:
    """How often the method of a matrix is named."""
    if not named:
        return "Fewer than two seeds of every method have been run, so the method of another seed's matrices was not asked for.\n"
    shares = ", ".join(f"{LABELS[arm]} {share:.0%}" for arm, share in named.items())
    return (
        "The nearest centroid of the other seeds' matrices, from the numbers over their nulls without the size of the change,\n"
        f"names the method of a matrix rightly for: {shares} (chance 33 %).\n"
    )


def forgetting_table(runs: list[Any]) -> str:
    """Loss before and after."""
    rows = [
        [f"{LABELS[r['arm']]}, seed {r['seed']}", r["matrices"], f"{r['before']:.3f}", f"{r['after']:.3f}",
         f"{r['after'] - r['before']:+.3f}"]
        for r in runs
    ]  # fmt: skip
    return common.table(["run", "matrices that changed", "base", "fine-tuned", "forgetting"], rows)


def predictor_table(found: dict[str, Any]) -> str:
    """Rank correlations with forgetting."""
    arms = [arm for arm in ARMS if any(arm in of for of in found["within"].values())]
    rows = []
    for key, label in NUMBERS.items():
        of_runs = f"{found['across'][key]:+.2f}" if found["across"] else "–"
        of_matrices = [f"{found['within'][key][arm]:+.2f}" if arm in found["within"][key] else "–" for arm in arms]
        rows.append([label, of_runs, *of_matrices])
    return common.table(["number", f"{len(found['runs'])} runs", *(f"matrices, {LABELS[arm]}" for arm in arms)], rows)
