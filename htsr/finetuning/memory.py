"""The memory of the run of a recipe: what `htsr memory` predicts for it, and what it took."""

from __future__ import annotations

import resource
import sys
from typing import TYPE_CHECKING, Any

from htsr.finetuning.checkpoints import count_processes
from htsr.finetuning.placing import is_to_be_sharded
from htsr.finetuning.starts import OF_STARTS
from htsr.training.memory.plan import SAMPLED, Logits, MemoryPlan, beside
from htsr.training.memory.prediction import predict_memory

if TYPE_CHECKING:
    from htsr.finetuning.recipe import Recipe


def setting_of(recipe: Recipe, arguments: Any, longest: int | None = None) -> dict[str, Any]:
    """The keyword arguments of `predict_memory` for the run of a `recipe` in one process.

    An embedding that is drawn like a block (``sampled``) is counted as one that trains, which is the most it can take.

    Args:
        recipe: recipe of the run.
        arguments: arguments of TRL, as `training_arguments` makes them of the recipe.
        longest: number of tokens of the longest record, where it is known; ``max_length`` and packing go with it.

    Examples:
        >>> from types import SimpleNamespace
        >>> from htsr.finetuning.memory import setting_of
        >>> from htsr.finetuning.recipe import Data, Recipe
        >>> recipe = Recipe(model="org/name", output="out", data=Data(train="train.jsonl"), method="lisa")
        >>> arguments = {"per_device_train_batch_size": 4, "max_length": 1024, "packing": False, "use_cpu": True}
        >>> arguments["gradient_accumulation_steps"] = 1
        >>> setting = setting_of(recipe, SimpleNamespace(**arguments, gradient_checkpointing=True), longest=300)
        >>> setting["batch"], setting["sequence"], setting["active_blocks"], setting["embeddings"]
        (4, 300, 2, 'freeze')
    """
    sampling, low_rank = recipe.sampling, recipe.low_rank
    length = arguments.max_length
    if longest is not None and not (arguments.packing and length):
        length = longest if length is None else min(length, longest)
    setting: dict[str, Any] = {
        "method": recipe.method,
        "batch": arguments.per_device_train_batch_size,
        "sequence": length or 1024,
        "dtype": {"auto": None}.get(recipe.dtype, recipe.dtype),
        "checkpointing": bool(arguments.gradient_checkpointing),
        "rounding": recipe.rounds,
        "frozen_weights": recipe.frozen_weights,
        "logits": logits_of(arguments),
        "accumulation": arguments.gradient_accumulation_steps,
        "model_options": recipe.model_options,
        "revision": recipe.revision,
    }
    data = recipe.data
    if data.evaluation or data.evaluation_share or data.evaluation_records:  # by default in no larger batches
        setting["evaluation"] = int(recipe.training.get("per_device_eval_batch_size") or 0)
    if sampling is not None:
        setting |= {"active_blocks": sampling.active, "unit": sampling.unit, "frozen_state": sampling.frozen_state}
    if sampling is not None and recipe.method in SAMPLED:
        setting["embeddings"] = "train" if sampling.embedding == "sampled" else sampling.embedding
    if low_rank is not None:
        if sampling is None:
            setting["embeddings"] = low_rank.embedding
        setting |= {"rank": low_rank.rank, "state_dtype": low_rank.state_dtype, "gradients": low_rank.gradients}
        setting["projector"] = low_rank.method
    if (gum := recipe.gum) is not None:
        setting |= {"active_blocks": gum.active, "base": gum.base, "unit": gum.unit}
    if recipe.lora is not None:
        lora = recipe.lora
        setting |= {"rank": lora.rank, "targets": lora.targets, "modules_to_save": lora.modules_to_save}
        options = {key: value for key, value in lora.options.items() if key not in OF_STARTS}
        setting["lora_options"] = options | ({"lora_dropout": lora.dropout} if lora.dropout else {})
        setting["merge"] = lora.merge
    return setting


def logits_of(arguments: Any, *, on_accelerator: bool | None = None) -> Logits:
    """How the loss of TRL's SFTTrainer reads logits: whole only where labels are smoothed.

    Args:
        arguments: arguments of TRL.
        on_accelerator: whether an accelerator with Triton trains; None where the arguments tell.
    """
    if getattr(arguments, "label_smoothing_factor", 0):
        return "whole"
    if on_accelerator is None:
        on_accelerator = not arguments.use_cpu and arguments.device.type in ("cuda", "xpu")
    return "fused" if on_accelerator else "chunked"


def is_planned(arguments: Any) -> bool:
    """Whether a plan is made of the run of TRL's `arguments`: not where a model is sharded over processes."""
    sharded = is_to_be_sharded(arguments) or getattr(arguments, "deepspeed_plugin", None) is not None
    return not sharded or count_processes(arguments) == 1


def predicted_memory(recipe: Recipe, arguments: Any, longest: int | None = None) -> MemoryPlan | None:
    """The plan of the run of a `recipe`; None where it is sharded over processes, of which no plan is made.

    Args:
        recipe: recipe of the run.
        arguments: arguments of TRL.
        longest: number of tokens of the longest record, where it is known.

    Raises:
        SourceError: the model's configuration cannot be read, or no training step of it simulated.
        UsageError: the model cannot have such a rank or so many active blocks.
    """
    if not is_planned(arguments):
        return None
    return predict_memory(recipe.model, **setting_of(recipe, arguments, longest))


def predicted_mib(recipe: Recipe, arguments: Any, longest: int | None = None) -> float | None:
    """The plan of the run of a `recipe` in MiB, of what `peak` measures; None where no plan is made.

    Args:
        recipe: recipe of the run.
        arguments: arguments of TRL.
        longest: number of tokens of the longest record, where it is known.

    Raises:
        SourceError: the model's configuration cannot be read, or no training step of it simulated.
        UsageError: the model cannot have such a rank or so many active blocks.
    """
    plan = predicted_memory(recipe, arguments, longest)
    if plan is None:
        return None
    return (plan.total + (0 if _counts_memory() else beside(plan)["process"])) / 2**20


def reset_peak() -> None:
    """Begin to count the peak memory of the accelerator, where there is one."""
    import torch

    if _counts_memory():
        torch.accelerator.reset_peak_memory_stats()


def peak() -> dict[str, Any]:
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
