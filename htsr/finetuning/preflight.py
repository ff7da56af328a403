"""What is read and checked before a model is loaded: data, tokenizer, and the checkpoint from which to go on."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from htsr.calibration.loading import load_config, load_tokenizer
from htsr.calibration.model_options import CODE, empty_model
from htsr.calibration.outliers import Outliers
from htsr.calibration.record_forms import Record, form_of
from htsr.calibration.record_texts import as_dataset
from htsr.calibration.records import read_records
from htsr.errors import UsageError
from htsr.finetuning.adapters import adapter_config
from htsr.finetuning.answers import answers_alone
from htsr.finetuning.checkpoints import Checkpoint, count_processes, last_checkpoint
from htsr.finetuning.data import training_records
from htsr.finetuning.labels import (
    check_labels,
    check_tokenizer,
    check_tools,
    check_vocabulary,
    count_labels,
    take_own,
)
from htsr.finetuning.placing import is_to_be_sharded
from htsr.finetuning.preview import Preview, preview
from htsr.finetuning.rates import check_rates, policy_of
from htsr.finetuning.run_folder import check_same_data, leaves, plain
from htsr.finetuning.starts import start_of
from htsr.finetuning.tokens import with_labels
from htsr.matrices.blocks import find_blocks
from htsr.ranks import Ranks
from htsr.training.lowrank.groups import low_rank_groups

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

    from htsr.finetuning.recipe import Data, Recipe


logger = logging.getLogger(__name__)

_PATHS = frozenset(
    (
        *("model", "output", "data.multiple_choice", "sampling.outliers", "gum.outliers"),
        *("data.train", "data.train.source", "data.evaluation", "data.evaluation.source"),
    )
)  # each machine may have its own


@dataclass(frozen=True)
class Prepared:
    """What a run begins with.

    Attributes:
        tokenizer: tokenizer of the model.
        train: records to train on.
        held_out: records for the evaluation loss.
        questions: multiple-choice records for the accuracy.
        checkpoint: checkpoint from which the run goes on; None at the beginning.
        preview: what training will read of `train`.
        stream: what is trained on where training is streaming, of which `train` holds the first records; else None.
        answers_by_default: whether answers alone have labels, and the recipe does not say so.
    """

    tokenizer: Any
    train: list[Record]
    held_out: list[Record]
    questions: list[Record]
    checkpoint: Checkpoint | None
    preview: Preview
    stream: IterableDataset | None = None
    answers_by_default: bool = False

    @cached_property
    def digests(self) -> dict[str, str]:
        """What `digest_of` says of the records, by what they are for."""
        kinds = {"train": self.train, "held_out": self.held_out, "questions": self.questions}
        digests = {name: digest_of(records) for name, records in kinds.items()}
        if self.answers_by_default:  # a run of an older version gave them to all tokens
            digests["labels"] = "those of answers alone (training.assistant_only_loss: false has those of all tokens)"
        return digests

    def datasets(self, arguments: Any) -> tuple[Dataset | IterableDataset, Dataset | None]:
        """What TRL trains on, and the held-out records, if there are any.

        Where answers alone have labels, records have their tokens and labels already, and TRL takes them as they are.

        Args:
            arguments: arguments of TRL, of which assistant_only_loss is no longer set then.
        """
        train = as_dataset(self.train) if self.stream is None else self.stream
        found = train, as_dataset(self.held_out) if self.held_out else None
        if not arguments.assistant_only_loss:
            return found
        train, held_out = (None if one is None else with_labels(one, self.tokenizer, arguments) for one in found)
        arguments.assistant_only_loss = False
        return train, held_out


def check_sharding(recipe: Recipe, arguments: Any) -> None:
    """Refuse a `recipe` that cannot run sharded as TRL's `arguments` say, and have ZeRO-3 save whole weights.

    Raises:
        UsageError: it cannot.
    """
    plugin: Any = getattr(arguments, "deepspeed_plugin", None)
    stage = plugin.zero_stage if plugin is not None else 0
    if stage and (recipe.sampling is not None or recipe.low_rank is not None):
        raise UsageError(
            f"method: {recipe.method} needs the model's own matrices, and DeepSpeed's ZeRO flattens them: take DDP or "
            "FSDP2"
        )
    if stage and recipe.rounding is not None:
        raise UsageError("rounding: DeepSpeed's ZeRO keeps weights in float32 beside the narrow ones; leave it out")
    if is_to_be_sharded(arguments) and recipe.sampling is not None and recipe.sampling.strategy == "gradient_norm":
        raise UsageError("sampling.strategy: gradient_norm draws by whole gradients: take DDP, or another strategy")
    alone = count_processes(arguments) == 1 and not stage and not is_to_be_sharded(arguments)
    if recipe.frozen_weights != "device" and not alone:
        raise UsageError(
            f"frozen_weights: {recipe.frozen_weights} is for one process on one device: make others invisible "
            "(CUDA_VISIBLE_DEVICES=0), or take FSDP2 with frozen_weights: device"
        )
    if recipe.method == "qlora" and (stage == 3 or arguments.fsdp):
        raise UsageError("method: qlora keeps a copy of the model in 4 bits on each process: take DDP or ZeRO-2")
    if stage == 3 and start_of(recipe.lora) is not None:
        raise UsageError(
            f"lora.options.init_lora_weights: {start_of(recipe.lora)} reads whole weights, and ZeRO-3 has none"
        )
    if stage == 3:
        if recipe.data.multiple_choice:
            raise UsageError("data.multiple_choice: ZeRO-3 holds no whole model to ask; ask the saved one afterwards")
        zero = plugin.hf_ds_config.config["zero_optimization"]
        zero["stage3_gather_16bit_weights_on_model_save"] = True


def check_gradients(recipe: Recipe, arguments: Any) -> None:
    """Refuse a way of a `recipe` to release gradients that does not go with TRL's `arguments`.

    Raises:
        UsageError: there are several processes, fp16, several backward passes a step, or clipping that it cannot do.
    """
    gradients = "keep" if recipe.low_rank is None else recipe.low_rank.gradients
    if gradients == "keep":
        return
    if arguments.world_size > 1 or arguments.fp16:
        raise UsageError(f"low_rank.gradients: {gradients} is for one process and not for fp16; take keep")
    if gradients == "update" and (arguments.gradient_accumulation_steps > 1 or arguments.max_grad_norm > 0):
        other = "keep" if recipe.method == "apollo" else "project"
        raise UsageError(
            f"low_rank.gradients: update takes one backward a step and cannot clip: take {other}, or "
            "gradient_accumulation_steps: 1 and max_grad_norm: 0"
        )


def prepare_data(recipe: Recipe, arguments: Any, resume: bool, say: Callable[[str], None]) -> Prepared:
    """Read data and tokenizer, and see that they go together with the model's configuration.

    Args:
        recipe: recipe of the run.
        arguments: arguments of TRL.
        resume: whether checkpoints are looked for.
        say: function that is told how many records there are, and what cutting takes of them.

    Raises:
        UsageError: there is nothing to learn from, or nothing to evaluate on where that is asked for.
        SourceError: model, data or outliers cannot be had, or do not go together.
    """
    output = Path(recipe.output)
    checkpoint = last_checkpoint(output) if resume else None
    if checkpoint is not None:
        _check_processes(output, checkpoint, count_processes(arguments))
    if recipe.draws is not None and recipe.draws.outliers:
        Outliers.load(recipe.draws.outliers).distribution(recipe.draws.threshold)
    questions = _questions(recipe.data)
    own_code = bool(recipe.model_options.get(CODE))
    if own_code:
        logger.warning("model_options.%s: Python code that comes with %s runs in this process", CODE, recipe.model)
    config = load_config(recipe.model, revision=recipe.revision, causal=True, options=recipe.model_options)
    check_sizes(recipe, config)
    tokenizer = load_tokenizer(recipe.model, revision=recipe.revision, own_code=own_code)
    take_own(recipe.model, tokenizer, arguments)
    train, held_out, stream = training_records(recipe, tokenizer, say)
    asked = f", {len(questions)} questions" if questions else ""
    say(f"{'a stream of' if stream else len(train)} training records, {len(held_out)} held out{asked}")
    check_tokenizer(recipe.model, tokenizer, [*train, *held_out], arguments)
    check_tools(recipe.model, tokenizer, [*train, *held_out], say)
    wanted = recipe.training.get("assistant_only_loss")
    arguments.assistant_only_loss = answers_alone(recipe.model, tokenizer, [*train, *held_out], wanted, say)
    seen = preview(train, tokenizer, arguments)
    found = seen.cut
    check_labels(found, arguments, "training records")
    highest = found.highest
    if found.cut:
        say(f"max_length {arguments.max_length}: {found}")
    if held_out:
        held = count_labels(held_out, tokenizer, arguments)
        highest = max(highest, held.highest)
        if held.empty == held.records:
            say(f"max_length {arguments.max_length}: none of the {held.records} held-out records keeps a label")
            held_out = []
    if not held_out and (_word(arguments.eval_strategy) != "no" or arguments.eval_on_start):
        key = _asks_to_evaluate(recipe)
        raise UsageError(f"{key} wants held-out records: set data.evaluation, data.evaluation_share, max_length")
    if questions:
        whole = _Whole()
        highest = max(highest, count_labels(questions, tokenizer, whole).highest)
    check_vocabulary(recipe.model, highest, int(config.get_text_config().vocab_size))
    by_default = arguments.assistant_only_loss and not wanted
    prepared = Prepared(tokenizer, train, held_out, questions, checkpoint, seen, stream, by_default)
    if resume:
        check_same_data(prepared.digests, output)
    return prepared


def tell_of_warmup(arguments: Any, steps: int, say: Callable[[str], None]) -> None:
    """Tell that the learning rate never comes to what was asked for, where its warm-up takes all of the training.

    Args:
        arguments: arguments of TRL.
        steps: number of optimizer steps of the run.
        say: function that is told so.

    Examples:
        >>> from transformers import TrainingArguments
        >>> from htsr.finetuning.preflight import tell_of_warmup
        >>> tell_of_warmup(TrainingArguments(warmup_steps=100, use_cpu=True), 3, print)
        training.warmup_steps: the learning rate rises for 100 steps, and the run has 3: it ends at 2 % of 5e-05
    """
    warmup = arguments.get_warmup_steps(steps)
    if steps > warmup or _word(arguments.lr_scheduler_type) in ("constant", "reduce_lr_on_plateau", "greedy"):
        return
    say(
        f"training.warmup_steps: the learning rate rises for {warmup:,} steps, and the run has {steps:,}: it ends at "
        f"{100 * (steps - 1) / warmup:.2g} % of {arguments.learning_rate:g}"
    )


def _asks_to_evaluate(recipe: Recipe) -> str:
    """The key of a `recipe` for which held-out records are needed."""
    given = [key for key in ("eval_on_start", "eval_strategy") if recipe.training.get(key) not in (None, False, "no")]
    if not given and recipe.early_stopping is not None:
        return "early_stopping"
    return f"training.{(*given, 'load_best_model_at_end')[0]}"


def _questions(data: Data) -> list[Record]:
    questions = read_records(data.multiple_choice) if data.multiple_choice else []
    if any(form_of(record) != "question" for record in questions):
        raise UsageError(
            f"data.multiple_choice: {data.multiple_choice} holds records without question, choices, answer"
        )
    return questions


def digest_of(records: Sequence[Record]) -> str:
    """How many `records` there are, and a digest of them in their order.

    Examples:
        >>> from htsr.finetuning.preflight import digest_of
        >>> digest_of([{"text": "a"}])
        '1 records with the digest 7c24616314d4c7dd'
    """
    digest = hashlib.sha256()
    for record in records:
        digest.update(json.dumps(record, sort_keys=True, default=str).encode("utf-8", "surrogatepass") + b"\n")
    return f"{len(records)} records with the digest {digest.hexdigest()[:16]}"


def agree(ranks: Ranks, recipe: Recipe, prepared: Prepared) -> None:
    """Make sure that all ranks are about to do one run. Paths may differ, what was read from them may not.

    Args:
        ranks: processes that train.
        recipe: recipe of the run.
        prepared: what this rank has read.

    Raises:
        UsageError: the ranks differ; every rank raises it.
    """
    if ranks.size == 1:
        return
    ranks.meet("htsr finetune")
    lines = [f"{key} {value}" for key, value in leaves(plain(recipe)) if key not in _PATHS]
    lines += [f"{told} of {name}" for name, told in prepared.digests.items()]
    lines.append(f"checkpoint of step {prepared.checkpoint.step}" if prepared.checkpoint else "no checkpoint")
    if differ := ranks.difference(lines):
        raise UsageError(f"the processes do not train one run: {differ}")


def _check_processes(output: Path, checkpoint: Checkpoint, now: int) -> None:
    """The Trainer would go on with batches of another size, and with other records in them, without a word."""
    then = checkpoint.processes
    if then not in (None, now):
        raise UsageError(
            f"{output} holds a run of {then} process{'es' * (then != 1)}, and --resume with {now} would go on with "
            "batches of another size and order: start as many, or name another output"
        )


def check_sizes(recipe: Recipe, config: Any) -> None:
    """Insist that the model of transformers' `config` has what a `recipe` names, and is large enough for its ranks.

    Raises:
        UsageError: it is not.
    """
    if recipe.low_rank is None and recipe.sampling is None and recipe.lora is None and recipe.layerwise == "none":
        return
    try:
        model = empty_model(config)
    except Exception:  # a class that cannot be made without values: the model itself will be asked
        logger.debug("%s cannot be made on the meta device", recipe.model, exc_info=True)
        return
    adapters = adapter_config(replace(recipe.lora, score=None), model, None) if recipe.lora is not None else None
    sampling = recipe.sampling
    if sampling is not None:
        blocks = len(find_blocks(model)) + (sampling.embedding == "sampled")
        if sampling.active > blocks:
            raise UsageError(f"sampling.active is {sampling.active}, and {recipe.model} has {blocks} blocks to draw")
    if recipe.low_rank is not None:
        assert recipe.low_rank.rank is not None
        try:
            low_rank_groups(model, recipe.low_rank.rank, embeddings=recipe.embedding == "lowrank")
        except UsageError as error:
            raise UsageError(f"low_rank.rank: {error}") from error
        if recipe.gum is not None:
            blocks = len(find_blocks(model))
            if recipe.gum.active >= blocks:
                raise UsageError(
                    f"gum.active is {recipe.gum.active}, and is below the {blocks} blocks of {recipe.model}"
                )
    if (policy := policy_of(recipe.layerwise)) is not None:
        check_rates(policy, model, adapters, ends_train=recipe.embedding != "freeze")


class _Whole:
    """Arguments of TRL under which nothing is cut, since questions are asked whole."""

    max_length, packing, packing_strategy, truncation_mode, completion_only_loss = None, False, "", "keep_start", None


def _word(value: Any) -> str:
    return str(getattr(value, "value", value))
