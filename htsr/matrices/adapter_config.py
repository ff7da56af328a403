"""What an adapter folder says about itself in ``adapter_config.json``, checked."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from htsr.errors import SourceError
from htsr.matrices.folders import read_json

CONFIG = "adapter_config.json"
_PROMPTS = (
    "PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "ADAPTION_PROMPT", "CPT", "CARTRIDGE",
)  # fmt: skip
# starts of A and B that leave W + ΔW = W where training begins
_PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")
# options with which there is more to LoRA than W + ΔW of whole layers
_MORE_THAN_LORA = (
    "velora_config", "alora_invocation_tokens", "use_qalora", "monteclora_config", "use_bdlora", "arrow_config",
    "kasa_config", "layer_replication", "trainable_token_indices", "target_parameters", "megatron_config",
)  # fmt: skip


@dataclass(frozen=True)
class AdapterConfig:
    """The configuration of an adapter.

    Attributes:
        folder: folder of the adapter.
        method: PEFT's name for the kind of adapter, such as ``LORA``.
        base: path or hub id of the model that the adapter was trained on; None where the file names none.
        alpha: LoRA's `lora_alpha`; None where the file gives none.
        alpha_pattern: values of `lora_alpha` for some modules, by a pattern of their names.
        rank_stabilised: whether ΔW is scaled by alpha/√r instead of alpha/r.
        dora: whether the adapter is DoRA.
        transposed: whether the adapted layers store (in, out), as GPT-2's do.
        needs_base: reason why ΔW depends on the base; empty where it does not.
        at_random: whether training began from a random part of the base's weights, which cannot be computed again.
        parameters: names of adapted parameters that are not layers of their own.
        saved: last components of the names of modules that are trained and saved whole.
        tokens: whether single rows of embeddings are trained.
    """

    folder: Path
    method: str
    base: str | None
    alpha: float | None
    alpha_pattern: Mapping[str, float]
    rank_stabilised: bool
    dora: bool
    transposed: bool
    needs_base: str
    at_random: bool
    parameters: tuple[str, ...]
    saved: tuple[str, ...]
    tokens: bool

    @property
    def changes_weights(self) -> bool:
        """Whether the method changes weights at all; prompts do not."""
        return self.method not in _PROMPTS

    def scaling(self, module: str, rank: int) -> float:
        """The number that B·A is multiplied with.

        Args:
            module: name of the adapted layer.
            rank: rank r of its factors A and B.

        Returns:
            alpha/r, or alpha/√r with rank-stabilised LoRA.
        """
        matches = (alpha for key, alpha in self.alpha_pattern.items() if re.match(rf"(.*\.)?({key})$", module))
        alpha = next(matches, self.alpha)
        return (rank if alpha is None else alpha) / (rank**0.5 if self.rank_stabilised else rank)


def read_adapter_config(folder: Path) -> AdapterConfig:
    """The configuration of the adapter in `folder`.

    Raises:
        SourceError: the file is missing or not a JSON object, or a value in it has no meaning; the message names the
            key.
    """
    content = read_json(folder / CONFIG)

    def value(key: str, kinds: tuple[type, ...], default: Any) -> Any:
        found = content.get(key, default)
        good = found is None or (isinstance(found, kinds) and not (isinstance(found, bool) and bool not in kinds))
        if not good or not _finite(found):
            raise SourceError(f"{folder / CONFIG}: {key} is {_short(found)}, which has no meaning there")
        return default if found is None else found

    def strings(key: str) -> tuple[str, ...]:
        found = value(key, (list, str), [])
        if not isinstance(found, str) and not all(isinstance(item, str) for item in found):
            raise SourceError(f"{folder / CONFIG}: {key} is {_short(found)}, not names of modules")
        return (found,) if isinstance(found, str) else tuple(found)

    method = value("peft_type", (str,), "LORA")
    strings("target_modules")
    patterns = value("alpha_pattern", (dict,), {}), value("rank_pattern", (dict,), {})
    for key, number in (pair for pattern in patterns for pair in pattern.items()):
        if not (_is_pattern(key) and isinstance(number, (int, float)) and _finite(number)):
            raise SourceError(f"{folder / CONFIG}: {_short(key)} → {_short(number)} is no pattern with its number")
    start = content.get("init_lora_weights", True)
    if not isinstance(start, (bool, str, type(None))):
        raise SourceError(f"{folder / CONFIG}: init_lora_weights is {_short(start)}, which has no meaning there")
    parameters, dora = strings("target_parameters"), value("use_dora", (bool,), False)
    more = [key for key in _MORE_THAN_LORA if content.get(key)]
    reason = f"it has {more[0]}" if more else ""
    if start not in _PLAIN_STARTS:
        reason = f"it began as {start}, which takes a part out of the base's weights"
    return AdapterConfig(
        folder=folder,
        method=method,
        base=value("base_model_name_or_path", (str,), "") or None,
        alpha=value("lora_alpha", (int, float), None),
        alpha_pattern=patterns[0],
        rank_stabilised=value("use_rslora", (bool,), False),
        dora=dora,
        transposed=value("fan_in_fan_out", (bool,), False),
        needs_base=reason if method == "LORA" else f"it is of the kind {method}",
        at_random=str(start).startswith("pissa_niter_"),
        parameters=parameters,
        saved=tuple(name.rpartition(".")[2] for name in strings("modules_to_save")),
        tokens=bool(content.get("trainable_token_indices")),
    )


def _finite(found: Any) -> bool:
    try:
        return not isinstance(found, (int, float)) or math.isfinite(found)
    except OverflowError:
        return False


def _is_pattern(key: str) -> bool:
    try:
        re.compile(key)
    except (re.error, RecursionError, OverflowError):
        return False
    return True


def _short(found: Any) -> str:
    text = repr(found)
    return text if len(text) <= 60 else f"{text[:57]}..."
