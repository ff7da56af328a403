"""README.md and the figures of the study, from results.json; the verdict is the text of verdict.md."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from reports import common
from reports.checkpoints.finetuned import CHANGE, MOVED
from reports.checkpoints.measuring import METRICS
from reports.checkpoints.training import BATCH
from reports.checkpoints.turned_text import section as directions_text

HERE = Path(__file__).parent
SHOWN = ("alpha", "null", "minus_null", "over_null", "hill", "hill_minus_null", "farms", "trace_log")
NAMES = METRICS | {
    "null": "null of α (ks)", "stable_rank": "stable rank", "relative_norm": "‖ΔW‖ / ‖W‖",
    "energy_90": "directions for 90 % of the norm", "energy_999": "for 99.9 %", "rank": "hard rank",
}  # fmt: skip


def quartiles(values: list[float]) -> str:
    """Median and quartiles."""
    low, middle, high = values
    return f"{middle:.2f} ({low:.2f}, {high:.2f})"


def model_table(models: dict[str, list[Any]]) -> str:
    """One line per model, trained and random."""
    rows = []
    for name, lines in models.items():
        for kind in ("trained", "random"):
            found = lines[0][kind]
            flags = f"{found['random_like']} of {found['fitted']}"
            rows.append([name, kind, found["matrices"], *(quartiles(found[k]) for k in SHOWN), flags])
    return common.table(["model", "weights", "matrices", *(NAMES[k] for k in SHOWN), "random-like"], rows)


def role_table(models: dict[str, list[Any]]) -> str:
    """Medians by role, trained (random)."""
    keys = ("alpha", "hill", "hill_minus_null", "farms", "trace_log", "stable_rank_share")
    rows = []
    for name, lines in models.items():
        for line in lines[1:]:
            trained, random = line["trained"], line["random"]
            if not trained["fitted"]:
                rows.append([name, line["role"], f"{trained['matrices']} (too small to fit)", *["–"] * 7])
                continue
            cells = [f"{trained[k][1]:.2f} ({random[k][1]:.2f})" for k in keys]
            flags = f"{trained['random_like']} ({random['random_like']})"
            rows.append([name, line["role"], f"{trained['fitted']} of {trained['matrices']}", *cells, flags])
    return common.table(["model", "role", "fitted", *(NAMES[k] for k in keys), "random-like"], rows)


def separation_table(lines: list[Any]) -> str:
    """Area under the ROC curve by class; an arrow says where the trained ones lie."""

    def cell(value: float) -> str:
        return f"{max(value, 1 - value):.2f} {'↓' if value > 0.5 else '↑'}" if abs(value - 0.5) > 0.005 else "0.50"

    rows = [[label, *(cell(line["auc"][key]) for line in lines)] for key, label in METRICS.items()]
    flags = [
        "flag random-like: trained / random",
        *(f"{x['random_like']['trained']:.0%} / {x['random_like']['random']:.0%}" for x in lines),
    ]
    return common.table(["number", *(f"{line['class']} ({line['matrices']})" for line in lines)], [*rows, flags])


def negative_table(found: Any) -> str:
    """The untrained matrix between noise and trained ones of its shape."""
    rows = []
    for key, label in METRICS.items():
        numbers = found["metrics"][key]
        mean, sd = numbers["noise"]
        low, middle, high = numbers["trained"]
        away = f"{(numbers['suspect'] - mean) / sd:+.1f}" if sd > 1e-9 else "–"
        inside = "inside" if low <= numbers["suspect"] <= high else "outside"
        rows.append(
            [
                label,
                f"{numbers['suspect']:.3f}",
                f"{mean:.3f} ± {sd:.3f}",
                away,
                f"{middle:.3f} ({low:.3f} to {high:.3f})",
                inside,
            ]
        )
    return common.table(
        ["number", "pooler.dense", "noise", "sds from noise", "trained: median (range)", "range of the trained"], rows
    )


def quantized_table(found: Any) -> str:
    """Median and largest size of the shift, in the number's unit, and Spearman over layers before and after."""
    formats = found["formats"]
    rows = [["relative error of the weights", *(f"{f['error']:.2%}" for f in formats.values())]]
    for key, label in METRICS.items():
        cells = []
        for f in formats.values():
            n = f["numbers"][key]
            cells.append(
                f"{n['median']:+.2g}; {n['size'][0]:.2g}, {n['size'][2]:.2g}; {n['of_spread']:.0%}; {n['order']:.2f}"
            )
        rows.append([label, *cells])
    rows.append(["α (ks) moves by more than σ", *(f"{f['beyond_sigma']:.0%}" for f in formats.values())])
    rows.append(
        ["random-like, before and after", *(f"{f['random_like'][0]}, {f['random_like'][1]}" for f in formats.values())]
    )
    rows.append(
        ["hard rank, all matrices, before and after", *(f"{f['rank'][0]}, {f['rank'][1]}" for f in formats.values())]
    )
    return common.table(["number", *formats], rows)


