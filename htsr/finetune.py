"""Fine-tune a causal language model by a recipe: full, (Q)LoRA, LISA, OwLore or GaLore, with spectra before and after.

    accelerate launch -m htsr.finetune --config recipe.yaml
    htsr finetune --config one_cpu

TRL's SFTTrainer does the training: chat templates, packing, evaluation, trackers, checkpoints, FSDP2. A killed run is
taken up with `--resume` from its last checkpoint and ends with the same weights as one that was not.

The folder of the result holds the model as plain transformers loads it (and LoRA's adapter under ``adapter``), a model
card, ``results.json``, the recipe, ``spectra_before.npz`` and ``spectra_after.npz`` with their comparison as
``spectra.csv``, ``outliers.json`` where blocks were drawn by outliers, and the checkpoints.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import logging
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from htsr.analysis import Analysis, analyze
from htsr.errors import UsageError
from htsr.files import written
from htsr.loading import load_model, load_tokenizer, resolve
from htsr.matrices.modules import whole_shape
from htsr.multiple_choice import Accuracy, multiple_choice_accuracy
from htsr.recipe import Recipe
from htsr.records import Record, as_dataset, read_records, split

if TYPE_CHECKING:
    import torch

    from htsr.training.sampling import Coverage

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Result:
    """What a run came to; ``results.json`` holds the same.

    Attributes:
        output: folder of the model.
        metrics: ``train_loss`` and ``eval_loss`` (nats per token), ``accuracy`` and ``before_accuracy`` …,
            ``seconds_per_step``, ``steps``, ``peak_mib`` (of ``peak_of``), ``trainable_parameters``.
        coverage: how often each block trained, where blocks were sampled.
    """

    output: str
    metrics: dict[str, Any]
    coverage: tuple[Coverage, ...] = ()


def finetune(recipe: Recipe, *, resume: bool = False, say: Callable[[str], None] = logger.info) -> Result:
    """Run a recipe on every process of the launcher (or this one alone).

    Args:
        recipe: from `htsr.recipe.read_recipe`.
        resume: go on from the last checkpoint in the output folder; from the beginning where there is none.
        say: told in a sentence what happens.

    Returns:
        The `Result`; its times, memory and mean training loss are those of this process.

    Raises:
        UsageError: arguments without meaning, or an output folder that is not empty, without `resume`.
        SourceError: model or data that cannot be had.
        MissingDependencyError: TRL, datasets or another optional package is not installed.
    """
    from accelerate import PartialState
    from transformers import set_seed

    from htsr.training.methods import prepare

    output = Path(recipe.output)
    arguments = _arguments(recipe)
    _prepare_sharding(recipe, arguments)
    ranks = PartialState()
    checkpoint = _last_checkpoint(output)
    if not resume and output.is_dir() and any(output.iterdir()):
        raise UsageError(f"{output} is not empty; --resume goes on with the run in it, or name another output")
    ranks.wait_for_everyone()
    output.mkdir(parents=True, exist_ok=True)
    set_seed(recipe.seed)
    tokenizer = load_tokenizer(recipe.model, revision=recipe.revision)
    share = 0.0 if recipe.data.evaluation else recipe.data.evaluation_share
    train, held_out = split(read_records(recipe.data.train), share, recipe.seed)
    train = train[: recipe.data.limit]
    held_out = read_records(recipe.data.evaluation) if recipe.data.evaluation else held_out
    questions = read_records(recipe.data.multiple_choice) if recipe.data.multiple_choice else []
    say(f"{len(train)} training records, {len(held_out)} held out, {len(questions)} questions")
    four_bit = recipe.method == "qlora"
    how: dict[str, Any] = {"dtype": _dtype(recipe), "causal": True, "four_bit": four_bit}
    model = load_model(recipe.model, revision=recipe.revision, **how).to(arguments.device)

    whole = resolve(recipe.model) if four_bit else model  # adapters are merged into the weights as they are stored
    before = _spectra(recipe, whole, output / "spectra_before.npz", say)
    accuracy_before = _accuracy(model, tokenizer, questions, output / "accuracy_before.json", say)
    model, sampler = prepare(recipe, model, tokenizer, train, before, output, say)
    trainer = _trainer(recipe, model, tokenizer, arguments, train, held_out, sampler)
    _reset_peak()
    started, first_step = time.perf_counter(), _steps_of(checkpoint)
    if checkpoint:
        say(f"going on from {Path(checkpoint).name}")
    outcome = trainer.train(resume_from_checkpoint=checkpoint)
    seconds = time.perf_counter() - started
    metrics: dict[str, Any] = {
        "train_loss": outcome.training_loss,
        "steps": outcome.global_step,
        "seconds_per_step": seconds / max(outcome.global_step - first_step, 1),
        "trainable_parameters": sum(prod(whole_shape(p)) for p in trainer.model.parameters() if p.requires_grad),
        **_peak(),
    }
    if held_out:
        metrics["eval_loss"] = trainer.evaluate()["eval_loss"]
    say("saving")
    _save(recipe, trainer, tokenizer, output, ranks)
    del trainer, model
    gc.collect()
    if questions:
        trained = load_model(str(output), **how).to(arguments.device)
        accuracy = multiple_choice_accuracy(trained, tokenizer, questions)
        metrics |= {f"before_{k}": v for k, v in (accuracy_before or {}).items()} | asdict(accuracy)
        del trained
    after = _spectra(recipe, str(output), output / "spectra_after.npz", say)
    result = Result(str(output), metrics, sampler.coverage() if sampler else ())
    if ranks.is_main_process:
        _write_reports(recipe, result, output, before, after)
    ranks.wait_for_everyone()
    return result


def _dtype(recipe: Recipe) -> torch.dtype:
    import torch

    return getattr(torch, recipe.dtype)  # type: ignore[no-any-return]


def _arguments(recipe: Recipe) -> Any:
    """TRL's configuration: the recipe's, on defaults that a CPU can follow."""
    import torch
    from trl.trainer.sft_config import SFTConfig

    on_cpu = not torch.accelerator.is_available()
    defaults: dict[str, Any] = {"report_to": "none", "save_strategy": "steps", "save_steps": 100, "save_total_limit": 2}
    if on_cpu:
        defaults |= {"use_cpu": True, "bf16": False, "gradient_checkpointing": False, "dataloader_pin_memory": False}
    else:
        defaults |= {"gradient_checkpointing_kwargs": {"use_reentrant": False}}
    if recipe.sampling is not None:
        defaults["ddp_find_unused_parameters"] = True
    given = defaults | dict(recipe.training)
    try:
        return SFTConfig(output_dir=recipe.output, seed=recipe.seed, **given)
    except (ValueError, TypeError) as error:
        raise UsageError(f"training: {error}") from error


def _prepare_sharding(recipe: Recipe, arguments: Any) -> None:
    """Refuse what the method cannot do sharded, and have ZeRO-3 save whole weights."""
    plugin: Any = getattr(arguments, "deepspeed_plugin", None)
    stage = plugin.zero_stage if plugin is not None else 0
    if stage and (recipe.sampling is not None or recipe.low_rank is not None):
        raise UsageError(
            f"method: {recipe.method} needs the model's own matrices, and DeepSpeed's ZeRO flattens them: take DDP or "
            "FSDP2"
        )
    if recipe.method == "qlora" and (stage == 3 or arguments.fsdp):
        raise UsageError("method: qlora keeps a copy of the model in 4 bits on each process: take DDP or ZeRO-2")
    if stage == 3:
        if recipe.data.multiple_choice:
            raise UsageError("data.multiple_choice: ZeRO-3 holds no whole model to ask; ask the saved one afterwards")
        zero = plugin.hf_ds_config.config["zero_optimization"]
        zero["stage3_gather_16bit_weights_on_model_save"] = True


def _spectra(recipe: Recipe, source: torch.nn.Module | str, path: Path, say: Callable[[str], None]) -> Analysis | None:
    """The analysis of a model, shared by all ranks; taken up from its file when resuming."""
    from accelerate import PartialState

    if not recipe.spectra:
        return None
    ranks = PartialState()
    is_before = path.name == "spectra_before.npz"
    if is_before and path.exists():
        return Analysis.load(path)
    say(f"analyzing the spectra {path.stem.removeprefix('spectra_')}")
    needs_bulk = recipe.sampling is not None and recipe.sampling.strategy == "snr"
    revision = recipe.revision if is_before and isinstance(source, str) else None
    found = analyze(source, revision=revision, bulk=needs_bulk)
    found = replace(found, label=recipe.model if is_before else recipe.output)
    ranks.wait_for_everyone()
    if ranks.is_main_process:
        found.save(path)
    return found


def _accuracy(
    model: torch.nn.Module, tokenizer: Any, questions: list[Record], path: Path, say: Callable[[str], None]
) -> dict[str, Any] | None:
    from accelerate import PartialState

    if not questions:
        return None
    if path.exists():
        return dict(json.loads(path.read_text()))
    say("asking the questions before training")
    found: Accuracy = multiple_choice_accuracy(model, tokenizer, questions)
    if PartialState().is_main_process:
        _write_json(path, asdict(found))
    return asdict(found)


def _trainer(
    recipe: Recipe,
    model: torch.nn.Module,
    tokenizer: Any,
    arguments: Any,
    train: list[Record],
    held_out: list[Record],
    sampler: Any,
) -> Any:
    from htsr.training.trainer import FinetuneTrainer

    return FinetuneTrainer(
        recipe=recipe,
        sampler=sampler,
        model=model,
        args=arguments,
        processing_class=tokenizer,
        train_dataset=as_dataset(train),
        eval_dataset=as_dataset(held_out) if held_out else None,
    )


def _save(recipe: Recipe, trainer: Any, tokenizer: Any, output: Path, ranks: Any) -> None:
    """The model as plain transformers loads it, in safetensors."""
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    if trainer.is_fsdp_enabled:  # whatever its checkpoints are
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    if recipe.lora is None:
        trainer.save_model(str(output))
    else:
        trainer.save_model(str(output / "adapter"))
        unset_hf_deepspeed_config()  # type: ignore[no-untyped-call]  # under ZeRO-3 all ranks would have to load
        ranks.wait_for_everyone()
        if ranks.is_main_process:  # merged into a fresh copy, whatever wraps the trained one
            from peft import PeftModel

            base: Any = load_model(recipe.model, revision=recipe.revision, dtype=_dtype(recipe), causal=True)
            merged = PeftModel.from_pretrained(base, str(output / "adapter")).merge_and_unload()
            merged.save_pretrained(output)
    if ranks.is_main_process:
        tokenizer.save_pretrained(output)
    ranks.wait_for_everyone()


def _write_reports(
    recipe: Recipe, result: Result, output: Path, before: Analysis | None, after: Analysis | None
) -> None:
    from htsr.comparison import compare_analyses
    from htsr.reporting.model_card import model_card

    comparison = None
    if before is not None and after is not None:
        comparison = compare_analyses(before, after)
        with written(output / "spectra.csv") as temporary:
            comparison.to_pandas().to_csv(temporary, index=False)
    _write_json(output / "results.json", {"recipe": dataclasses.asdict(recipe), **asdict(result)})
    with written(output / "README.md") as temporary:
        temporary.write_text(model_card(recipe, result, comparison), encoding="utf-8")


def _write_json(path: Path, content: Any) -> None:
    with written(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1, default=str) + "\n", encoding="utf-8")


def _last_checkpoint(output: Path) -> str | None:
    """The last that was written whole: the Trainer writes its state last."""
    found = [folder for folder in output.glob("checkpoint-*") if (folder / "trainer_state.json").exists()]
    return str(max(found, key=lambda folder: _steps_of(str(folder)))) if found else None


def _steps_of(checkpoint: str | None) -> int:
    return int(checkpoint.rsplit("-", 1)[1]) if checkpoint else 0


def _reset_peak() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def _peak() -> dict[str, Any]:
    """Peak memory: what the accelerator allocated in training, or what this process ever had resident."""
    import torch

    if torch.cuda.is_available():
        return {"peak_mib": torch.cuda.max_memory_allocated() / 2**20, "peak_of": "accelerator, training"}
    unit = 2**10 if sys.platform != "darwin" else 2**20
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
    return {"peak_mib": resident, "peak_of": "resident, whole process"}


if __name__ == "__main__":
    from htsr_cli.main import main

    sys.exit(main(["finetune", *sys.argv[1:]]))
