"""Which parameters of a model are trained at low rank, and which options their groups may have."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral
from typing import TYPE_CHECKING, Any

from htsr.errors import UsageError
from htsr.matrices.roles import block_of, is_stack_of_experts, role_of
from htsr.matrices.sharded import refuse_flat
from htsr.matrices.stored_tensors import clean_name
from htsr.training.lowrank.moments import STATE_DTYPES
from htsr.training.lowrank.rounding import ROUNDINGS
from htsr.training.lowrank.scaling import SCALED_BY

if TYPE_CHECKING:
    import torch

_IN_BLOCKS = {"attn", "cross_attn", "mlp", "expert", "shared_expert"}


def is_low_rank(name: str, shape: Sequence[int], rank: int, embeddings: bool = False) -> bool:
    """Whether `low_rank_groups` gives a parameter a rank: a large matrix, or stack of experts, inside a block.

    Args:
        name: name of the parameter, with wrappers' prefixes or without.
        shape: shape of the parameter; a stack has the experts on its first axis.
        rank: dimension r of the subspace; the smaller side must exceed it.
        embeddings: whether embedding and head get one, too.

    Examples:
        >>> from htsr.training.lowrank.groups import is_low_rank
        >>> is_low_rank("model.layers.0.mlp.up_proj.weight", (256, 64), rank=8)
        True
        >>> is_low_rank("model.layers.0.mlp.up_proj.weight", (256, 8), rank=8)
        False
    """
    name = clean_name(name)
    role = role_of(name)
    chosen = role.split(".")[0] in _IN_BLOCKS and block_of(name) is not None
    matrices = len(shape) == 2 or is_stack_of_experts(name, shape)
    return matrices and min(shape[-2:]) > rank and (chosen or (embeddings and role in ("embed", "head")))


def low_rank_groups(
    model: torch.nn.Module, rank: int, *, embeddings: bool = False, **options: Any
) -> list[dict[str, Any]]:
    """Parameter groups for `LowRankAdamW`: attention and MLP matrices of the blocks at low rank, the rest in full.

    Frozen parameters are in the groups too, so that they can be thawed later. A matrix whose smaller side is at most
    `rank` stays full-rank, where it is smaller and cheaper; so do tensors of three and more dimensions, but for
    stacks of experts, where each expert has a subspace of its own. Vectors (norms, biases) have no weight decay.

    Args:
        model: any module whose parameter names tell their roles (`htsr.matrices.roles`).
        rank: dimension r of the subspace of every low-rank matrix.
        embeddings: whether embedding and head get low-rank states, too.
        **options: more keys of the low-rank group: `scale`, `refresh_every`, `method`, `scaled_by`, `moments`, `lr` …

    Returns:
        Up to three groups, those without parameters left out: low rank, full rank, vectors.

    Raises:
        UsageError: the rank is below 1, no matrix of the model can have it, or FSDP1 has flattened them.

    Examples:
        Four matrices of each of three blocks at rank 4, and eight vectors of each without weight decay:

        >>> import htsr, torch
        >>> layer = torch.nn.TransformerEncoderLayer(d_model=16, nhead=2, dim_feedforward=32)
        >>> model = torch.nn.TransformerEncoder(layer, num_layers=3, enable_nested_tensor=False)
        >>> [(len(group["params"]), group.get("rank")) for group in htsr.low_rank_groups(model, rank=4)]
        [(12, 4), (24, None)]
    """
    refuse_flat(model)
    _insist_on_count("rank", rank)
    low: list[Any] = []
    full: list[Any] = []
    vectors: list[Any] = []
    for name, parameter in model.named_parameters():
        if is_low_rank(name, parameter.shape, rank, embeddings):
            low.append(parameter)
        else:
            (vectors if parameter.ndim < 2 else full).append(parameter)
    if not low:
        raise UsageError(
            f"no matrix of {type(model).__name__} can have rank {rank}: none is an attention or MLP matrix of a block "
            "with both sides larger"
        )
    groups = [{"params": low, "rank": rank, **options}, {"params": full}, {"params": vectors, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def told(group: dict[str, Any], parameter: torch.Tensor, number: int) -> str:
    """What a message calls a parameter: by its name where torch was given named parameters, else by its number.

    Args:
        group: group of the parameter.
        parameter: parameter of any shape.
        number: number of the parameter among all of the optimizer.
    """
    members, names = group["params"], group.get("param_names", ())
    named = zip(names, members, strict=True) if len(names) == len(members) else ()
    return f"parameter {next((name for name, member in named if member is parameter), number)}"


def fill_group(group: dict[str, Any]) -> None:
    """Put the values of GaLore, APOLLO or APOLLO-Mini where a group of `LowRankAdamW` has None.

    Args:
        group: parameter group with all options.
    """
    if group["scale"] is None:
        group["scale"] = 128**0.5 if group["scaled_by"] == "tensor" else 1.0
    if group["method"] is None:
        group["method"] = "randomized" if group["scaled_by"] is None else "random"


def check_group(group: dict[str, Any]) -> None:
    """Refuse a group of `LowRankAdamW` with an option without meaning.

    Args:
        group: parameter group with all options.

    Raises:
        UsageError: an option has no meaning, a parameter is complex, or a group with a rank holds anything but
            matrices.
    """
    for name, known in (
        ("method", ("svd", "randomized", "random")),
        ("scaled_by", (None, *SCALED_BY)),
        ("moments", ("keep", "rotate")),
        ("state_dtype", STATE_DTYPES),
        ("rounding", ROUNDINGS),
    ):
        if group[name] not in known:
            raise UsageError(f"unknown {name} {group[name]!r}: one of {', '.join(map(str, known))}")
    if group["method"] == "random" and (group["scaled_by"] is None or group["moments"] == "rotate"):
        wrong = "scaled_by None" if group["scaled_by"] is None else "moments 'rotate'"
        raise UsageError(f"method 'random' is for scaled_by channel or tensor with moments kept, not for {wrong}")
    for name in ("lr", "eps", "weight_decay", "scale"):
        if not 0 <= _number(group[name]) < math.inf:
            raise UsageError(f"{name} is {group[name]!r}; it is a finite number, at least 0")
    betas = group["betas"]
    if not (isinstance(betas, (tuple, list)) and len(betas) == 2 and all(0 <= _number(beta) < 1 for beta in betas)):
        raise UsageError(f"betas are {betas!r}; they are two numbers in [0, 1)")
    _insist_on_count("refresh_every", group["refresh_every"])
    if any(parameter.is_complex() for parameter in group["params"]):
        raise UsageError("LowRankAdamW takes real parameters, and one is complex: train it as torch.view_as_real")
    if group["rank"] is None:
        return
    _insist_on_count("rank", group["rank"])
    for parameter in group["params"]:
        if parameter.ndim not in (2, 3):
            raise UsageError(
                "a group with rank holds matrices and stacks of them, and one of its parameters is "
                f"{tuple(parameter.shape)}"
            )


def _number(value: Any) -> float:
    """The value of a number or of a tensor with one; NaN for anything else."""
    try:
        return math.nan if isinstance(value, (bool, str)) else float(value)
    except (TypeError, ValueError, RuntimeError):
        return math.nan


def _insist_on_count(name: str, value: Any) -> None:
    if not isinstance(value, Integral) or isinstance(value, bool) or value < 1:
        raise UsageError(f"{name} is {value!r}; it is a whole number, at least 1")