def half_table(lines: list[Any]) -> str:
    """Matrices cut to half of their rank."""
    keys = ("rank", "energy_999", "floor", "stable_rank_share", "alpha", "hill", "trace_log")
    head = ["hard rank / M", "directions for 99.9 % / M", *(NAMES[k] for k in keys[2:])]
    return common.table(["matrix", *head], [[line["format"], *(f"{line[k]:.3f}" for k in keys)] for line in lines])


def moved_table(runs: list[Any]) -> str:
    """Shifts of numbers of W, fine-tuned and random change of the same size."""
    rows = []
    for key in MOVED:
        cells = []
        for r in runs:
            real, random = r["shifts"][key]["real"], r["shifts"][key]["random"]
            cells.append(f"{real[0]:+.1e}; {real[1]:.1e}, {real[3]:.1e}; random {random[1]:.1e}")
        rows.append([NAMES[key], *cells])
    rows.append(["α (ks) moves by more than σ", *(f"{r['beyond_sigma']:.0%}" for r in runs)])
    rows.append(["matrices that changed", *(f"{r['moved']} of {r['matrices']}" for r in runs)])
    rows.append(["training loss, mean over the run", *(f"{r['metrics']['train_loss']:.2f}" for r in runs)])
    return common.table(["number", *(f"{r['arm']}, seed {r['seed']}" for r in runs)], rows)


def change_table(runs: list[Any]) -> str:
    """Numbers of the change."""
    rows = []
    for key in CHANGE:
        cells = ["{1:.3g} ({0:.3g}, {2:.3g})".format(*r["change"][key]) for r in runs]
        rows.append([NAMES[key], *cells])
    rows.append(["flag random-like", *(f"{r['change_random_like']:.0%}" for r in runs)])
    return common.table(
        ["number of W₁ - W₀: median (10 %, 90 %)", *(f"{r['arm']}, seed {r['seed']}" for r in runs)], rows
    )


def agreement_table(lines: list[Any]) -> str:
    """Spearman of the shifts of two seeds."""
    rows = [
        [NAMES[key], *("{after:+.2f}; random {random:+.2f}".format(**line["numbers"][key]) for line in lines)]
        for key in MOVED
    ]
    return common.table(["number", *(f"{line['arm']} ({line['matrices']} matrices)" for line in lines)], rows)


def told_text(scores: dict[str, float]) -> str:
    """How well the method is named."""
    if not scores:
        return "Fewer than two seeds of every method have been run, so this was not asked.\n"
    shares = "; ".join(f"{label} {share:.0%}" for label, share in scores.items())
    return f"Matrices whose method is named rightly: {shares}.\n"


def finetuned_text(found: Any) -> str:
    """The section on fine-tuning."""
    runs = found["runs"]
    if not runs:
        return "## Before and after fine-tuning\n\nNo fine-tuning has been run for this page yet (the command runs six); nothing is claimed about it.\n"
    steps = runs[0]["metrics"]["steps"]
    return f"""## Before and after fine-tuning

SmolLM2-135M-Instruct, {steps} steps of `htsr finetune` on the Python language reference, {BATCH} × 128 tokens a step; recipes in
`training.py`. Median shift; median and largest size of the shift over the matrices that changed; and the
median size under a Gaussian change of the same norm, matrix by matrix.

{moved_table(runs)}
### The spectrum of the change

`htsr analyze FINE_TUNED --against BASE`.

{change_table(runs)}
### Do two seeds move the same matrices?

Spearman over matrices of the shift under one seed and under the other; that of two random changes of the same norms beside it.

{agreement_table(found["agreement"]) if found["agreement"] else "Only one seed has been run."}

### Can the method be told?

The nearest centroid of one seed's matrices names the method of the other seed's, from the {len(MOVED)} shifts above, or
from the shape of the change's spectrum (stable rank, directions for 90 and 99.9 %, ratio to the edge; not its size).
{told_text(found["told"])}"""


