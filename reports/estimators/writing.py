"""README.md and the figure of the estimators' study, from results.json."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from reports import common
from reports.estimators.__main__ import MATRIX_HEAD, matrix_row

HERE = Path(__file__).parent
Row = dict[str, Any]


def numbers(row: Row) -> list[str]:
    """Bias, spread, stated σ, coverage and false alarms of a line."""
    return [
        f"{row['bias']:+.2f}", f"{row['sd']:.2f}", f"{row['sigma']:.2f}", f"{row['coverage']:.0%}",
        f"{row['false_alarms']:.0%}", str(int(row["tail"])),
    ]  # fmt: skip


NUMBERS = ["bias", "sd", "stated σ", "coverage", "false alarms", "tail found"]


def difference_table(rows: list[Row]) -> str:
    """Smallest difference that a test at 5 % finds with a power of 80 %, by true exponent and shape."""
    chosen = [r for r in rows if r["ensemble"] == "power-law population"]
    cases = sorted({(r["truth"], r["M"], r["Q"]) for r in chosen})
    methods = list(dict.fromkeys(r["method"] for r in chosen))
    by_key = {(r["truth"], r["M"], r["Q"], r["method"]): r for r in chosen}
    lines = [
        [f"{alpha:g}", f"{Q * M}×{M}", *(f"{by_key[alpha, M, Q, m]['detectable']:.2f}" for m in methods)]
        for alpha, M, Q in cases
    ]
    return common.table(["true α", "N×M", *methods], lines)


def separation_table(rows: list[Row]) -> str:
    """How many standard deviations two exponents are apart, M = 256."""
    chosen = [r for r in rows if r["ensemble"] == "power-law population" and r["M"] == 256]
    methods = list(dict.fromkeys(r["method"] for r in chosen))
    by_key = {(r["truth"], r["Q"], r["method"]): r for r in chosen}

    def apart(low: Row, high: Row) -> str:
        difference = high["truth"] + high["bias"] - low["truth"] - low["bias"]
        return f"{difference / ((low['sd'] ** 2 + high['sd'] ** 2) / 2) ** 0.5:.1f}"

    lines = [
        [f"{a:g} and {b:g}", Q, *(apart(by_key[a, Q, m], by_key[b, Q, m]) for m in methods)]
        for Q in (1, 4)
        for a, b in ((2.0, 3.0), (3.0, 5.0))
    ]
    return common.table(["true α", "Q", *methods], lines)


def shape_table(rows: list[Row]) -> str:
    """Mean α found at a true α of 3, by aspect."""
    chosen = [r for r in rows if r["ensemble"] == "power-law population" and r["truth"] == 3.0 and r["M"] == 256]
    methods = list(dict.fromkeys(r["method"] for r in chosen))
    shapes = sorted({r["Q"] for r in chosen})
    by_key = {(r["Q"], r["method"]): r for r in chosen}
    lines = [
        [m, *(f"{by_key[Q, m]['truth'] + by_key[Q, m]['bias']:.2f}±{by_key[Q, m]['sd']:.2f}" for Q in shapes)]
        for m in methods
    ]
    return common.table(["estimator", *(f"Q = {Q}" for Q in shapes)], lines)


def write_up(results: dict[str, Any]) -> None:
    """README.md and estimators.png."""
    plot(results)
    pure = [[r["size"], f"{r['truth']:g}", r["method"], *numbers(r)] for r in results["pure"]]
    pure = [line for line in pure if line[1] == "3"]
    mixed = [[f"{r['true_tail']} of 400", f"{r['truth']:g}", r["method"], *numbers(r)] for r in results["contaminated"]]
    ensembles = [matrix_row(r) for r in results["matrices"]]
    resampled = [
        [r["source"], r["size"], r["method"], f"{r['holds_truth']:.0%}", f"{r['holds_mean']:.0%}", f"{r['width']:.2f}",
         f"{r['needed']:.2f}"]
        for r in results["bootstrap"]
    ]  # fmt: skip
    text = f"""# α as an estimator

`python -m reports.estimators` makes this page ({results["cpu_minutes"]:.1f} minutes of processor time).
{common.facts(results["machine"])}

