"""What takes part in layer sampling: which parameters belong to which block, to the embedding, or to neither."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

from htsr.errors import UsageError
from htsr.matrices.blocks import Blocks, find_blocks
from htsr.matrices.roles import role_of
from htsr.matrices.stored_tensors import base_name, clean_name

if TYPE_CHECKING:
    import torch

Unit: TypeAlias = Literal["block", "matrix"]

EMBEDDING = "embedding and head"


@dataclass(frozen=True)
class Trainable:
    """Names, without wrappers, of the parameters of a model that train.

    Attributes:
        blocks: names of the parameters of each block.
        embedding: names in the input embedding with all that comes before the first block of its tower (encoder and
            decoder are two), in position tables and embedding norms wherever a tower registers them, and in the head.
        rest: names of all others: final norm, classifier, vision tower.
    """

    blocks: list[list[str]]
    embedding: list[str]
    rest: list[str]


def trainable(model: torch.nn.Module, blocks: Blocks) -> Trainable:
    """Sort a model's trainable parameters into blocks, embedding and rest.

    Args:
        model: model, wrapped or not.
        blocks: blocks of this model.

    Examples:
        >>> import torch
        >>> from htsr.matrices.blocks import find_blocks
        >>> from htsr.training.sampling.members import trainable
        >>> layer = torch.nn.TransformerEncoderLayer(d_model=16, nhead=2, dim_feedforward=32)
        >>> model = torch.nn.TransformerEncoder(layer, 2, norm=torch.nn.LayerNorm(16), enable_nested_tensor=False)
        >>> found = trainable(model, find_blocks(model))
        >>> [len(names) for names in found.blocks], found.rest
        ([12, 12], ['norm.weight', 'norm.bias'])
    """
    ends = set()
    for module in model.modules():
        if hasattr(type(module), "get_input_embeddings"):
            for getter in ("get_input_embeddings", "get_output_embeddings"):
                try:
                    end = getattr(module, getter)()
                except (AttributeError, NotImplementedError, TypeError):
                    continue
                ends |= {id(parameter) for parameter in end.parameters()} if end is not None else set()
            break
    found = Trainable([[] for _ in blocks.names], [], [])
    lists = {block.rpartition(".")[0] for block in blocks.names}
    parents = sorted((name.rpartition(".")[0] for name in lists), key=len)
    begun = set[str]()  # towers of which a block has come, "" for all outside of them
    for full, parameter in model.named_parameters():
        index, name = blocks.index_of(full), clean_name(full)
        parent = next((own for own in reversed(parents) if own and base_name(name).startswith(f"{own}.")), "")
        begun |= set() if index is None else {parent, ""}
        if not parameter.requires_grad:
            continue
        if index is not None:
            found.blocks[index].append(name)
        elif id(parameter) in ends or (blocks.holds(name) and _embeds(name, before=parent not in begun)):
            found.embedding.append(name)
        else:
            found.rest.append(name)
    return found


def members_of(
    model: torch.nn.Module, blocks: Blocks, found: Trainable, unit: Unit, extra: list[str]
) -> dict[str, list[str]]:
    """What is drawn: blocks with something that trains, or their matrices as MISA draws them.

    A matrix goes with its bias, the adapters of one matrix go together, and so do matrices of one module (the experts
    of a block, a fused projection). What of a block belongs to no matrix (norms) goes with the first of its matrices.

    Args:
        model: model, wrapped or not.
        blocks: blocks of this model.
        found: its trainable parameters.
        unit: ``block`` or ``matrix``.
        extra: names of parameters that are one more member, embedding and head; none if empty.

    Returns:
        Names of the parameters of each member, by the member's name.

    Raises:
        UsageError: no block has trainable parameters, or there is `extra` beside matrices.

    Examples:
        >>> import torch
        >>> from htsr.matrices.blocks import find_blocks
        >>> from htsr.training.sampling.members import members_of, trainable
        >>> layer = torch.nn.TransformerEncoderLayer(d_model=16, nhead=2, dim_feedforward=32)
        >>> model = torch.nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        >>> blocks = find_blocks(model)
        >>> members = members_of(model, blocks, trainable(model, blocks), "matrix", [])
        >>> {name: len(inside) for name, inside in members.items()}  # the first with two norms of two vectors each
        {'layers.0.self_attn': 6, 'layers.0.self_attn.out_proj': 2, 'layers.0.linear1': 2, 'layers.0.linear2': 2}
    """
    if unit == "matrix" and extra:
        raise UsageError("embedding='sampled' is a member beside blocks: take unit='block', or another embedding")
    dimensions = {clean_name(name): parameter.ndim for name, parameter in model.named_parameters()}
    members: dict[str, list[str]] = {}
    for block, names in zip(blocks.names, found.blocks, strict=True):
        if not names:  # the caller says so
            continue
        modules: dict[str, list[str]] = {}
        for name in names:
            modules.setdefault(_module_of(name), []).append(name)
        own = {module: inside for module, inside in modules.items() if any(dimensions[name] > 1 for name in inside)}
        if unit == "block" or not own:
            members[block] = names
        else:
            members |= own
            first = next(iter(own))
            members[first] = own[first] + [n for module, inside in modules.items() if module not in own for n in inside]
    if not members:
        raise UsageError(f"no block of {type(model).__name__} has trainable parameters: thaw some before sampling")
    return members | ({EMBEDDING: extra} if extra else {})


def _module_of(name: str) -> str:
    """The module whose parameter this is; of an adapter the one that it adapts."""
    return re.split(r"\.lora_\w+(?:\.|$)", name)[0] if ".lora_" in name else name.rpartition(".")[0]


def freeze_embedding(model: torch.nn.Module) -> None:
    """Freeze the embedding with all that comes before the first block, and the head.

    Args:
        model: model, wrapped or not.

    Raises:
        SourceError: the model has no blocks.
    """
    frozen = set(trainable(model, find_blocks(model)).embedding)
    for name, parameter in model.named_parameters():
        if clean_name(name) in frozen:
            parameter.requires_grad_(False)


def _embeds(name: str, before: bool) -> bool:
    """Whether a parameter outside of the blocks embeds; `before`: it is registered before its tower's first block.

    Registration is not the order of forward: OPT's final norm comes before its blocks, BART's embedding norm after.
    """
    roles = {role_of(name), role_of(f"{name.rpartition('.')[0]}.weight")}  # a norm's bias has no role of its own
    return any(role.split(".")[0] == "embed" for role in roles) or (before and "final" not in name)


def what_else_trains(model: torch.nn.Module, blocks: Blocks, names: Trainable) -> str | None:
    """A sentence on what trains in every step beside sampled blocks, where it is more than the largest of them.

    Args:
        model: model, wrapped or not.
        blocks: blocks that are sampled.
        names: names of the model's trainable parameters.
    """
    sizes = {clean_name(name): parameter.numel() for name, parameter in model.named_parameters()}
    rest = sum(sizes[name] for name in names.rest)
    if rest <= max(sum(sizes[name] for name in members) for members in names.blocks):
        return None
    towers = [name for name in blocks.others if any(own.startswith(f"{name}.") for own in names.rest)]
    where = ", ".join(towers) or f"{names.rest[0]} and others"
    return (
        f"{rest / 1e6:.3g} million parameters outside of the sampled blocks ({blocks.names[0]} …) train in every step, "
        f"more than a block has: {where}. Freeze them before the sampler is made, or give it blocks=…"
    )
