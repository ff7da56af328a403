"""What the parameters of a model are called, whatever wraps it and whatever PEFT adds to it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from htsr.matrices.stored_tensors import base_names
from htsr.matrices.tuners import is_tuner, without_peft

if TYPE_CHECKING:
    import torch

_PARAMETRIZED = re.compile(r"parametrizations\.(\w+)\..+$")


def parameter_names(module: torch.nn.Module) -> dict[int, str]:
    """Names of the parameters of `module` by their id, as the model without wrappers and adapters has them.

    A shared parameter has its first name. What PEFT or a parametrization adds to a layer has the name of the weight
    that it adapts, and a copy of a whole module that PEFT trains (`modules_to_save`) the names of the original.
    """
    parameters = dict(module.named_parameters(remove_duplicate=False))
    cleaned = base_names(parameters)
    names: dict[int, str] = {}
    for parameter, layer, _, adapted in _of_adapters(module, cleaned):
        names.setdefault(id(parameter), without_peft(f"{layer}.{adapted}"))
    for name, parameter in parameters.items():
        names.setdefault(id(parameter), _PARAMETRIZED.sub(r"\1", without_peft(cleaned[name])))
    return names


def adapter_names(module: torch.nn.Module) -> dict[int, str]:
    """Names of what PEFT's adapters train in `module`, by the id of the parameter: ``layers.0.q_proj.lora_B``.

    They are those of the adapted layer in the model without adapters, and of the attribute in which PEFT keeps the
    parameter; adapters of several names have them in common.
    """
    cleaned = base_names(dict(module.named_parameters(remove_duplicate=False)))
    names: dict[int, str] = {}
    for parameter, layer, attribute, _ in _of_adapters(module, cleaned):
        names.setdefault(id(parameter), without_peft(f"{layer}.{attribute}"))
    return names


def _of_adapters(module: torch.nn.Module, cleaned: Mapping[str, str]) -> Iterator[tuple[Any, str, str, str]]:
    """Every parameter of an adapter, with its layer, its attribute there, and the name of the weight that it adapts."""
    for prefix, layer in module.named_modules():
        for attribute in (*layer.adapter_layer_names, *layer.other_param_names) if is_tuner(layer) else ():
            held: Any = getattr(layer, attribute, None)
            for name, parameter in held.named_parameters() if hasattr(held, "named_parameters") else ():
                place = f".{attribute}.{name}"
                layer_name = cleaned[f"{prefix}{place}"].removesuffix(place)
                yield parameter, layer_name, attribute, getattr(layer, "parameter_name", "weight")
