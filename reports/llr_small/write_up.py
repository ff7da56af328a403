"""README.md and the figures from results.json."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from reports import common
from reports.llr_small.search import GRID
from reports.llr_small.summary import paired, significance
from reports.llr_small.training import BETAS, CLIP, WEIGHT_DECAY

HERE = Path(__file__).parent
VERDICT = HERE / "verdict.md"  # written by hand, from the tables


def write_up(results: dict[str, Any]) -> None:
    """The page, one section for each size."""
    points = results["points"]
    sections = []
    for name, point in points.items():
        curves(point, HERE / f"{name}.png")
        sections.append(section(name, point))
    first = next(iter(points.values()))
    corpus = first["corpus"]
    text = f"""# Layerwise learning rates on a small LLaMA

`python -m reports.llr_small --work FOLDER` makes this page. {common.facts(results["machine"])} One thread, float32;
seconds are of the process, since other work ran on the machine at the same time (those of the first ten runs, which only
the core-hours contain, are of the clock).

{VERDICT.read_text() if VERDICT.exists() else ""}
## What was done

LLaMA (RMSNorm, rotary positions, SwiGLU, heads of 32, head **not** tied to the embedding), random weights, on
{corpus["source"]} ({corpus["files"]} files, {corpus["megabytes"]} MB, sha256 `{corpus["sha256"][:16]}…`; {corpus["validation_files"]} files held out by the
hash of their name), byte-level BPE of {corpus["vocabulary"]} tokens trained on the training files:
{corpus["train_tokens"]:,} tokens to train on, {corpus["validation_tokens"]:,} held out. AdamW (β {BETAS[0]}, {BETAS[1]}; decay {WEIGHT_DECAY} on matrices, 0 on norms), gradients
clipped at {CLIP:g}, warm-up over 10 % of the steps, cosine to 10 %.

The base learning rate of **every arm** is searched on the same grid, factors of 2 from {GRID[0]:g} to {GRID[-1]:g}: seed 0, downhill
until the best has both its neighbours; the other seeds run at the best. Runs of one seed begin with the same weights and
see the same batches, so differences are taken by seed. "Between" is the minimum of the parabola in log₂ lr through the
best point and its neighbours: what a finer grid would have found on seed 0. Steps to uniform's final loss are read off
the validation curve of each seed, linear between its points, against the mean of uniform's last ones on the same windows;
every run has its own whole cosine, so an arm that is ahead early is not helped by it.

LLR has its published range, 1 to 5, with events at step 1 and every 1/20 of the run up to 1/5 of it and ramps of half an
interval, which is 100 / 50 / 0.2 at 2000 steps. Embedding and head are "the ends". AlphaDecay sets the decay in [2/3, 3]
at the same interval to the end of the run. FARMS pools 5 × 5 windows of 64 × 64.

