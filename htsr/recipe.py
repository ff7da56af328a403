"""Recipes of `htsr finetune`: what they may say, read from YAML and checked before anything is loaded."""

from __future__ import annotations

import dataclasses
import re
import types
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from htsr.errors import MissingDependencyError, SourceError, UsageError
from htsr.training.block_scores import Strategy
from htsr.training.sampling import Embedding, FrozenState

Method = Literal["full", "lora", "qlora", "lisa", "owlore", "galore"]
LayerwisePolicy = Literal["none", "llr", "tempbalance", "alphadecay"]

FOLDER = Path(__file__).parent / "recipes"

_SECTIONS_OF: Mapping[str, tuple[str, ...]] = {
    "full": (),
    "lora": ("lora", "sampling"),
    "qlora": ("lora", "sampling"),
    "lisa": ("sampling",),
    "owlore": ("sampling", "low_rank"),
    "galore": ("low_rank",),
}
_OWN = {
    "output_dir": "output",
    "seed": "seed",
    "model_init_kwargs": "model and dtype",
    "resume_from_checkpoint": "--resume",
}
_LORA_OWN = {
    "r": "lora.rank",
    "lora_alpha": "lora.scaling",
    "lora_dropout": "lora.dropout",
    "rank_pattern": "lora.score",
    "alpha_pattern": "lora.score",
    "target_modules": "htsr",
    "task_type": "htsr",
}


@dataclass(frozen=True, kw_only=True)
class Data:
    """What is trained and tested on; sources as of `htsr.records.read_records`.

    Attributes:
        train: records with ``text``, ``prompt`` and ``completion``, chat ``messages``, or ``question``, ``choices`` and
            ``answer``.
        evaluation: the same, for the evaluation loss.
        evaluation_share: without `evaluation`, this share of the training records is held out for it; 0 for none.
        multiple_choice: questions whose accuracy is measured before and after.
        limit: training records at most, drawn by the seed.
    """

    train: str
    evaluation: str | None = None
    evaluation_share: float = 0.05
    multiple_choice: str | None = None
    limit: int | None = None


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Which blocks train, see `LayerSampler`.

    Attributes:
        strategy: None is the method's own: ``owlore`` for owlore, ``uniform`` for the others.
        active: γ.
        interval: K.
        top: see `LayerSampler`.
        embedding: see `LayerSampler`.
        frozen_state: see `LayerSampler`.
        threshold: τ of the outlier distribution.
        outliers: a file from `htsr outliers`; without it outliers are measured on the training data.
        calibration_samples: training records for that.
    """

    strategy: Strategy | None = None
    active: int = 2
    interval: int = 50
    top: bool = False
    embedding: Embedding = "freeze"
    frozen_state: FrozenState = "drop"
    threshold: float = 13.0
    outliers: str | None = None
    calibration_samples: int = 64


@dataclass(frozen=True, kw_only=True)
class LowRank:
    """Low-rank optimizer state, see `LowRankAdamW`.

    Attributes:
        rank: r of every low-rank matrix.
        scale: factor of the low-rank updates.
        refresh_every: T, optimizer steps between projectors.
        method: of the projector.
        moments: what becomes of them at a refresh.
        state_dtype: of the moments.
        gradients: ``project`` and ``update`` keep no full gradient of a low-rank matrix, in one process; ``update``
            has one backward a step and no clipping. The gradient norm that ``project`` clips is that in the subspaces.
    """

    rank: int = 128
    scale: float = 0.25
    refresh_every: int = 200
    method: Literal["randomized", "svd"] = "randomized"
    moments: Literal["keep", "rotate"] = "keep"
    state_dtype: Literal["float32", "bfloat16", "8bit"] = "float32"
    gradients: Literal["keep", "project", "update"] = "keep"


@dataclass(frozen=True, kw_only=True)
class Lora:
    """LoRA on all linear layers of the blocks; with qlora over weights in 4 bits.

    Attributes:
        rank: of each adapter, or the average by parameters with `score`.
        scaling: lora_alpha/r.
        dropout: of the adapters' input.
        score: ranks follow this metric of the model's analysis, see `htsr.lora_config`; None for equal ranks.
        options: any other argument of PEFT's ``LoraConfig``: use_rslora, use_dora, bias …
    """

    rank: int = 8
    scaling: float = 2.0
    dropout: float = 0.0
    score: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A fine-tuning run.

    Attributes:
        model: folder, hub id, .gguf file, or ``package:MODULE/PATH``.
        output: folder of the result.
        data: see `Data`.
        method: ``full``, ``lora``, ``qlora`` (LoRA over weights in 4 bits), ``lisa``, ``owlore`` or ``galore``.
        layerwise: policy of `htsr.layerwise`, or ``none``.
        revision: of a hub id.
        dtype: of the weights.
        seed: of everything random.
        spectra: analyze the model before and after.
        sampling: for lisa, owlore, and for adapters sampled by block with lora and qlora.
        low_rank: for owlore and galore.
        lora: for lora and qlora.
        training: any argument of TRL's ``SFTConfig``: learning_rate, max_steps, max_length, packing, report_to …

    Raises:
        UsageError: a section or a layerwise policy that has no meaning for the method.
    """

    model: str
    output: str
    data: Data
    method: Method = "owlore"
    layerwise: LayerwisePolicy = "none"
    revision: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    seed: int = 0
    spectra: bool = True
    sampling: Sampling | None = None
    low_rank: LowRank | None = None
    lora: Lora | None = None
    training: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        wanted = _SECTIONS_OF[self.method]
        for section, make in (("sampling", Sampling), ("low_rank", LowRank), ("lora", Lora)):
            if getattr(self, section) is not None and section not in wanted:
                raise UsageError(f"the section {section} has no meaning for the method {self.method}")
            needed = section in wanted and not ("lora" in wanted and section == "sampling")
            if getattr(self, section) is None and needed:
                object.__setattr__(self, section, make())
        if self.layerwise != "none" and self.lora is not None:
            raise UsageError(
                f"layerwise sets learning rates of whole matrices, which the method {self.method} does not train"
            )


