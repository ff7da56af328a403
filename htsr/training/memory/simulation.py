"""A training step on tensors without values, and what of it is alive at the peak."""

from __future__ import annotations

import logging
import warnings
from collections import Counter
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any, get_args

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from htsr.calibration.model_options import empty_model
from htsr.errors import SourceError, UsageError
from htsr.matrices.blocks import find_blocks
from htsr.matrices.stored_tensors import clean_name
from htsr.training.lora_targets import module_options, tied_modules
from htsr.training.lowrank.gum_groups import unit_of
from htsr.training.memory.head import chunked_loss
from htsr.training.memory.ledger import Ledger, Trace
from htsr.training.memory.plan import LOW_RANK, MemoryPlan, Setting
from htsr.training.memory.states import Kind, entries_of, has_rank, states, to_project, to_step, to_update
from htsr.training.sampling.members import Trainable, freeze_embedding, members_of, trainable
from htsr.training.streaming.block import resident
from htsr.training.streaming.layout import Layout

logger = logging.getLogger(__name__)

# NF4 in blocks of 64 with doubly quantised scales (QLoRA, arXiv 2305.14314, §3): bytes per weight
_NF4 = 0.5 + 1 / 64 + 4 / (64 * 256)


class Simulation:
    """A model without values, and the step that trains it.

    Args:
        label: name of the model.
        config: the model's transformers configuration.
        setting: what decides about memory beside the model and the batch.
        halves_rank: whether the rank of the subspaces is halved until a matrix that trains can have it.

    Raises:
        SourceError: transformers knows no causal language model of this configuration.
        UsageError: it has fewer blocks than shall be active, or no matrix that can have the rank.
    """

    def __init__(self, label: str, config: Any, setting: Setting, *, halves_rank: bool = False) -> None:
        model = _quietly(_model, label, config, setting)
        ever = _frozen(label, model, setting)
        setting = _with_possible_rank(setting, model) if halves_rank else setting
        self.label, self.model, self.setting, self.mode = label, model, setting, FakeTensorMode()
        with self.mode:
            _materialise(model)
            self.trained: dict[str, Any] = {name: p for name, p in model.named_parameters() if p.requires_grad}
            self.ranked = {name for name, p in self.trained.items() if has_rank(name, p, setting)}
            kept = self.trained | {name: p for name, p in model.named_parameters() if name in ever}
            if setting.method in LOW_RANK and not self.ranked:
                least = f"no matrix of a block of {label} can have rank {setting.rank}"
                raise UsageError(f"{least}: none has both sides larger")
            drawn = _drawn(label, model, self.ranked, setting)
            self.kinds = {name: _kind(name in self.ranked, name in drawn) for name in self.trained}
            quantised = _quantised(model) if setting.method == "qlora" else []
            self.dense = {p.untyped_storage()._cdata: p.numel() * p.element_size() for p in quantised}
            low = {name: _kind(has_rank(name, p, setting), False) for name, p in kept.items()}
            self.fixed = states(kept, low | self.kinds, setting)
            self.fixed["weights"] = round(sum(p.numel() for p in quantised) * _NF4) - sum(self.dense.values())
            self.streamed = _Streamed.of(model) if setting.frozen_weights != "device" else None
            if self.streamed is not None:
                self.fixed["weights"] += self.streamed.buffers - self.streamed.frozen

    def trace(self, batch: int) -> Trace:
        """Bytes at each moment of a step.

        Args:
            batch: sequences per backward pass.

        Raises:
            UsageError: torch cannot simulate the model's experts in this dtype.
        """
        setting = self.setting
        with self.mode:
            ledger = self._ledger(batch)
            hooks = [
                p.register_post_accumulate_grad_hook(self._arrival(name, ledger)) for name, p in self.trained.items()
            ]
            tokens = torch.zeros(batch, setting.sequence, dtype=torch.long)
            if setting.accumulation > 1:
                self._accumulate(ledger)
            with ledger:
                try:
                    loss = self._loss(tokens, ledger)
                except RuntimeError as error:
                    if "BF16" not in str(error):  # of torch's grouped matrix product
                        raise
                    sentence = f"torch can simulate the experts of {self.label} in bfloat16 only: ask for that dtype"
                    raise UsageError(sentence) from None
                ledger.now = "backward"
                loss.backward()
            del loss
            ledger.now = "step"
            ledger.note(self._workspace())
            for name, hook in zip(self.trained, hooks, strict=True):
                hook.remove()
                self.trained[name].grad = None
        return ledger.trace()

    def evaluated(self) -> MemoryPlan:
        """The plan of an evaluation between two steps: a forward pass, whose activations nothing keeps."""
        batch = self.setting.evaluation
        with self.mode, torch.no_grad():
            ledger = self._ledger(batch)
            ledger.now = "evaluation"
            self.model.eval()
            with ledger:
                self._loss(torch.zeros(batch, self.setting.sequence, dtype=torch.long), ledger)
            self.model.train()
        return self.plan(ledger.trace(), batch)

    def _ledger(self, batch: int) -> Ledger:
        """What counts a pass of this batch, with the weights entered."""
        model, setting = self.model, self.setting
        vocabulary, cuts = int(model.config.get_text_config().vocab_size), (0, 1) if setting.logits == "whole" else ()
        ledger = Ledger({batch * (setting.sequence - cut) * vocabulary for cut in cuts}, self.fixed, self.dense)
        for tensor in (*model.parameters(), *model.buffers()):
            ledger.enter(tensor, "weights")
        return ledger

    def plan(self, trace: Trace, batch: int) -> MemoryPlan:
        """The plan of `htsr.predict_memory`.

        Args:
            trace: bytes at each moment of a step of this batch.
            batch: sequences per backward pass.
        """
        setting, streamed = self.setting, self.streamed
        moment, parts = trace.at_peak(batch * (setting.sequence - 1))
        return MemoryPlan(
            model=self.label,
            method=setting.method,
            moment=moment,
            total=sum(parts.values()),
            parameters=sum(p.numel() for p in self.model.parameters()),
            trainable=sum(p.numel() for p in self.trained.values()),
            rank=setting.rank if setting.method not in ("full", "lisa") else None,
            host=streamed.blocks if streamed else 0,
            bus=2 * streamed.frozen if streamed else 0,
            merging=parts["weights"] if setting.merge and setting.method in ("lora", "qlora") else 0,
            **parts,
        )

    def _accumulate(self, ledger: Ledger) -> None:
        """Gradients as the backward passes before the last have left them."""
        for name, parameter in self.trained.items():
            if self.setting.gradients == "project" and name in self.ranked:
                entries = entries_of(parameter, self.kinds[name], self.setting)
                ledger.live["gradients"] += entries * parameter.element_size()
            else:
                parameter.grad = torch.empty_like(parameter)
                ledger.enter(parameter.grad, "gradients")

    def _loss(self, tokens: Tensor, ledger: Ledger) -> Any:
        if self.setting.logits == "whole":
            return self.model(input_ids=tokens, labels=tokens).loss
        return chunked_loss(self.model, tokens, ledger, fused=self.setting.logits == "fused")

    def _arrival(self, name: str, ledger: Ledger) -> Any:
        released = self.setting.gradients == "update" or (self.setting.gradients == "project" and name in self.ranked)
        return partial(_arrived, ledger=ledger, kind=self.kinds[name], released=released, setting=self.setting)

    def _workspace(self) -> int:
        """Temporaries of the optimizer's step, of those whose gradients wait for it."""
        setting, kinds = self.setting, self.kinds
        projects = setting.gradients == "project"
        waiting = {name: p for name, p in self.trained.items() if p.grad is not None or projects}
        needed = [to_project(p, kinds[name], setting) for name, p in waiting.items() if p.grad is not None]
        for kind in get_args(Kind):
            needed.append(to_update([p for name, p in waiting.items() if kinds[name] == kind], kind, setting))
        return max(needed, default=0)


