"""What a recipe will do, found out without training: `htsr finetune --check`."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from htsr.errors import Refusals
from htsr.finetuning.budget import MOST, Budget, largest_batch
from htsr.finetuning.memory import is_planned, logits_of, setting_of
from htsr.finetuning.preflight import Prepared, check_gradients, check_sharding, prepare_data, tell_of_warmup
from htsr.finetuning.preview import Preview
from htsr.finetuning.recipe import Recipe
from htsr.finetuning.run_folder import check_output, check_same_run, plain, resolved
from htsr.results import Column, Record, Table, Tabular
from htsr.training.memory.plan import MemoryPlan, MemoryPlans
from htsr.training.memory.prediction import plans_by_batch


@dataclass(frozen=True)
class Schedule:
    """How long a run trains, and how fast.

    Attributes:
        steps: number of optimizer steps.
        epochs: number of passes over the training records; None where they are streamed, and not counted.
        batch: sequences of an optimizer step, over all processes and accumulated passes.
        learning_rate: largest learning rate.
        shape: name of its schedule.
        warmup: number of optimizer steps in which it rises.
    """

    steps: int
    epochs: float | None
    batch: int
    learning_rate: float
    shape: str
    warmup: int


@dataclass(frozen=True)
class Check(Tabular):
    """What a recipe will do; None or empty where that could not be found out.

    Attributes:
        recipe: keys and values of the recipe, every default of htsr filled in; those of TRL are not.
        text: the same as YAML.
        refusals: what `htsr finetune` would refuse, in whole sentences.
        notes: what else it would say of the data.
        preview: what training will read; of a stream its first records.
        sequences: number of sequences that training has of them in an epoch.
        streams: whether training records are streamed.
        held_out: number of records for the evaluation loss.
        questions: number of multiple-choice records for the accuracy.
        schedule: how long the run trains, and how fast.
        plan: memory at the peak, by part, of one process.
        needed: bytes that the run needs, what its plan leaves out included.
        budget: bytes that there are, and where.
        largest_batch: largest per_device_train_batch_size with which the run fits; 0 where it does not fit at all.
            `htsr.finetuning.budget.MOST` stands for that or more, as none that is larger is looked for.
        is_wrong_usage: whether one of the refusals is of what was asked for, and not of what was found.
    """

    recipe: dict[str, Any]
    text: str
    refusals: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    preview: Preview | None = None
    sequences: int | None = None
    streams: bool = False
    held_out: int = 0
    questions: int = 0
    schedule: Schedule | None = None
    plan: MemoryPlan | None = None
    needed: int | None = None
    budget: Budget | None = None
    largest_batch: int | None = None
    is_wrong_usage: bool = False

    @property
    def label(self) -> str:  # type: ignore[override]
        """The folder of the result."""
        return str(self.recipe["output"])

    def records(self) -> list[Record]:
        """One dictionary: what is counted of data, steps and memory."""
        row: Record = {"output": self.recipe["output"], "held_out": self.held_out, "questions": self.questions}
        if (seen := self.preview) is not None:
            row |= {"records": seen.records, "sequences": self.sequences, "tokens": seen.tokens, "labels": seen.labels}
            row |= {f"tokens_{name.replace(' %', '_percent')}": size for name, size in seen.lengths.items()}
            row |= {"cut_records": seen.cut.cut, "empty_records": seen.cut.empty, "lost_labels": seen.cut.lost}
        if self.schedule is not None:
            row |= asdict(self.schedule)
        if self.plan is not None and self.budget is not None:
            row |= {"needed_bytes": self.needed, "budget_bytes": self.budget.size, "budget_of": self.budget.of}
            row |= {"largest_batch": self.largest_batch}
        return [row]

    def tables(self) -> tuple[Table, ...]:
        """Data, steps and memory in words; then the parts of the memory."""
        rows = [*self._of_data(), *self._of_schedule(), *self._of_memory()]
        tables = [Table((Column("check", text=True), Column("value", text=True)), tuple(rows))]
        if self.plan is not None:
            tables += MemoryPlans(self.plan.model, (self.plan,)).tables()
        return tuple(tables)

    def facts(self) -> dict[str, Any]:
        """The recipe, what would be refused, the records that are shown, and the memory by part."""
        shown = [asdict(record) for record in self.preview.shown] if self.preview else []
        plan = self.plan.records()[0] if self.plan else None
        return {
            "recipe": self.recipe,
            "refusals": list(self.refusals),
            "notes": list(self.notes),
            "shown": shown,
            "memory": plan,
        }

    def _of_data(self) -> list[tuple[str, str]]:
        if (seen := self.preview) is None:
            return []
        asked = f", {self.questions:,} questions" if self.questions else ""
        train = f"a stream, here its first {seen.records:,}" if self.streams else f"{seen.records:,} to train on"
        of = "these" if self.streams else "an epoch"
        return [
            ("records", f"{train}, {self.held_out:,} held out{asked}"),
            (f"sequences in {of}", f"{self.sequences:,}"),
            (f"tokens in {of}", f"{seen.tokens:,}, of which {seen.labels:,} enter the loss"),
            ("tokens of a record", ", ".join(f"{name} {size:,}" for name, size in seen.lengths.items())),
            ("cut off", str(seen.cut) if seen.cut.cut else "nothing"),
        ]

    def _of_schedule(self) -> list[tuple[str, str]]:
        if (schedule := self.schedule) is None:
            return []
        rate = f"{schedule.learning_rate:g}, {schedule.shape}"
        passes = "" if schedule.epochs is None else f": {schedule.epochs:.3g} epochs"
        return [
            ("steps", f"{schedule.steps:,} of {schedule.batch:,} sequences{passes}"),
            ("learning rate", rate + (f", {schedule.warmup:,} steps of warm-up" if schedule.warmup else "")),
        ]

    def _of_memory(self) -> list[tuple[str, str]]:
        if self.plan is None or self.budget is None or self.needed is None:
            return []
        fits = "it fits" if self.needed <= self.budget.size else "it does not fit"
        rows = [("memory", f"{_gib(self.needed)} needed of {_gib(self.budget.size)} ({self.budget.of}): {fits}")]
        if self.largest_batch is not None:
            most = f"{self.largest_batch:,}" if self.largest_batch else "none: not even one sequence fits"
            given = int(self.recipe["training"].get("per_device_train_batch_size", 0))
            most += " or more" * (self.largest_batch >= max(MOST, given))  # none that is larger was looked for
            rows.append(("largest batch", f"{most} (training.per_device_train_batch_size)"))
        return rows


def check(recipe: Recipe, *, resume: bool = False, memory: int | None = None) -> Check:
    """Find out what `recipe` will do: read data, tokenizer and configuration, load no weights, write nothing.

    Args:
        recipe: recipe, as `htsr.finetuning.reading.read_recipe` returns it.
        resume: whether the run would go on from the last checkpoint in the output folder.
        memory: bytes of the accelerator for which memory is planned; None for this machine's own, or its main memory.

    Raises:
        MissingDependencyError: TRL or datasets is not installed.
    """
    from htsr.finetuning.arguments import training_arguments

    refused = Refusals()
    output = Path(recipe.output)
    refused.unless(check_output, output, resume)
    if resume:
        refused.unless(lambda: check_same_run(recipe, output, lambda _: None))
    arguments = refused.unless(training_arguments, recipe)
    found: dict[str, Any] = {}
    notes: list[str] = []
    if arguments is not None:
        refused.unless(check_sharding, recipe, arguments)
        refused.unless(check_gradients, recipe, arguments)
        prepared = refused.unless(prepare_data, recipe, arguments, resume, notes.append)
        if prepared is not None:
            found |= refused.unless(_seen, prepared, arguments) or {}
        if "schedule" in found:
            tell_of_warmup(arguments, found["schedule"].steps, notes.append)
        longest = found["preview"].lengths["longest"] if "preview" in found else None
        found |= refused.unless(_memory, recipe, arguments, longest, memory) or {}
        optim = str(getattr(arguments.optim, "value", arguments.optim))
        if recipe.low_rank is None and optim not in _PLANNED and "plan" in found:
            notes.append(f"memory is planned with AdamW's two moments; training.optim: {optim} may keep others")
        if arguments.use_liger_kernel and "plan" in found:
            notes.append("memory is planned without Liger's kernels, which should take less: how much was not measured")
    found |= {"refusals": tuple(refused.sentences), "notes": tuple(notes)}
    return Check(plain(recipe), resolved(recipe), **found, is_wrong_usage=refused.is_wrong_usage)


def _seen(prepared: Prepared, arguments: Any) -> dict[str, Any]:
    seen = prepared.preview
    counts = {"held_out": len(prepared.held_out), "questions": len(prepared.questions)}
    streams, sequences = prepared.stream is not None, seen.sequences(arguments)
    schedule = schedule_of(arguments, None if streams else sequences)
    return {"preview": seen, "sequences": sequences, "streams": streams, **counts, "schedule": schedule}


def schedule_of(arguments: Any, sequences: int | None) -> Schedule:
    """How long the Trainer trains on `sequences` a pass, as it counts itself.

    Args:
        arguments: arguments of TRL.
        sequences: number of sequences in an epoch; None where it is not known, and ``max_steps`` is set.
    """
    an_epoch = None if sequences is None else _steps_of(arguments, sequences)
    steps = arguments.max_steps
    if an_epoch is not None and steps <= 0:
        steps = math.ceil(arguments.num_train_epochs * an_epoch)
    return Schedule(
        steps=steps,
        epochs=None if an_epoch is None else steps / an_epoch,
        batch=arguments.train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size,
        learning_rate=arguments.learning_rate,
        shape=str(getattr(arguments.lr_scheduler_type, "value", arguments.lr_scheduler_type)),
        warmup=arguments.get_warmup_steps(steps),
    )


def _steps_of(arguments: Any, sequences: int) -> int:
    """Number of optimizer steps in an epoch of so many `sequences`."""
    share = math.ceil(sequences / arguments.world_size)
    passes = share / arguments.train_batch_size
    passes = max(math.floor(passes) if arguments.dataloader_drop_last else math.ceil(passes), 1)
    return max(math.ceil(passes / arguments.gradient_accumulation_steps), 1)


_PLANNED = ("adamw_torch", "adamw_torch_fused")


def planned(
    recipe: Recipe, arguments: Any, longest: int | None, memory: int | None
) -> tuple[Budget, dict[str, Any]] | None:
    """The memory that there is, and the arguments of `predict_memory` for the run of a `recipe` in it.

    Args:
        recipe: recipe of the run.
        arguments: arguments of TRL.
        longest: number of tokens of the longest record, where it is known.
        memory: bytes of the accelerator for which memory is planned; None for this machine's own, or its main memory.

    Returns:
        None where the run is sharded over processes, of which no plan is made.
    """
    if not is_planned(arguments):
        return None
    setting = setting_of(recipe, arguments, longest)
    is_host = bool(recipe.training.get("use_cpu"))
    budget = Budget.of_device(arguments) if memory is None else Budget(memory, "--memory", is_host)
    if not budget.is_host and arguments.use_cpu:  # planned here for there, where TRL's own default holds
        names = ("activation_checkpointing", "gradient_checkpointing")  # the new name goes first in transformers, too
        setting["checkpointing"] = next((recipe.training[name] for name in names if name in recipe.training), True)
        setting["logits"] = logits_of(arguments, on_accelerator=True)
    return budget, setting


def _memory(recipe: Recipe, arguments: Any, longest: int | None, memory: int | None) -> dict[str, Any]:
    if (found := planned(recipe, arguments, longest, memory)) is None:
        return {}
    budget, setting = found

    batch = setting.pop("batch")
    plan_of = plans_by_batch(recipe.model, **setting)
    plan = plan_of(batch)
    most = largest_batch(plan_of, batch, budget)
    return {"plan": plan, "needed": budget.needed(plan), "budget": budget, "largest_batch": most}


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"
