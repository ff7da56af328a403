"""README.md and the figure of the MLP3 study, from whatever runs results.json holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from reports import common

HERE = Path(__file__).parent
PAPER = {
    8: ("2.9 / 2.94", ".70 / .72", "1.8 / 1.75"),
    16: ("2.46 / 2.45", ".33–.42 / .32–.38", "1.63 / 1.65"),
    24: ("– / 2.17", "– / .13", "– / 1.55"),
    32: ("1.93–1.99 / 1.93–1.98", "about 0 / about 0", "1.78±.28 / 1.63–2.03"),
}
SURGERY = (
    "as trained", "ECS", "ECS of FC1 only", "power-law tail", "80 directions", "40 directions", "20 directions",
    "10 directions", "without the ECS", "without the tail", "without traps",
)  # fmt: skip

Run = dict[str, Any]
Key = tuple[str, int, int, int]  # optimizer, learning rate, batch, patience


def spread(values: list[float], digits: int = 2) -> str:
    """Mean, and half the range where there are several."""
    if not values:
        return "–"
    mean = f"{np.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean}±{(max(values) - min(values)) / 2:.{digits}f}"


def layer(name: str, field: str) -> Any:
    """A number of a layer, out of a run."""
    return lambda run: run["layers"][name][field]


def error(kind: str, part: str = "as trained") -> Any:
    """Train or test error in percent, out of a run."""
    return lambda run: 100 * run["surgery"][part][kind]


def groups(runs: list[Run]) -> dict[Key, list[Run]]:
    """Runs that differ in the seed only."""
    found: dict[Key, list[Run]] = {}
    for run in runs:
        if not run["diverged"]:
            found.setdefault((run["optimizer"], run["factor"], run["batch"], run["patience"]), []).append(run)
    return found


def label(key: Key) -> str:
    """Optimizer, where it is not SGD, learning rate and batch."""
    return f"{'Adam ' if key[0] == 'adam' else ''}{key[1]}×, b {key[2]}"


def setting_table(found: dict[Key, list[Run]]) -> str:
    """One line per setting."""
    head = ["optimizer", "lr", "batch", "patience", "seeds", "epochs", "FC1 α", "FC1 Δλ_min", "FC1 T", "FC1 traps", "FC2 α",
            "FC2 Δλ_min", "train error, %", "test error, %"]  # fmt: skip
    rows = []
    for (optimizer, factor, batch, patience), runs in found.items():
        cells: list[Any] = [optimizer, f"{factor}×", batch, patience, len(runs), spread([r["epochs"] for r in runs], 0)]
        for get, digits in (
            (layer("FC1", "alpha"), 2), (layer("FC1", "delta_lambda_min"), 2), (layer("FC1", "trace_log"), 2),
            (layer("FC1", "num_traps"), 0), (layer("FC2", "alpha"), 2), (layer("FC2", "delta_lambda_min"), 2),
            (error("train"), 2), (error("test"), 2),
        ):  # fmt: skip
            cells.append(spread([get(r) for r in runs if get(r) is not None], digits))
        rows.append(cells)
    return common.table(head, rows)


def target_table(found: dict[Key, list[Run]]) -> str:
    """The paper's figures and those of an earlier re-run beside these, at batch 32 and patience 3."""
    rows = []
    for factor, (alpha, delta, test) in PAPER.items():
        runs = found.get(("sgd", factor, 32, 3), [])
        rows.append([
            f"{factor}×", alpha, spread([layer("FC1", "alpha")(r) for r in runs]), delta,
            spread([layer("FC1", "delta_lambda_min")(r) for r in runs]), test, spread([error("test")(r) for r in runs]),
        ])  # fmt: skip
    return common.table(["lr", "α: paper / re-run", "here", "Δλ_min: paper / re-run", "here",
                         "test error, %: paper / re-run", "here"], rows)  # fmt: skip


def surgery_table(found: dict[Key, list[Run]]) -> str:
    """Test error after surgery, at patience 3."""
    columns = [(key, runs) for key, runs in found.items() if key[3] == 3]
    rows = []
    for part in SURGERY:
        cells = []
        for _, runs in columns:
            have = [r for r in runs if part in r["surgery"]]
            cells.append(spread([error("test", part)(r) for r in have]))
        rows.append([part, *cells])
    kept = ["directions in the ECS, FC1 + FC2"]
    kept += [
        " + ".join(f"{np.mean([r['surgery']['ECS']['kept'][i] for r in runs]):.0f}" for i in (0, 1))
        for _, runs in columns
    ]
    return common.table(["FC1 and FC2 become", *(label(key) for key, _ in columns)], [*rows, kept])


