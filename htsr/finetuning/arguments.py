"""Arguments of TRL, PEFT and the optimizer, tried before anything is loaded; a refusal names the key.

`check_training` and `check_lora` look at keys and kinds and run when a recipe is read; `training_arguments` makes the
objects themselves, which sets up devices and processes, when the run begins.
"""

from __future__ import annotations

import enum
import importlib.util
import logging
import math
import re
import types
import warnings
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any, Literal, Union, get_args, get_origin, get_type_hints

from htsr.errors import HtsrError, MissingDependencyError, Refusals, UsageError, reason_of
from htsr.finetuning.recipe_values import kind_of, nearest

if TYPE_CHECKING:
    from htsr.finetuning.recipe import Lora, Recipe

logger = logging.getLogger(__name__)

_OWN = {
    "output_dir": "output",
    "seed": "seed",
    "model_init_kwargs": "model and dtype",
    "resume_from_checkpoint": "--resume",
    "dataset_text_field": "data.text_field",
    "hub_token": "nothing in a recipe, which is kept and pushed: log in by hf auth login, or set HF_TOKEN",
}
_LORA_OWN = {
    "r": "lora.rank",
    "lora_alpha": "lora.scaling",
    "lora_dropout": "lora.dropout",
    "rank_pattern": "lora.score",
    "alpha_pattern": "lora.score",
    "target_modules": "lora.targets",
    "modules_to_save": "lora.modules_to_save",
    "task_type": "htsr",
}
_STARTS = r"gaussian|orthogonal|mica|pissa(_niter_\d+)?|olora|eva|corda|lora_ga|loftq"
_NAMES = "pissa (pissa_niter_4), olora, eva, corda, lora_ga, loftq"
_NOT_TAKEN = {
    "loftq_config": "has no meaning here: the weights are in the 4 bits of qlora",
    "kasa_config": "changes the weights for good, so that there would be nothing to merge into; take PEFT itself",
    "arrow_config": "is for several adapters; take PEFT itself",
    "monteclora_config": "wants a loss of its own; take PEFT itself",
}
_LOOSE = ("fsdp", "debug", "parallelism_config", "init_lora_weights")  # more kinds are taken than their hints say
_POSITIVE = (
    "per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps", "max_length",
    "num_train_epochs", "logging_steps", "eval_steps", "save_steps", "save_total_limit", "dataset_num_proc",
    "pad_to_multiple_of", "eval_accumulation_steps", "torch_empty_cache_steps", "dataloader_prefetch_factor",
)  # fmt: skip
_NOT_NEGATIVE = (
    "learning_rate", "weight_decay", "warmup_steps", "warmup_ratio", "max_grad_norm", "dataloader_num_workers",
    "label_smoothing_factor", "adam_beta1", "adam_beta2", "adam_epsilon", "data_seed", "eval_delay",
    "neftune_noise_alpha", "ddp_timeout",
)  # fmt: skip
_SHARES = ("label_smoothing_factor", "adam_beta1", "adam_beta2")
_OF_THE_OPTIMIZER = ("optim", "optim_args", "learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon")
_OF_THE_SCHEDULE = ("lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "warmup_ratio")


def check_training(training: Mapping[str, Any]) -> None:
    """Insist that every key of `training` is an argument of SFTConfig, set nowhere else, with a value of its kind.

    Raises:
        UsageError: it is not.
        MissingDependencyError: TRL is not installed.
    """
    config, refusals = _sft_config(), Refusals()
    refusals.unless(_check, "training", training, config, _OWN)
    for key, value in training.items():
        refusals.unless(_check_range, key, value)
    refusals.end()


def _check_range(key: str, value: Any) -> None:
    if key == "hub_strategy" and value not in (None, "end"):
        raise UsageError("training.hub_strategy: a run pushes its result, once, at its end; leave it out")
    number = value if isinstance(value, (int, float)) and not isinstance(value, bool) else None
    if number is None:
        return
    if not math.isfinite(number):
        raise UsageError(f"training.{key} is {number}; it is a finite number")
    if key in _POSITIVE and number <= 0:
        raise UsageError(f"training.{key} is {number}; it is above 0")
    if (key in _NOT_NEGATIVE and number < 0) or (key in _SHARES and number >= 1):
        raise UsageError(f"training.{key} is {number}; it is at least 0{' and below 1' * (key in _SHARES)}")
    if key == "max_steps" and (number == 0 or number < -1):
        raise UsageError(f"training.max_steps is {number}; it is at least 1, or -1 for num_train_epochs")
    if key in ("max_steps", "num_train_epochs") and number > 10**9:
        raise UsageError(f"training.{key} is {kind_of(number)}; no run comes to more than {10**9:,}")


def check_lora(lora: Lora, method: str) -> None:
    """Insist that LoraConfig takes the options of `lora`, and that adapters of this `method` can begin as they say.

    Raises:
        UsageError: it does not, or they cannot.
    """
    from peft import LoraConfig

    from htsr.finetuning.starts import changes_weights, start_of, with_configs

    _check("lora.options", lora.options, LoraConfig, _LORA_OWN)
    wanted, key = lora.options.get("init_lora_weights", True), "lora.options.init_lora_weights"
    if wanted is not True and not (isinstance(wanted, str) and re.fullmatch(_STARTS, wanted)):
        raise UsageError(f"{key} is {kind_of(wanted)}; it is true, gaussian, orthogonal, mica, or one of {_NAMES}")
    start = start_of(lora)
    if start == "loftq" and method == "lora":
        raise UsageError(f"{key}: loftq makes up for weights in 4 bits, which are those of the method qlora")
    if changes_weights(start) and start != "loftq" and method == "qlora":
        raise UsageError(f"{key}: {start} changes the weights, which qlora keeps in 4 bits: take loftq or eva")
    if bad := sorted({*lora.options} & {*_NOT_TAKEN}):
        raise UsageError(f"lora.options.{bad[0]} {_NOT_TAKEN[bad[0]]}")

    def make(options: Mapping[str, Any]) -> Any:
        own = with_configs(options)
        return LoraConfig(r=lora.rank, **{k: v for k, v in own.items() if (k, v) != ("init_lora_weights", "loftq")})

    _tried("lora.options", lora.options, lora.options, make)


def training_arguments(recipe: Recipe) -> Any:
    """TRL's configuration for the `recipe`, with defaults that suit a CPU where there is no accelerator.

    Optimizer, schedule and trackers are tried.

    Raises:
        UsageError: ``training.KEY: why``.
        MissingDependencyError: a package that a key asks for is not installed.
    """
    import torch

    SFTConfig = _sft_config()
    defaults: dict[str, Any] = {"report_to": "none", "save_strategy": "steps", "save_steps": 100, "save_total_limit": 2}
    defaults["logging_first_step"] = True
    batch = recipe.training.get("per_device_train_batch_size")
    if isinstance(batch, int):  # an evaluation takes no more memory than a step
        defaults["per_device_eval_batch_size"] = min(batch, 8)
    if recipe.early_stopping is not None or recipe.training.get("load_best_model_at_end"):
        defaults |= _of_the_best(recipe.training)
    if recipe.training.get("push_to_hub"):
        defaults["hub_strategy"] = "end"
    if not torch.accelerator.is_available():
        defaults |= {"use_cpu": True, "bf16": False, "gradient_checkpointing": False, "dataloader_pin_memory": False}
    else:
        defaults |= {"gradient_checkpointing_kwargs": {"use_reentrant": False}}
    if recipe.sampling is not None:
        defaults["ddp_find_unused_parameters"] = True

    def made(given: Mapping[str, Any]) -> Any:
        return SFTConfig(output_dir=recipe.output, seed=recipe.seed, **(defaults | dict(given)))

    arguments = _tried("training", recipe.training, recipe.training, made)
    _check_packages(arguments)
    if arguments.bf16 and arguments.use_cpu and torch.backends.cpu.get_cpu_capability() in ("NO AVX", "AVX2"):
        logger.warning(
            "training.bf16: this processor has no instructions for bfloat16 and takes many times as long with it as in "
            "float32; leave bf16 out"
        )
    for keys, what in ((_OF_THE_OPTIMIZER, _optimizer), (_OF_THE_SCHEDULE, _schedule)):
        _tried("training", recipe.training, keys, lambda given, what=what: what(made(given)))  # type: ignore[misc]
    return arguments


def _of_the_best(given: Mapping[str, Any]) -> dict[str, Any]:
    """Defaults under which every checkpoint has an evaluation, and the best is kept."""
    strategy = given.get("eval_strategy") or given.get("save_strategy") or "steps"
    steps = given.get("eval_steps") or given.get("save_steps") or 100
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": False}
    return best | {"eval_strategy": strategy, "save_strategy": strategy, "eval_steps": steps, "save_steps": steps}


def _tried(section: str, given: Mapping[str, Any], keys: Any, make: Callable[[Mapping[str, Any]], Any]) -> Any:
    """What `make` returns for `given`; an error is blamed on the first of `keys` that brings it about alone."""
    try:
        return _quietly(make, given)
    except HtsrError:
        raise
    except Exception as error:  # a library's own check of its arguments
        culprit = ""
        for key in keys:
            if key in given:
                try:
                    _quietly(make, {key: given[key]})
                except Exception as alone:
                    if type(alone) is type(error):
                        culprit = f".{key}"
                        break
        reason = reason_of(error)
        missing = isinstance(error, ImportError) or "pip install" in reason
        kind = MissingDependencyError if missing else UsageError
        raise kind(f"{section}{culprit}: {reason}") from error


def _quietly(make: Callable[[Mapping[str, Any]], Any], given: Mapping[str, Any]) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they come again where the run makes its own
        return make(given)


def _check_packages(arguments: Any) -> None:
    from transformers.integrations.integration_utils import get_reporting_integration_callbacks

    if getattr(arguments, "use_liger_kernel", False):
        if importlib.util.find_spec("liger_kernel") is None:
            raise MissingDependencyError("training.use_liger_kernel needs liger-kernel: pip install liger-kernel")
        if not _runs_kernels():
            raise UsageError("training.use_liger_kernel: its kernels run on an accelerator, and there is none here")
    try:
        for callback in get_reporting_integration_callbacks(arguments.report_to):  # type: ignore[no-untyped-call]
            callback()
    except (ImportError, RuntimeError, AssertionError) as error:
        raise MissingDependencyError(f"training.report_to: {reason_of(error)}") from error
    except Exception as error:  # whatever a tracker says of its name or its settings
        raise UsageError(f"training.report_to: {reason_of(error)}") from error


def _runs_kernels() -> bool:
    import torch

    return torch.accelerator.is_available()


def _optimizer(arguments: Any) -> Any:
    """The optimizer over one small parameter, where its class can be made without the model."""
    import torch
    from transformers import Trainer

    name = str(getattr(arguments.optim, "value", arguments.optim))
    if any(part in name for part in ("galore", "apollo", "lomo")):
        return None
    kind, options = Trainer.get_optimizer_cls_and_kwargs(arguments)
    return kind([torch.nn.Parameter(torch.zeros(1))], **({"weight_decay": arguments.weight_decay} | options))


def _schedule(arguments: Any) -> Any:
    import torch
    from transformers import get_scheduler

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-3)
    options: Any = arguments.lr_scheduler_kwargs or {}
    warmup = arguments.get_warmup_steps(10)
    return get_scheduler(arguments.lr_scheduler_type, optimizer, warmup, 10, scheduler_specific_kwargs=options)


