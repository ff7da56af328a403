"""The model card of a fine-tuned model."""

from __future__ import annotations

import importlib.metadata
import json
from typing import TYPE_CHECKING, Any

from htsr.reporting.formats import as_markdown
from htsr.results import Column, Table

if TYPE_CHECKING:
    from htsr.analysis.comparison import Comparison
    from htsr.finetuning.recipe import Recipe
    from htsr.finetuning.result import Result

_METHODS = {
    "full": "full fine-tuning",
    "lora": "LoRA on all linear layers of the blocks",
    "qlora": "LoRA on all linear layers of the blocks, over weights in 4 bits, merged into those in full precision",
    "lisa": "layer sampling (LISA): a few blocks train at a time",
    "owlore": "outlier-weighted layer sampling with low-rank optimizer state (OwLore)",
    "galore": "low-rank optimizer state (GaLore)",
    "apollo": "learning rates by channel or matrix from a random projection (APOLLO)",
    "gum": "low-rank optimizer state, and some blocks outside of it (GUM)",
}
_SHOWN = ("alpha", "trace_log", "stable_rank", "log_norm", "log_spectral_norm")


def model_card(recipe: Recipe, result: Result, comparison: Comparison | None) -> str:
    """Markdown with the hub's header: what it was trained from, on what, how, with which seed, and what came of it.

    Args:
        recipe: recipe of the run.
        result: result of the run.
        comparison: spectra before and after training; None where they were not measured.
    """
    library = "transformers" if recipe.lora is None or recipe.lora.merge else "peft"
    front = ["---", f"library_name: {library}", "tags:", "- htsr", f"- {recipe.method}"]
    if "/" in recipe.model and not recipe.model.startswith(("/", ".", "package:")):
        front.append(f"base_model: {recipe.model}")
    rates = recipe.layerwise if isinstance(recipe.layerwise, str) else f"`{json.dumps(dict(recipe.layerwise))}`"
    layerwise = "" if rates == "none" else f", layerwise learning rates by {rates}"
    sources = ", ".join(f"`{source.source}`" for source in recipe.data.sources("train"))
    metrics = [row for row in result.tables()[0].rows if row != ("model", result.output)]
    parts = [
        "\n".join([*front, "---"]),
        f"# {recipe.output.rstrip('/').rsplit('/', 1)[-1]}",
        f"Fine-tuned from `{recipe.model}` on {sources} by {_METHODS[recipe.method]}{layerwise}. "
        f"The seed of everything random, data order, draws and adapters, is {recipe.seed}.",
        "## Results\n\n" + _table(["metric", "value"], metrics),
        "## Settings\n\n" + _table(["key", "value"], _settings(recipe)),
    ]
    if result.coverage:
        rows = [(c.name, f"{c.probability:.4f}", c.intervals, f"{c.expected:.1f}") for c in result.coverage]
        parts.append("## Blocks\n\n" + _table(["block", "probability", "intervals trained", "expected"], rows))
    if comparison is not None:
        found = comparison.summary()
        spectra = [(name, *map(_number, found[name])) for name in _SHOWN if name in found]
        parts.append(
            "## Spectra\n\nMeans over all matrices; `spectra.csv` has them one by one.\n\n"
            + _table(["metric", "before", "after", "change"], spectra)
        )
    versions = [
        f"{name} {importlib.metadata.version(name)}" for name in ("htsr", "torch", "transformers", "trl", "peft")
    ]
    parts.append("Made with " + ", ".join(versions) + ".")
    return "\n\n".join(parts) + "\n"


def _settings(recipe: Recipe) -> list[tuple[str, str]]:
    names = ("low_rank", "gum", "lora", "sampling", "early_stopping")
    sections = [(name, getattr(recipe, name)) for name in names]
    rows: list[tuple[str, str]] = [("dtype", recipe.dtype)]
    if recipe.dtype != "float32":
        rows.append(("rounding", recipe.rounds))
    if recipe.frozen_weights != "device":
        rows.append(("frozen_weights", recipe.frozen_weights))
    rows += [(f"training.{key}", json.dumps(v)) for key, v in recipe.training.items()]
    for name, section in sections:
        if section is not None:
            rows += [(f"{name}.{key}", json.dumps(value)) for key, value in vars(section).items() if value is not None]
    return rows


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _table(head: list[str], rows: list[Any]) -> str:
    return as_markdown(Table(tuple(Column(title, text=True) for title in head), tuple(map(tuple, rows)))).rstrip("\n")
