"""Parameter groups of `htsr.GUM`: which matrices are drawn together, and with which weight."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from htsr.calibration.outliers import OWLORE_THRESHOLD
from htsr.errors import UsageError
from htsr.matrices.blocks import find_blocks
from htsr.matrices.roles import block_of, role_of
from htsr.matrices.stored_tensors import clean_name
from htsr.training.lowrank.groups import low_rank_groups
from htsr.training.sampling.members import Unit
from htsr.training.sampling.probabilities import Scores, Strategy, block_probabilities

if TYPE_CHECKING:
    import torch


def gum_groups(
    model: torch.nn.Module,
    rank: int,
    *,
    strategy: Strategy | Sequence[float] = "uniform",
    scores: Scores | None = None,
    unit: Unit = "block",
    threshold: float = OWLORE_THRESHOLD,
    embeddings: bool = False,
    **options: Any,
) -> list[dict[str, Any]]:
    """Parameter groups for `GUM`: `low_rank_groups`, with one group at low rank for each unit of the draws.

    Args:
        model: any module whose parameter names tell their roles; its blocks are found as by `LayerSampler`.
        rank: dimension r of the subspace of every low-rank matrix.
        strategy: weights of the blocks in the draws, as `LayerSampler` takes them: ``uniform`` (the paper), ``owlore``
            (outliers), ``alpha``, ``erg``, ``snr`` (an analysis) …, or one weight above 0 for each block.
        scores: the `Outliers` or the `Analysis` that the strategy needs.
        unit: what is drawn: a ``block`` with all of its matrices, or each ``matrix`` for itself, with the weight of
            its block.
        threshold: τ of the outlier distribution.
        embeddings: whether embedding and head are trained at low rank, too, as one unit with the mean weight.
        **options: more keys of the groups with a rank: `scale`, `base`, `lr` …

    Returns:
        Groups with the keys ``unit`` and ``weight`` at low rank, then those in full, and vectors without decay.

    Raises:
        UsageError: no matrix can have this rank, the strategy lacks its scores, or it gives a block the weight 0,
            whose complement no draw would ever reach.
        SourceError: the model has no blocks.

    Examples:
        >>> import htsr, torch
        >>> layer = torch.nn.TransformerEncoderLayer(d_model=16, nhead=2, dim_feedforward=32)
        >>> model = torch.nn.TransformerEncoder(layer, num_layers=2, enable_nested_tensor=False)
        >>> groups = htsr.gum_groups(model, rank=4, strategy="increase")
        >>> [(len(group["params"]), group.get("unit"), round(group.get("weight", 0), 2)) for group in groups]
        [(4, 0, 0.33), (4, 1, 0.67), (16, None, 0)]
    """
    blocks = find_blocks(model)
    probabilities = block_probabilities(strategy, blocks, scores, threshold)
    if (probabilities == 0).any():
        empty = blocks.names[int((probabilities == 0).argmax())]
        raise UsageError(
            f"{empty} has the weight 0 in the draws, so nothing would train it outside of its subspaces: take a lower "
            "threshold of outliers, or another strategy"
        )
    if unit not in ("block", "matrix"):
        raise UsageError(f"unknown unit {unit!r}: block or matrix")
    names = {parameter: clean_name(name) for name, parameter in model.named_parameters()}
    units: dict[Any, dict[str, Any]] = {}
    (low, *rest) = low_rank_groups(model, rank, embeddings=embeddings, **options)
    for parameter in low.pop("params"):
        name = names[parameter]
        index = blocks.index_of(name)
        key = unit_of(name, index, unit)
        weight = float(probabilities[index] if index is not None else 1 / len(blocks))
        units.setdefault(key, {"params": [], **low, "unit": len(units), "weight": weight})["params"].append(parameter)
    return [*units.values(), *rest]


def unit_of(name: str, block: int | None, unit: Unit) -> str | int:
    """What of the draws a matrix at low rank belongs to.

    Args:
        name: name of the parameter.
        block: place of its block; None outside of the sampled blocks.
        unit: what is drawn, ``block`` or ``matrix``.

    Returns:
        The name itself, the place of the block, or what stands for one: ``embedding and head``, a block of another
        tower.
    """
    if unit == "matrix":
        return name
    return block if block is not None else _outside(name)


def _outside(name: str) -> str:
    """What a matrix outside of the sampled blocks belongs to: embedding and head, or a block of another tower."""
    if role_of(name) in ("embed", "head"):
        return "embedding and head"
    before, _, _ = name.partition(f".{block_of(name)}.")
    return f"{before}.{block_of(name)}"