def _sft_config() -> Any:
    try:
        from trl.trainer.sft_config import SFTConfig
    except ImportError as error:
        raise MissingDependencyError("fine-tuning needs TRL: pip install 'htsr[finetune]'") from error
    return SFTConfig


def _check(section: str, given: Mapping[str, Any], kind: Any, own: Mapping[str, str]) -> None:
    known = {f.name for f in fields(kind)}
    hints, refusals = get_type_hints(kind), Refusals()

    def check(key: str) -> None:
        if key in own:
            raise UsageError(f"{section}.{key} is set by {own[key]}")
        if key not in known:
            raise UsageError(f"{section}.{key} is no argument of {kind.__name__}{nearest(key, known)}")
        if key not in _LOOSE and not _fits(hints[key], given[key]):
            hint = hints[key].__name__ if isinstance(hints[key], type) else str(hints[key]).replace("typing.", "")
            raise UsageError(f"{section}.{key} is {kind_of(given[key])}, and {kind.__name__} wants {hint}")

    for key in given:
        refusals.unless(check, key)
    refusals.end()


def _fits(hint: Any, value: Any) -> bool:
    """Whether a value may be meant by a type hint; hints that are not of plain kinds are left to the library."""
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        return any(_fits(option, value) for option in get_args(hint))
    if origin is Literal:
        return value in get_args(hint)
    if hint is type(None):
        return value is None
    if hint in (int, float):
        return isinstance(value, (int, float) if hint is float else int) and not isinstance(value, bool)
    if hint in (str, bool):
        return isinstance(value, hint)
    if hint is dict or origin in (dict, Mapping):
        return isinstance(value, dict)
    if hint is list or origin is list:
        inner = get_args(hint)
        return isinstance(value, list) and all(_fits(inner[0], item) for item in value if inner)
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return isinstance(value, str)
    return True
