"""Fine-tune a causal language model by a recipe: full, (Q)LoRA, LISA, OwLore or GaLore, with spectra before and after.

    accelerate launch -m htsr.finetune --config recipe.yaml
    htsr finetune --config one_cpu

TRL's SFTTrainer does the training: chat templates, packing, evaluation, trackers, checkpoints, FSDP2. A killed run is
taken up with `--resume` from its last checkpoint and ends with the same weights as one that was not. What can be known
before the model is loaded is checked before (`htsr.finetuning.preflight`); the model is saved before it is evaluated,
asked and analyzed, and so is the untrained one, where the method needs no spectra (`htsr.finetuning.measuring`).

The folder of the result holds the model as plain transformers loads it (and LoRA's adapter under ``adapter``), a model
card, ``results.json``, the recipe as ``recipe.yaml``, ``spectra_before.npz`` and ``spectra_after.npz``, ``spectra.csv``
with their comparison and how far each matrix moved, ``outliers.json`` where blocks were drawn by outliers, a digest of
the data in ``data.json``, and the checkpoints.
"""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from htsr.calibration.record_texts import preamble_of
from htsr.errors import HtsrError
from htsr.finetuning.progress import Voice
from htsr.finetuning.recipe import Recipe
from htsr.finetuning.result import Result
from htsr.matrices.modules import whole_shape
from htsr.ranks import Ranks, all_launched

if TYPE_CHECKING:
    from htsr.finetuning.preflight import Prepared
    from htsr.training.sampling.coverage import Coverage

logger = logging.getLogger(__name__)


