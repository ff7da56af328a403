"""The method that the memory is enough for: `htsr finetune --method auto`.

The candidates and their order are those of `reports/arena`: by the loss that each reached at its own best rate.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from htsr.errors import UsageError
from htsr.finetuning.reading import check_options, read_contents, recipe_of
from htsr.finetuning.recipe import SECTIONS_OF, Recipe


@dataclass(frozen=True)
class Candidate:
    """A way to train.

    Attributes:
        method: method of the recipe.
        settings: keys of its sections with their values, where the recipe says nothing else.
        share: share of the blocks that trains at a time, where blocks are sampled.
    """

    method: str
    settings: Mapping[str, dict[str, Any]]
    share: float | None = None


CANDIDATES = (
    Candidate("lora", {"lora": {"rank": 32}}),
    Candidate(
        "owlore",
        {
            "sampling": {"threshold": 3.0},
            "low_rank": {"rank": 128, "state_dtype": "8bit", "gradients": "project"},
        },
        share=0.5,
    ),
    Candidate("lora", {"lora": {"rank": 8}}),
    Candidate("qlora", {"lora": {"rank": 32}}),
    Candidate("qlora", {"lora": {"rank": 8}}),
)


@dataclass(frozen=True)
class Choice:
    """What was chosen.

    Attributes:
        recipe: the recipe with the method that was chosen.
        why: why that one, in a sentence or two.
    """

    recipe: Recipe
    why: str


def choose(
    path: str, changes: Mapping[str, Any] | None = None, overrides: Sequence[str] = (), *, memory: int | None = None
) -> Choice:
    """The recipe with the first of `CANDIDATES` whose run fits, as `htsr memory` predicts it at ``max_length``.

    Args:
        path: path of the recipe, or the name of one that htsr carries; its own sections stay as they are.
        changes: top-level keys that replace the file's.
        overrides: any keys that replace the file's.
        memory: bytes of the accelerator for which memory is planned; None for this machine's own, or its main memory.

    Raises:
        UsageError: none fits, or the recipe has no meaning.
        SourceError: the recipe or the model's configuration cannot be read.
        MissingDependencyError: TRL is not installed.
    """
    from htsr.finetuning.arguments import training_arguments
    from htsr.finetuning.check import planned
    from htsr.training.memory.prediction import predict_memory

    passed: list[str] = []
    for candidate in CANDIDATES:
        left: list[str] = []
        recipe = _with(candidate, path, changes, overrides, left.append)
        check_options(recipe)
        found = planned(recipe, training_arguments(recipe), None, memory)
        if found is None:
            raise UsageError("--method auto plans for one process; of a sharded run no plan is made: name the method")
        budget, setting = found
        try:
            needed = budget.needed(predict_memory(recipe.model, **setting))
        except UsageError as error:  # of a rank or a number of blocks that this model cannot have
            passed.append(f"{_name(recipe)} ({'; '.join(str(error).splitlines())})")
            continue
        told = f"{_name(recipe)} with {needed / 2**30:.2f} GiB"
        if needed <= budget.size:
            others = f"; {', '.join(passed)} would not fit" if passed else ""
            return Choice(
                recipe,
                f"method auto: {told} is the first in our order for pre-trained models, by reports/arena, that fits in "
                f"{budget.size / 2**30:.2f} GiB ({budget.of}){others}" + "".join(f"; {sentence}" for sentence in left),
            )
        passed.append(told)
    raise UsageError(
        f"--method auto: none of {', '.join(passed)} fits in {budget.size / 2**30:.2f} GiB ({budget.of}): take a "
        "smaller training.per_device_train_batch_size or training.max_length, gradient_checkpointing, dtype: bfloat16, "
        "or owlore with frozen_weights: host"
    )


def _with(
    candidate: Candidate,
    path: str,
    changes: Mapping[str, Any] | None,
    overrides: Sequence[str],
    say: Callable[[str], None],
) -> Recipe:
    """The recipe with a candidate's method, and its settings where file and command line say nothing else."""
    of_others = {name for names in SECTIONS_OF.values() for name in names} - {*SECTIONS_OF[candidate.method]}
    mine = [text for text in overrides if text.partition("=")[0].partition(".")[0].strip() not in of_others]
    content = read_contents(path, {**(changes or {}), "method": candidate.method}, mine, say)
    for section, settings in candidate.settings.items():
        given = content.get(section) or {}
        content[section] = settings | given if isinstance(given, dict) else given  # whose kind is refused
    if candidate.share is not None:
        content["sampling"].setdefault("active", max(1, round(candidate.share * _blocks(recipe_of(content, path)))))
    return recipe_of(content, path)


def _blocks(recipe: Recipe) -> int:
    """The number of blocks of a recipe's model."""
    from htsr.calibration.loading import load_config

    config = load_config(recipe.model, revision=recipe.revision, causal=True).get_text_config()
    return int(config.num_hidden_layers)


def _name(recipe: Recipe) -> str:
    section = recipe.lora or recipe.low_rank
    blocks = f"{recipe.sampling.active} blocks at a time, " if recipe.sampling is not None else ""
    return f"{recipe.method} ({blocks}rank {section.rank})" if section is not None else recipe.method
