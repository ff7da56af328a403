"""Adapters whose change depends on the base: PEFT loads them onto a skeleton of it, and merges one layer at a time.

The skeleton has the base's module names and shapes, and the numbers of the adapted layers only; those stay in memory
together, since PEFT's starts (PiSSA and the like) want them when the adapter is loaded.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from htsr.errors import SourceError
from htsr.matrices import roles
from htsr.matrices.adapter_config import AdapterConfig
from htsr.matrices.adapters import adapter_tensors, refuse_prompts, whole_tensors
from htsr.matrices.stored_tensors import StoredTensor, base_name
from htsr.matrices.tuners import Adapted, Merged

if TYPE_CHECKING:
    import torch


_BY_ORDER = ("TINYLORA", "UNILORA")


def computed_by_peft(config: AdapterConfig, base: list[StoredTensor]) -> list[StoredTensor]:
    """The base's tensors; those that the adapter changes are as PEFT computes them.

    Args:
        config: configuration of the adapter.
        base: stored tensors of the base model, de-quantised.

    Raises:
        SourceError: PEFT cannot load the adapter onto this base, their names do not match, or the adapter changes no
            weight.
    """
    refuse_prompts(config)
    stored = adapter_tensors(config.folder)
    if config.method in _BY_ORDER:
        raise SourceError(
            f"{config.folder} is a {config.method} adapter, whose random numbers follow the order of the model's "
            "layers, which files do not tell: load it with PEFT and analyze the PeftModel"
        )
    if config.at_random:
        raise SourceError(
            f"{config.folder} took a part out of its base's weights that PEFT draws anew each time it is loaded "
            "(pissa_niter_…): convert it to a plain LoRA where it was trained"
        )
    if any(tensor.name.startswith("blk.") for tensor in base):
        raise SourceError(
            f"{config.folder} is a {config.method} adapter, whose change is computed on the model, and the "
            "base has GGUF's names: give the model that the GGUF file was made from as the base"
        )
    shift = _shift(stored, base)
    by_name = {shift(tensor.name): tensor for tensor in base}
    whole = whole_tensors(stored)
    for tensor in whole:
        target = by_name.get(tensor.name)
        if target is not None:
            by_name[tensor.name] = replace(tensor, name=target.name, kind=target.kind)
        elif tensor.name.rpartition(".")[0].rpartition(".")[2] in config.saved:
            by_name[tensor.name] = tensor  # a head that was tied before
    adapted = _adapted(config, stored, by_name)
    result = []
    for name, tensor in by_name.items():
        found = adapted.get(name)
        if found is None:
            result.append(tensor)
        else:
            read = found.read
            if isinstance(read, (Adapted, Merged)):  # the skeleton is in float32, and the base's numbers are not
                read = replace(read, base=replace(read.base, dtype=tensor.dtype))
            # a tied pair that the adapter saves whole stays one
            kept = tensor.storage if read is found.read and tensor.name in {other.name for other in whole} else None
            result.append(replace(tensor, read=read, problem=found.problem or tensor.problem, storage=kept))
    return result


def _adapted(
    config: AdapterConfig, stored: dict[str, StoredTensor], base: dict[str, StoredTensor]
) -> dict[str, StoredTensor]:
    """The tensors of the modules that the adapter touches, merged when they are read."""
    import torch
    from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PeftModel, PeftType

    from htsr.matrices.modules import module_tensors

    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]), torch.no_grad():
        warnings.simplefilter("ignore")
        try:
            options = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(config.method)].from_pretrained(str(config.folder))
            options.task_type, options.inference_mode = None, True
            touched = {path for path in _modules(base) if _touches(options, stored, path)}
            model = PeftModel(_skeleton(base, touched, config.transposed), options)
            loaded = model.load_adapter(str(config.folder), "default", torch_device="cpu")
            unknown = [*loaded.unexpected_keys, *_not_loaded(model, loaded.missing_keys)]
        except MemoryError:
            raise
        except Exception as error:
            why = (str(error) or type(error).__name__).strip().splitlines()[0]
            raise SourceError(f"PEFT cannot put the adapter {config.folder} on this base: {why}") from error
    if unknown:
        raise SourceError(
            f"the adapter {config.folder} does not belong to this base, which has no place for {unknown[0]}; if its "
            "files store layers in another form than the loaded model has, give that as the base"
        )
    tensors = {base_name(tensor.name): tensor for tensor in module_tensors(model)}
    return {name: tensor for name, tensor in tensors.items() if name.rpartition(".")[0] in touched and name in base}


def _not_loaded(model: Any, missing: list[str]) -> list[str]:
    """Of the `missing` names those that share no memory with a tensor that was loaded under another name."""
    state = model.state_dict()
    loaded = {tensor.data_ptr() for name, tensor in state.items() if name not in missing}
    return [name for name in missing if name not in state or state[name].data_ptr() not in loaded]


def _touches(options: Any, stored: Iterable[str], path: str) -> bool:
    from peft.tuners.tuners_utils import check_target_module_exists

    if any(name.startswith(f"{path}.") for name in stored):
        return True
    return bool(getattr(options, "target_modules", None) and check_target_module_exists(options, path))


def _modules(base: dict[str, StoredTensor]) -> dict[str, dict[str, StoredTensor]]:
    """The base's tensors by the module that they are in."""
    modules: dict[str, dict[str, StoredTensor]] = {}
    for name, tensor in base.items():
        path, _, leaf = name.rpartition(".")
        modules.setdefault(path, {})[leaf] = tensor
    return modules


