"""The page and its figure, from the parts that are there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from reports import common


def write_up(results: dict[str, Any], folder: Path) -> None:
    """README.md and the figure in `folder`, from each part's machine and what it found."""
    sections = [
        "# Speed and memory of the analyzer\n",
        f"`python -m reports.analyze_speed` makes this page. {_machines(results)}\n",
    ]
    found = {name: part["found"] for name, part in results.items()}
    for needed, write in SECTIONS:
        if any(name in found for name in needed):
            sections.append(write(found))
    if "growth" in found:
        plot(found["growth"], folder)
    (folder / "README.md").write_text("\n".join(sections))


def _machines(results: dict[str, Any]) -> str:
    """One line; or, where parts were run elsewhere or with other versions, one for each."""
    lines: dict[str, list[str]] = {}
    for name, part in results.items():
        lines.setdefault(common.facts(part["machine"]), []).append(name)
    if len(lines) == 1:
        return next(iter(lines))
    return "Its parts were not all run at once.\n\n" + "\n".join(
        f"- {', '.join(names)}: {line}" for line, names in lines.items()
    )


def _beside(found: dict[str, Any]) -> str:
    rows = []
    for pair in (pair for name in ("causal", "encoder", "erg") for pair in found.get(name, ())):
        a, b = pair["htsr"], pair["weightwatcher"]
        rows += [
            [
                pair["name"],
                pair["model"],
                "analysis",
                b["analysis"],
                a["analysis"],
                _ratio(b["analysis"], a["analysis"]),
            ],
            ["", "", "whole process", b["process"], a["process"], _ratio(b["process"], a["process"])],
            [
                "",
                "",
                "peak memory, MiB",
                round(b["peak_mib"]),
                round(a["peak_mib"]),
                _ratio(b["peak_mib"], a["peak_mib"], bold=False),
            ],
        ]
    return f"""## Beside WeightWatcher

Medians of three runs, the tools alternating, each in its own process on the same files; seconds unless said otherwise.
The causal LM is SmolLM2-135M (211 matrices), the encoder all-MiniLM-L6-v2 (40 matrices, embeddings included). htsr runs
as it does by default, shape null included. `--full` adds permuted weights, the bulk and alternatives to the power law,
and stands beside WeightWatcher's ERG, randomize and mp_fit.

{common.table(["metrics", "model", "", "WeightWatcher", "htsr", "ratio"], rows)}"""


def _billion(found: dict[str, Any]) -> str:
    big = found["billion"]
    other = big["weightwatcher"]
    rows = [["WeightWatcher", other["process"], round(other["peak_mib"]), "", ""]]
    for name in ("htsr", "float32"):
        if numbers := big.get(name):
            ratios = (_ratio(other[key], numbers[key], bold=key == "process") for key in ("process", "peak_mib"))
            label = "htsr, float64" if name == "htsr" else "htsr, float32"
            rows.append([label, numbers["process"], round(numbers["peak_mib"]), *ratios])
    return f"""## A large checkpoint

A LLaMA-shaped checkpoint of 1.1 billion float32 weights with heavy-tailed spectra, default metrics, once each. Of htsr's
memory {big["imports_mib"]:.0f} MiB are imports.

{common.table(["", "whole process, s", "peak memory, MiB", "ratio of times", "ratio of memory"], rows)}"""


def _null(found: dict[str, Any]) -> str:
    labels = {
        "none": "without the null (`--no-null`)",
        "drawn": "drawn: a shape that was never met",
        "file": "from the cache file of an earlier run",
        "table": "from the package's table (the default)",
    }
    rows = [
        [label, *(part[name][key] for part in found["null"] for key in ("analysis", "processor"))]
        for name, label in labels.items()
    ]
    heads = [f"{part['model']}, {what}" for part in found["null"] for what in ("analysis", "processor")]
    return f"""## The shape null

Seconds of the analysis, and processor seconds of the whole process, medians. The [table](../shape_null/README.md) holds
all shapes of both models; for the two arms in the middle it is put aside.

{common.table(["default metrics", *heads], rows)}"""


def _precision(found: dict[str, Any]) -> str:
    rows = [
        [
            part["model"],
            *(part[dtype][key] for key in ("analysis", "processor") for dtype in ("float64", "float32")),
            _ratio(part["float64"]["analysis"], part["float32"]["analysis"]),
            f"{part['off']:.1e}",
        ]
        for part in found["precision"]
    ]
    heads = [f"{key}, {dtype}" for key in ("analysis", "processor") for dtype in ("float64", "float32")]
    return f"""## Precision

Seconds on one thread, medians, default metrics without the null; "difference" is the largest relative one of an α.

{common.table(["model", *heads, "ratio of analyses", "difference"], rows)}"""


