"""The weights of a live torch module, on whatever device, wrapped or not."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from htsr.matrices.entries import Entry, clean_name, tensor_entry
from htsr.spectra.esd import Array

if TYPE_CHECKING:
    import torch


def module_entries(module: torch.nn.Module) -> list[Entry]:
    """The parameters of a module as it computes: LoRA layers as W + ΔW of the active adapters, quantised as floats."""
    entries: list[Entry] = []
    done: list[str] = []
    for name, child in module.named_modules():
        prefix = clean_name(name)
        if any(prefix.startswith(parent) for parent in done):
            continue
        if hasattr(child, "get_delta_weight") and hasattr(child, "base_layer"):
            entries.append(_lora(f"{prefix}.weight", child))
            done.append(f"{prefix}.")
        elif _is_quantized(child):
            entries.append(_quantized(f"{prefix}.weight", child))
            done.append(f"{prefix}.")
        else:
            own = child.named_parameters(prefix=prefix, recurse=False, remove_duplicate=False)
            entries.extend(_parameter(parameter_name, parameter, child) for parameter_name, parameter in own)
    return [replace(entry, name=entry.name.removeprefix("base_model.model.")) for entry in entries]


def module_config(module: Any) -> dict[str, Any]:
    """The configuration of a transformers model, however wrapped; empty for other modules."""
    while not hasattr(module, "config") and hasattr(module, "module"):
        module = module.module
    to_dict = getattr(getattr(module, "config", None), "to_dict", None)
    return dict(to_dict()) if to_dict else {}


def _parameter(name: str, parameter: Any, owner: torch.nn.Module) -> Entry:
    from torch import nn

    kind = None
    if isinstance(owner, (nn.Embedding, nn.EmbeddingBag)):
        kind = "embedding"
    elif isinstance(owner, nn.modules.conv._ConvNd):
        kind = "conv"
    elif isinstance(owner, nn.Linear):
        kind = "linear"
    if type(parameter).__name__ == "DTensor" or hasattr(parameter, "ds_id"):
        why = f"{clean_name(name)} is sharded over processes; analyze the gathered model or its checkpoint"
        return _unread(name, parameter, ("sharded", why))
    if hasattr(parameter, "dequantize") and type(parameter) is not nn.Parameter:

        def read(index: int | None = None) -> Array:
            values = parameter.detach().dequantize()
            return values if index is None else values[index]  # type: ignore[no-any-return]

        shape, dtype = tuple(parameter.shape), type(parameter).__name__
        return Entry(clean_name(name), shape, dtype, read, storage=id(parameter), kind=kind, warning="de-quantised")
    return tensor_entry(name, parameter, kind=kind)


def _lora(name: str, layer: Any) -> Entry:
    weight = layer.base_layer.weight
    if _is_quantized(layer.base_layer):
        return _unread(name, weight, ("quantized", f"{name} is a LoRA layer on a quantised base; merge it first"))
    if any(getattr(layer, "use_dora", {}).values()) and not layer.merged:
        return _unread(name, weight, ("unmerged", f"{name} is a DoRA layer; merge the adapter first"))

    def read(index: int | None = None) -> Array:
        W = weight.detach()
        for adapter in () if layer.merged else layer.active_adapters:
            if adapter in layer.scaling:
                W = W + layer.get_delta_weight(adapter).detach().to(W)
        return W if index is None else W[index]  # type: ignore[no-any-return]

    return replace(tensor_entry(name, weight), read=read, storage=None)


def _is_quantized(module: Any) -> bool:
    return type(module).__name__ in ("Linear4bit", "Linear8bitLt")


def _quantized(name: str, layer: Any) -> Entry:
    def read(index: int | None = None) -> Array:
        from transformers.integrations.bitsandbytes import dequantize_bnb_weight

        W = dequantize_bnb_weight(layer.weight, state=getattr(layer, "state", None)).detach()
        return W if index is None else W[index]  # type: ignore[no-any-return]

    shape = (layer.out_features, layer.in_features)
    return Entry(name, shape, type(layer).__name__, read, kind="linear", warning="de-quantised by bitsandbytes")


def _unread(name: str, parameter: Any, problem: tuple[str, str]) -> Entry:
    dtype = str(parameter.dtype).removeprefix("torch.")
    return Entry(clean_name(name), tuple(parameter.shape), dtype, lambda: parameter, problem=problem)
