"""LoRA adapters with ranks from spectra, under a fixed number of parameters.

    config = htsr.lora_config(model, htsr.analyze(model), rank=8)
    model = peft.get_peft_model(model, config)

The parameters are those of uniform rank 8; matrices with larger scores get more of them (AlphaLoRA: a larger α means
less trained, so more to learn). Adapters are sampled by block with `LayerSampler(model)`, which takes what trains.
`htsr.analyze` reads a PEFT model as W + ΔW, before `merge_and_unload` as after.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from htsr import allocate
from htsr.analysis import Analysis
from htsr.errors import UsageError
from htsr.matrices.blocks import find_blocks
from htsr.matrices.patterns import matches, require
from htsr.matrices.roles import role_of
from htsr.spectra.metrics import NUMERIC

if TYPE_CHECKING:
    import torch
    from peft import LoraConfig

_ROLES = ("attn.*", "mlp.*")


def lora_config(
    model: torch.nn.Module,
    analysis: Analysis,
    *,
    rank: int = 8,
    score: str = "alpha",
    roles: Sequence[str] = _ROLES,
    minimum: int = 1,
    maximum: int | None = None,
    reverse: bool = False,
    scaling: float = 2.0,
    **options: Any,
) -> LoraConfig:
    """A `LoraConfig` whose `rank_pattern` follows the scores, at the parameters of uniform rank `rank`.

    A unit of rank costs in + out parameters. `alpha_pattern` keeps lora_alpha/r = `scaling` for every matrix, so that a
    larger rank means more directions, not a larger learning rate.

    Args:
        model: the model to be adapted.
        analysis: of it.
        rank: of the uniform adapter that sets the budget.
        score: any numeric metric ≥ 0 of `LayerMetrics`; a matrix without it gets an average share.
        roles: which Linear modules inside the blocks, by role.
        minimum: least rank.
        maximum: largest rank; 4·`rank` if None. No rank exceeds the smaller side of its matrix.
        reverse: more rank for smaller scores.
        scaling: lora_alpha/r.
        **options: more arguments of `LoraConfig`.

    Returns:
        PEFT's `LoraConfig`, for `peft.get_peft_model`.

    Raises:
        UsageError: no such metric, negative scores, no such modules, or a budget that the bounds do not allow.
        SourceError: a model without blocks.

    Source: AlphaLoRA (arXiv 2410.10054) for ranks that follow α; LoRA (arXiv 2106.09685).
    """
    from peft import LoraConfig

    ranks = adapter_ranks(
        model, analysis, rank=rank, score=score, roles=roles, minimum=minimum, maximum=maximum, reverse=reverse
    )
    patterns = {re.escape(name): r for name, r in ranks.items()}
    return LoraConfig(
        r=rank,
        lora_alpha=scaling * rank,  # type: ignore[arg-type]
        target_modules=list(ranks),
        rank_pattern=patterns,
        alpha_pattern={name: scaling * r for name, r in patterns.items()},  # type: ignore[misc]
        **options,
    )


def adapter_ranks(
    model: torch.nn.Module,
    analysis: Analysis,
    *,
    rank: int,
    score: str = "alpha",
    roles: Sequence[str] = _ROLES,
    minimum: int = 1,
    maximum: int | None = None,
    reverse: bool = False,
) -> dict[str, int]:
    """Rank of each adapted module by name.

    Args:
        model: as for `lora_config`, like the next.
        analysis: of it.
        rank: of the uniform adapter that sets the budget.
        score: any numeric metric ≥ 0 of `LayerMetrics`.
        roles: which Linear modules inside the blocks, by role.
        minimum: least rank.
        maximum: largest rank; 4·`rank` if None.
        reverse: more rank for smaller scores.

    Raises:
        UsageError: no such metric, negative scores, no such modules, or a budget that the bounds do not allow.
        SourceError: a model without blocks.
    """
    from htsr.activations import linear_modules

    if score not in NUMERIC:
        raise UsageError(f"rows have no metric {score!r}; alpha, stable_rank and entropy are usual")
    blocks = find_blocks(model)
    inside = {name: module for name, module in linear_modules(model) if blocks.index_of(name) is not None}
    if tuple(roles) != _ROLES:
        require(roles, {role_of(name) for name in inside}, type(model).__name__, "role of a Linear inside the blocks")
    modules = {
        name: cast("torch.Tensor", module.weight).shape
        for name, module in inside.items()
        if matches(role_of(name), roles)
    }
    if not modules:
        raise UsageError(f"no Linear inside the blocks of {type(model).__name__} has a role among {', '.join(roles)}")
    values: dict[str, list[float]] = {name: [] for name in modules}
    for row in analysis:
        name = row.name.split("[")[0]  # parts of a fused matrix share its adapter
        value = getattr(row, score)
        if name in values and value is not None:
            values[name].append(float(value))
    if not any(values.values()):
        raise UsageError(f"the analysis of {analysis.label} has no {score} of these modules")
    scores = [float(np.mean(found)) if found else math.nan for found in values.values()]
    costs = [int(sum(shape)) for shape in modules.values()]
    most = [min(4 * rank if maximum is None else maximum, *shape) for shape in modules.values()]
    given = allocate.ranks(scores, total=rank * sum(costs), minimum=minimum, maximum=most, costs=costs, reverse=reverse)
    return {name: int(r) for name, r in zip(modules, given, strict=True)}
