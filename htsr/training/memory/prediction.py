"""What a training run will need at its peak, by part, from the configuration alone.

One forward and backward pass runs on tensors without values (torch's FakeTensor), so that every architecture, and
activation checkpointing, is counted as torch would allocate it; optimizer states are added by their formulas. Not
counted: the CUDA context, kernels' own workspaces, fragmentation of the allocator, the data; and on a CPU, where
``peak_mib`` of a run is of the whole process, what `beside` says.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, Union, get_args

from htsr.errors import HtsrError, SourceError, UsageError, reason_of
from htsr.matrices.adapters import base_of, is_adapter
from htsr.training.memory.plan import (
    DRAWN,
    DTYPES,
    LOW_RANK,
    METHODS,
    SAMPLED,
    STREAMED,
    Embeddings,
    FrozenWeights,
    Logits,
    MemoryPlan,
    Setting,
    TrainingMethod,
)

if TYPE_CHECKING:
    import torch

    from htsr.training.lowrank.gum import Base
    from htsr.training.lowrank.moments import StateDtype
    from htsr.training.lowrank.released import Gradients
    from htsr.training.lowrank.rounding import Rounding
    from htsr.training.lowrank.subspace import Method as Projector
    from htsr.training.sampling.members import Unit
    from htsr.training.sampling.states import FrozenState


Source: TypeAlias = Union[str, "os.PathLike[str]", "torch.nn.Module"]


def predict_memory(
    source: Source,
    method: TrainingMethod = "full",
    *,
    batch: int = 1,
    sequence: int = 512,
    rank: int | None = None,
    active_blocks: int | None = None,
    dtype: str | None = None,
    checkpointing: bool = False,
    state_dtype: StateDtype | None = None,
    embeddings: Embeddings | None = None,
    gradients: Gradients = "keep",
    rounding: Rounding | None = None,
    frozen_weights: FrozenWeights = "device",
    targets: str | Sequence[str] = "all-linear",
    modules_to_save: Sequence[str] = (),
    lora_options: Mapping[str, Any] | None = None,
    model_options: Mapping[str, Any] | None = None,
    base: Base = "adamw",
    unit: Unit = "block",
    logits: Logits = "whole",
    merge: bool = True,
    accumulation: int = 1,
    projector: Projector | None = None,
    frozen_state: FrozenState = "drop",
    evaluation: int = 0,
    revision: str | None = None,
) -> MemoryPlan:
    """Peak memory of training a causal language model, without loading it.

    Args:
        source: a folder with a config.json (weights are not needed), that file, a .gguf file, each also as
            ``package:MODULE/PATH``, a hub id (only its configuration is fetched), or a transformers model.
        method: ``full``; ``lora`` and ``qlora`` on all linear layers of the blocks; ``galore`` and ``apollo``
            (`LowRankAdamW`), the latter with a random projection that is not stored; ``lisa`` and ``owlore``: some
            blocks at a time, the latter at low rank; ``gum`` (`GUM`): some blocks at full rank at a time, the others at
            low rank. The active blocks are taken to be the lowest, from which backward is longest; under ``gum`` those
            units of the draws that take most: with embeddings ``lowrank`` embedding and head are one of them.
        batch: sequences per backward pass.
        sequence: tokens per sequence, all of them real.
        rank: rank of the adapters (8 by default), or dimension of the gradients' subspaces: 128 by default, under
            ``apollo`` 256 (APOLLO-Mini has 1), halved for a small model until a matrix of a block can have it. The plan
            says which.
        active_blocks: number γ of blocks that ``lisa`` and ``owlore`` train at a time, and that ``gum`` trains at full
            rank; 2 by default, or the only one. Under ``lora`` and ``qlora`` the adapters of so many blocks, as in a
            recipe with the section sampling; of all by default, or of 2 where frozen weights are streamed.
        dtype: dtype of the weights; by default the configuration's.
        checkpointing: whether activations are checkpointed, non-reentrant, per block.
        state_dtype: dtype of Adam's moments; by default float32 under the methods with a low rank, else the
            parameter's own.
        embeddings: what becomes of embedding and head: under ``lisa`` and ``owlore`` ``freeze``, the default as in
            `LayerSampler`, or ``train`` as in the papers; ``train`` is that of ``galore``, ``apollo`` and ``gum``,
            which can ``freeze`` them, too; under the methods with a low rank also ``lowrank``, with low-rank states.
        gradients: what the methods with a low rank do with gradients, see `LowRankAdamW`; ``apollo`` has no
            ``project``.
        rounding: how weights that train in bfloat16 or float16 are rounded, see `LowRankAdamW`; by default
            ``stochastic``, as in a recipe. ``nearest`` is torch's fused AdamW under the methods without low-rank state.
        frozen_weights: where the weights of blocks live that do not train now: on the ``device``, or in memory of the
            ``host`` or on ``disk``, from which they are streamed (`stream_frozen`); for ``lora``, ``lisa``, ``owlore``.
        targets: which modules have adapters under ``lora`` and ``qlora``, by name, role or regular expression, as
            ``lora.targets`` in a recipe.
        modules_to_save: names or roles of modules that train whole beside adapters.
        lora_options: further arguments of PEFT's ``LoraConfig``; ``use_dora`` and ``lora_dropout`` keep more of the
            activations.
        model_options: how transformers makes the model, as in a recipe: attn_implementation and attributes of the
            configuration; for a source that is read.
        base: what trains the matrices under ``gum``: ``adamw``, or ``muon`` with one moment.
        unit: what is drawn: a ``block``, or each ``matrix`` for itself: under ``gum`` as many as γ blocks have, taken
            to be the largest; otherwise as many as have the parameters of γ blocks, taken to be one of the first block
            and the others of the last.
        logits: how the loss reads what the head says: ``whole``, as the model's own loss does in a loop of one's own;
            tile by tile, as TRL's SFTTrainer does: ``fused`` by kernels of an accelerator, ``chunked`` without them, on
            a CPU, where the temporaries of a tile take several times its memory.
        merge: whether adapters are merged into the weights after training, which a run on a CPU needs them twice for.
        accumulation: backward passes of a step (``gradient_accumulation_steps``); from the second on the gradients that
            are kept lie beside the activations.
        projector: how the gradients' subspaces are found, ``method`` of `LowRankAdamW`: ``randomized``, the default,
            ``svd``, or, the default of ``apollo``, ``random``, which is not stored.
        frozen_state: what becomes of the optimizer state of a sampled block that is frozen, see `LayerSampler`:
            ``keep`` takes in the end that of all blocks.
        evaluation: sequences in a batch of the evaluations between steps, which keep no activations; 0 for none, or for
            no more than in training, which take less.
        revision: branch, tag or commit of a hub id.

    Returns:
        The `MemoryPlan` of the peak, in bytes.

    Raises:
        SourceError: the source is no configuration of a causal language model.
        UsageError: an option has no meaning, or the model cannot have this rank or so many active blocks.

    Examples:
        AdamW keeps two moments of four bytes for each float32 parameter; LISA keeps them for what trains now:

        >>> import htsr
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "vocab_size": 99}
        >>> model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2))
        >>> full = htsr.predict_memory(model, "full", sequence=16)
        >>> lisa = htsr.predict_memory(model, "lisa", active_blocks=1, sequence=16)
        >>> full.optimizer == 8 * full.parameters, lisa.optimizer == 8 * lisa.trainable
        (True, True)
        >>> lisa.total < full.total
        True
    """
    given = {name: value for name, value in locals().items() if name not in ("source", "method", "batch")}
    _insist_on_one(batch=batch)
    return plans_by_batch(source, method, **given)(batch)


def plans_by_batch(
    source: Source,
    method: TrainingMethod = "full",
    *,
    model_options: Mapping[str, Any] | None = None,
    revision: str | None = None,
    **options: Any,
) -> Callable[[int], MemoryPlan]:
    """What `predict_memory` says for any batch; two of them or three are simulated, however many are asked for.

    Args:
        source: folder, file, hub id or model, as `predict_memory` takes it.
        method: how the model is trained.
        model_options: how transformers makes the model.
        revision: branch, tag or commit of a hub id.
        **options: the other options of `predict_memory`, without the batch.

    Raises:
        SourceError: the source is no configuration of a causal language model.
        UsageError: an option has no meaning, or the model cannot have this rank or so many active blocks.
    """
    known = {name: value for name, value in (predict_memory.__kwdefaults__ or {}).items() if name in _OF_SETTING}
    setting = _setting(method, **(known | options))
    from htsr.training.memory.by_batch import PlansByBatch
    from htsr.training.memory.simulation import Simulation

    label, config = _configuration(source, revision, model_options)
    halves = options.get("rank") is None and method in LOW_RANK

    @contextmanager
    def told() -> Iterator[None]:
        try:
            yield
        except HtsrError:
            raise
        except Exception as error:  # whatever transformers' code for a model raises on sizes that do not go together
            raise SourceError(f"a training step of {label} cannot be simulated: {reason_of(error)}") from error

    with told():
        plans = PlansByBatch(Simulation(label, config, setting, halves_rank=halves))
    return told()(plans)


_OF_SETTING = frozenset(field.name for field in fields(Setting)) - {"method"}


def _setting(
    method: TrainingMethod,
    *,
    sequence: int,
    rank: int | None,
    active_blocks: int | None,
    dtype: str | None,
    checkpointing: bool,
    state_dtype: StateDtype | None,
    embeddings: Embeddings | None,
    gradients: Gradients,
    rounding: Rounding | None,
    frozen_weights: FrozenWeights,
    targets: str | Sequence[str],
    modules_to_save: Sequence[str],
    lora_options: Mapping[str, Any] | None,
    base: Base,
    unit: Unit,
    logits: Logits,
    merge: bool,
    accumulation: int,
    projector: Projector | None,
    frozen_state: FrozenState,
    evaluation: int,
) -> Setting:
    """The setting with its defaults filled in; options of no meaning are refused."""
    from htsr.training.lowrank.rounding import ROUNDINGS

    if method not in METHODS:
        raise UsageError(f"unknown method {method!r}: one of {', '.join(METHODS)}")
    for name, value, known in (
        ("dtype", dtype, DTYPES),
        ("state_dtype", state_dtype, ("float32", "bfloat16", "8bit")),
        ("embeddings", embeddings, ("train", "lowrank", "freeze")),
        ("gradients", gradients, ("keep", "project", "update")),
        ("rounding", rounding, ROUNDINGS),
        ("frozen_weights", frozen_weights, get_args(FrozenWeights)),
        ("base", base, ("adamw", "muon")),
        ("unit", unit, ("block", "matrix")),
        ("logits", logits, get_args(Logits)),
        ("projector", projector, ("randomized", "svd", "random")),
        ("frozen_state", frozen_state, ("drop", "keep", "offload")),
    ):
        if value is not None and value not in known:
            raise UsageError(f"unknown {name} {value!r}: one of {', '.join(known)}")
    if embeddings is not None and not embeddings_fit(method, embeddings):
        where = _listed([known for known in METHODS if embeddings_fit(known, embeddings)])
        raise UsageError(f"embeddings={embeddings!r} is for {where}, not for {method}")
    if not gradients_fit(method, gradients):
        where = _listed([known for known in METHODS if gradients_fit(known, gradients)])
        raise UsageError(f"gradients={gradients!r} is for {where}, not for {method}")
    if frozen_weights != "device" and method not in STREAMED:
        raise UsageError(f"frozen_weights={frozen_weights!r} is for {', '.join(STREAMED)}, not for {method}")
    if (targets != "all-linear" or modules_to_save or lora_options) and method not in ("lora", "qlora"):
        raise UsageError(f"targets, modules_to_save and lora_options are those of adapters, which {method} has not")
    for name, differs, value in (("base", base != "adamw", base), ("unit", unit != "block", unit)):
        fit = ("gum",) if name == "base" else DRAWN
        if differs and method not in fit:
            raise UsageError(f"{name}={value!r} is for {', '.join(fit)}, not for {method}")
    if active_blocks is not None and method not in DRAWN:
        raise UsageError(f"active_blocks={active_blocks} is for {', '.join(DRAWN)}, not for {method}")
    rank = rank if rank is not None else 256 if method == "apollo" else 128 if method in LOW_RANK else 8
    _insist_on_one(sequence=sequence, rank=rank, active_blocks=active_blocks, accumulation=accumulation)
    if evaluation < 0:
        raise UsageError(f"evaluation is {evaluation}; it is at least 0")
    if accumulation > 1 and gradients == "update":
        raise UsageError("gradients='update' takes one backward a step: accumulation is 1")
    with_projector = ("apollo",) if projector == "random" else LOW_RANK
    if projector is not None and method not in with_projector:
        raise UsageError(f"projector={projector!r} is for {', '.join(with_projector)}, not for {method}")
    if frozen_state != "drop" and (method not in DRAWN or method == "gum"):
        raise UsageError(f"frozen_state={frozen_state!r} is for methods that sample blocks, not for {method}")
    return Setting(
        method=method,
        sequence=sequence,
        rank=rank,
        active_blocks=active_blocks,
        dtype=dtype,
        checkpointing=checkpointing,
        state_dtype=state_dtype or ("float32" if method in LOW_RANK else None),
        embeddings=embeddings or ("freeze" if method in SAMPLED else "train"),
        gradients=gradients,
        rounding=rounding or "stochastic",
        frozen_weights=frozen_weights,
        targets=targets if isinstance(targets, str) else tuple(targets),
        modules_to_save=tuple(modules_to_save),
        lora_options=lora_options or {},
        base=base,
        unit=unit,
        logits=logits,
        merge=merge,
        accumulation=accumulation,
        projector=projector or ("random" if method == "apollo" else "randomized"),
        frozen_state=frozen_state,
        evaluation=evaluation,
    )


def _insist_on_one(**numbers: int | None) -> None:
    for name, number in numbers.items():
        if number is not None and number < 1:
            raise UsageError(f"{name} is {number}; it is at least 1")


def gradients_fit(method: str, gradients: str) -> bool:
    """Whether this `method` can treat `gradients` so."""
    return gradients == "keep" or (method in LOW_RANK and not (method == "apollo" and gradients == "project"))


def embeddings_fit(method: TrainingMethod, embeddings: Embeddings) -> bool:
    """Whether `embeddings` is a way in which this `method` can treat embedding and head."""
    return embeddings == "train" or method in LOW_RANK or (embeddings == "freeze" and method in SAMPLED)


def _listed(names: list[TrainingMethod]) -> str:
    return f"{', '.join(names[:-1])} and {names[-1]}"


def _configuration(source: Source, revision: str | None, options: Mapping[str, Any] | None) -> tuple[str, Any]:
    if not isinstance(source, (str, os.PathLike)):
        from htsr.calibration.loading import check_config
        from htsr.matrices.modules import unwrapped

        config = getattr(unwrapped(source), "config", None)
        if config is None:
            raise SourceError(f"{type(source).__name__} has no config; memory is predicted of transformers models")
        if options:
            raise UsageError("model_options are for a configuration that is read, and a model has its own")
        check_config(type(unwrapped(source)).__name__, config, causal=True)
        return type(unwrapped(source)).__name__, config
    from htsr.calibration.loading import load_config

    name = os.fspath(source)
    path = Path(name).expanduser()
    if path.is_file() and path.suffix != ".gguf":
        path = path.parent
    if path.is_dir() and not (path / "config.json").is_file():
        if is_adapter(path):
            base = f" of {named}" if (named := base_of(path)) else ", and names no base model"
            raise SourceError(f"{path} is an adapter{base}, and memory is predicted of its base model: give that")
        raise SourceError(f"{path} has no config.json, from which memory is predicted")
    return name, load_config(str(path) if path.is_dir() else name, revision=revision, causal=True, options=options)
