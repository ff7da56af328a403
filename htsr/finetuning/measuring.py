"""What a run measures of the model before and after training: spectra, how far each matrix has moved, and accuracy.

The model before training is measured after it, too, from where it is stored: it is as it was, and the first step does
not wait. Only a method that needs spectra has them first (`needs_spectra`).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from htsr.analysis.analyze import Progress, analyze
from htsr.analysis.comparing import compare_analyses
from htsr.analysis.comparison import Comparison
from htsr.analysis.result import Analysis
from htsr.calibration.adapted import is_adapter_alone
from htsr.calibration.loading import load_model, resolve
from htsr.calibration.multiple_choice import multiple_choice_accuracy
from htsr.finetuning.placing import how_loaded, load_placed, on_device, whole_on_every_rank
from htsr.finetuning.run_folder import ACCURACY_BEFORE, write_json
from htsr.matrices.sources import Source, open_model
from htsr.ranks import Ranks

if TYPE_CHECKING:
    from htsr.calibration.record_forms import Record
    from htsr.finetuning.progress import Voice
    from htsr.finetuning.recipe import Recipe

_EXACT = {"float32": ("float32", "bfloat16", "float16"), "bfloat16": ("bfloat16",), "float16": ("float16",)}
_WHICH = {"before": "untrained", "after": "trained"}  # both are measured when training has ended, as a rule


def needs_spectra(recipe: Recipe) -> bool:
    """Whether the method of a `recipe` asks for the spectra of the model before it trains."""
    return recipe.strategy in ("alpha", "erg", "snr") or (recipe.lora is not None and recipe.lora.score is not None)


def spectra_before(
    recipe: Recipe, source: Source, revision: str | None, output: Path, ranks: Ranks, voice: Voice
) -> Analysis:
    """The analysis of the model before training, from its file in `output` where it is there.

    Args:
        recipe: recipe of the run.
        source: the model, as it was loaded or as it is `stored`.
        revision: branch, tag or commit, where the source is a hub id.
        output: folder of the run.
        ranks: processes that share the work.
        voice: voice of the run.
    """
    path = output / "spectra_before.npz"
    kept = ranks.of_first(lambda: Analysis.load(path) if path.exists() else None)
    if kept is not None:
        return kept
    bulk = recipe.strategy == "snr"
    return _analyzed(source, revision, path, recipe.model, ranks, voice, bulk=bulk)


def moved(recipe: Recipe, output: Path, ranks: Ranks, voice: Voice) -> Comparison:
    """The spectra of the model in `output` beside those before, with how far each matrix has moved.

    Args:
        recipe: recipe of the run.
        output: folder of the run.
        ranks: processes that share the work.
        voice: voice of the run.
    """
    source, revision = stored(recipe)
    before = spectra_before(recipe, source, revision, output, ranks, voice)
    path = output / "spectra_after.npz"
    trained, base = str(output), None
    if is_adapter_alone(trained):  # base + ΔW, a matrix at a time
        base = "auto" if isinstance(source, str) else source
    after = _analyzed(trained, None, path, recipe.output, ranks, voice, bulk=before.options.bulk, base=base)
    models = open_model(source, revision=revision), open_model(trained, base=base)
    told = _told(voice, "comparing the weights")
    return compare_analyses(before, after, *models, ranks=ranks, progress=told)


def stored(recipe: Recipe) -> tuple[Source, str | None]:
    """The untrained model of a `recipe` in the recipe's dtype, and its revision: where it is stored.

    Where that is in a wider dtype, or a GGUF file, it is the model, loaded into host memory.
    """
    path, exact = resolve(recipe.model), _EXACT.get(recipe.dtype)
    if not path.endswith(".gguf"):
        model = open_model(path, revision=recipe.revision)
        if exact is None or all(matrix.dtype in exact for matrix in model):
            return path, recipe.revision
    with whole_on_every_rank():
        return load_model(recipe.model, revision=recipe.revision, **how_loaded(recipe) | {"four_bit": False}), None


def _analyzed(
    source: Source,
    revision: str | None,
    path: Path,
    label: str,
    ranks: Ranks,
    voice: Voice,
    *,
    bulk: bool,
    base: Source | None = None,
) -> Analysis:
    when = path.stem.removeprefix("spectra_")
    voice.say(f"analyzing the spectra of the {_WHICH[when]} model")
    found = analyze(source, revision=revision, base=base, bulk=bulk, progress=_told(voice, f"spectra {when}"))
    found = replace(found, label=label)
    ranks.of_first(lambda: found.save(path))
    return found


def _told(voice: Voice, what: str) -> Callable[[Progress], None]:
    stage = voice.stage(what, "matrices")
    return lambda now: stage(now.done, now.total, now.fraction)


def accuracies(
    recipe: Recipe, arguments: Any, tokenizer: Any, questions: list[Record], output: Path, ranks: Ranks, voice: Voice
) -> dict[str, Any]:
    """Accuracy of the model as it is stored, its keys beginning with ``before_``, and of the trained one in `output`.

    Args:
        recipe: recipe of the run.
        arguments: arguments of TRL.
        tokenizer: tokenizer of the model.
        questions: multiple-choice records; where there are none, nothing is found.
        output: folder of the run, in which ``accuracy_before.json`` is kept.
        ranks: processes that share the questions.
        voice: voice of the run.
    """
    if not questions:
        return {}

    def asked(name: str, revision: str | None, when: str) -> dict[str, Any]:
        voice.say(f"asking the {_WHICH[when]} model the questions")
        stage = voice.stage(f"questions {when} training", "answers")
        streamed = recipe.frozen_weights != "device"
        model = load_placed(arguments, name, streamed=streamed, revision=revision, **how_loaded(recipe))
        with on_device(model, arguments.device):
            return asdict(multiple_choice_accuracy(model, tokenizer, questions, progress=stage))

    path = output / ACCURACY_BEFORE
    before = ranks.of_first(lambda: dict(json.loads(path.read_text())) if path.exists() else None)
    if before is None:
        found = before = asked(recipe.model, recipe.revision, "before")
        ranks.of_first(lambda: write_json(path, found))
    return {f"before_{key}": value for key, value in before.items()} | asked(str(output), None, "after")