def nudge_table(runs: list[Run], nudged: list[Run]) -> str:
    """Nudged runs beside those of the same rate and seed."""
    twins = {(r["factor"], r["seed"]): r for r in runs if (r["optimizer"], r["batch"], r["patience"]) == ("sgd", 32, 3)}
    pairs: dict[tuple[int, float], list[tuple[Run, Run]]] = {}
    for run in nudged:
        if (twin := twins.get((run["factor"], run["seed"]))) is not None and not run["diverged"]:
            pairs.setdefault((run["factor"], run["nudge"]), []).append((run, twin))

    def difference(get: Any, found: list[tuple[Run, Run]]) -> str:
        values = [get(run) - get(twin) for run, twin in found]
        error = f" ± {np.std(values, ddof=1) / len(values) ** 0.5:.2f}" if len(values) > 1 else ""
        return f"{np.mean(values):+.2f}{error}"

    rows = []
    for (factor, strength), found in sorted(pairs.items()):
        cells = [f"{factor}×", strength, len(found), spread([r["epochs"] for r, _ in found], 0)]
        for name in ("FC1", "FC2"):
            cells += [spread([layer(name, "alpha")(r) for r, _ in found]), difference(layer(name, "alpha"), found)]
        cells += [spread([layer("FC1", "delta_lambda_min")(r) for r, _ in found])]
        cells += [spread([error("train")(r) for r, _ in found])]
        rows.append([*cells, spread([error("test")(r) for r, _ in found]), difference(error("test"), found)])
    return common.table(["lr", "strength", "seeds", "epochs", "FC1 α", "difference", "FC2 α", "difference", "FC1 Δλ_min",
                         "train error, %", "test error, %", "difference"], rows)  # fmt: skip


def correlation_table(runs: list[Run]) -> tuple[str, int]:
    """Spearman correlation with the test error over runs of patience 3, with a bootstrap interval over runs."""
    import warnings

    from scipy.stats import spearmanr

    warnings.simplefilter("ignore")  # a resample can be constant

    chosen = [r for r in runs if not r["diverged"] and r["patience"] == 3 and r["optimizer"] == "sgd"]
    test = np.array([error("test")(r) for r in chosen])
    random = np.random.default_rng(0)

    def correlate(values: list[float]) -> str:
        x = np.array(values, dtype=float)
        samples = [random.integers(0, x.size, x.size) for _ in range(1000)]
        low, high = np.nanquantile([spearmanr(x[s], test[s]).statistic for s in samples], [0.025, 0.975])
        return f"{spearmanr(x, test).statistic:+.2f} [{low:+.2f}, {high:+.2f}]"

    fields = {
        "α": "alpha", "distance of α from 2": "alpha", "Δλ_min": "delta_lambda_min", "size of Δλ_min": "delta_lambda_min",
        "T (trace-log)": "trace_log", "quality: tail norm": "quality_tail_norm", "quality: log": "quality_log",
        "quality: Schatten": "quality_schatten", "quality: free cumulants": "quality_cumulant",
        "α̂ = α·log10 λ_max": "alpha_hat", "stable rank": "stable_rank", "‖W‖²": "norm",
    }  # fmt: skip
    rows = []
    for label in fields:
        cells = []
        for name in ("FC1", "FC2"):
            values = [layer(name, fields[label])(r) for r in chosen]
            if any(v is None for v in values):
                cells.append("–")
                continue
            if label == "distance of α from 2":
                values = [abs(v - 2) for v in values]
            if label == "size of Δλ_min":
                values = [abs(v) for v in values]
            cells.append(correlate(values))
        rows.append([label, *cells])
    rows.append(["(train error)", correlate([error("train")(r) for r in chosen]), ""])
    return common.table(["measure", "FC1", "FC2"], rows), len(chosen)


