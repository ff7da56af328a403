"""The blocks of a transformer, found by structure: no class is named."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from htsr.errors import SourceError
from htsr.matrices.entries import clean_name

if TYPE_CHECKING:
    import torch

_ADAPTED = "base_model.model."  # what peft puts before the names of the model it wraps


@dataclass(frozen=True)
class Blocks:
    """The repeated blocks of a model, in order; indexed from 0.

    Attributes:
        names: their module names without wrappers, as in ``model.layers.0``.
        modules: the modules.
    """

    names: tuple[str, ...]
    modules: tuple[torch.nn.Module, ...] = field(repr=False)

    def __len__(self) -> int:
        return len(self.names)

    def index_of(self, name: str) -> int | None:
        """The block that the matrix or parameter `name` lies in, None outside of all.

        Names of files and of modules may differ in what stands before the container (``h.0.attn`` in a GPT-2 file,
        ``transformer.h.0.attn`` in the module); the container's own name and the index decide where the whole name
        does not.
        """
        name = clean_name(name).removeprefix(_ADAPTED)
        for index, block in enumerate(self.names):
            if name.startswith(f"{block}."):
                return index
        short = [".".join(block.rsplit(".", 2)[-2:]) for block in self.names]
        if len(set(short)) == len(short):
            for index, block in enumerate(short):
                if name.startswith(f"{block}."):
                    return index
        return None


def find_blocks(model: torch.nn.Module) -> Blocks:
    """The blocks of a transformers encoder or decoder: the items of its longest ``nn.ModuleList`` with parameters.

    Lists inside the items of another list (the experts of a block) do not count, and lists of equal length (encoder
    and decoder of a sequence-to-sequence model) are taken together, one after the other.

    Args:
        model: wrapped or not.

    Raises:
        SourceError: the model has no such list.
    """
    from torch import nn

    lists: list[tuple[str, nn.ModuleList]] = []
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer, _ in lists)
        if isinstance(module, nn.ModuleList) and not inside and _has_parameters(module):
            lists.append((name, module))
    if not lists:
        raise SourceError(f"{type(model).__name__} has no nn.ModuleList of blocks with parameters")
    longest = max(len(module) for _, module in lists)
    chosen = [(name, module) for name, module in lists if len(module) == longest]
    names = [f"{name}.{i}" for name, module in chosen for i in range(len(module))]
    return Blocks(
        tuple(clean_name(name).removeprefix(_ADAPTED) for name in names),
        tuple(block for _, module in chosen for block in module),
    )


def _has_parameters(modules: Iterable[torch.nn.Module]) -> bool:
    return all(next(module.parameters(), None) is not None for module in modules)