def write_up(results: dict[str, Any]) -> None:
    """README.md and separation.png, quantized.png."""
    separation_plot(results)
    quantized_plot(results["quantized"], results["finetuned"]["runs"])
    verdict = HERE / "verdict.md"
    negative = results["negative"]
    flags = negative["random_like"]
    text = f"""# Which number sees what, on real models

`python -m reports.checkpoints --work DIR` makes this page. {common.facts(results["machine"])}

{len(results["models"])} trained models in this page ({", ".join(results["models"])}; the command runs {SOURCES}), each against
Gaussian weights of the same shapes and variances; MiniLM quantised and de-quantised; SmolLM2 before and after brief
fine-tuning ({len(results["finetuned"]["runs"])} of 6 runs). "Null" is the α of noise of that shape under the same fit; FARMS is
`hill` on 16 windows of 128 × 128 at most (a smaller matrix: smaller windows).
SmolLM2 is a de-quantised 4-bit checkpoint, the others are float32.

{verdict.read_text() if verdict.exists() else ""}
## Trained against random

Median (quartiles) over the matrices that have a fit (8 eigenvalues or more).

{model_table(results["models"])}
![trained against random](separation.png)

Area under the ROC curve, trained against random, by class of shape: 0.50 is chance, 1.00 perfect; ↓ trained ones lie
lower. All models together; MiniLM's untrained `pooler.dense` is left out. log10 norm is equal by construction.

{separation_table(results["separation"])}
### The negative control

`{negative["name"]}` was never trained (its bias is zero). {DRAWS_TEXT.format(alike=negative["alike"])} Flagged random-like: the
suspect {"yes" if flags[0] else "no"}, noise {flags[1]} of 20, trained {flags[2]} of {negative["alike"]}.

{negative_table(negative)}
### By role

Medians, trained (random).

{role_table(results["models"])}
## Quantised against original

MiniLM, every matrix quantised round-to-nearest and de-quantised. In each cell: median shift; median and largest size of
the shift; median size in percent of the interquartile range over layers; Spearman over layers, before against after.

{quantized_table(results["quantized"])}
![quantised](quantized.png)

Square matrices of the first block cut to half of their rank, then quantised: the true hard rank is 0.5 M.

{half_table(results["quantized"]["half"])}
{finetuned_text(results["finetuned"])}
{directions_text(results.get("directions", {}))}"""
    (HERE / "README.md").write_text(text)


SOURCES = "MiniLM, SmolLM2-135M, EfficientNet-Lite0, CREPE full and tiny"
DRAWS_TEXT = "Beside it 20 draws of noise of its shape and variance, and the {alike} trained matrices of its shape in the same model."


def separation_plot(results: dict[str, Any]) -> None:
    """α of ks and of hill against the aspect ratio, trained and random."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(13, 4.2), layout="constrained")
    for number, (name, pair) in enumerate(results["points"].items()):
        for kind, marker in (("trained", "o"), ("random", "x")):
            values = np.array(pair[kind])
            if not values.size:
                continue
            Q = np.minimum(values[:, 0], 130) * (1 + 0.02 * (number - 2))
            label = name if kind == "trained" else None
            style: dict[str, Any] = {"color": f"C{number}", "ms": 4, "alpha": 0.5 if kind == "trained" else 0.35}
            axes[0].loglog(Q, values[:, 1], marker, label=label, **style)
            axes[1].loglog(Q, values[:, 3], marker, **style)
            axes[2].loglog(Q, values[:, 3] / values[:, 4], marker, **style)
    titles = ("α (ks)", "α (hill)", "α (hill) / its null")
    for ax, title in zip(axes, titles, strict=True):
        ax.set(xlabel="aspect ratio Q (130: more)", title=f"{title}   ● trained  × random")
        ax.grid(alpha=0.3, which="both", lw=0.4)
    axes[2].axhline(1, color="k", lw=0.7)
    axes[0].legend(frameon=False, fontsize=8)
    figure.savefig(HERE / "separation.png", dpi=90)
    plt.close(figure)


def quantized_plot(found: Any, runs: list[Any]) -> None:
    """Shift in percent of the spread over layers against the error of the weights; and the change of each method."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        1, 2 if runs else 1, figsize=(11 if runs else 6.5, 4.4), layout="constrained", squeeze=False
    )
    axes = axes[0]
    formats = sorted(found["formats"].values(), key=lambda f: f["error"])
    for number, key in enumerate(
        ("alpha", "hill", "farms", "trace_log", "stable_rank_share", "entropy", "spike_share", "floor")
    ):
        share = [max(100 * f["numbers"][key]["of_spread"], 0.01) for f in formats]
        axes[0].loglog([100 * f["error"] for f in formats], share, "o-", color=f"C{number}", label=METRICS[key], ms=4)
    axes[0].set(
        xlabel="error of the weights, %",
        ylabel="median shift, % of the spread over layers",
        title="quantised: int8, nf4, 4, 3, 2 bits",
    )
    axes[0].axhline(100, color="k", lw=0.6)
    axes[0].legend(frameon=False, fontsize=8)
    if runs:
        change_plot(axes[1], runs)
    figure.savefig(HERE / "quantized.png", dpi=90)
    plt.close(figure)


def change_plot(ax: Any, runs: list[Any]) -> None:
    """Directions of the change against its size, by method."""
    for number, arm in enumerate(dict.fromkeys(r["arm"] for r in runs)):
        values = np.concatenate([np.array(r["points"]) for r in runs if r["arm"] == arm])
        ax.loglog(values[:, 0], values[:, 1], "o", color=f"C{number}", ms=3, alpha=0.5, label=arm)
    ax.set(xlabel="‖ΔW‖ / ‖W‖", ylabel="directions for 90 % of the change / M", title="fine-tuned: the change")
    ax.legend(frameon=False, fontsize=8)


if __name__ == "__main__":
    write_up(json.loads((HERE / "results.json").read_text()))
