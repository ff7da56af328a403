"""Where the model of a run lies before it is trained.

A whole model lies on the device of its process. One that FSDP2 will shard is loaded into host memory, and accelerate
brings it to the devices block by block, sharded: no device ever holds it whole. So is one whose frozen blocks live
there. What runs before (outliers, questions) runs on the device all the same, one block of the model at a time
(`on_device`).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from typing import TYPE_CHECKING, Any

from htsr.calibration.activations import stacked_experts
from htsr.calibration.adapted import is_adapter_alone, load_adapted
from htsr.calibration.loading import load_model
from htsr.errors import SourceError
from htsr.matrices.blocks import find_blocks

if TYPE_CHECKING:
    import torch

    from htsr.finetuning.recipe import Recipe


def how_loaded(recipe: Recipe) -> dict[str, Any]:
    """Arguments of `load_model` for the model of a `recipe`, and for what becomes of it."""
    import torch

    dtype = None if recipe.dtype == "auto" else getattr(torch, recipe.dtype)
    return {"dtype": dtype, "causal": True, "four_bit": recipe.method == "qlora", "options": recipe.model_options}


def load_placed(arguments: Any, name: str, *, streamed: bool = False, **how: Any) -> torch.nn.Module:
    """The model in its place: on the device of this process, or in host memory where FSDP will shard it.

    Args:
        arguments: arguments of TRL.
        name: folder, hub id or .gguf file; or the folder of an adapter, which is merged into its base.
        streamed: whether the model's frozen blocks live in host memory.
        how: arguments of `load_model`.

    Raises:
        SourceError: it cannot be loaded.
    """
    load = load_model
    if is_adapter_alone(name):
        load = load_adapted
        del how["revision"]  # that of the base is the adapter's to name
    if streamed:
        return load(name, **how)
    if not is_to_be_sharded(arguments):
        return load(name, **how).to(arguments.device)
    with whole_on_every_rank():
        return load(name, **how)


def is_to_be_sharded(arguments: Any) -> bool:
    """Whether the `arguments` of TRL, or the configuration of the launcher, tell accelerate to use FSDP."""
    from accelerate.utils import parse_flag_from_env

    return bool(arguments.fsdp) or bool(parse_flag_from_env("ACCELERATE_USE_FSDP"))


@contextmanager
def whole_on_every_rank() -> Iterator[None]:
    """Within it transformers loads weights on all ranks; else those but the first have none, and nothing to measure.

    Nor could accelerate tell the optimizer's parameters apart, which it does by their addresses.
    """
    name = "FSDP_CPU_RAM_EFFICIENT_LOADING"
    before = os.environ.get(name)
    os.environ[name] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


@contextmanager
def on_device(model: torch.nn.Module, device: torch.device) -> Iterator[None]:
    """Within it `model` runs on `device`, and only the block that runs lies there, beside what is outside of blocks.

    Nothing may train within it. A model that lies on the device already stays as it is. So does one whose experts are
    stacked, or that has no blocks: it runs where it lies.

    Args:
        model: model, not yet wrapped.
        device: device to run on.
    """
    if all(parameter.device == device for parameter in model.parameters()) or stacked_experts(model):
        yield
        return
    try:
        blocks = find_blocks(model).modules
    except SourceError:
        yield
        return
    homes: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def bring(tensors: Iterator[torch.Tensor]) -> None:
        for tensor in tensors:
            if tensor.device != device:
                homes[id(tensor)] = tensor, tensor.data
                tensor.data = tensor.data.to(device)

    def send_home(tensors: Iterator[torch.Tensor]) -> None:
        for tensor in tensors:
            if id(tensor) in homes:
                tensor.data = homes.pop(id(tensor))[1]

    def before(block: torch.nn.Module, _args: Any) -> None:
        bring(_tensors(block))

    def after(block: torch.nn.Module, _args: Any, _output: Any) -> None:
        send_home(_tensors(block))

    inside = {id(tensor) for block in blocks for tensor in _tensors(block)}
    handles = [block.register_forward_pre_hook(before) for block in blocks]
    handles += [block.register_forward_hook(after) for block in blocks]
    try:
        bring(tensor for tensor in _tensors(model) if id(tensor) not in inside)
        yield
    finally:
        for handle in handles:
            handle.remove()
        send_home(tensor for tensor, _ in list(homes.values()))


def _tensors(module: torch.nn.Module) -> Iterator[torch.Tensor]:
    return chain(module.parameters(), module.buffers())
