"""What a recipe's method adds to the model before training: adapters, and the sampler of blocks with its scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from htsr.analysis.result import Analysis
from htsr.arrays import Vector
from htsr.calibration.outlier_scores import measure_outliers
from htsr.calibration.outliers import Outliers
from htsr.calibration.records import Record, text_of
from htsr.errors import SourceError, UsageError
from htsr.finetuning.adapters import adapter_config
from htsr.finetuning.placing import on_device
from htsr.finetuning.starts import START, Start, begun, changes_weights, made_start, start_of
from htsr.matrices.blocks import find_blocks
from htsr.ranks import Ranks
from htsr.training.sampling.members import freeze_embedding
from htsr.training.sampling.probabilities import block_probabilities
from htsr.training.sampling.sampler import LayerSampler
from htsr.training.streaming.streaming import stream_frozen

if TYPE_CHECKING:
    import torch

    from htsr.finetuning.progress import Voice
    from htsr.finetuning.recipe import Recipe


def prepare(
    recipe: Recipe,
    model: torch.nn.Module,
    tokenizer: Any,
    train: Sequence[Record],
    before: Analysis | None,
    output: Path,
    voice: Voice,
    arguments: Any,
) -> tuple[torch.nn.Module, LayerSampler | None, Vector | None]:
    """The model with its adapters, and as the recipe's method has them, or None: sampler, and weights of the blocks.

    The weights, (L,) with the sum 1, are those of the draws of gum.

    Where frozen blocks live in host memory, they are streamed to the device from then on.

    Args:
        recipe: recipe, of which method, frozen_weights, lora, sampling, seed and max_length are read.
        model: model, not yet wrapped.
        tokenizer: tokenizer of the model.
        train: training records, on which outliers or the start of adapters are measured where the method asks for them.
        before: analysis of the model, for what depends on spectra.
        output: folder in which ``outliers.json`` and the start of adapters are kept.
        voice: voice of the run.
        arguments: arguments of TRL; on their device outliers are measured, and the model trains.

    Raises:
        UsageError: the recipe needs spectra and has none, or adapters cannot begin as it says.
    """
    device, given, strategy = arguments.device, recipe.sampling, recipe.strategy
    scores: Outliers | Analysis | None = None
    if strategy in ("owlore", "reverse"):
        scores = _outliers(recipe, model, tokenizer, train, output / "outliers.json", voice, device)
    elif strategy in ("alpha", "erg", "snr"):
        if before is None:
            raise UsageError(f"the strategy {strategy} needs spectra: true")
        scores = before
    if recipe.lora is not None:
        model = _with_adapters(recipe, model, tokenizer, train, before, output, voice, arguments)
    weights = None
    if recipe.gum is not None and strategy is not None:
        weights = block_probabilities(strategy, find_blocks(model), scores, recipe.gum.threshold)
    if given is None or strategy is None:
        if recipe.embedding == "freeze":
            freeze_embedding(model)
        return model, None, weights
    sampler = LayerSampler(
        model,
        strategy,
        scores=scores,
        unit=given.unit,
        active=given.active,
        interval=given.interval,
        top=given.top,
        embedding=given.embedding,
        frozen_state=given.frozen_state,
        seed=recipe.seed,
        threshold=given.threshold,
    )
    if recipe.frozen_weights != "device":
        streaming = stream_frozen(model, sampler, device=device, where=recipe.frozen_weights)
        place = "on disk" if recipe.frozen_weights == "disk" else "in host memory"
        here = f"visit {device} to compute" if device.type != "cpu" else "compute on the CPU, where that saves nothing"
        voice.say(f"frozen_weights: {len(streaming.streamed)} blocks live {place} and {here}")
    return model, sampler, None


def _outliers(
    recipe: Recipe,
    model: torch.nn.Module,
    tokenizer: Any,
    train: Sequence[Record],
    path: Path,
    voice: Voice,
    device: torch.device,
) -> Outliers:
    """Outliers from the recipe's file, from the run's own when resuming, or measured by the first process for all."""
    given = recipe.draws
    assert given is not None
    if given.outliers:
        return Outliers.load(given.outliers)

    def measured() -> Outliers:
        if path.exists():
            return Outliers.load(path)
        voice.say("measuring outliers on the training data")
        stage = voice.stage("outliers", "records")
        texts = [text_of(record, tokenizer) for record in train[: given.calibration_samples]]
        length = recipe.training.get("max_length") or 512
        thresholds = sorted({3.0, 5.0, 7.0, 10.0, given.threshold})
        with on_device(model, device):
            found = measure_outliers(model, tokenizer, texts, thresholds=thresholds, length=length, progress=stage)
        found = replace(found, label=recipe.model)
        found.save(path)
        return found

    return Ranks.running().of_first(measured)


def _with_adapters(
    recipe: Recipe,
    model: torch.nn.Module,
    tokenizer: Any,
    train: Sequence[Record],
    before: Analysis | None,
    output: Path,
    voice: Voice,
    arguments: Any,
) -> Any:
    from peft import get_peft_model

    assert recipe.lora is not None
    config = adapter_config(recipe.lora, model, before)
    start = start_of(recipe.lora)
    if start is None:
        return get_peft_model(model, config)  # type: ignore[arg-type]
    path = output / START

    def made() -> Start:
        if path.exists():
            return Start.load(path)
        if any(output.glob("checkpoint-*")):
            raise SourceError(f"{path} is not there, without which the run cannot go on as it was")
        voice.say(f"beginning the adapters by {start}")
        found = made_start(recipe, model, config, tokenizer, train, arguments)
        found.save(path)
        return found

    changed = changes_weights(start) and recipe.method == "lora"  # 4 bits stay as they are, and the start fits them
    adapted = begun(model, config, Ranks.running().of_first(made), changed=changed)
    if changes_weights(start):  # a checkpoint's adapter alone would be wrong with the model as it is stored
        adapted.peft_config["default"].base_model_name_or_path = f"{recipe.model} without {path}"
    return adapted
