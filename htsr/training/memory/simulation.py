"""A training step on tensors without values, and which of them are alive at the peak."""

from __future__ import annotations

import warnings
import weakref
from collections import Counter
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from htsr.calibration.model_options import empty_model
from htsr.errors import SourceError, UsageError
from htsr.matrices.blocks import find_blocks
from htsr.training.lora_targets import module_options
from htsr.training.lowrank.groups import is_low_rank
from htsr.training.lowrank.gum_groups import unit_of
from htsr.training.lowrank.moments import BLOCK
from htsr.training.lowrank.rounding import NARROW
from htsr.training.lowrank.subspace import OVERSAMPLING
from htsr.training.memory.plan import LOW_RANK, PARTS, MemoryPlan, Setting
from htsr.training.sampling.members import freeze_embedding, trainable
from htsr.training.streaming.block import resident
from htsr.training.streaming.layout import Layout

Kind: TypeAlias = Literal["full", "low", "drawn"]  # what of a parameter's gradient goes into the moments

# NF4 in blocks of 64 with doubly quantised scales (QLoRA, arXiv 2305.14314, §3): bytes per weight
_NF4 = 0.5 + 1 / 64 + 4 / (64 * 256)


class Ledger(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Bytes of all storages that operations have made and that are still alive, by part; and the peak of their sum.

    Args:
        logits: numbers of entries by which a tensor is known as logits.
        fixed: bytes, by part, that are there all the time.
    """

    def __init__(self, logits: set[int], fixed: dict[str, int]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.logits, self.fixed = logits, fixed
        self.dense: dict[int, int] = {}  # bytes of the weights in 4 bits, by storage, while an operation uses them
        self.live: Counter[str] = Counter()
        self.peak, self.parts, self.moment = 0, dict.fromkeys(PARTS, 0), "forward"
        self.now = "forward"
        self._parts_of: dict[int, tuple[str, int]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operation, and enter what it made."""
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                part = "logits" if leaf.numel() in self.logits else "activations"
                self.enter(leaf, part, move=False)
        used = [leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor)] if self.dense else []
        self.check(max((self.dense.get(tensor.untyped_storage()._cdata, 0) for tensor in used), default=0))
        return out

    def enter(self, tensor: Tensor, part: str, move: bool = True) -> None:
        """Count the storage of a `tensor` of any shape under `part`; a known one changes its part if it may `move`."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        known = self._parts_of.get(key)
        if known is None:
            weakref.finalize(storage, self._leave, key)
        elif move:
            self.live[known[0]] -= known[1]
        else:
            return
        self._parts_of[key] = (part, storage.nbytes())
        self.live[part] += storage.nbytes()

    def check(self, workspace: int = 0) -> None:
        """Take note of this moment, with `workspace` bytes more, if it is the peak."""
        total = self.live.total() + sum(self.fixed.values()) + workspace
        if total > self.peak:
            self.peak, self.moment = total, self.now
            self.parts = {part: self.live[part] + self.fixed.get(part, 0) for part in PARTS}
            self.parts["workspace"] += workspace

    def _leave(self, key: int) -> None:
        part, size = self._parts_of.pop(key)
        self.live[part] -= size


def simulate(label: str, config: Any, setting: Setting, *, halves_rank: bool = False) -> MemoryPlan:
    """The plan of `htsr.predict_memory`.

    Args:
        label: name of the model.
        config: the model's transformers configuration.
        setting: what decides about memory beside the model.
        halves_rank: whether the rank of the subspaces is halved until a matrix that trains can have it.

    Raises:
        SourceError: transformers knows no causal language model of this configuration.
        UsageError: torch cannot simulate its experts in this dtype, it has fewer blocks than shall be active, or no
            matrix that can have the rank.
    """
    model = _quietly(_model, label, config, setting)
    setting = _with_possible_rank(setting, model) if halves_rank else setting
    with FakeTensorMode():
        _materialise(model)
        vocabulary = int(model.config.get_text_config().vocab_size)
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        ranked = {name for name, p in trained.items() if _is_low_rank(name, p, setting)}
        if setting.method in LOW_RANK and not ranked:
            least = f"no matrix of a block of {label} can have rank {setting.rank}"
            raise UsageError(f"{least}: none has both sides larger")
        drawn = _drawn(label, model, ranked, setting)
        kinds = {name: _kind(name in ranked, name in drawn) for name in trained}
        fixed = _states(trained, kinds, setting)
        quantised = _quantised(model) if setting.method == "qlora" else []
        dense = sum(p.numel() * p.element_size() for p in quantised)
        fixed["weights"] = round(sum(p.numel() for p in quantised) * _NF4) - dense
        ledger = Ledger({setting.batch * (setting.sequence - cut) * vocabulary for cut in (0, 1)}, fixed)
        ledger.dense = {p.untyped_storage()._cdata: p.numel() * p.element_size() for p in quantised}
        streamed = _Streamed.of(model) if setting.frozen_weights != "device" else None
        if streamed is not None:
            fixed["weights"] += streamed.buffers - streamed.frozen
        for tensor in (*model.parameters(), *model.buffers()):
            ledger.enter(tensor, "weights")
        for name, parameter in trained.items():
            released = setting.gradients == "update" or (setting.gradients == "project" and name in ranked)
            parameter.register_post_accumulate_grad_hook(_Arrived(ledger, kinds[name], released, setting))
        tokens = torch.zeros(setting.batch, setting.sequence, dtype=torch.long)
        with ledger:
            try:
                loss = model(input_ids=tokens, labels=tokens).loss
            except RuntimeError as error:
                if "BF16" not in str(error):  # of torch's grouped matrix product
                    raise
                sentence = f"torch can simulate the experts of {label} in bfloat16 only: ask for that dtype"
                raise UsageError(sentence) from None
            ledger.now = "backward"
            loss.backward()
        del loss
        ledger.now = "step"
        waiting = {name: p for name, p in trained.items() if p.grad is not None or setting.gradients == "project"}
        needed = [_to_project(p, kinds[name], setting) for name, p in waiting.items() if p.grad is not None]
        for kind in get_args(Kind):
            needed.append(_to_update([p for name, p in waiting.items() if kinds[name] == kind], kind, setting))
        ledger.check(max(needed, default=0))
        count = sum(p.numel() for p in model.parameters())
    return MemoryPlan(
        model=label,
        method=setting.method,
        moment=ledger.moment,
        total=ledger.peak,
        parameters=count,
        trainable=sum(p.numel() for p in trained.values()),
        rank=setting.rank if setting.method not in ("full", "lisa") else None,
        host=streamed.blocks if streamed else 0,
        bus=2 * streamed.frozen if streamed else 0,
        **ledger.parts,
    )


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
    while setting.rank > 1 and not any(_is_low_rank(name, p, setting) for name, p in trained):
        setting = replace(setting, rank=setting.rank // 2)
    return setting


class _Arrived:
    """Hook for a parameter's complete gradient: it waits for the optimizer, or is used up at once."""

    def __init__(self, ledger: Ledger, kind: Kind, released: bool, setting: Setting) -> None:
        self.ledger, self.kind, self.released, self.setting = ledger, kind, released, setting

    def __call__(self, parameter: Tensor) -> None:
        assert parameter.grad is not None
        self.ledger.enter(parameter.grad, "gradients")
        if self.released:
            at_once = _to_project if self.setting.gradients == "project" else _workspace
            self.ledger.check(at_once(parameter, self.kind, self.setting))
            parameter.grad = None
            if self.setting.gradients == "project":
                self.ledger.live["gradients"] += _entries(parameter, self.kind, self.setting) * parameter.element_size()


