"""The page of reports/gpu, from what was measured and what is predicted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from reports import common
from reports.gpu import floor
from reports.gpu.shapes import SHAPES

H100 = {"flops_per_second": 67e12, "bytes_per_second": 3.35e12, "of": "an H100's data sheet"}
TITLES = {
    "tests": "The same numbers as on the CPU",
    "analysis": "Analysis of LLaMA-2-7B's shapes",
    "layerwise": "Layerwise learning rates",
    "methods": "A training step by method",
    "hosts": "Host time of the optimizers",
    "rounding": "Narrow weights",
}


def write_up(results: dict[str, Any], predicted: dict[str, Any], folder: Path) -> None:
    """README.md: one section per stage that ran; predictions stand there all the same."""
    results = {"analysis": {"rows": []}, "methods": {"rows": []}} | results
    text = "# On an accelerator\n\n`python -m reports.gpu` makes this page"
    if "device" not in results:
        text += (
            ". **Nothing here is measured yet: no card was at hand.** What stands below is predicted. The command runs on a "
            "machine with a GPU where nothing can be downloaded, takes at most eight minutes, and keeps every row as it "
            "comes; `--dry` runs the same code in miniature on the pretended device of the tests, in CI too.\n"
        )
    else:
        device = results["device"]
        text += f": {device['name']}, {device.get('memory_gib', '?')} GiB. {common.facts(results['machine'])}\n"
    for stage, title in TITLES.items():
        if stage in results:
            found = results[stage]
            section = methods(found["rows"], predicted) if stage == "methods" else SECTIONS[stage](found["rows"])
            text += f"\n## {title}\n\n{section}"
            cut = [row["failed"] for row in found["rows"] if "failed" in row and len(row) == 1]
            if cut := cut + [found[key] for key in ("said",) if key in found]:
                text += f"\nCut short: {' '.join(cut)}\n"
    (folder / "README.md").write_text(text)


def tests(rows: list[dict[str, Any]]) -> str:
    """Counts, and what did not pass."""
    text = ""
    for row in rows:
        if "counts" in row:
            text += ", ".join(f"{number} {outcome}" for outcome, number in row["counts"].items()) + ". "
            text += "Cut short by its time. " * row["cut_short"]
        elif row.get("outcome") == "missing":
            text += "There are no device tests. "
    return text + "\n\n" + "".join(f"- {row['said']}\n" for row in rows if "said" in row)


def analysis(rows: list[dict[str, Any]]) -> str:
    """The whole model by route, one matrix by part, several at a time."""
    base = next((r["seconds"] for r in rows if r.get("what") == "svdvals" and r.get("role") == "all"), None)
    cells = [["`torch.linalg.svdvals` as WeightWatcher calls it, one of each shape", base, "", ""]] if base else []
    for row in rows:
        if row.get("what") == "whole" and "seconds" in row:
            name = row["route"] + (f" (from {row['measured']} matrices)" if row["estimated"] else "")
            cells.append([name, row["seconds"], base / row["seconds"] if base else "", row.get("beyond_model_mib", "")])
    text = ""
    if cells:
        text += "Seconds for the default metrics of all matrices of the blocks, bfloat16, which lie on the device.\n\n"
        text += common.table(["route", "seconds", "× faster", "MiB beyond the model"], cells)
    text += floors(rows)
    part = [r for r in rows if r.get("what") == "parts" and "gram" in r]
    if part:
        text += "\nSeconds of one matrix: torch's product and solver alone, `htsr.esd`, `htsr.analyze`.\n\n"
        keys = ("role", "dtype", "gram", "eigenvalues", "esd", "analyze", "peak_mib")
        head = ["matrices", "precision", "Gram product", "eigenvalues", "esd", "analyze", "peak MiB"]
        text += common.table(head, [[r[k] for k in keys] for r in part])
    several = [r for r in rows if r.get("what") == "several" and "seconds" in r]
    if several:
        text += "\nAn experiment: eight float64 Gram matrices of one side.\n\n"
        text += common.table(["how", "side", "seconds"], [[r["how"], r["side"], r["seconds"]] for r in several])
    return text + failures(rows)


def floors(rows: list[dict[str, Any]]) -> str:
    """The least that this card needs by stage, beside what was measured of one matrix times their number."""
    card = next((r for r in rows if r.get("what") == "ceilings" and "flops_per_second" in r), H100)
    shapes = list(SHAPES.values())
    text = f"\nThe floor, stage by stage, at {card['flops_per_second'] / 1e12:.3g} Tflop/s in float64 and {card['bytes_per_second'] / 1e12:.3g} TB/s ({card.get('of', 'measured on this card')}):\n\n"
    measured = {
        name: sum(
            r["count"] * r[key] for r in rows if r.get("what") == "parts" and r.get("dtype") == "float64" and key in r
        )
        for name, key in (("Gram product", "gram"), ("reduction to three diagonals", "eigenvalues"))
    }
    cells = [
        [
            stage.name,
            stage.flops,
            stage.bytes,
            stage.seconds(card["flops_per_second"], card["bytes_per_second"]),
            measured.get(stage.name) or "",
        ]
        for stage in floor.model(shapes, [floor.exact(m, n) for m, n, _ in shapes])
    ]
    return text + common.table(
        ["stage of all 224 matrices", "operations", "bytes", "least seconds", "torch alone, seconds"], cells
    )


def layerwise(rows: list[dict[str, Any]]) -> str:
    """Milliseconds by model."""
    keys = ("forward_backward_ms", "plain_ms", "layerwise_ms", "first_step_with_event_ms", "groups")
    head = [
        "model",
        "forward and backward, ms",
        "plain step, ms",
        "layerwise step, ms",
        "first step with its event, ms",
        "groups",
    ]
    text = "Float32 weights, bfloat16 autocast, 8 × 512 tokens, fused AdamW.\n\n"
    return (
        text
        + common.table(head, [[r["model"], *(r.get(k, "") for k in keys)] for r in rows if "model" in r])
        + failures(rows)
    )


def methods(rows: list[dict[str, Any]], predictions: dict[str, Any]) -> str:
    """Step and peak beside the predictions."""
    measured = {row["arm"]: row for row in rows if "arm" in row}
    cells = []
    for arm, predicted in predictions.items():
        row = measured.get(arm, {})
        off = (
            f"{100 * (row['peak_gib'] / predicted - 1):+.1f} %"
            if "peak_gib" in row and isinstance(predicted, float)
            else ""
        )
        cells.append(
            [
                arm,
                predicted,
                row.get("peak_gib", ""),
                off,
                row.get("step_ms", ""),
                row.get("first_ms", ""),
                row.get("tokens_per_second", ""),
            ]
        )
    head = ["method", "predicted GiB", "measured GiB", "off", "ms a step", "ms of the first", "tokens/s"]
    text = "LLaMA-2-7B's shapes in bfloat16, checkpointing, 1 × 1024 tokens; OwLore and LISA with two active blocks, ranks of 128, LoRA's of 16. The peak is that of tensors; a CUDA context comes on top.\n\n"
    return text + common.table(head, cells) + failures(rows)


def hosts(rows: list[dict[str, Any]]) -> str:
    """Milliseconds and ratios."""
    keys = ("ms", "of AdamW foreach", "of AdamW fused", "groups")
    text = "Least milliseconds until `step` returns, 272 tiny tensors.\n\n"
    return (
        text
        + common.table(["optimizer", *keys], [[r["arm"], *(r.get(k, "") for k in keys)] for r in rows if "ms" in r])
        + failures(rows)
    )


def rounding(rows: list[dict[str, Any]]) -> str:
    """What did not move, and at what cost."""
    keys = ("still", "loss", "step_ms", "peak_gib")
    text = "A LLaMA of 60M parameters, 40 steps at a learning rate of 2e-5 on a chain of words.\n\n"
    head = ["weights", "entries that never moved", "loss at the end", "ms a step", "peak GiB"]
    return (
        text
        + common.table(head, [[r["arm"], *(r.get(k, "") for k in keys)] for r in rows if "still" in r])
        + failures(rows)
    )


def failures(rows: list[dict[str, Any]]) -> str:
    """What said that it failed."""
    found = [
        f"- {row.get('arm') or row.get('what') or row.get('model')}: {row['failed']}\n"
        for row in rows
        if "failed" in row and len(row) > 1
    ]
    return "\nIt failed:\n\n" + "".join(found) if found else ""


SECTIONS = {
    "tests": tests,
    "analysis": analysis,
    "layerwise": layerwise,
    "hosts": hosts,
    "rounding": rounding,
}
