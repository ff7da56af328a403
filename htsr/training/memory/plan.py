"""What decides about the memory of a training run, and how much it takes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

if TYPE_CHECKING:
    from htsr.training.lowrank.moments import StateDtype
    from htsr.training.lowrank.optimizer import Gradients

TrainingMethod: TypeAlias = Literal["full", "lora", "qlora", "galore", "lisa", "owlore"]
Embeddings: TypeAlias = Literal["train", "lowrank", "freeze"]

METHODS: tuple[TrainingMethod, ...] = ("full", "lora", "qlora", "galore", "lisa", "owlore")
DTYPES = ("float32", "bfloat16", "float16")
LOW_RANK = ("galore", "owlore")
SAMPLED = ("lisa", "owlore")
PARTS = ("weights", "gradients", "optimizer", "projectors", "activations", "logits", "workspace")


@dataclass(frozen=True)
class Setting:
    """What decides about memory beside the model, see `predict_memory`; its defaults are filled in.

    Attributes:
        method: how the model is trained.
        batch: sequences per backward pass.
        sequence: tokens per sequence.
        rank: rank of the adapters, or dimension of the gradients' subspaces.
        active_blocks: number of blocks that train at a time.
        dtype: dtype of the weights; None for the configuration's.
        checkpointing: whether activations are checkpointed.
        state_dtype: dtype of Adam's moments; None for the parameter's own.
        embeddings: what becomes of embedding and head.
        gradients: when gradients are released.
    """

    method: TrainingMethod
    batch: int
    sequence: int
    rank: int
    active_blocks: int
    dtype: str | None
    checkpointing: bool
    state_dtype: StateDtype | None
    embeddings: Embeddings
    gradients: Gradients


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes at the moment of the peak, by part; they add up to `total`.

    Attributes:
        model: name of the model.
        method: how the model is trained.
        moment: when the peak is: ``forward``, ``backward`` or ``step``.
        total: bytes of all parts.
        weights: bytes of parameters and buffers, adapters included.
        gradients: bytes of the gradients that wait for the optimizer at that moment.
        optimizer: bytes of Adam's moments.
        projectors: bytes of the bases of the low-rank subspaces.
        activations: bytes of what backward needs, and of what forward and backward are working on.
        logits: bytes of tensors of batch × sequence × vocabulary: logits, their logarithms and gradients.
        workspace: bytes of the optimizer's temporaries, or of a de-quantised matrix.
        parameters: number of the model's parameters, adapters included.
        trainable: number of the parameters that train.
    """

    model: str
    method: TrainingMethod
    moment: str
    total: int
    weights: int
    gradients: int
    optimizer: int
    projectors: int
    activations: int
    logits: int
    workspace: int
    parameters: int
    trainable: int


@dataclass(frozen=True)
class MemoryPlans:
    """Plans of one model side by side.

    Attributes:
        label: name of the model.
        plans: one plan for each way to train it.
    """

    label: str
    plans: tuple[MemoryPlan, ...]


PROCESS = 525 << 20  # resident with torch 2.13, transformers 5.24, TRL 1.16 and datasets 5.2 imported, nothing loaded


def beside(plan: MemoryPlan) -> dict[str, int]:
    """Bytes that a run on a CPU has resident and that are no part of a `plan`'s total.

    Returns:
        Bytes by name. ``process``: the interpreter with the packages of a fine-tuning run, all the time. ``merging``:
        the weights once more after training, into which adapters are merged.
    """
    return {"process": PROCESS, "merging": plan.weights if plan.method in ("lora", "qlora") else 0}