def finetune(
    recipe: Recipe,
    *,
    resume: bool = False,
    say: Callable[[str], None] = logger.info,
    show: Callable[[str], None] | None = None,
) -> Result:
    """Run a recipe on every process of the launcher (or this one alone).

    Args:
        recipe: recipe, as `htsr.finetuning.reading.read_recipe` returns it.
        resume: whether the run goes on from the last checkpoint in the output folder; where there is none it begins.
        say: function that is told, in one sentence, what happens.
        show: function that is told how far something is, again and again: each word takes the place of the one before.
            With it the losses are told to `say`, a short line each; without it the Trainer shows what it logs.

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

    from htsr.finetuning.run_folder import DATA, begin_folder, check_output, check_same_run, write_json

    output, voice = Path(recipe.output), Voice(say, show)
    check_output(output, resume)
    if resume:
        check_same_run(recipe, output, say)

    from htsr.finetuning.arguments import training_arguments
    from htsr.finetuning.check import schedule_of
    from htsr.finetuning.measuring import accuracies, moved
    from htsr.finetuning.preflight import agree, check_gradients, check_sharding, prepare_data, tell_of_warmup
    from htsr.finetuning.publishing import hub_repository, publish
    from htsr.finetuning.saving import finished_result, most_moved, write_reports

    with all_launched("htsr finetune"):
        arguments = training_arguments(recipe)  # with them accelerate begins the group
    check_sharding(recipe, arguments)
    check_gradients(recipe, arguments)
    ranks = Ranks.launched("htsr finetune")
    finished = ranks.of_first(lambda: finished_result(recipe, output) if resume else None)
    if finished is not None:
        say(f"the run in {output} is finished")
        return finished
    prepared = prepare_data(recipe, arguments, resume, say)
    agree(ranks, recipe, prepared)
    if arguments.get_warmup_steps(1):  # to know the number of steps may take packing
        sequences = None if prepared.stream is not None else prepared.preview.sequences(arguments)
        tell_of_warmup(arguments, schedule_of(arguments, sequences).steps, say)
    repository = ranks.of_first(lambda: hub_repository(arguments))
    ranks.of_first(lambda: begin_folder(recipe, output, resume))
    ranks.of_first(lambda: write_json(output / DATA, prepared.digests))
    set_seed(recipe.seed)
    metrics, losses, coverage = _train(recipe, arguments, prepared, output, ranks, voice)
    gc.collect()  # model, optimizer and trainer hold each other, and the saved model is loaded next
    metrics |= accuracies(recipe, arguments, prepared.tokenizer, prepared.questions, output, ranks, voice)
    comparison = moved(recipe, output, ranks, voice) if recipe.spectra else None
    result = Result(str(output), metrics, coverage, losses, most_moved(comparison), str(recipe.model))
    ranks.of_first(lambda: write_reports(recipe, result, output, comparison))
    if repository is not None:
        voice.say(f"pushing to {repository}")
        ranks.of_first(lambda: publish(repository, arguments, output))
    return result


def _train(
    recipe: Recipe, arguments: Any, prepared: Prepared, output: Path, ranks: Ranks, voice: Voice
) -> tuple[dict[str, Any], tuple[tuple[int, float], ...], tuple[Coverage, ...]]:
    """Metrics, logged losses and coverage of a training whose model is saved and let go."""
    from htsr.finetuning.labels import insist_on_labels
    from htsr.finetuning.measuring import needs_spectra, spectra_before, stored
    from htsr.finetuning.memory import peak
    from htsr.finetuning.methods import prepare
    from htsr.finetuning.placing import how_loaded, load_placed
    from htsr.finetuning.rates import rates_in_words
    from htsr.finetuning.saving import save_model
    from htsr.finetuning.stopping import best_step
    from htsr.finetuning.trainer import FinetuneTrainer

    train, held_out, checkpoint = prepared.train, prepared.held_out, prepared.checkpoint
    if "eval_on_start" not in recipe.training:
        arguments.eval_on_start = bool(held_out)
    if checkpoint is not None:
        arguments.eval_on_start = False  # the run began long ago
    streamed = recipe.frozen_weights != "device"
    voice.say("loading the model")
    model = load_placed(arguments, recipe.model, streamed=streamed, revision=recipe.revision, **how_loaded(recipe))
    before = None
    if needs_spectra(recipe):
        # adapters are merged into the weights as they are stored
        source, revision = stored(recipe) if recipe.method == "qlora" else (model, None)
        before = spectra_before(recipe, source, revision, output, ranks, voice)
    model, sampler, weights = prepare(recipe, model, prepared.tokenizer, train, before, output, voice, arguments)
    training_set, held_out_set = prepared.datasets(arguments)
    trainer: Any = FinetuneTrainer(
        recipe=recipe,
        sampler=sampler,
        weights=weights,
        checkpoint=checkpoint,
        voice=voice,
        model=model,
        args=arguments,
        processing_class=prepared.tokenizer,
        train_dataset=training_set,
        eval_dataset=held_out_set,
    )
    if prepared.stream is None:
        insist_on_labels(trainer.train_dataset)
    if checkpoint:
        voice.say(f"going on from {checkpoint.path.name}")
    rates = rates_in_words(recipe.layerwise, arguments.learning_rate)
    voice.say(f"training by {recipe.method}, {rates}")
    started = time.perf_counter()
    outcome = trainer.train(resume_from_checkpoint=str(checkpoint.path) if checkpoint else None)
    seconds, steps = time.perf_counter() - (trainer.began or started), outcome.global_step
    trained = steps - (checkpoint.step if checkpoint else 0)
    metrics: dict[str, Any] = {"train_loss": trainer.losses.mean(), "steps": steps}
    if trained:
        metrics |= {"seconds": seconds, "seconds_per_step": seconds / trained, "timed_steps": trained}
    metrics["trainable_parameters"] = sum(prod(whole_shape(p)) for p in trainer.model.parameters() if p.requires_grad)
    if arguments.load_best_model_at_end and (best := best_step(trainer.state)) is not None:
        metrics["best_step"] = best
        early = f"training stopped early, at step {steps} of {trainer.state.max_steps}; " * (
            steps < trainer.state.max_steps
        )
        voice.say(f"{early}the best model is that of step {best}")
    if trainer.rounding is not None:
        metrics["rounding"] = trainer.rounding
    if trained:  # else what is resident has nothing to do with a plan of training
        metrics |= peak() | _predicted(recipe, arguments, trainer)
    history = trainer.state.log_history
    at_start = [entry["eval_loss"] for entry in history if "eval_loss" in entry and entry["step"] == 0]
    if at_start:
        metrics["before_eval_loss"] = at_start[0]
    losses = tuple((int(entry["step"]), float(entry["loss"])) for entry in history if "loss" in entry)
    voice.say("saving")
    save_model(recipe, trainer, prepared.tokenizer, output, ranks, preamble=preamble_of(train))
    if held_out and "eval_loss" in (evaluated := trainer.evaluate()):
        metrics["eval_loss"] = evaluated["eval_loss"]
    coverage = sampler.coverage() if sampler else ()
    trainer.accelerator.free_memory()
    return metrics, losses, coverage


def _predicted(recipe: Recipe, arguments: Any, trainer: Any) -> dict[str, float]:
    """What `htsr memory` says of this run, where it says anything."""
    from htsr.finetuning.memory import predicted_mib

    try:
        found = predicted_mib(recipe, arguments, trainer.longest())
    except HtsrError as error:  # the run has gone well: a prediction is no reason to lose it
        logger.info("the memory of this run could not be predicted: %s", error)
        return {}
    return {} if found is None else {"predicted_mib": found}
