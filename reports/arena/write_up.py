"""The page and the picture, from results.json."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from reports import common
from reports.arena.summary import LEVEL, is_real

REFERENCE = "lora-32"


def write_up(results: dict[str, Any], folder: Path) -> None:
    """README.md and pareto.png of whatever there is."""
    points = results["points"]
    verdict = folder / "verdict.md"
    draw(points, folder / "pareto.png")
    (folder / "README.md").write_text(f"""# The arena: every way to fine-tune, each at its own best rate

`python -m reports.arena` makes this page. {common.facts(results["machine"])}

{"".join(first_lines(name, point) for name, point in points.items())}
{verdict.read_text() if verdict.exists() else ""}
![loss, memory and time](pareto.png)

## What was done

One protocol for all arms: the same records in the same order by seed, the same steps, linear schedule with a warm-up of
10 %, float32 where no other type is named, a recipe of `htsr finetune` each (`arms.py`). The learning rate of **each arm** is searched with
seed 0 on one grid, factors of 2, downhill until the best has both neighbours. Rates are chosen on one half of the held-out
records, arms are compared on the other; which arm is *our best* is chosen there, too, so that its p-values are too small. Gradients are clipped at
1.0, but not in the arms that use them up in backward (`gradients: update`), which know no norm of all. *Forgotten* is the rise of the loss on ordinary text that the base model knows.
Seconds a step are of short runs, beside other work on the machine where the page does not say else. Differences are paired by seed and record; one is *real* where Student's t has p < {LEVEL:g} both over the seeds and over
the records. Memory is what `htsr memory` predicts at full sequences, with checkpointed activations, which is the default on
an accelerator and changes no loss; in a column of its own without (weights that train, norms among them, keep their
inputs, so that adapters save activations there). Ranks and blocks are in proportion to the model: r32 of width 576
is rank 7 of width 128. Arms of *ours* are those that `htsr finetune` has and PEFT has not.
{"".join(section(name, point) for name, point in points.items())}""")


def ranked(point: dict[str, Any]) -> list[str]:
    """Arms by their mean loss."""
    return sorted(point["arms"], key=lambda arm: np.mean(point["arms"][arm]["losses"]))


def first_lines(name: str, point: dict[str, Any]) -> str:
    """Who beats our best arm within LoRA r32's memory, and whether that arm beats LoRA r32 and full fine-tuning."""
    arms = point["arms"]
    budget = arms[REFERENCE]["predicted_mib"]
    ours = [arm for arm in ranked(point) if arms[arm]["ours"] and arms[arm]["predicted_mib"] <= budget]
    if not ours:
        return f"**{point['title']}**: no arm of ours within the memory of LoRA r32 has run.\n\n"
    best = arms[ours[0]]
    ahead = [arm for arm in ranked(point) if np.mean(arms[arm]["losses"]) < np.mean(best["losses"])]
    better = ", ".join(f"{arms[arm]['title']} ({np.mean(arms[arm]['losses']):.3f})" for arm in ahead) or "none"
    reached = all(is_real(found) and found["mean"] < 0 for found in best["against"].values())
    against = "; ".join(f"minus {arms[other]['title']} {told(found)}" for other, found in best["against"].items())
    return (
        f"**{point['title']}.** Arms with a lower loss than our best within LoRA r32's memory ({budget:.4g} MiB): {better}. "
        f"Our best there: {best['title']} ({np.mean(best['losses']):.3f}, {best['predicted_mib']:.4g} MiB); {against}. "
        f"The goal, lower than both beyond the spread, is {'reached' if reached else '**not** reached'} here.\n\n"
    )


def told(found: dict[str, Any]) -> str:
    """A difference with what is known of its spread."""
    if found["mean"] is None:
        return "unknown"
    p = [f"p {found[f'p_{of}']:.2g} over {of}" for of in ("seeds", "records") if found[f"p_{of}"] is not None]
    return f"{found['mean']:+.3f} ({found['seeds']} seed{'s' * (found['seeds'] > 1)}, {', '.join(p)})"