def write_up(results: dict[str, Any]) -> None:
    """README.md and march.png."""
    runs = [run for run in results["runs"] if not run["nudge"]]
    nudged = [run for run in results["runs"] if run["nudge"]]
    found = groups(runs)
    plot(runs, nudged)
    correlations, count = correlation_table(runs)
    seeds = sorted({r["seed"] for r in runs})
    best = min(found.items(), key=lambda item: np.mean([error("test")(r) for r in item[1]]))
    minutes = sum(r["cpu_seconds"] for r in results["runs"]) / 60
    verdict = HERE / "verdict.md"
    text = f"""# SETOL's three-layer perceptron on MNIST

`python -m reports.setol_mlp3 --work DIR` makes this page. {common.facts(results["machine"])}

784–300–100–10, ReLU, Glorot-normal weights and zero biases that differ by seed, plain SGD at a constant multiple of
lr 0.01 (Adam: of 0.001), 54,000 training images, full test set of 10,000; training stops when the loss of an epoch has for three epochs
not fallen by 1e-4 below its best. **{len(results["runs"])} runs ({len(seeds)} seeds at most) are in this page, {minutes:.0f} minutes of
processor time in all**; the column "seeds" says how many each line has, ± is half the range between them. The standard error of a test error of 1.7 %
on 10,000 images is 0.13 points: smaller differences between single runs say nothing.

**The loss is the mean over the mini-batch.** The text of the study speaks of a summed cross-entropy. On a sum, lr 8× at
batch 32 is a step of 2.56 on the mean (here: lr {TOO_FAR}×), and training {far(runs)}; and the step per image would
be the same at every batch size, so that batch size could hardly matter. With the mean, the published α, Δλ_min and errors
come out as they are printed (next table), so that is what was done there. It also says why the two sweeps look alike: lr 32× at
batch 32 and lr 1× at batch 1 take the same step per image.

{verdict.read_text() if verdict.exists() else ""}
## Against the published numbers (FC1, batch 32)

{target_table(found)}
## All settings

{setting_table(found)}
T is the mean of ln λ̃ over the power-law tail, the trace-log (ERG) number; Δλ_min is in units where the mean λ is 1.

![march](march.png)

## What the measures say about the test error

Spearman correlation with the test error over the {count} runs of SGD with patience 3 (all settings together), with a 95 %
bootstrap interval over runs. Runs of one setting are not independent samples of settings; read the intervals as narrow.

{correlations}
## Surgery: does the error survive on the effective correlation space?

Test error in % (mean ± half the range over seeds), FC1 and FC2 projected together by `htsr.project_tail`; biases and the
last layer stay. "Without" takes the tail out and keeps the rest. "Without traps" is `htsr.remove_traps` (mean
subtracted, large entries clipped), where there were any.

{surgery_table(found)}
## Nudged towards α = 2 while training

FC1 and FC2 under `htsr.spectral_projection`'s rule every 100 steps of SGD at batch 32 and patience 3: ln(α - 1) of the tail shrinks by the
factor 1 - strength as far as the trace-log condition allows. Differences are to the run of the same seed without it, mean ± its standard error.

{nudge_table(runs, nudged)}
"""
    best_key = f"{best[0][0]}, lr {best[0][1]}×, batch {best[0][2]}, patience {best[0][3]}"
    text += f"\nLowest mean test error: {best_key}, {spread([error('test')(r) for r in best[1]])} % over {len(best[1])} seed(s).\n"
    (HERE / "README.md").write_text(text)


TOO_FAR = 256


def far(runs: list[Run]) -> str:
    """How training went at the rate that the summed loss would mean."""
    row = next((r for r in runs if r["factor"] == TOO_FAR), None)
    if row is None:
        return "diverges in the first epoch (tried by hand, not among the runs)"
    return f"diverges in epoch {row['epochs']}" if row["diverged"] else "does not diverge"


def plot(runs: list[Run], nudged: list[Run]) -> None:
    """FC1's march in the (α, Δλ_min) plane, test error against α, and the paths of training."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(13, 4.2), layout="constrained")
    finished = [r for r in runs if not r["diverged"]]
    sgd = [r for r in finished if r["optimizer"] == "sgd"]
    for name, marker, chosen in (
        ("lr 1×–32×, batch 32", "o", [r for r in sgd if r["batch"] == 32 and r["patience"] == 3]),
        ("lr 1×, batch 1–16", "s", [r for r in sgd if r["batch"] < 32]),
        ("patience 12", "^", [r for r in sgd if r["patience"] > 3]),
        ("Adam", "x", [r for r in finished if r["optimizer"] == "adam"]),
        ("SGD, nudged towards α = 2", "+", [r for r in nudged if not r["diverged"]]),
    ):
        if not chosen:
            continue
        alpha = [layer("FC1", "alpha")(r) for r in chosen]
        deltas = [layer("FC1", "delta_lambda_min")(r) for r in chosen]
        axes[0].plot(alpha, [np.nan if d is None else d for d in deltas], marker, label=name, alpha=0.8)
        axes[1].plot(alpha, [error("test")(r) for r in chosen], marker, label=name, alpha=0.8)
    axes[0].axhline(0, color="k", lw=0.6)
    axes[0].set(xlabel="α of FC1", ylabel="Δλ_min of FC1", title="α and ERG march together")
    axes[1].set(xlabel="α of FC1", ylabel="test error, %", title="and the error on the way")
    for run in sorted((r for r in finished if r["path"] and r["patience"] == 3), key=lambda r: r["factor"]):
        path = np.array(run["path"])
        axes[2].plot(path[:, 3], 100 * path[:, 2], "-", lw=1, label=f"lr {run['factor']}×")
    axes[2].set(xlabel="α of FC1", ylabel="test error, %", title="epoch by epoch, seed 0", ylim=(1.4, 4), xlim=(1.7, 6))
    for ax in axes:
        ax.axvline(2, color="k", lw=0.6)
        ax.legend(frameon=False, fontsize=8)
    figure.savefig(HERE / "march.png", dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    import json

    write_up(json.loads((HERE / "results.json").read_text()))
