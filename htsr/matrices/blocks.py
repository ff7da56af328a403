"""The blocks of a transformer that its loss comes through, found by structure: no class is named."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from htsr.errors import SourceError, UsageError
from htsr.matrices.stored_tensors import clean_name

if TYPE_CHECKING:
    import torch

_ADAPTED = "base_model.model."  # what peft puts before the names of the model it wraps


@dataclass(frozen=True)
class Blocks:
    """The repeated blocks of a model, in order; indexed from 0.

    Attributes:
        names: module names of the blocks without wrappers' prefixes, as in ``model.layers.0``.
        modules: the blocks themselves.
        tower: name of the module that holds the blocks and their embedding, such as ``model.language_model`` in a
            vision-language model; empty where that is the whole model.
        others: names of the model's other lists of modules, such as the blocks of a vision tower.
    """

    names: tuple[str, ...]
    modules: tuple[torch.nn.Module, ...] = field(repr=False)
    tower: str = ""
    others: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.names)

    def holds(self, name: str) -> bool:
        """Whether the parameter `name` lies in the tower."""
        return not self.tower or _clean(name).startswith(f"{self.tower}.")

    def index_of(self, name: str) -> int | None:
        """The block that the matrix or parameter `name` lies in, None outside of all.

        Names of files and of modules may differ in what stands before the container: ``h.0.attn`` in a GPT-2 file is
        ``transformer.h.0.attn`` in the module, ``language_model.model.layers.0`` in an older file of a vision-language
        model is ``model.language_model.layers.0``. Where the whole name does not decide, a name is of a block if
        container and index are the same and all that stands before them also stands before the block's.
        """
        name = _clean(name)
        for index, block in enumerate(self.names):
            if name.startswith(f"{block}."):
                return index
        found = [index for index, block in enumerate(self.names) if _is_elsewhere(name, block)]
        return found[0] if len(found) == 1 else None


def _is_elsewhere(name: str, block: str) -> bool:
    *before, container, number = block.split(".")
    parts = name.split(".")
    for at in range(len(parts) - 2):
        if parts[at : at + 2] == [container, number]:
            return set(parts[:at]) <= set(before)
    return False


def find_blocks(model: torch.nn.Module, blocks: str | Sequence[str] | None = None) -> Blocks:
    """The blocks of a transformers encoder or decoder: the items of an ``nn.ModuleList`` with parameters.

    It is looked for in the smallest part of the model that holds such a list beside the input embeddings
    (`get_input_embeddings`): the language model of a vision-language model, not its vision tower, though that may have
    more blocks. There it is the list of as many items as the configuration's text model has layers, else the longest.
    Of a sequence-to-sequence model encoder and decoder are taken together, one after the other. A model without such
    methods gives its longest list, or all of that length. Lists inside the items of another list (the experts of a
    block) do not count.

    Args:
        model: the model, wrapped or not.
        blocks: name of the list to take instead, as in ``model.visual.blocks``, or several such names.

    Raises:
        SourceError: the model has no list of modules with parameters.
        UsageError: the model has no list with the name given as `blocks`.
    """
    lists = _lists(model)
    if not lists:
        raise SourceError(f"{type(model).__name__} has no nn.ModuleList of blocks with parameters")
    if blocks is None:
        tower, chosen = _of_the_loss(model, lists)
    else:
        tower, chosen = "", [blocks] if isinstance(blocks, str) else list(blocks)
        missing = [name for name in chosen if name not in lists]
        if missing or not chosen:
            known = ", ".join(f"{name} ({len(items)} blocks)" for name, items in lists.items())
            raise UsageError(f"{type(model).__name__} has no blocks {', '.join(missing)!r}; there are {known}")
    return Blocks(
        tuple(f"{name}.{i}" for name in chosen for i in range(len(lists[name]))),
        tuple(block for name in chosen for block in lists[name]),
        tower,
        tuple(name for name in lists if name not in chosen),
    )


def _lists(model: torch.nn.Module) -> dict[str, Any]:
    """The outermost lists of modules with parameters, by clean name."""
    from torch import nn

    lists: dict[str, Any] = {}
    for full, module in model.named_modules():
        name = _clean(full)
        inside = any(name.startswith(f"{outer}.") for outer in lists)
        if isinstance(module, nn.ModuleList) and len(module) and not inside and _have_parameters(module):
            lists[name] = module
    return lists


def _of_the_loss(model: torch.nn.Module, lists: dict[str, Any]) -> tuple[str, list[str]]:
    """Name of the part of the model, and of its lists, that the loss of the text comes through."""
    names = {id(module): _clean(name) for name, module in model.named_modules()}
    inner: Any = next((m for m in model.modules() if hasattr(type(m), "get_input_embeddings")), None)
    config = getattr(inner, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        halves = [names.get(id(_called(inner, getter))) for getter in ("get_encoder", "get_decoder")]
        found = [_longest(_within(half, lists), lists) for half in halves if half]
        both = list(dict.fromkeys(name for (name, *_) in found))
        return ("", both) if len(both) == 2 else ("", _longest(list(lists), lists))
    embedding = names.get(id(_called(inner, "get_input_embeddings")))
    if embedding is None:
        return "", _longest(list(lists), lists)
    tower = embedding
    while tower and not _within(tower, lists):
        tower = tower.rpartition(".")[0]
    candidates = _within(tower, lists)
    layers = getattr(_called(config, "get_text_config") or config, "num_hidden_layers", None)
    longest = [name for name in candidates if len(lists[name]) == layers] or _longest(candidates, lists)
    return tower, [min(longest, key=lambda name: name.count("."))]


def _called(owner: Any, getter: str) -> Any:
    try:
        return getattr(owner, getter)()
    except (AttributeError, NotImplementedError, TypeError):
        return None


def _within(part: str, lists: Iterable[str]) -> list[str]:
    return [name for name in lists if not part or name.startswith(f"{part}.")]


def _longest(candidates: list[str], lists: dict[str, Any]) -> list[str]:
    longest = max((len(lists[name]) for name in candidates), default=0)
    return [name for name in candidates if len(lists[name]) == longest]


def _clean(name: str) -> str:
    return clean_name(name).removeprefix(_ADAPTED)


def _have_parameters(modules: Iterable[torch.nn.Module]) -> bool:
    return all(next(module.parameters(), None) is not None for module in modules)
