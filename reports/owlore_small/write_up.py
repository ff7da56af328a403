"""The page and the figure, from results.json."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from reports import common


def write_up(results: dict[str, Any], folder: Path) -> None:
    """README.md and accuracy.png of whatever runs there are."""
    runs, size = results["runs"], results["size"]
    arms = [arm for arm in results["arms"] if any(r["arm"] == arm and r["kind"] == "test" for r in runs)]
    asked = {arm: {r["seed"]: r for r in runs if r["arm"] == arm and r["kind"] == "test"} for arm in arms}
    cost = {r["arm"]: r for r in runs if r["kind"] == "cost"}
    first = next(iter(asked[arms[0]].values()))
    rows = [_row(arm, asked[arm], asked.get("full", {}), cost.get(arm)) for arm in arms]
    tried = {arm: {r["lr"]: r["eval_loss"] for r in runs if r["arm"] == arm and r["kind"] == "search"} for arm in arms}
    grid = [
        [arm, *(f"{tried[arm][lr]:.4f}" if lr in tried[arm] else "" for lr in results["grid"])]
        for arm in results["arms"]
        if arm in tried
    ]
    _plot(asked, cost, folder / "accuracy.png")
    head = [
        "arm",
        "lr",
        "seeds",
        "accuracy, %",
        "minus full",
        "real?",
        "per character, %",
        "evaluation loss",
        "minus full",
        "real?",
        "peak MiB",
        "s a step",
        "trained",
    ]
    (folder / "README.md").write_text(f"""# Fine-tuning SmolLM2-135M-Instruct by every method

`python -m reports.owlore_small --data FOLDER --work FOLDER` makes this page. {common.facts(results["machine"])}

ARC-Easy and OpenBookQA training questions, {size["steps"]} steps of {size["batch"]} sequences of at most 128 tokens, linear schedule with
10 % warm-up, float32 weights and bf16 autocast on the CPU. Accuracy by log-likelihood on {size["questions"]} ARC-Easy test questions (standard error of one
figure about {100 * first["standard_error"]:.1f} points, common to all arms); before training {100 * first["before_accuracy"]:.1f} %. The model's weights are de-quantised
from 4 bits. Blocks: γ = 4 of 30 every 10 steps, embedding (tied to the head) frozen unless said otherwise; projections of
rank 64 refreshed every 20 steps; LoRA of rank 8 on all linear layers.

Mean ± standard deviation over seeds; "minus full" is by seed, for accuracy in points, and "real?" whether its 95 % interval (Student's t over seeds)
leaves out 0.

{common.table(head, rows)}
![accuracy](accuracy.png)

Evaluation loss of seed 0 by learning rate: the grid on which each arm was tuned.

{common.table(["arm", *(f"{lr:g}" for lr in results["grid"])], grid)}{_verdict(folder)}""")


def _verdict(folder: Path) -> str:
    file = folder / "verdict.md"
    return f"\n{file.read_text()}" if file.exists() else ""


def _row(
    arm: str, runs: dict[int, dict[str, Any]], full: dict[int, dict[str, Any]], cost: dict[str, Any] | None
) -> list[Any]:
    def values(key: str) -> list[float]:
        return [run[key] for run in runs.values()]

    shared = sorted(set(runs) & set(full))
    others = shared if arm != "full" else []
    differences = [100 * (runs[s]["accuracy"] - full[s]["accuracy"]) for s in others]
    losses = [runs[s]["eval_loss"] - full[s]["eval_loss"] for s in others]
    return [
        arm,
        f"{next(iter(runs.values()))['lr']:g}",
        len(runs),
        _spread([100 * v for v in values("accuracy")], 1),
        _spread(differences, 1),
        _real(differences),
        _spread([100 * v for v in values("per_character")], 1),
        _spread(values("eval_loss"), 4),
        _spread(losses, 3),
        _real(losses),
        round(cost["peak_mib"]) if cost else "",
        f"{cost['seconds_per_step']:.2f}" if cost else "",
        f"{next(iter(runs.values()))['trainable_parameters'] / 1e6:.1f} M",
    ]


def _spread(values: list[float], digits: int) -> str:
    if not values:
        return ""
    sd = f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
    return f"{np.mean(values):.{digits}f}{sd}"


def _real(differences: list[float]) -> str:
    if len(differences) < 2:
        return "–"
    reach = stats.t.ppf(0.975, len(differences) - 1) * np.std(differences, ddof=1) / len(differences) ** 0.5
    return "yes" if abs(np.mean(differences)) > reach else "no"


def _plot(asked: dict[str, dict[int, dict[str, Any]]], cost: dict[str, dict[str, Any]], file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, ax = plt.subplots(figsize=(6.4, 4.0), layout="constrained")
    for arm, runs in asked.items():
        if arm not in cost:
            continue
        ax.plot(
            [cost[arm]["peak_mib"] / 1024] * len(runs), [100 * run["accuracy"] for run in runs.values()], "o", label=arm
        )
    before = next(iter(next(iter(asked.values())).values()))["before_accuracy"]
    ax.axhline(100 * before, color="grey", linestyle=":", linewidth=1, label="before")
    ax.set(xlabel="peak resident memory of the run, GiB", ylabel="accuracy, %")
    ax.legend(frameon=False, fontsize="small")
    figure.savefig(file, dpi=130)
    plt.close(figure)
