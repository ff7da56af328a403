"""What decides about the memory of a training run, and how much it takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from htsr.results import Column, Record, Table, Tabular

if TYPE_CHECKING:
    from htsr.training.lowrank.gum import Base
    from htsr.training.lowrank.moments import StateDtype
    from htsr.training.lowrank.released import Gradients
    from htsr.training.lowrank.rounding import Rounding
    from htsr.training.lowrank.subspace import Method as Projector
    from htsr.training.sampling.members import Unit
    from htsr.training.sampling.states import FrozenState

TrainingMethod: TypeAlias = Literal["full", "lora", "qlora", "galore", "apollo", "gum", "lisa", "owlore"]
Embeddings: TypeAlias = Literal["train", "lowrank", "freeze"]
FrozenWeights: TypeAlias = Literal["device", "host", "disk"]
Logits: TypeAlias = Literal["whole", "chunked", "fused"]

METHODS: tuple[TrainingMethod, ...] = ("full", "lora", "qlora", "galore", "apollo", "gum", "lisa", "owlore")
DTYPES = ("float32", "bfloat16", "float16")
LOW_RANK = ("galore", "apollo", "gum", "owlore")
SAMPLED = ("lisa", "owlore")
DRAWN = ("lora", "qlora", *SAMPLED, "gum")  # methods that may train some blocks at a time, or at full rank
STREAMED = ("lora", "lisa", "owlore")  # methods whose frozen blocks may live in host memory
PARTS = ("weights", "gradients", "optimizer", "projectors", "activations", "logits", "workspace")


@dataclass(frozen=True)
class Setting:
    """What decides about memory beside the model, see `predict_memory`; its defaults are filled in.

    Attributes:
        method: how the model is trained.
        sequence: tokens per sequence.
        rank: rank of the adapters, or dimension of the gradients' subspaces.
        active_blocks: number of blocks that train at a time, or at full rank, where the method samples; None for 2, or
            the only one.
        dtype: dtype of the weights; None for the configuration's.
        checkpointing: whether activations are checkpointed.
        state_dtype: dtype of Adam's moments; None for the parameter's own.
        embeddings: what becomes of embedding and head.
        gradients: when gradients are released.
        rounding: how narrow weights are rounded.
        frozen_weights: where the weights of frozen blocks live.
        targets: which modules have adapters.
        modules_to_save: which modules train whole beside adapters.
        lora_options: further arguments of PEFT's ``LoraConfig``.
        base: optimizer of the blocks' matrices under ``gum``.
        unit: what is drawn.
        logits: how the loss reads what the head says.
        merge: whether adapters are merged into the weights after training.
        accumulation: backward passes of a step.
        projector: how the gradients' subspaces are found.
        frozen_state: what becomes of the optimizer state of blocks that are frozen.
        evaluation: sequences in a batch of an evaluation; 0 for none.
    """

    method: TrainingMethod
    sequence: int
    rank: int
    active_blocks: int | None
    dtype: str | None
    checkpointing: bool
    state_dtype: StateDtype | None
    embeddings: Embeddings
    gradients: Gradients
    rounding: Rounding
    frozen_weights: FrozenWeights = "device"
    targets: str | tuple[str, ...] = "all-linear"
    modules_to_save: tuple[str, ...] = ()
    lora_options: Mapping[str, Any] = field(default_factory=dict)
    base: Base = "adamw"
    unit: Unit = "block"
    logits: Logits = "whole"
    merge: bool = True
    accumulation: int = 1
    projector: Projector = "randomized"
    frozen_state: FrozenState = "drop"
    evaluation: int = 0

    @property
    def samples(self) -> bool:
        """Whether some blocks train at a time; of adapters where their number is given, or frozen ones are away."""
        asked = self.active_blocks is not None or self.frozen_weights != "device"
        return self.method in SAMPLED or (self.method in ("lora", "qlora") and asked)


@dataclass(frozen=True)
class MemoryPlan(Tabular):
    """Bytes at the moment of the peak, by part; they add up to `total`.

    Attributes:
        model: name of the model.
        method: how the model is trained.
        moment: when the peak is: ``forward``, ``backward``, ``step`` or ``evaluation``.
        total: bytes of all parts.
        weights: bytes of parameters and buffers, adapters included.
        gradients: bytes of the gradients that wait for the optimizer at that moment, and of those on their way: of a
            tied embedding the head's, its own and their sum.
        optimizer: bytes of Adam's moments, and of what the rounding keeps.
        projectors: bytes of the bases of the low-rank subspaces.
        activations: bytes of what backward needs, and of what forward and backward are working on.
        logits: bytes of tensors of batch × sequence × vocabulary: logits, their logarithms and gradients.
        workspace: bytes of the optimizer's temporaries, or of a de-quantised matrix.
        parameters: number of the model's parameters, adapters included.
        trainable: number of the parameters that train.
        rank: rank of the adapters, or dimension of the gradients' subspaces; None for a method that has none.
        host: bytes of weights in host memory, where frozen blocks live there; with ``disk`` at most, as training
            changes them. No part of `total`.
        bus: bytes of frozen blocks that are copied to the device for one forward and backward pass; no part of `total`.
        merging: bytes of the weights once more, after training on a CPU, where adapters are merged into them; else 0.
            No part of `total`.
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
    rank: int | None = None
    host: int = 0
    bus: int = 0
    merging: int = 0

    @property
    def label(self) -> str:  # type: ignore[override]
        """The model."""
        return self.model

    def records(self) -> list[Record]:
        """One dictionary: the attributes, and bytes that a run on a CPU has resident besides, no part of `total`.

        ``process``: bytes of the interpreter with the packages of a fine-tuning run.
        """
        return MemoryPlans(self.model, (self,)).records()

    def tables(self) -> tuple[Table, ...]:
        """Parts of the peak."""
        return MemoryPlans(self.model, (self,)).tables()