def _resampling(found: dict[str, Any]) -> str:
    base = found["resampling"][0]["processor"]
    rows = [[r["name"], r["analysis"], r["processor"], r["processor"] - base] for r in found["resampling"]]
    return f"""## Resampling

Seconds on one thread, the encoder, medians; "more" is what the option adds to the processor's time.

{common.table(["metrics", "analysis", "processor", "more"], rows)}"""


def _stages(found: dict[str, Any]) -> str:
    names = list(found["stages"]["causal"])
    rows = [[name, *(found["stages"][model].get(name, 0.0) for model in ("causal", "encoder"))] for name in names]
    return f"""## Where the time goes

Processor seconds on one thread with ERG, permuted weights and the Marchenko-Pastur bulk.

{common.table(["stage", "causal LM", "encoder"], rows)}
What made it fast: the Gram matrix of the smaller side in place of an SVD of W; its product as a symmetric update (half
the flops of a general one); in float32 LAPACK's reduction called directly, since NumPy's solver computes in float64
whatever it is given; small matrices side by side, one BLAS thread each, large ones with all threads; all tails of a scan
in a few array operations; other laws by maximum likelihood of our own; the bulk fitted to quantiles rather than to a
smoothed density; the null of common shapes in a table; entries shuffled as float64, whose items NumPy swaps fastest;
torch not even imported where no tensor needs it. Tried and left: LAPACK's two-stage reduction (slower below n = 2048, 1.7
times faster at 4096, where torch's MKL does the same); a hashed permutation in place of a shuffled one (four times
faster, but it leaves structure behind that shows as false correlation traps).
"""


def _growth(found: dict[str, Any]) -> str:
    rows = [
        [int(g["n"]), g["gram_float64"], g["float64"], g["float32"], g.get("svd", ""), g["lanczos"], g["fit"],
         gflops(g["n"], g["float64"]), g["lanczos_error"], g["lanczos_alpha_error"]]
        for g in found["growth"]
    ]  # fmt: skip
    overtaken = next((int(g["n"]) for g in found["growth"] if g["lanczos"] < g["float64"]), None)
    heads = [
        "n",
        "Gram float64",
        "exact float64",
        "exact float32",
        "SVD",
        "Lanczos",
        "KS fit",
        "GFLOP/s",
        "stated error",
        "Δα (hill)",
    ]
    return f"""## How the cost grows

One n × n matrix, all threads. The exact routes are O(n³): GFLOP/s counts n³ for the symmetric product and 4/3 n³ for the
reduction to tridiagonal form. Lanczos (128 steps, 8 probes) is O(n²) and overtakes float64 at n = {overtaken}; what it
gives up is in the last columns: the standard error of the distribution function that it states, and how far its Hill α is
from the exact one.

{common.table(heads, rows)}
![growth](growth.png)
"""


SECTIONS: tuple[tuple[tuple[str, ...], Callable[[dict[str, Any]], str]], ...] = (
    (("causal", "encoder", "erg"), _beside),
    (("billion",), _billion),
    (("null",), _null),
    (("precision",), _precision),
    (("resampling",), _resampling),
    (("stages",), _stages),
    (("growth",), _growth),
)


def gflops(n: float, seconds: float) -> float:
    """Rate of the exact route."""
    return (1 + 4 / 3) * n**3 / seconds / 1e9


def plot(rows: list[dict[str, float]], folder: Path) -> None:
    """Seconds against n, log-log, with the cubic flop count."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    n = [g["n"] for g in rows]
    figure, ax = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
    for key, label in (
        ("float64", "exact, float64"),
        ("float32", "exact, float32"),
        ("lanczos", "Lanczos 128 × 8"),
        ("fit", "KS fit"),
    ):
        ax.loglog(n, [g[key] for g in rows], "o-", label=label)
    ax.loglog(n, [rows[-1]["float64"] * (x / n[-1]) ** 3 for x in n], "k:", lw=1, label="n³")
    ax.set(xlabel="n", ylabel="seconds", xticks=n, xticklabels=[str(int(x)) for x in n])
    ax.minorticks_off()
    ax.legend(frameon=False)
    figure.savefig(folder / "growth.png", dpi=130)


def _ratio(theirs: float, ours: float, bold: bool = True) -> str:
    text = f"{theirs / ours:.1f}×"
    return f"**{text}**" if bold else text
