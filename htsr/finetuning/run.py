"""Fine-tune a causal language model by a recipe: full, (Q)LoRA, LISA, OwLore or GaLore, with spectra before and after.

    accelerate launch -m htsr.finetune --config recipe.yaml
    htsr finetune --config one_cpu

TRL's SFTTrainer does the training: chat templates, packing, evaluation, trackers, checkpoints, FSDP2. A killed run is
taken up with `--resume` from its last checkpoint and ends with the same weights as one that was not. What can be known
before the model is loaded is checked before (`htsr.finetuning.preflight`); the model is saved before it is evaluated.

The folder of the result holds the model as plain transformers loads it (and LoRA's adapter under ``adapter``), a model
card, ``results.json``, the recipe as ``recipe.yaml``, ``spectra_before.npz`` and ``spectra_after.npz`` with their
comparison as ``spectra.csv``, ``outliers.json`` where blocks were drawn by outliers, and the checkpoints.
"""

from __future__ import annotations

import gc
import json
import logging
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from htsr.analysis.analyze import analyze
from htsr.analysis.result import Analysis
from htsr.calibration.loading import resolve
from htsr.calibration.multiple_choice import multiple_choice_accuracy
from htsr.calibration.record_forms import Record, as_dataset
from htsr.finetuning.recipe import Recipe
from htsr.finetuning.result import Result
from htsr.matrices.modules import whole_shape
from htsr.ranks import Ranks, all_launched

if TYPE_CHECKING:
    import torch

    from htsr.finetuning.preflight import Prepared
    from htsr.training.sampling.coverage import Coverage

logger = logging.getLogger(__name__)


def finetune(recipe: Recipe, *, resume: bool = False, say: Callable[[str], None] = logger.info) -> Result:
    """Run a recipe on every process of the launcher (or this one alone).

    Args:
        recipe: recipe, as `htsr.finetuning.reading.read_recipe` returns it.
        resume: whether the run goes on from the last checkpoint in the output folder; where there is none it begins.
        say: function that is told, in one sentence, what happens.

    Returns:
        The `Result`; its times, memory and mean training loss are those of this process. With `resume` and a finished
        run, the result of that run: nothing is trained.

    Raises:
        UsageError: arguments have no meaning, there is nothing to learn from, or the output folder is not empty
            (without `resume`) or holds a run of another recipe (with it).
        SourceError: model, data or checkpoint cannot be had, or do not go together.
        MissingDependencyError: TRL, datasets or another optional package is not installed.
    """
    from transformers import set_seed

    from htsr.finetuning.run_folder import begin_folder, check_output, check_same_run

    output = Path(recipe.output)
    check_output(output, resume)
    if resume:
        check_same_run(recipe, output, say)

    from htsr.finetuning.arguments import training_arguments
    from htsr.finetuning.placing import load_placed, on_device
    from htsr.finetuning.preflight import agree, check_sharding, prepare_data
    from htsr.finetuning.saving import finished_result, write_reports

    with all_launched("htsr finetune"):
        arguments = training_arguments(recipe)  # with them accelerate begins the group
    check_sharding(recipe, arguments)
    ranks = Ranks.launched("htsr finetune")
    finished = ranks.of_first(lambda: finished_result(recipe, output) if resume else None)
    if finished is not None:
        say(f"the run in {output} is finished")
        return finished
    prepared = prepare_data(recipe, arguments, resume, say)
    agree(ranks, recipe, prepared)
    ranks.of_first(lambda: begin_folder(recipe, output, resume))
    set_seed(recipe.seed)
    before, accuracy, metrics, coverage = _train(recipe, arguments, prepared, output, ranks, say)
    gc.collect()  # model, optimizer and trainer hold each other, and the saved model is loaded next
    if prepared.questions:
        trained = load_placed(arguments, str(output), streamed=recipe.frozen_weights != "device", **_how(recipe))
        with on_device(trained, arguments.device):
            found = multiple_choice_accuracy(trained, prepared.tokenizer, prepared.questions)
        metrics |= {f"before_{key}": value for key, value in (accuracy or {}).items()} | asdict(found)
        del trained
    after = _spectra(recipe, str(output), output / "spectra_after.npz", ranks, say)
    result = Result(str(output), metrics, coverage)
    ranks.of_first(lambda: write_reports(recipe, result, output, before, after))
    return result


