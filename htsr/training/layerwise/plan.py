"""The multipliers that a model would get at the first event, before any training."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from htsr.analysis.devices import device_of
from htsr.errors import UsageError
from htsr.matrices.roles import whole_name
from htsr.matrices.sources import Source, open_model
from htsr.results import Column, Record, Table, Tabular, Value, column_types, tabulate
from htsr.training.layerwise.live_scores import Failure, refuse_faults, scores
from htsr.training.layerwise.names import adapter_names, parameter_names
from htsr.training.layerwise.policy import Policy, PolicyLike, make_policy
from htsr.training.layerwise.units import (
    ParameterUnit,
    decide,
    fixed,
    has_tied_head,
    matrix_units,
    require_head,
    require_patterns,
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PlanRow:
    """One parameter of the plan.

    Attributes:
        name: name of the tensor, without ``.weight``.
        role: role of the tensor.
        block: index of its block.
        rows: rows of the whole tensor, or of one of its parts.
        columns: columns of the whole tensor, or of one of its parts.
        parts: number of matrices in it: 1, or more of a fused or stacked tensor.
        score: mean score over the parts; None where not measured.
        multiplier: multiplier of the learning rate or weight decay.
        why: ``measured``, ``embedding``, ``head``, ``small`` (fewer eigenvalues than `min_size`), ``fixed`` (pinned,
            excluded, or nothing is measured), or ``no score``.
    """

    name: str
    role: str
    block: int | None
    rows: int
    columns: int
    parts: int
    score: float | None
    multiplier: float
    why: str


_COLUMNS: tuple[tuple[Column, Callable[[PlanRow], Value]], ...] = (
    (Column("matrix", text=True), lambda row: row.name),
    (Column("role", text=True), lambda row: row.role),
    (Column("shape"), lambda row: f"{row.rows}×{row.columns}" + (f" ({row.parts} parts)" if row.parts > 1 else "")),
    (Column("score", ".3f"), lambda row: row.score),
    (Column("multiplier", ".3f"), lambda row: row.multiplier),
    (Column("note", text=True), lambda row: "" if row.why == "measured" else row.why),
)


@dataclass(frozen=True, repr=False)
class Plan(Tabular):
    """What `layerwise_plan` returns.

    Attributes:
        label: name of the model.
        policy: policy that was planned.
        rows: one for each tensor with a matrix, in the model's order. All other parameters have the multiplier 1,
            unless they are pinned.
    """

    label: str
    policy: Policy
    rows: tuple[PlanRow, ...]

    def __repr__(self) -> str:
        return f"<Plan of {self.label!r}: {len(self.rows)} tensors>"

    def __iter__(self) -> Iterator[PlanRow]:
        return iter(self.rows)

    @property
    def sets(self) -> str:
        """What is multiplied, in words."""
        return {"lr": "learning rate", "weight_decay": "weight decay"}[self.policy.sets]

    def records(self) -> list[Record]:
        """One dictionary a tensor, with all fields of `PlanRow`."""
        return [asdict(row) for row in self.rows]

    def types(self) -> dict[str, type]:
        """The types of all columns."""
        return column_types(PlanRow)

    def tables(self) -> tuple[Table, ...]:
        """The tensors."""
        return (tabulate(self.rows, _COLUMNS, spare=("shape", "role", "note")),)

    def facts(self) -> dict[str, Any]:
        """Model and policy."""
        return {"model": self.label, "policy": json.loads(self.policy.describe())}

    def remarks(self) -> tuple[str, ...]:
        """What the multipliers are of."""
        rest = "parameters of no matrix stay at 1 unless pinned"
        return (f"{self.label}: multipliers of the {self.sets} at step 1; {rest}",)

    def plot(self, *, ax: Any = None) -> Any:
        """Heat map of the multipliers by role and block.

        Args:
            ax: matplotlib axes to draw on; new ones by default.

        Returns:
            The axes. Needs the ``report`` extra.
        """
        from htsr.reporting.plots import plot_heat_map

        title = f"multiplier of the {self.sets}"
        return plot_heat_map(self.records(), "multiplier", title=title, numbers=True, ax=ax)


def layerwise_plan(source: Source, policy: PolicyLike = "llr", *, revision: str | None = None, **changes: Any) -> Plan:
    """The multipliers of the first event for the weights as they are; nothing is instantiated.

    Args:
        source: model that `htsr.analyze` takes: a module, a state dict, a folder, a file, a hub id.
        policy: policy that `htsr.layerwise` takes; of weights, since gradients and momentum are in no checkpoint.
        revision: branch, tag or commit of a hub id.
        **changes: fields of `Policy` to be changed.

    Raises:
        SourceError: the source cannot be read.
        UsageError: the policy has no meaning.
        HtsrError: a score of your own fails.

    Examples:
        >>> import htsr, torch
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Sequential(torch.nn.Embedding(100, 64), torch.nn.Linear(64, 64), torch.nn.Linear(64, 8))
        >>> for row in htsr.layerwise_plan(model, embeddings=2.0):
        ...     print(row.name, row.multiplier, row.why)
        0 2.0 embedding
        1 1.0 measured
        2 1.0 small
    """
    chosen = make_policy(policy, **({"interval": None} | changes if policy == "tempbalance" else changes))
    if chosen.spectrum != "weights":
        raise UsageError(f"{chosen.spectrum} are not in a checkpoint; a plan can be made of weights only")
    model = open_model(source, revision=revision)
    units = matrix_units(model)
    vectors: Iterable[str] = ("norm", "vector")
    adapters: Iterable[str] = ()
    if isinstance(source, (str, os.PathLike, Mapping)):  # without a head: of a language model whose embedding is it
        tied = any(unit.role == "embed" for unit in units)
    else:
        tied, vectors, adapters = (
            has_tied_head(source),
            parameter_names(source).values(),
            adapter_names(source).values(),
        )
    require_patterns(chosen, units, vectors, model.label, adapters)
    require_head(chosen, units, model.label)
    settled = fixed(chosen, units, tied=tied)
    wanted = {part for unit, value in zip(units, settled, strict=True) if value is None for part in unit.parts}
    found = scores([matrix for matrix in model if matrix.name in wanted], chosen, device_of(source) or "cpu")
    refuse_faults(found, chosen)
    known = {name: value for name, value in found.items() if not isinstance(value, Failure)}
    for name in found.keys() - known.keys():
        logger.warning("%s could not be measured: %s", name, found[name])
    outcome = decide(chosen, units, settled, known)
    shapes = {whole_name(matrix.name): matrix.shape for matrix in reversed(model.matrices)}
    rows = []
    for unit, value, mean, m in zip(units, settled, outcome.scores, outcome.multipliers, strict=True):
        score = None if math.isnan(mean) else mean
        why = _why(chosen, unit, value, score)
        rows.append(PlanRow(unit.name, unit.role, unit.block, *shapes[unit.name], len(unit.parts), score, m, why))
    return Plan(model.label, chosen, tuple(rows))


def _why(policy: Policy, unit: ParameterUnit, settled: float | None, score: float | None) -> str:
    if settled is None:
        return "no score" if score is None else "measured"
    if unit.is_embedding and not policy.pin:
        return "head" if unit.is_head else "embedding"
    return "small" if unit.size < policy.min_size and settled == 1.0 else "fixed"
