"""What takes part in layer sampling: which parameters belong to which block, to the embedding, or to neither."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from htsr.matrices.blocks import Blocks, find_blocks
from htsr.matrices.roles import role_of
from htsr.matrices.stored_tensors import base_name, clean_name

if TYPE_CHECKING:
    import torch


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