@dataclass(frozen=True)
class _Streamed:
    """Bytes of blocks that live in host memory, of what is frozen of them, and of two buffers on the device."""

    blocks: int
    frozen: int
    buffers: int

    @classmethod
    def of(cls, model: Any) -> _Streamed:
        modules = find_blocks(model).modules
        stays = resident(model, modules)
        weights = [[p for p in module.parameters() if id(p) not in stays] for module in modules]
        sizes = [Layout.of(block).size for block in weights]
        frozen = sum(p.numel() * p.element_size() for block in weights for p in block if not p.requires_grad)
        return cls(sum(sizes), frozen, 2 * max(sizes))


def _with_possible_rank(setting: Setting, model: Any) -> Setting:
    """The `setting` with its rank halved until one of the matrices that train can have it; 1 if none can have more."""
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    while setting.rank > 1 and not any(has_rank(name, p, setting) for name, p in trained):
        setting = replace(setting, rank=setting.rank // 2)
    return setting


def _arrived(parameter: Tensor, *, ledger: Ledger, kind: Kind, released: bool, setting: Setting) -> None:
    """Hook for a parameter's complete gradient: it waits for the optimizer, or is used up at once."""
    assert parameter.grad is not None
    ledger.arrive(parameter.grad)
    if released:
        at_once = to_project if setting.gradients == "project" else to_step
        ledger.note(at_once(parameter, kind, setting))
        parameter.grad = None
        if setting.gradients == "project" and setting.accumulation == 1:  # else they are there, and are added to
            ledger.live["gradients"] += entries_of(parameter, kind, setting) * parameter.element_size()


def _tie_saved(model: Any, tied: list[str]) -> None:
    """Make one tensor of the copies of `tied` modules that train, as PEFT does where there are values."""
    modules = [model.get_submodule(f"base_model.model.{name}") for name in tied]
    saved = [module.modules_to_save["default"] for module in modules if hasattr(module, "modules_to_save")]
    for copy in saved[1:]:
        copy.weight = saved[0].weight


def _quietly(make: Any, *arguments: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on the names of transformers' and peft's own options
        return make(*arguments)


def _model(label: str, config: Any, setting: Setting) -> Any:
    config = deepcopy(config)
    config.use_cache = False
    packed = getattr(config, "quantization_config", None)
    if packed is not None:
        del config.quantization_config
    dtype = getattr(torch, setting.dtype) if setting.dtype else getattr(config, "dtype", None) or torch.float32
    if packed and setting.method != "qlora":
        form = packed.get("quant_method", "another form") if isinstance(packed, dict) else packed.quant_method.value
        _tell_packed(label, str(form), str(dtype).removeprefix("torch."))
    try:
        model = empty_model(config, dtype=dtype)
    except ValueError as error:
        raise SourceError(f"{label} ({config.model_type}) is no causal language model of transformers") from error
    model.train()
    if setting.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
    if setting.method in ("lora", "qlora"):
        import peft

        tied = tied_modules(model)
        modules = module_options(model, setting.targets, setting.modules_to_save, dict(setting.lora_options))
        adapter = peft.LoraConfig(r=setting.rank, task_type="CAUSAL_LM", **modules)
        if setting.checkpointing:
            model.enable_input_require_grads()
        model = peft.get_peft_model(model, adapter, low_cpu_mem_usage=True)
        _tie_saved(model, tied)
    return model


def _frozen(label: str, model: Any, setting: Setting) -> set[str]:
    """Freeze what does not train, or not now; names of the parameters whose optimizer states stay while they do not."""
    if setting.samples:
        found = trainable(model, find_blocks(model))
        active = _active(label, model, found, setting)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in active)
        return {name for names in found.blocks for name in names} if setting.frozen_state == "keep" else set()
    if setting.embeddings == "freeze":
        freeze_embedding(model)
    return set()


@cache
def _tell_packed(label: str, form: str, dtype: str) -> None:
    """Say once, and not for each method and each plan, what is planned of a model that is stored packed."""
    sentence = "%s is stored in %s; its memory is planned with weights in %s, and less is needed where they stay packed"
    logger.warning(sentence, label, form, dtype)


def _active(label: str, model: Any, found: Trainable, setting: Setting) -> set[str]:
    """Names of the parameters that `LayerSampler` lets train while it has drawn the first blocks."""
    count = len(found.blocks)
    if setting.active_blocks is not None and setting.active_blocks > count:
        raise UsageError(f"active_blocks is {setting.active_blocks}, and {label} has {count} block{'s' * (count != 1)}")
    if setting.unit == "matrix":
        drawn = _spread(model, found, setting.active_blocks or min(2, count))
    else:
        drawn = [name for names in found.blocks[: setting.active_blocks or 2] for name in names]
    return {*drawn, *found.rest, *(found.embedding if setting.embeddings != "freeze" else ())}


def _spread(model: Any, found: Trainable, active: int) -> list[str]:
    """Names of the parameters of a draw of matrices that takes much: of one in the first block, and of the last blocks.

    Backward then goes through all blocks, and gradients come while most activations are still there.
    """
    members = members_of(model, find_blocks(model), found, "matrix", [])
    sizes = {clean_name(name): parameter.numel() for name, parameter in model.named_parameters()}
    room = sum(sizes[name] for names in found.blocks for name in names) * active // len(found.blocks)
    first, *others = members.values()
    drawn: list[str] = []
    for names in (first, *reversed(others)):
        if (size := sum(sizes[name] for name in names)) <= room:
            drawn += names
            room -= size
    return drawn


def _materialise(model: torch.nn.Module) -> None:
    """Put valueless tensors of the CPU in place of those on the meta device, for which torch takes other kernels."""
    made: dict[int, torch.nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                fake = torch.nn.Parameter(torch.empty(parameter.shape, dtype=parameter.dtype), parameter.requires_grad)
                module._parameters[name] = made.setdefault(id(parameter), fake)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


def _drawn(label: str, model: Any, ranked: set[str], setting: Setting) -> set[str]:
    """Names of the matrices that `GUM` trains at full rank while it has drawn the units that take most."""
    if setting.method != "gum":
        return set()
    blocks, shapes = find_blocks(model), dict(model.named_parameters())
    places = {name: blocks.index_of(name) for name in shapes if name in ranked}
    count = len({place for place in places.values() if place is not None})
    active = setting.active_blocks if setting.active_blocks is not None else min(2, count - 1)
    if not 1 <= active < count:
        raise UsageError(f"active_blocks is {active}, and is at least 1 and below the {count} blocks of {label}")
    units = {name: unit_of(name, place, setting.unit) for name, place in places.items()}
    more: Counter[str | int] = Counter()
    for name, unit in units.items():
        more[unit] += shapes[name].numel() - entries_of(shapes[name], "low", setting)
    each = len(more) // len(blocks) if setting.unit == "matrix" else 1
    largest = {unit for unit, _ in more.most_common(active * each)}
    return {name for name, unit in units.items() if unit in largest}


def _kind(ranked: bool, drawn: bool) -> Kind:
    return "drawn" if drawn else "low" if ranked else "full"


def _quantised(model: Any) -> list[Tensor]:
    """The weights that QLoRA keeps in 4 bits: the linear layers under adapters."""
    return [module.base_layer.weight for module in model.modules() if hasattr(module, "base_layer")]