def read_recipe(path: str, changes: Mapping[str, Any] | None = None) -> Recipe:
    """The recipe in a YAML file, or one that htsr carries, by its name (``one_cpu``, ``one_gpu_24gb`` …).

    Args:
        path: of the file, or a name.
        changes: top-level keys that go before the file's.

    Raises:
        SourceError: no such file, or no YAML.
        UsageError: an unknown key or a value of the wrong kind, with its place.
    """
    file = Path(path)
    if not file.exists() and (FOLDER / f"{path}.yaml").exists():
        file = FOLDER / f"{path}.yaml"
    try:
        content = _load_yaml(file.read_text(encoding="utf-8"))
    except OSError as error:
        known = ", ".join(sorted(found.stem for found in FOLDER.glob("*.yaml")))
        raise SourceError(f"{path} is neither a file nor one of the recipes {known}") from error
    except ValueError as error:
        raise SourceError(f"{file} is no YAML: {error}") from error
    if not isinstance(content, dict):
        raise SourceError(f"{file} holds no keys and values")
    content |= changes or {}
    if changes and "method" in changes:  # the file's sections may be those of another method
        content = {
            k: v
            for k, v in content.items()
            if k not in ("sampling", "low_rank", "lora") or k in _SECTIONS_OF.get(str(changes["method"]), ())
        }
    recipe: Recipe = _made(Recipe, content, file.name)
    check_training(recipe.training)
    if recipe.lora is not None:
        check_lora(recipe.lora.options)
    return recipe


def check_training(training: Mapping[str, Any]) -> None:
    """Insist that every key is an argument of SFTConfig that the recipe does not set elsewhere.

    Raises:
        UsageError: it is not.
        MissingDependencyError: TRL is not installed.
    """
    try:
        from trl.trainer.sft_config import SFTConfig
    except ImportError as error:
        raise MissingDependencyError("fine-tuning needs TRL: pip install 'htsr[finetune]'") from error
    _insist_on_arguments("training", training, SFTConfig, _OWN)


def check_lora(options: Mapping[str, Any]) -> None:
    """Insist that every key is an argument of LoraConfig that the recipe does not set elsewhere, and that W stays.

    Raises:
        UsageError: it is not, or the adapters' start would change the weights that they are merged into at the end.
    """
    from peft import LoraConfig

    _insist_on_arguments("lora.options", options, LoraConfig, _LORA_OWN)
    start = options.get("init_lora_weights", True)
    if start not in (True, "gaussian", "orthogonal"):
        raise UsageError(
            f"lora.options.init_lora_weights: {start} changes the weights or wants a step of its own; take PEFT itself"
        )


def _insist_on_arguments(section: str, given: Mapping[str, Any], kind: Any, own: Mapping[str, str]) -> None:
    known = {f.name for f in fields(kind)}
    for key in given:
        if key in own:
            raise UsageError(f"{section}.{key} is set by {own[key]}")
        if key not in known:
            raise UsageError(f"{section}.{key} is no argument of {kind.__name__}{_nearest(key, known)}")


def _load_yaml(text: str) -> Any:
    import yaml

    Loader: Any = type("Loader", (yaml.SafeLoader,), {})  # YAML 1.1 takes 1e-4 for a word; here it is a number
    number = re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$")
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", number, list("-+.0123456789"))
    try:
        return yaml.load(text, Loader)
    except yaml.YAMLError as error:
        raise ValueError(str(error).replace("\n", " ")) from error


def _made(kind: Any, content: Mapping[str, Any], where: str) -> Any:
    hints = get_type_hints(kind)
    for key in content:
        if key not in hints:
            raise UsageError(f"{where}: unknown key {key}{_nearest(key, hints)}")
    for f in fields(kind):
        missing = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        if missing and f.name not in content:
            raise UsageError(f"{where}: the key {f.name} is missing")
    return kind(**{key: _value(hints[key], value, f"{where}: {key}") for key, value in content.items()})


def _value(hint: Any, value: Any, where: str) -> Any:
    options = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    if value is None and type(None) in options:
        return None
    for option in options:
        if dataclasses.is_dataclass(option) and isinstance(value, dict):
            return _made(option, value, where)
        if get_origin(option) is Literal:
            if value in get_args(option):
                return value
            raise UsageError(f"{where} is one of {', '.join(map(str, get_args(option)))}, not {value!r}")
        if get_origin(option) is Mapping and isinstance(value, dict):
            return value
        if option is float and isinstance(value, (int, float)) and not isinstance(value, bool):
            return float(value)
        if option in (int, str, bool) and type(value) is option:
            return value
    kinds = {str: "a text", int: "a whole number", float: "a number", bool: "true or false"}
    wanted = " or ".join(kinds.get(option, "a section of keys") for option in options if option is not type(None))
    raise UsageError(f"{where} is {wanted}, not {value!r}")


def _nearest(key: Any, known: Any) -> str:
    import difflib

    near = difflib.get_close_matches(str(key), list(known), n=1)
    return f"; did you mean {near[0]}?" if near else f"; there are {', '.join(known)}" if len(known) < 20 else ""