def _quietly(make: Any, *arguments: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on the names of transformers' and peft's own options
        return make(*arguments)


def _model(label: str, config: Any, setting: Setting) -> Any:
    config = deepcopy(config)
    config.use_cache = False
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    dtype = getattr(torch, setting.dtype) if setting.dtype else getattr(config, "dtype", None) or torch.float32
    try:
        model = empty_model(config, dtype=dtype)
    except ValueError as error:
        raise SourceError(f"{label} ({config.model_type}) is no causal language model of transformers") from error
    model.train()
    if setting.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
    if setting.method in ("lora", "qlora"):
        import peft

        modules = module_options(model, setting.targets, setting.modules_to_save, {})
        adapter = peft.LoraConfig(r=setting.rank, task_type="CAUSAL_LM", **modules)
        if setting.checkpointing:
            model.enable_input_require_grads()
        model = peft.get_peft_model(model, adapter, low_cpu_mem_usage=True)
    if setting.samples:
        active = _active(label, model, setting)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in active)
    elif setting.embeddings == "freeze":
        freeze_embedding(model)
    return model


def _active(label: str, model: Any, setting: Setting) -> set[str]:
    """Names of the parameters that `LayerSampler` lets train while it has drawn the first blocks."""
    found = trainable(model, find_blocks(model))
    count = len(found.blocks)
    if setting.active_blocks is not None and setting.active_blocks > count:
        raise UsageError(f"active_blocks is {setting.active_blocks}, and {label} has {count} block{'s' * (count != 1)}")
    blocks = found.blocks[: setting.active_blocks or 2]
    return {name for names in blocks for name in names}.union(
        found.rest, found.embedding if setting.embeddings != "freeze" else ()
    )


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