def _train(
    recipe: Recipe, arguments: Any, prepared: Prepared, output: Path, ranks: Ranks, say: Callable[[str], None]
) -> tuple[Analysis | None, dict[str, Any] | None, dict[str, Any], tuple[Coverage, ...]]:
    """Spectra and accuracy before, metrics, and coverage of a training whose model is saved and let go."""
    from htsr.finetuning.labels import insist_on_labels
    from htsr.finetuning.methods import prepare
    from htsr.finetuning.placing import load_placed, on_device
    from htsr.finetuning.saving import save_model
    from htsr.finetuning.trainer import FinetuneTrainer

    train, held_out, checkpoint = prepared.train, prepared.held_out, prepared.checkpoint
    streamed = recipe.frozen_weights != "device"
    model = load_placed(arguments, recipe.model, streamed=streamed, revision=recipe.revision, **_how(recipe))
    # adapters are merged into the weights as they are stored
    whole = resolve(recipe.model) if recipe.method == "qlora" else model
    before = _spectra(recipe, whole, output / "spectra_before.npz", ranks, say)
    with on_device(model, arguments.device):
        accuracy = _accuracy(model, prepared.tokenizer, prepared.questions, output / "accuracy_before.json", ranks, say)
    model, sampler = prepare(recipe, model, prepared.tokenizer, train, before, output, say, arguments.device)
    trainer: Any = FinetuneTrainer(
        recipe=recipe,
        sampler=sampler,
        checkpoint=checkpoint,
        model=model,
        args=arguments,
        processing_class=prepared.tokenizer,
        train_dataset=as_dataset(train),
        eval_dataset=as_dataset(held_out) if held_out else None,
    )
    insist_on_labels(trainer.train_dataset)
    _reset_peak()
    if checkpoint:
        say(f"going on from {checkpoint.path.name}")
    say(f"training by {recipe.method}, learning rate {arguments.learning_rate:g}")
    started = time.perf_counter()
    outcome = trainer.train(resume_from_checkpoint=str(checkpoint.path) if checkpoint else None)
    seconds, steps = time.perf_counter() - started, outcome.global_step
    trained = steps - (checkpoint.step if checkpoint else 0)
    metrics: dict[str, Any] = {"train_loss": trainer.losses.mean(), "steps": steps}
    if trained:
        metrics["seconds_per_step"] = seconds / trained
    metrics["trainable_parameters"] = sum(prod(whole_shape(p)) for p in trainer.model.parameters() if p.requires_grad)
    if trainer.rounding is not None:
        metrics["rounding"] = trainer.rounding
    metrics |= _peak()
    say("saving")
    save_model(recipe, trainer, prepared.tokenizer, output, ranks)
    if held_out and "eval_loss" in (evaluated := trainer.evaluate()):
        metrics["eval_loss"] = evaluated["eval_loss"]
    coverage = sampler.coverage() if sampler else ()
    trainer.accelerator.free_memory()
    return before, accuracy, metrics, coverage


def _how(recipe: Recipe) -> dict[str, Any]:
    import torch

    return {"dtype": getattr(torch, recipe.dtype), "causal": True, "four_bit": recipe.method == "qlora"}


def _spectra(
    recipe: Recipe, source: torch.nn.Module | str, path: Path, ranks: Ranks, say: Callable[[str], None]
) -> Analysis | None:
    """The analysis of a model, shared by all ranks; taken up from its file when resuming."""
    if not recipe.spectra:
        return None
    is_before = path.name == "spectra_before.npz"
    kept = ranks.of_first(lambda: Analysis.load(path) if is_before and path.exists() else None)
    if kept is not None:
        return kept
    say(f"analyzing the spectra {path.stem.removeprefix('spectra_')}")
    needs_bulk = recipe.sampling is not None and recipe.sampling.strategy == "snr"
    revision = recipe.revision if is_before and isinstance(source, str) else None
    found = analyze(source, revision=revision, bulk=needs_bulk)
    found = replace(found, label=recipe.model if is_before else recipe.output)
    ranks.of_first(lambda: found.save(path))
    return found


def _accuracy(
    model: torch.nn.Module,
    tokenizer: Any,
    questions: list[Record],
    path: Path,
    ranks: Ranks,
    say: Callable[[str], None],
) -> dict[str, Any] | None:
    from htsr.finetuning.run_folder import write_json

    if not questions:
        return None
    kept = ranks.of_first(lambda: dict(json.loads(path.read_text())) if path.exists() else None)
    if kept is not None:
        return kept
    say("asking the questions before training")
    found = asdict(multiple_choice_accuracy(model, tokenizer, questions))
    ranks.of_first(lambda: write_json(path, found))
    return found


def _reset_peak() -> None:
    import torch

    if _counts_memory():
        torch.accelerator.reset_peak_memory_stats()


def _peak() -> dict[str, Any]:
    """Peak memory: what the accelerator allocated in training, or what this process ever had resident."""
    import torch

    if _counts_memory():
        return {"peak_mib": torch.accelerator.max_memory_allocated() / 2**20, "peak_of": "accelerator, training"}
    unit = 2**10 if sys.platform != "darwin" else 2**20
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
    return {"peak_mib": resident, "peak_of": "resident, whole process"}


def _counts_memory() -> bool:
    """Whether there is an accelerator whose allocator keeps statistics; that of MPS does not."""
    import torch

    device = torch.accelerator.current_accelerator(check_available=True)
    return device is not None and device.type != "mps"
