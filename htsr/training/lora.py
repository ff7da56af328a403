"""LoRA adapters with ranks from spectra, under a fixed number of parameters.

    config = htsr.lora_config(model, htsr.analyze(model), rank=8)
    model = peft.get_peft_model(model, config)

The parameters are those of uniform rank 8; matrices with larger scores get more of them (AlphaLoRA: a larger α means
less trained, so more to learn). By default that is Hill's α over the mean of its role: α as such follows shape, so that
q, k and the MLP's matrices would differ by their kind before any training, and the α of a searched λ_min follows the
noise of the fit. Of the variance of Hill's α over the matrices of SmolLM2-135M and MiniLM-L6, 84 and 87 % lie between
roles (64 and 88 % after subtraction of the shape null), and the α of two random halves of a matrix, cut along its long
side, agree within roles by a correlation of .99 and .97; the α of ``ks`` by .45 and .51, stable ranks by .93 and .52.

Adapters are sampled by block with `LayerSampler(model)`, which takes what trains.
`htsr.analyze` reads a PEFT model as W + ΔW, before `merge_and_unload` as after.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from htsr import allocate
from htsr.analysis.result import Analysis
from htsr.errors import MatrixError, UsageError
from htsr.matrices.blocks import find_blocks
from htsr.matrices.patterns import matches, require
from htsr.matrices.roles import role_of
from htsr.spectra.metrics import NUMERIC, LayerMetrics
from htsr.spectra.tail import fit_power_law
from htsr.training.lora_targets import with_exclusions

if TYPE_CHECKING:
    import torch
    from peft import LoraConfig

HILL = "hill"  # computed here, no metric of the rows
_ROLES = ("attn.*", "mlp.*")


def lora_config(
    model: torch.nn.Module,
    analysis: Analysis,
    *,
    rank: int = 8,
    score: str = HILL,
    roles: Sequence[str] = _ROLES,
    modules: Collection[str] | None = None,
    blocks: str | Sequence[str] | None = None,
    minimum: int = 1,
    maximum: int | None = None,
    reverse: bool = False,
    scaling: float = 2.0,
    **options: Any,
) -> LoraConfig:
    """A `LoraConfig` whose `rank_pattern` follows the scores, at the parameters of uniform rank `rank`.

    One more rank costs in + out parameters. `alpha_pattern` keeps lora_alpha/r = `scaling` for every matrix, so that a
    larger rank means more directions, not a larger learning rate.

    Args:
        model: the model to be adapted.
        analysis: analysis of this model.
        rank: rank of the uniform adapter that sets the budget.
        score: ``hill``, Hill's α over the mean of its role, from the analysis's spectra whatever its own fit was, or
            any numeric metric ≥ 0 of `LayerMetrics` as it is. A matrix without it gets an average share.
        roles: which Linear modules inside the blocks are adapted, by role.
        modules: full names of these modules, in place of `roles`.
        blocks: name of the list of blocks, or several, in place of what `find_blocks` takes.
        minimum: least rank.
        maximum: largest rank; 4·`rank` if None. No rank exceeds the smaller side of its matrix.
        reverse: whether smaller scores get the larger ranks.
        scaling: lora_alpha/r.
        **options: more arguments of `LoraConfig`.

    Returns:
        PEFT's `LoraConfig`, for `peft.get_peft_model`.

    Raises:
        UsageError: there is no such metric, a score is negative, no module has these roles or one of these names, the
            analysis has other shapes, or the bounds do not allow the budget.
        SourceError: the model has no blocks.

    Examples:
        Four matrices of noise, but that the first has one dominant direction, and so the least stable rank:

        >>> import htsr, torch
        >>> _ = torch.manual_seed(0)
        >>> layer = torch.nn.TransformerEncoderLayer(d_model=64, nhead=2, dim_feedforward=128)
        >>> model = torch.nn.TransformerEncoder(layer, num_layers=2, enable_nested_tensor=False)
        >>> with torch.no_grad():
        ...     _ = model.layers[0].linear1.weight.add_(1.0)
        >>> analysis = htsr.analyze(model)
        >>> config = htsr.lora_config(model, analysis, rank=4, roles=["mlp.*"], score="stable_rank")
        >>> list(config.rank_pattern.values())  # four times 4 in all
        [1, 5, 5, 5]

    Source: AlphaLoRA (arXiv 2410.10054) for ranks that follow α; LoRA (arXiv 2106.09685).
    """
    from peft import LoraConfig

    ranks = adapter_ranks(
        model,
        analysis,
        rank=rank,
        score=score,
        roles=roles,
        modules=modules,
        blocks=blocks,
        minimum=minimum,
        maximum=maximum,
        reverse=reverse,
    )
    longest_first = sorted(ranks.items(), key=lambda item: -len(item[0]))  # PEFT takes the first that ends a name
    patterns = {re.escape(name): r for name, r in longest_first}
    return LoraConfig(
        r=rank,
        lora_alpha=scaling * rank,  # type: ignore[arg-type]
        target_modules=list(ranks),
        rank_pattern=patterns,
        alpha_pattern={name: scaling * r for name, r in patterns.items()},  # type: ignore[misc]
        **with_exclusions(model, ranks, options),
    )


def adapter_ranks(
    model: torch.nn.Module,
    analysis: Analysis,
    *,
    rank: int,
    score: str = HILL,
    roles: Sequence[str] = _ROLES,
    modules: Collection[str] | None = None,
    blocks: str | Sequence[str] | None = None,
    minimum: int = 1,
    maximum: int | None = None,
    reverse: bool = False,
) -> dict[str, int]:
    """Rank of each adapted module by name.

    Args:
        model: the model to be adapted.
        analysis: analysis of this model.
        rank: rank of the uniform adapter that sets the budget.
        score: ``hill``, or any numeric metric ≥ 0 of `LayerMetrics`.
        roles: which Linear modules inside the blocks are adapted, by role.
        modules: full names of these modules, in place of `roles`.
        blocks: name of the list of blocks, or several, in place of what `find_blocks` takes.
        minimum: least rank.
        maximum: largest rank; 4·`rank` if None.
        reverse: whether smaller scores get the larger ranks.

    Raises:
        UsageError: there is no such metric, a score is negative, no module has these roles or one of these names, the
            analysis has other shapes, or the bounds do not allow the budget.
        SourceError: the model has no blocks.
    """
    from htsr.calibration.activations import linear_modules

    if score != HILL and score not in NUMERIC:
        raise UsageError(f"rows have no metric {score!r}; hill, stable_rank and entropy are usual")
    found = find_blocks(model, blocks)
    inside = {name: module for name, module in linear_modules(model) if found.index_of(name) is not None}
    if modules is None and tuple(roles) != _ROLES:
        require(roles, {role_of(name) for name in inside}, type(model).__name__, "role of a Linear inside the blocks")
    if outside := [name for name in modules or () if name not in inside]:
        raise UsageError(f"{outside[0]} is no Linear inside the blocks of {type(model).__name__}, and has no {score}")
    sides = {
        name: _sides(module)
        for name, module in inside.items()
        if (name in modules if modules is not None else matches(role_of(name), roles))
    }
    if not sides:
        raise UsageError(f"no Linear inside the blocks of {type(model).__name__} has a role among {', '.join(roles)}")
    values: dict[str, list[float]] = {name: [] for name in sides}
    rows = [row for row in analysis if _module_of(row) in sides]
    for row in rows:
        _insist_on_shape(row, sides[_module_of(row)], analysis.label, type(model).__name__)
    for row, value in zip(rows, _relative_hill(analysis, rows) if score == HILL else _metric(rows, score), strict=True):
        if value is not None:
            values[_module_of(row)].append(float(value))
    if not any(values.values()):
        raise UsageError(f"the analysis of {analysis.label} has no {score} of these modules")
    scores = [float(np.mean(own)) if own else math.nan for own in values.values()]
    costs = [int(sum(shape)) for shape in sides.values()]
    most = [min(4 * rank if maximum is None else maximum, *shape) for shape in sides.values()]
    given = allocate.ranks(scores, total=rank * sum(costs), minimum=minimum, maximum=most, costs=costs, reverse=reverse)
    return {name: int(r) for name, r in zip(sides, given, strict=True)}


def _module_of(row: LayerMetrics) -> str:
    return row.name.split("[")[0]  # parts of a fused matrix share its adapter


def _sides(module: torch.nn.Module) -> tuple[int, int]:
    """Output and input features of a Linear, whose weight may be packed in 4 bits; of a Conv1D the weight's shape."""
    if hasattr(module, "out_features") and hasattr(module, "in_features"):
        return int(cast("int", module.out_features)), int(cast("int", module.in_features))
    out, into = cast("torch.Tensor", module.weight).shape
    return out, into