def _is_low_rank(name: str, parameter: Tensor, setting: Setting) -> bool:
    low = setting.method in LOW_RANK
    return low and is_low_rank(name, parameter.shape, setting.rank, setting.embeddings == "lowrank")


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
        more[unit] += shapes[name].numel() - _entries(shapes[name], "low", setting)
    each = len(more) // len(blocks) if setting.unit == "matrix" else 1
    largest = {unit for unit, _ in more.most_common(active * each)}
    return {name for name, unit in units.items() if unit in largest}


def _kind(ranked: bool, drawn: bool) -> Kind:
    return "drawn" if drawn else "low" if ranked else "full"


def _states(trained: dict[str, Tensor], kinds: dict[str, Kind], setting: Setting) -> dict[str, int]:
    """Bytes of moments, of what rounding keeps, and of projectors."""
    moments = projectors = 0
    for name, parameter in trained.items():
        entries = _entries(parameter, kinds[name], setting)
        number = 1 if setting.base == "muon" and kinds[name] != "full" else 2
        if setting.state_dtype == "8bit":
            moments += number * (entries + 4 * -(-entries // BLOCK))
        else:
            dtype = getattr(torch, setting.state_dtype) if setting.state_dtype else parameter.dtype
            moments += number * entries * dtype.itemsize
        if parameter.dtype in NARROW:
            moments += {"kahan": 2, "master": 4}.get(setting.rounding, 0) * parameter.numel()
        if kinds[name] != "full" and setting.method != "apollo":
            projectors += parameter.numel() // max(parameter.shape[-2:]) * setting.rank * parameter.element_size()
    return {"optimizer": moments, "projectors": projectors}


def _entries(parameter: Tensor, kind: Kind, setting: Setting) -> int:
    """Number of entries of what goes into the moments."""
    return parameter.numel() // min(parameter.shape[-2:]) * setting.rank if kind == "low" else parameter.numel()


def _workspace(parameter: Tensor, kind: Kind, setting: Setting) -> int:
    """Temporaries of projecting and updating one parameter by `LowRankAdamW`; torch's fused AdamW has none."""
    return max(_to_project(parameter, kind, setting), _to_update([parameter], kind, setting))


def _to_project(parameter: Tensor, kind: Kind, setting: Setting) -> int:
    """Temporaries of a randomised refresh, or of a random projection with what it is made of.

    Of a refresh a float32 copy of a float16 gradient, the products with the basis, and four bases (start, QR, next,
    Ritz vectors), matrix by matrix in a stack.
    """
    if setting.method not in LOW_RANK or kind == "full":
        return 0
    small, large = sorted(parameter.shape[-2:])
    if setting.method == "apollo":
        return 16 * parameter.numel() // large * min(setting.rank, small)
    width = min(small, setting.rank + OVERSAMPLING)
    wide = 4 * small * large if parameter.dtype == torch.float16 else 0
    refresh = wide + 4 * width * (2 * large + 4 * small)
    stack = parameter.numel() // (small * large)
    bases = 2 * stack * small * setting.rank * parameter.element_size()  # one by one, and together
    return refresh if stack == 1 else bases + refresh


def _to_update(parameters: list[Tensor], kind: Kind, setting: Setting) -> int:
    """Temporaries of updating parameters in batches, of a large one in pieces, by `LowRankAdamW`.

    Gradients in float32 (under apollo the whole one, too, for its norms), moments in float32 where they are narrower,
    and Adam's denominators; then new weights in float32, a stack at a time, and what rounds them.
    """
    from htsr.training.lowrank.update import BATCH, PIECE, STACK

    narrow = any(parameter.dtype in NARROW for parameter in parameters)
    if setting.base == "muon" and kind != "full":
        return max((_to_orthogonalise(parameter, kind, setting) for parameter in parameters), default=0)
    if not parameters or (setting.method not in LOW_RANK and (not narrow or setting.rounding == "nearest")):
        return 0

    def at_once(sizes: list[int], most: int) -> int:
        return max(min(sum(sizes), most), min(max(sizes), PIECE))

    whole = [parameter.numel() for parameter in parameters]
    sizes = [_entries(parameter, kind, setting) for parameter in parameters]
    batch, one, stack = at_once(sizes, BATCH), min(max(sizes), PIECE), at_once(whole, STACK)
    state = setting.state_dtype or str(parameters[0].dtype).removeprefix("torch.")
    own, noise = 2 * (state != "float32"), 13 * (state in ("bfloat16", "float16"))
    moments = 4 * (1 + own + narrow) * batch + noise * one
    rounded = narrow * {"stochastic": 17, "master": 11}.get(setting.rounding, 4) * stack
    projected = (kind == "low") * parameters[0].element_size() * batch
    if kind == "low" and narrow and setting.method == "apollo":
        projected += 4 * max(whole)
    if kind == "drawn":  # the complements, of those that are taken together
        projected = parameters[0].element_size() * max(min(sum(sizes), BATCH), max(sizes))
    return projected + max(moments, 4 * (1 + own // 2) * batch + rounded)


def _to_orthogonalise(parameter: Tensor, kind: Kind, setting: Setting) -> int:
    """Temporaries of one update by Muon.

    What is orthogonalised, momentum and direction in float32, and of Newton and Schulz two iterates and three products
    of the smaller side; then new weights in float32, and what rounds them.
    """
    from htsr.training.lowrank.update import PIECE

    entries, each, narrow = _entries(parameter, kind, setting), parameter.element_size(), parameter.dtype in NARROW
    small = setting.rank if kind == "low" else min(parameter.shape[-2:])
    stack = parameter.numel() // (parameter.shape[-1] * parameter.shape[-2])
    own = setting.state_dtype not in (None, "float32")
    iterates = each * (3 * entries + 3 * stack * small**2)
    rounded = narrow * {"stochastic": 17, "master": 11}.get(setting.rounding, 4) * min(parameter.numel(), PIECE)
    return each * entries + 4 * entries * (own + narrow) + max(4 * entries + iterates, each * entries + rounded)


def _quantised(model: Any) -> list[Tensor]:
    """The weights that QLoRA keeps in 4 bits: the linear layers under adapters."""
    return [module.base_layer.weight for module in model.modules() if hasattr(module, "base_layer")]