{"".join(sections)}"""
    (HERE / "README.md").write_text(text)


def section(name: str, point: dict[str, Any]) -> str:
    """One size: the main table, the grid, multipliers and α."""
    size, parameters, arms = point["size"], point["parameters"], point["arms"]
    order = sorted(arms, key=lambda arm: arms[arm]["mean"])
    main = [
        [
            arms[arm]["title"],
            f"{arms[arm]['best_lr']:g}" + ("" if arms[arm]["bracketed"] else " †"),
            spread(arms[arm]["mean"], arms[arm]["sd"]),
            f"{arms[arm]['perplexity']:.1f}",
            len(arms[arm]["losses"]),
            "" if arm == "uniform" else signed(arms[arm].get("difference"), arms[arm].get("difference_sd")),
            "" if arm == "uniform" else chance(arms[arm].get("differences", {})),
            "" if arm == "uniform" else reached(arms[arm].get("steps_to_uniform", [])),
            between(arms[arm]["between"]),
        ]
        for arm in order
    ]
    columns = [k for k, lr in enumerate(GRID) if any(f"{lr:g}" in arms[arm]["grid"] for arm in arms)]
    grid = [[arms[arm]["title"], *(grid_cell(arms[arm], GRID[k]) for k in columns)] for arm in order]
    roles = list(next(iter(arms.values()))["alpha"][0][1])
    given = [
        [arms[arm]["title"], step, *(f"{values.get(role, 1.0):.2f}" for role in roles)]
        for arm in order
        if arms[arm]["multipliers"]
        for step, values in ends_of(arms[arm]["multipliers"])
    ]
    alpha = [
        [arms[arm]["title"], step, *(f"{values[role]:.2f}" for role in roles)]
        for arm in order
        for step, values in ([arms[arm]["alpha"][0]] if arm == order[0] else []) + [arms[arm]["alpha"][-1]]
    ]
    cost = [
        [arms[arm]["title"], f"{s['spectra']:.3f}", f"{100 * s['spectra'] / s['training']:.2f} %",
         f"{1000 * s['optimizer_step']:.2f}", f"{s['training'] / size['steps'] * 1000:.0f}"]
        for arm in order
        for s in [arms[arm]["seconds"]]
        if s["spectra"] or arm == "uniform"
    ]  # fmt: skip
    untuned = (
        ""
        if point["tuned_on"] == name
        else " Every arm at the learning rate that was best for it above,\nand what else the grid below shows."
    )
    tokens = size["steps"] * size["batch"] * size["context"]
    return f"""## Width {size["width"]}, {size["blocks"]} blocks, {size["steps"]} steps

{parameters["body"]:,} weights in the body, {parameters["embedding and head"]:,} in embedding and head; batch {size["batch"]} × {size["context"]}, {tokens:,} tokens; {point["runs"]} runs,
{point["hours"]:.1f} core-hours.{untuned} Validation loss in nats per token, mean ± standard deviation over seeds; difference to uniform by
seed, mean ± standard deviation of the differences, and p of a paired t-test over the seeds (three or more).
{between_arms(arms)}
{common.table(["arm", "best lr", "validation loss", "perplexity", "seeds", "minus uniform", "p", "steps to uniform's loss", "between"], main)}
† the best has not both neighbours: at the edge of the grid, no search at this size, or one cut short.

![loss]({name}.png)

The whole grid, seed 0 (bold: best; empty: the search did not go there):

{common.table(["arm", *(f"{GRID[k]:g}" for k in columns)], grid)}
Mean multiplier by role at the first and the last step (seed 0, best lr; of the decay for AlphaDecay):

{common.table(["arm", "step", *roles], given)}
Mean α (hill) by role, at the start and at the end (seed 0, best lr):

{common.table(["arm", "step", *roles], alpha)}
Seconds on spectra in a whole run, their share of training, and a step of the optimizer beside a whole step, in ms:

{common.table(["arm", "seconds", "share", "optimizer", "step"], cost)}
"""


def ends_of(values: list[Any]) -> list[Any]:
    """First and last, once where they are equal."""
    return values[:1] if values[0][1] == values[-1][1] else [values[0], values[-1]]


def spread(mean: float, sd: float | None) -> str:
    """Mean ± sd."""
    return f"{mean:.3f}" + ("" if sd is None else f" ± {sd:.3f}")


def signed(mean: float | None, sd: float | None) -> str:
    """Signed mean ± sd."""
    if mean is None:
        return ""
    return f"{mean:+.3f}" + ("" if sd is None else f" ± {sd:.3f}")


def chance(differences: dict[str, float]) -> str:
    """p of the paired t-test, where there are seeds enough."""
    p = significance(differences.values())
    return "" if p is None else f"{p:.2g}"


def between_arms(arms: dict[str, Any]) -> str:
    """Arms against each other that both have several seeds: what the body's part of LLR adds, and ends of their own."""
    lines = []
    for arm, base in (("llr", "ends"), ("apart", "ends"), ("llr", "apart")):
        if arm in arms and base in arms and len(found := list(paired(arms[arm], arms[base]).values())) > 2:
            spread_of = signed(float(np.mean(found)), float(np.std(found, ddof=1)))
            lines.append(
                f"- {arms[arm]['title']}, less {arms[base]['title']}: {spread_of} "
                f"({len(found)} seeds, p = {significance(found):.2g})"
            )
    return "\n" + "\n".join(lines) + "\n" if lines else ""