def _skeleton(base: dict[str, StoredTensor], touched: set[str], transposed: bool) -> torch.nn.Module:
    """A module with the base's names and shapes; only what is `touched` takes memory."""
    import torch
    from torch import nn

    root = nn.Module()
    for path, leaves in sorted(_modules(base).items(), key=lambda item: item[0].count(".")):
        parent, steps = root, path.split(".") if path else []
        for step in steps[:-1]:
            if step not in parent._modules:
                parent.add_module(step, nn.Module())
            parent = parent._modules[step]  # type: ignore[assignment]
        module = _layer(leaves, transposed) if steps else root
        if steps:
            parent.add_module(steps[-1], module)
        for leaf, tensor in leaves.items():
            values = torch.as_tensor(tensor.read()) if path in touched and not tensor.problem else torch.zeros(())
            values = values if values.dtype == torch.float64 else values.float()  # PEFT computes in the base's dtype
            module.register_parameter(leaf, nn.Parameter(values.expand(tensor.shape), requires_grad=False))
    return root


def _layer(leaves: dict[str, StoredTensor], transposed: bool) -> torch.nn.Module:
    """The kind of layer that PEFT sees, told from the shape and name of its weight."""
    import torch
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    weight = leaves.get("weight")
    if weight is None or len(weight.shape) < 2 or 0 in weight.shape:
        return nn.Module()
    first, second, *kernel = weight.shape
    with torch.device("meta"):
        if kernel and len(kernel) <= 3:
            layer: nn.Module = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[len(kernel) - 1](second, first, tuple(kernel))  # type: ignore[arg-type]
        elif weight.kind == "embedding" or roles.role_of(weight.name, weight.kind).startswith("embed"):
            layer = nn.Embedding(first, second)
        elif transposed:
            layer = Conv1D(second, first)  # type: ignore[no-untyped-call]
        else:
            layer = nn.Linear(second, first)
    for name in [name for name, _ in layer.named_parameters() if name not in leaves]:
        layer.register_parameter(name, None)
    return layer


def _shift(stored: Iterable[str], base: list[StoredTensor]) -> Any:
    """What turns the base's names into those that the adapter knows: one of the two may have the head's prefix."""
    paths = {tensor.name.rpartition(".")[0] for tensor in base} - {""}
    for name in stored:
        if any(name.startswith(f"{path}.") for path in paths):
            return lambda name: name
        for path in paths:
            found = name.find(f".{path}.")
            if found > 0:
                prefix = name[: found + 1]
                return lambda name, prefix=prefix: prefix + name
            more, _, rest = path.partition(".")
            if rest and name.startswith(f"{rest}."):
                return lambda name, more=more: name.removeprefix(f"{more}.")
    return lambda name: name
