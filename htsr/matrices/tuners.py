"""Layers that PEFT has put an adapter on: the weight that they compute with.

Plain LoRA and DoRA are W + ΔW from the layer's own `get_delta_weight`. Every other kind is merged by PEFT itself, on a
copy of the one layer; a kind whose change depends on the input has no weight to speak of, and its row says so.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from htsr.arrays import Array, Difference, as_numpy
from htsr.errors import MatrixError
from htsr.matrices.deltas import dora_factor
from htsr.matrices.stored_tensors import StoredTensor, base_name, clean_name

Walk = Callable[[Any, str], Iterator[StoredTensor]]

_ADDED = re.compile(r"(^|\.)(?:(?:base_layer|original_module|modules_to_save\.[^.]+)\.)+")


def is_tuner(module: Any) -> bool:
    """Whether `module` is a layer that PEFT has wrapped, of whatever kind."""
    return hasattr(module, "base_layer") and hasattr(module, "active_adapters") and hasattr(module, "merge")


def model_in_peft(module: Any) -> Any:
    """The model inside a `module` that is a PeftModel or PeftMixedModel, without what all layers share; else None."""
    if not any(cls.__name__ in ("PeftModel", "PeftMixedModel") for cls in type(module).__mro__):
        return None
    return module.get_base_model() if hasattr(module, "get_base_model") else module.base_model.model


def wrapped_by_peft(module: Any) -> Any:
    """The module that computes in place of `module`, where PEFT has wrapped it whole; else None.

    So it does with `modules_to_save`, `trainable_token_indices` and prompts beside an attention.
    """
    if hasattr(module, "token_adapter"):
        return module.token_adapter
    if type(module).__name__ in ("AdaptedAttention", "AdaptedAttentionGPT"):  # prompts beside an untouched attention
        return module.model
    if not (hasattr(module, "modules_to_save") and hasattr(module, "original_module")):
        return None
    saved = () if module.disable_adapters else module.active_adapters
    active = next((name for name in saved if name in module.modules_to_save), None)
    return module.original_module if active is None else module.modules_to_save[active]


def without_peft(name: str) -> str:
    """The `name` of a parameter, or of a module, without the layers that PEFT puts in between."""
    return _ADDED.sub(r"\1", name)


def tuner_tensors(layer: Any, prefix: str, walk: Walk, mixture: bool = False) -> Iterator[StoredTensor]:
    """The weights of a `layer` that PEFT has wrapped, as it computes with them.

    Args:
        layer: layer that PEFT has wrapped.
        prefix: prefix of the names.
        walk: function that gives the tensors of a plain module, named from a prefix on.
        mixture: whether adapters are mixed anew for each input (X-LoRA).
    """
    if layer.disable_adapters and not getattr(layer, "merged", False):
        yield from walk(layer.base_layer, prefix)
        return
    if _is_plain_lora(layer) and not mixture:
        adapted = clean_name(prefix + getattr(layer, "parameter_name", "weight"))  # also bare parameters are adapted
        for tensor in walk(layer.base_layer, prefix):
            yield _lora(tensor, layer) if clean_name(tensor.name) == adapted else tensor
        return
    plain = dict.fromkeys(name for name, _ in _bare(layer).named_parameters())
    for tensor in walk(_bare(layer), prefix):
        relative = tensor.name.removeprefix(prefix)
        if tensor.problem:
            yield tensor
        elif relative not in plain or tensor.warning:
            yield _refused(tensor, layer, "its base is quantised, or computed from other parameters")
        elif mixture:
            yield _refused(tensor, layer, "its adapters are mixed anew for each input")
        else:
            yield replace(tensor, read=Merged(tensor, layer, relative), storage=None)


def _bare(layer: Any) -> Any:
    """The module that the tuners on `layer` adapt, be they one on another."""
    return layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer.base_layer


def _refused(tensor: StoredTensor, layer: Any, why: str) -> StoredTensor:
    kind = type(layer).__module__.removeprefix("peft.tuners.").partition(".")[0]
    why = f"{base_name(tensor.name)} has an adapter of PEFT's {kind} whose weight cannot be had: {why}"
    return replace(tensor, problem=("unmerged", why), storage=None)


def _is_plain_lora(layer: Any) -> bool:
    """Whether W + ΔW is all there is to the active adapters, times DoRA's factor."""
    if layer.disable_adapters or not (hasattr(layer, "lora_A") and hasattr(layer, "scaling")):
        return False
    variants = getattr(layer, "lora_variant", {})
    unknown = [a for a in layer.active_adapters if a in variants and not layer.use_dora.get(a)]
    return not unknown and not hasattr(layer.base_layer, "in_proj_weight")


