"""The weights of a live torch module, on whatever device, wrapped or not."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any

from htsr.arrays import Array
from htsr.matrices.parametrized import BUFFERS
from htsr.matrices.quantized import PACKED
from htsr.matrices.stored_tensors import StoredTensor, base_names, clean_name, stored_tensor
from htsr.matrices.tuners import is_tuner, model_in_peft, tuner_tensors, wrapped_by_peft

if TYPE_CHECKING:
    import torch

_WRAPPERS = {
    "DataParallel": "module",
    "DistributedDataParallel": "module",
    "DeepSpeedEngine": "module",
    "FullyShardedDataParallel": "_fsdp_wrapped_module",
    "OptimizedModule": "_orig_mod",
}


def module_tensors(module: torch.nn.Module) -> list[StoredTensor]:
    """The parameters of a `module` as it computes: with its active adapters, parametrizations, and de-quantised."""
    tensors = list(_tensors(module, "", set()))
    names = base_names(tensor.name for tensor in tensors)
    return [replace(tensor, name=names[tensor.name]) for tensor in tensors]


def module_config(module: Any) -> dict[str, Any]:
    """The configuration of a transformers model, however `module` wraps it; empty for other modules."""
    to_dict = getattr(getattr(unwrapped(module), "config", None), "to_dict", None)
    return dict(to_dict()) if to_dict else {}


def unwrapped(module: Any) -> Any:
    """The model inside `module`: what DDP, FSDP, DeepSpeed and torch.compile wrap; else the module itself."""
    while inner := _WRAPPERS.get(type(module).__name__):
        module = getattr(module, inner)
    return module


def is_sharded(tensor: Any) -> bool:
    """Whether `tensor` is spread over processes: a DTensor, or a parameter under DeepSpeed's ZeRO-3."""
    return type(tensor).__name__ == "DTensor" or hasattr(tensor, "ds_id")


def whole_shape(parameter: Any) -> tuple[int, ...]:
    """The shape of a `parameter`; under ZeRO-3, which leaves an empty one in its place, that of the whole."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def _tensors(module: Any, prefix: str, seen: set[int], mixture: bool = False) -> Iterator[StoredTensor]:
    """The weights of `module` and of what is inside, named from `prefix` on; `mixture` inside of X-LoRA."""
    from torch.nn.utils.parametrize import is_parametrized

    if id(module) in seen:
        return
    seen.add(id(module))
    if (model := model_in_peft(module)) is not None:
        mixture = type(module.base_model).__name__ == "XLoraModel"
        yield from _tensors(model, f"{prefix}base_model.model.", seen, mixture)
        if hasattr(module, "prompt_encoder"):
            yield from _tensors(module.prompt_encoder, f"{prefix}prompt_encoder.", seen)
        return
    if is_tuner(module):
        yield from tuner_tensors(module, prefix, partial(_tensors, seen=seen, mixture=mixture), mixture)
        return
    if (wrapped := wrapped_by_peft(module)) is not None:
        yield from _tensors(wrapped, prefix, seen, mixture)
        return
    if type(module).__name__ in ("Linear4bit", "Linear8bitLt"):
        yield _bitsandbytes(f"{prefix}weight", module)
        return
    for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
        yield _parameter(prefix + name, parameter, _kind(module))
    for name, buffer in module.named_buffers(recurse=False):
        if f".{name}" in PACKED or BUFFERS.fullmatch(name):
            yield stored_tensor(prefix + name, buffer)
    if is_parametrized(module):
        yield from _parametrized(module, prefix)
    for name, child in module.named_children():
        if not (name == "parametrizations" and is_parametrized(module)):
            yield from _tensors(child, f"{prefix}{name}.", seen, mixture)


def _kind(module: Any) -> str | None:
    from torch import nn

    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        return "embedding"
    if isinstance(module, nn.modules.conv._ConvNd):
        return "conv"
    return "linear" if isinstance(module, nn.Linear) else None


def _parameter(name: str, parameter: Any, kind: str | None) -> StoredTensor:
    import torch

    if is_sharded(parameter):
        why = f"{clean_name(name)} is sharded over processes; analyze the gathered model or its checkpoint"
        dtype = str(parameter.dtype).removeprefix("torch.")
        memory = ("sharded", id(parameter))
        return StoredTensor(name, whole_shape(parameter), dtype, lambda: parameter, memory, kind, ("sharded", why))
    if parameter.is_quantized or type(parameter).dequantize is not torch.Tensor.dequantize:

        def read(index: int | None = None) -> Array:
            values = parameter.detach().dequantize()
            return values if index is None else values[index]  # type: ignore[no-any-return]

        shape, dtype = tuple(parameter.shape), type(parameter).__name__
        return StoredTensor(name, shape, dtype, read, storage=id(parameter), kind=kind, warning="de-quantised")
    return stored_tensor(name, parameter, kind=kind)


def _parametrized(module: Any, prefix: str) -> Iterator[StoredTensor]:
    """Weights that are computed from others: weight norm, spectral norm."""
    for name, parametrization in module.parametrizations.items():
        original = next(chain(parametrization.parameters(), parametrization.buffers()))
        tensor = stored_tensor(prefix + name, original, kind=_kind(module))
        if tensor.problem is None:
            read = _Computed(parametrization)
            tensor = replace(tensor, shape=tuple(read().shape), read=read, storage=None)
        yield tensor


class _Computed:
    """Reads a parametrized weight, as it is in evaluation, off a copy: spectral norm moves its vectors otherwise."""

    def __init__(self, parametrization: Any) -> None:
        self.parametrization = parametrization

    def __call__(self, index: int | None = None) -> Array:
        import torch

        with torch.no_grad():
            W = copy.deepcopy(self.parametrization).eval()()
        return W if index is None else W[index]  # type: ignore[no-any-return]


def _bitsandbytes(name: str, layer: Any) -> StoredTensor:
    def read(index: int | None = None) -> Array:
        from transformers.integrations.bitsandbytes import dequantize_bnb_weight

        W = dequantize_bnb_weight(layer.weight, state=getattr(layer, "state", None)).detach()
        return W if index is None else W[index]  # type: ignore[no-any-return]

    shape = (layer.out_features, layer.in_features)
    return StoredTensor(name, shape, type(layer).__name__, read, kind="linear", warning="de-quantised by bitsandbytes")