def section(name: str, point: dict[str, Any]) -> str:
    """The tables of one size."""
    arms, size = point["arms"], point["size"]
    digits = 1 if arms[REFERENCE]["predicted_mib"] < 100 else 0
    rows = [
        [
            arms[arm]["title"] + (" *(ours)*" if arms[arm]["ours"] else ""),
            f"{arms[arm]['lr']:g}" + ("" if arms[arm]["bracketed"] else " †"),
            len(arms[arm]["losses"]),
            spread(arms[arm]["losses"]),
            *(
                cell(arms[arm]["against"][other]) if other in arms[arm]["against"] else ""
                for other in (REFERENCE, "full")
            ),
            spread(arms[arm]["forgotten"]),
            f"{arms[arm]['predicted_mib']:.{digits}f}",
            f"{arms[arm]['without_checkpointing_mib']:.{digits}f}",
            *([f"{arms[arm]['measured_mib']:.0f}" if arms[arm]["measured_mib"] else ""] if size["isolated"] else []),
            f"{arms[arm]['seconds_per_step']:.2f}" if arms[arm]["seconds_per_step"] else "",
            f"{arms[arm]['trainable'] / 1e6:.2f} M",
        ]
        for arm in ranked(point)
    ]
    head = ["arm", "lr", "seeds", "loss", "minus LoRA r32", "minus full", "forgotten", "MiB", "not checkpointed"]
    head += [*(["measured MiB"] if size["isolated"] else []), "s a step", "trains"]
    rates = sorted({float(lr) for arm in arms.values() for lr in arm["grid"]})
    grid = [[arms[arm]["title"], *(tried(arms[arm], lr) for lr in rates)] for arm in ranked(point)]
    missing = f"Not run: {', '.join(point['skipped'])}.\n\n" if point["skipped"] else ""
    return f"""
## {point["title"]}

{point["about"]} {size["steps"]} steps of {size["batch"]} sequences of at most {size["tokens"]} tokens; sampled blocks are drawn every
{size["interval"]} steps, subspaces every {size["refresh_every"]}. {point["runs"]} runs on {point["device"]}. Before: loss {point["base"]["loss"]:.3f}, on
ordinary text {point["base"]["ordinary"]:.3f}. Mean ± standard deviation over seeds; **bold**: real.

{common.table(head, rows)}
† the search has not come to its end; not in the picture. {missing}

Loss of seed 0 on the records that the rate is chosen by:

{common.table(["arm", *(f"{lr:g}" for lr in rates)], grid)}"""


def tried(arm: dict[str, Any], lr: float) -> str:
    """A cell of the grid."""
    if (key := f"{lr:g}") not in arm["grid"]:
        return ""
    text = "diverged" if arm["grid"][key] is None else f"{arm['grid'][key]:.3f}"
    return f"**{text}**" if key == f"{arm['lr']:g}" else text


def cell(found: dict[str, Any]) -> str:
    """A difference, bold where it is real."""
    if found["mean"] is None:
        return ""
    return f"**{found['mean']:+.3f}**" if is_real(found) else f"{found['mean']:+.3f}"


def spread(values: list[float]) -> str:
    """Mean ± sd."""
    return f"{np.mean(values):.3f}" + (f" ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else "")


def draw(points: dict[str, Any], file: Path) -> None:
    """Loss over predicted memory; larger marks take longer a step, the line joins arms that nothing beats in both."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(points), figsize=(9 * len(points), 6), layout="constrained", squeeze=False)
    for ax, point in zip(axes[0], points.values(), strict=True):
        arms = {name: arm for name, arm in point["arms"].items() if arm["bracketed"]}
        xy = {arm: (arms[arm]["predicted_mib"], float(np.mean(arms[arm]["losses"]))) for arm in arms}
        front = sorted(xy[a] for a in arms if not any(xy[b][0] <= xy[a][0] and xy[b][1] < xy[a][1] for b in arms))
        ax.step(*zip(*front, strict=True), where="post", color="grey", linewidth=0.8)
        usual = np.mean([seconds for arm in arms.values() if (seconds := arm["seconds_per_step"])] or [1.0])
        for arm, (x, y) in xy.items():
            colour = "tab:blue" if arms[arm]["ours"] else "tab:orange"
            area = 60 * (arms[arm]["seconds_per_step"] or usual) / usual
            ax.scatter(x, y, s=area, color=colour)
            sd = np.std(arms[arm]["losses"], ddof=1) if len(arms[arm]["losses"]) > 1 else 0.0
            ax.errorbar(x, y, yerr=sd, color=colour, linewidth=1)
        for place, arm in enumerate(
            order := [arm for arm in ranked(point) if arm in xy]
        ):  # titles in a column beside the picture, a line to each
            beside = (1.04, (place + 0.5) / len(order))
            line = {"arrowstyle": "-", "color": "lightgrey", "linewidth": 0.6, "shrinkB": 4, "relpos": (0, 0.5)}
            ax.annotate(
                arms[arm]["title"], xy[arm], beside, textcoords="axes fraction", va="center", fontsize=7.5,
                arrowprops=line, annotation_clip=False, zorder=0,
            )  # fmt: skip
        ax.axvline(xy[REFERENCE][0], color="tab:orange", linestyle=":", linewidth=0.8)
        ax.set(
            xlabel="predicted peak memory with checkpointing, MiB", ylabel="loss, nats per token", title=point["title"]
        )
    figure.savefig(file, dpi=110)
    plt.close(figure)