def _insist_on_shape(row: LayerMetrics, sides: tuple[int, int], label: str, model: str) -> None:
    if row.rows is None or row.columns is None:
        return
    own = (row.rows, row.columns)
    part = row.name != _module_of(row)
    fits = bool({*own} & {*sides}) and max(own) <= max(sides) if part else sorted(own) == sorted(sides)
    if not fits:
        raise UsageError(
            f"the analysis of {label} is of another model: {row.name} is {own[0]}×{own[1]} there, and "
            f"{_module_of(row)} of {model} is {sides[0]}×{sides[1]}"
        )


def _metric(rows: Sequence[LayerMetrics], score: str) -> list[float | None]:
    return [getattr(row, score) for row in rows]


def _relative_hill(analysis: Analysis, rows: Sequence[LayerMetrics]) -> list[float | None]:
    """Hill's α of each row's spectrum, over the mean of the rows of its role."""
    alphas: list[float | None] = []
    for row in rows:
        try:
            spectrum = analysis.eigenvalues.get(row.name) if row.status == "ok" else None
            alphas.append(None if spectrum is None else fit_power_law(spectrum, "hill").alpha)
        except MatrixError:
            alphas.append(None)
    known: dict[str, list[float]] = {}
    for row, alpha in zip(rows, alphas, strict=True):
        if alpha is not None:
            known.setdefault(row.role, []).append(alpha)
    return [
        None if alpha is None else alpha / float(np.mean(known[row.role]))
        for row, alpha in zip(rows, alphas, strict=True)
    ]
