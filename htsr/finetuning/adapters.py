"""The adapters that a recipe's section ``lora`` asks for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from htsr.errors import UsageError
from htsr.finetuning.starts import OF_STARTS, start_of, with_configs
from htsr.training.lora import lora_config
from htsr.training.lora_targets import ALL_LINEAR, module_options

if TYPE_CHECKING:
    import torch

    from htsr.analysis.result import Analysis
    from htsr.finetuning.recipe import Lora


def adapter_config(lora: Lora, model: torch.nn.Module, before: Analysis | None) -> Any:
    """PEFT's ``LoraConfig`` for the adapters of a `model`, with the names of the modules that are meant.

    Args:
        lora: section of the recipe.
        model: model without adapters; its weights are not read, and may be on the meta device. A start that is more
            than a draw is left to `htsr.finetuning.starts`.
        before: analysis of the model, where ranks follow a score.

    Raises:
        UsageError: a name, role or expression means no module; what is meant cannot be adapted, or not be merged; or
            ranks follow spectra that there are none of.
    """
    from peft import LoraConfig

    options: dict[str, Any] = {"lora_dropout": lora.dropout, "task_type": "CAUSAL_LM", **with_configs(lora.options)}
    if start_of(lora) is not None:
        options = {key: value for key, value in options.items() if key not in OF_STARTS}
    options = module_options(model, lora.targets, lora.modules_to_save, options)
    if lora.score is None:
        alpha: Any = lora.scaling * lora.rank
        return LoraConfig(r=lora.rank, lora_alpha=alpha, **options)
    if before is None:
        raise UsageError(f"ranks by {lora.score} need spectra: true")
    targets = options.pop("target_modules")
    names = None if targets == ALL_LINEAR else targets
    return lora_config(model, before, rank=lora.rank, score=lora.score, scaling=lora.scaling, modules=names, **options)