Spectra with a known exponent are drawn again and again and fitted by every method of htsr. **bias** is mean α minus the
true one, **sd** the spread of α from draw to draw, **stated σ** the median of (α-1)/√n that the fit reports,
**coverage** how often α ± 1.96 σ holds the true α (95 % is right), **false alarms** how often two draws of the *same*
law differ by more than 1.96·√(σ₁²+σ₂²) (5 % is right), **tail found** the median number of eigenvalues in the tail.

{(HERE / "recommendations.md").read_text()}
## Telling exponents apart

Difference of the mean α of two exponents, in units of their spread (root mean square of both sds): what counts when
layers of one shape are compared. M = 256, power-law population.

{separation_table(results["matrices"])}
## What a difference in α has to be

Smallest true difference between two layers of that shape and exponent that is found in 80 % of cases by a test that
cries wolf in 5 %: 2.8·√2·sd, with the sd of the power-law population below. This is from independent matrices; the
difference between two checkpoints of one training run can be smaller and real.

{difference_table(results["matrices"])}
![estimators](estimators.png)

## Matrices: eigenvalues repel

"Power-law population": N×M Gaussian, variances of the M columns from a power law of that α; the eigenvalues of WᵀW have
that exponent in their tail, but the finite N smears them, the more the nearer Q = N/M is to 1. "Heavy entries":
independent Student-t entries with ν = 2(α-1) degrees of freedom, whose largest eigenvalues are the squares of single
entries; for ν > 2 (α > 2) they sit on a Marchenko-Pastur bulk and are few.

{common.table(MATRIX_HEAD, ensembles)}
## Shape

Mean α ± sd at a true α of 3, M = 256, by aspect ratio.

{shape_table(results["matrices"])}
## Nothing but tail: independent draws of a pure power law, α = 3

{common.table(["eigenvalues", "α", "estimator", *NUMBERS], pure)}
## A tail on a bulk

400 values, of which a power-law tail above 1 and a Marchenko-Pastur bulk (Q = 2) that ends at 1.

{common.table(["true tail", "α", "estimator", *NUMBERS], mixed)}
## Bootstrap intervals

95 % intervals from 100 resamples (`htsr analyze --bootstrap`), true α = 3: how often they hold the true exponent, how often
the mean α of the same fit over all draws (an interval cannot know the fit's bias), their median width, and the width that
would do (2·1.96·sd).

{common.table(["spectrum", "size", "estimator", "holds true α", "holds mean α", "width", "width needed"], resampled)}"""
    (HERE / "README.md").write_text(text)


def plot(results: dict[str, Any]) -> None:
    """Spread against stated σ, and bias against the share of the true tail."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4.4), layout="constrained")
    methods = list(dict.fromkeys(r["method"] for r in results["matrices"]))
    colours = {m: f"C{i}" for i, m in enumerate(methods)}
    for kind, marker in (("pure", "o"), ("contaminated", "s"), ("matrices", "^")):
        for r in results[kind]:
            axes[0].loglog(r["sigma"], r["sd"], marker, color=colours[r["method"]], ms=4, alpha=0.6)
    ends = [0.02, 3.0]
    axes[0].plot(ends, ends, "k-", lw=0.7)
    axes[0].set(
        xlabel="stated σ",
        ylabel="sd of α over draws",
        title="○ pure  □ on a bulk  △ matrices",
        xlim=(0.015, 3),
        ylim=(0.015, 12),
    )
    for method in methods:
        axes[0].plot([], [], "o", color=colours[method], label=method)
    axes[0].legend(frameon=False, fontsize=8)
    for method in dict.fromkeys(r["method"] for r in results["contaminated"]):
        rows = [r for r in results["contaminated"] if r["method"] == method and r["truth"] == 3.0]
        axes[1].errorbar(
            [100 * r["share"] for r in rows], [r["truth"] + r["bias"] for r in rows], [r["sd"] for r in rows],
            fmt="o-", capsize=2, color=colours[method], label=method,
        )  # fmt: skip
    axes[1].axhline(3, color="k", lw=0.7)
    axes[1].set(
        xlabel="true tail, % of the eigenvalues",
        ylabel="α found (mean ± sd)",
        title="a tail of α = 3 on a bulk",
        ylim=(1, 6),
    )
    axes[1].legend(frameon=False, fontsize=8)
    figure.savefig(HERE / "estimators.png", dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    import json

    write_up(json.loads((HERE / "results.json").read_text()))