@dataclass(frozen=True)
class Merged:
    """Reads a parameter of the base layer after PEFT has merged the active adapters into a copy of it.

    Attributes:
        base: stored tensor that the result is computed from.
        layer: layer that PEFT has wrapped.
        parameter: name of the parameter in the layer.
    """

    base: StoredTensor
    layer: Any
    parameter: str

    def __call__(self, index: int | None = None) -> Array:
        """The result in the shape of `base`, or one slice of its first axis.

        Args:
            index: number of the slice; None for the whole tensor.
        """
        import warnings

        import torch

        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what PEFT says about merging is about models that are kept
            try:
                W = self._merge()
            except Exception as error:
                why = str(error).splitlines()[0] if str(error) else "PEFT cannot merge it"
                kind = type(self.layer).__module__.removeprefix("peft.tuners.").partition(".")[0]
                raise MatrixError(
                    "unmerged", f"{base_name(self.base.name)} has an adapter of PEFT's {kind}: {why}"
                ) from error
            result = as_numpy(W if index is None else W[index])
        return Difference.computed(result, [(as_numpy(self.base.read(index)), self.base.dtype)])

    def _merge(self) -> Any:
        import torch

        layer = copy.deepcopy(self.layer)
        for tensor in (*layer.parameters(), *layer.buffers()):
            if tensor.dtype in (torch.float16, torch.bfloat16):  # or the sum would be rounded to them
                tensor.data = tensor.data.float()
        tuners = [part for part in layer.modules() if is_tuner(part)]
        for part in reversed(tuners):  # from the innermost on
            if part.disable_adapters:
                part.unmerge()
            else:
                part.merge()
        W = _bare(layer)
        for step in self.parameter.split("."):
            W = getattr(W, step)
            W = _bare(W) if is_tuner(W) else W
        return W.detach()


def _lora(tensor: StoredTensor, layer: Any) -> StoredTensor:
    adapters = [a for a in layer.active_adapters if a in layer.scaling and a not in layer.merged_adapters]
    if tensor.problem or not adapters:
        return tensor
    return replace(tensor, read=Adapted(tensor, layer, tuple(adapters)), storage=None)


@dataclass(frozen=True)
class Adapted:
    """Reads W + ΔW of plain LoRA and DoRA, summed in float32 or better, whatever W is stored in.

    Attributes:
        base: stored tensor of W.
        layer: layer that PEFT has wrapped.
        adapters: names of the adapters to add.
    """

    base: StoredTensor
    layer: Any
    adapters: tuple[str, ...]

    def __call__(self, index: int | None = None) -> Array:
        """The result in the shape of `base`, or one slice of its first axis.

        Args:
            index: number of the slice; None for the whole tensor.
        """
        import torch

        with torch.no_grad():
            base = W = own = _at_least_float32(torch.as_tensor(self.base.read()))
            layer = _in_float32(self.layer, W)
            for adapter in self.adapters:
                delta = layer.get_delta_weight(adapter).to(W)
                W = W + delta
                if layer.use_dora.get(adapter):
                    magnitude = layer.lora_magnitude_vector[adapter].weight
                    transposed = self.base.kind == "embedding" or bool(getattr(layer, "fan_in_fan_out", False))
                    factor = dora_factor(base + delta, magnitude, transposed)
                    W, own = W * factor, own * factor
            W, own = (as_numpy(x if index is None else x[index]) for x in (W, own))
        return Difference.computed(W, [(own, self.base.dtype)])


def _at_least_float32(tensor: Any) -> Any:
    return tensor if tensor.element_size() > 4 else tensor.float()


def _in_float32(layer: Any, base: Any) -> Any:
    """The `layer`, or one like it that does not round its ΔW to the half precision of its factors or its parameter.

    Args:
        layer: layer that PEFT has wrapped.
        base: W in float32 or float64.
    """
    own = {name: part for name, part in layer._modules.items() if name != "base_layer" and part is not None}
    halves = any(p.element_size() < 4 for part in own.values() for p in part.parameters())
    if not halves and not hasattr(layer, "get_param"):
        return layer
    like = copy.copy(layer)
    like._modules = layer._modules | {name: copy.deepcopy(part).float() for name, part in own.items()}
    if hasattr(layer, "get_param"):  # of a bare parameter, in whose dtype PEFT returns ΔW
        like.get_param = lambda: base
    return like