def reached(steps: list[int | None]) -> str:
    """Mean step over the seeds that got there, or how many did."""
    found = [s for s in steps if s is not None]
    if not found:
        return "never"
    mean = f"{sum(found) / len(found):.0f}"
    return mean if len(found) == len(steps) else f"{mean} ({len(found)} of {len(steps)} seeds)"


def between(value: dict[str, float] | None) -> str:
    """Loss at the parabola's minimum and where it is."""
    return "" if value is None else f"{value['loss']:.3f} at {value['lr']:.2g}"


def grid_cell(arm: dict[str, Any], lr: float) -> str:
    """Loss at one learning rate."""
    key = f"{lr:g}"
    if key not in arm["grid"]:
        return ""
    loss = arm["grid"][key]
    text = "diverged" if loss is None else f"{loss:.3f}"
    return f"**{text}**" if math.isclose(lr, arm["best_lr"]) else text


def curves(point: dict[str, Any], file: Path) -> None:
    """Loss over base lr, paired differences, validation curves, α of attention and MLP over time."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    arms = point["arms"]
    order = sorted(arms, key=lambda arm: arms[arm]["mean"])
    colours = {arm: plt.get_cmap("tab20")((2 * i) % 20 + i // 10) for i, arm in enumerate(arms)}
    figure, axes = plt.subplots(2, 2, figsize=(12, 10), layout="constrained")
    (search, difference), (curve, alpha) = axes
    for arm in order:
        grid = {float(lr): loss for lr, loss in arms[arm]["grid"].items() if loss is not None}
        search.plot(list(grid), list(grid.values()), "o-", color=colours[arm], label=arms[arm]["title"])
        steps, losses = zip(*arms[arm]["curve"], strict=True)
        curve.plot(steps, losses, color=colours[arm])
    lowest, highest = arms[order[0]]["mean"], arms[order[-1]]["mean"]
    room = highest - lowest
    searched = sorted({float(lr) for arm in arms.values() for lr in arm["grid"]})
    search.set_xscale("log", base=2)
    search.set_xticks(searched, [f"{lr:g}" for lr in searched], rotation=30)
    search.set(xlabel="base learning rate", ylabel="validation loss, seed 0")
    search.set_ylim(
        min(min(v for v in a["grid"].values() if v) for a in arms.values()) - 0.1 * room, highest + 2 * room + 0.05
    )
    figure.legend(*search.get_legend_handles_labels(), loc="outside lower center", ncol=4, frameon=False, fontsize=8)
    curve.set(
        xlabel="step",
        ylabel="validation loss, mean of the seeds",
        ylim=(lowest - 0.2 * room - 0.05, highest + 4 * room + 0.3),
    )
    for place, arm in enumerate(reversed(order)):
        values = list(arms[arm].get("differences", {}).values())
        difference.plot(values, [place] * len(values), "o", color=colours[arm])
    difference.axvline(0, color="k", lw=0.8)
    difference.set(yticks=range(len(order)), xlabel="validation loss minus uniform's, one point a seed")
    difference.set_yticklabels([arms[arm]["title"] for arm in reversed(order)], fontsize=7)
    for arm in [a for a in ("uniform", "llr", "ends") if a in arms]:
        steps = [step for step, _ in arms[arm]["alpha"]]
        for role, style in (("attn.q", "-"), ("attn.v", "--"), ("mlp.up", ":")):
            label = f"{arm}: {role}"
            alpha.plot(steps, [v[role] for _, v in arms[arm]["alpha"]], style, color=colours[arm], label=label)
    alpha.set(xlabel="step", ylabel="α (hill), mean of the role")
    alpha.legend(frameon=False, fontsize=8, ncol=3)
    figure.savefig(file, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    import json

    write_up(json.loads((HERE / "results.json").read_text()))