PROCESS = 590 << 20  # resident with torch 2.13, transformers 5.24, TRL 1.16 and datasets 5.2, records read, no model


def beside(plan: MemoryPlan) -> dict[str, int]:
    """Bytes that a run on a CPU has resident and that are no part of a `plan`'s total.

    Returns:
        Bytes by name. ``process``: the interpreter with the packages of a fine-tuning run, all the time. ``merging``:
        the weights once more after training, where adapters are merged into them.
    """
    return {"process": PROCESS, "merging": plan.merging}


_UNITS = (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10))


@dataclass(frozen=True)
class MemoryPlans(Tabular):
    """Plans of one model side by side.

    Attributes:
        label: name of the model.
        plans: one plan for each way to train it.
    """

    label: str
    plans: tuple[MemoryPlan, ...]

    def records(self) -> list[Record]:
        """One dictionary a method, as `MemoryPlan.records` describes it."""
        return [asdict(plan) | beside(plan) for plan in self.plans]

    def tables(self) -> tuple[Table, ...]:
        """Parts of the peak, a column a method, in the binary unit in which the largest peak is at least 1."""
        records = self.records()
        peak = max((record["total"] for record in records), default=0)
        unit, size = next(((name, size) for name, size in _UNITS if peak >= size), _UNITS[-1])
        parts = {part: part for part in (*PARTS, "total")}
        extra = {f"on a CPU: {part}": part for part in ("process", "merging") if any(r[part] for r in records)}
        rows = [(label, *(f"{record[part] / size:.2f}" for record in records)) for label, part in parts.items()]
        rows += [
            (label, *(f"+{record[part] / size:.2f}" if record[part] else "" for record in records))
            for label, part in extra.items()
        ]
        for label, part in (("in host memory", "host"), ("to the device, a pass", "bus")):
            if any(record[part] for record in records):
                rows.append((label, *(f"{record[part] / size:.2f}" if record[part] else "" for record in records)))
        if any(record["rank"] for record in records):
            rows.append(("rank", *(str(record["rank"] or "") for record in records)))
        rows.append(("peak in", *(record["moment"] for record in records)))
        rows.append(("trained", *(_millions(record["trainable"]) for record in records)))
        columns = (Column(f"{unit} at the peak", text=True), *(Column(record["method"]) for record in records))
        tones = (*[""] * len(PARTS), "total", *["aside"] * (len(rows) - len(PARTS) - 1))
        spare = ("lisa", "qlora") if len(self.plans) > 6 else ()  # more than 80 characters hold
        return (Table(columns, tuple(rows), tones=tones, spare=spare, elsewhere="--method names those to show"),)


def _millions(parameters: int) -> str:
    digits = 1 if parameters < 1e9 else 0
    return f"{parameters / 1e6:,.{digits}f} M" if parameters >= 1e5 else f"{parameters:,}"
