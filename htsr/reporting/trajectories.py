"""Points of a trajectory as lines: the matrices of each checkpoint or model, in groups, from the first to the last.

A monitor measures few matrices at a time. At each step a matrix therefore has the last number that was measured by
then, and the mean of a group is over those of its matrices that have one. Models have nothing from each other.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from htsr.arrays import Vector
from htsr.reporting import figures
from htsr.results import Record

By = Literal["role", "block", "matrix"]


@dataclass(frozen=True)
class Pivot:
    """The records of a trajectory, by source and matrix.

    Attributes:
        sources: names of the checkpoints by their steps, of models in the order of the records.
        steps: step of each source; None where not all have one of their own.
        matrices: the first record of each matrix, in the order of the records.
        places: index of the source and of the matrix of each record, (records, 2).
        records: the records.
    """

    sources: tuple[str, ...]
    steps: tuple[int, ...] | None
    matrices: tuple[Record, ...]
    places: npt.NDArray[np.int64]
    records: Sequence[Record]

    def latest(self, metric: str) -> Vector:
        """(sources, matrices) number of each matrix, of steps as last measured by then; NaN where there is none."""
        values = np.full((len(self.sources), len(self.matrices)), np.nan)
        last = np.full(values.shape, -1)
        places = tuple(self.places.T)
        values[places], last[places] = self.column(metric), self.places[:, 0]
        if self.steps is not None:
            last = np.maximum.accumulate(last, axis=0)
        return np.where(last < 0, np.nan, np.take_along_axis(values, np.maximum(last, 0), axis=0))

    def changes(self, metric: str) -> Vector:
        """(sources, matrices) difference of `latest` from the first number of each matrix."""
        values = self.latest(metric)
        first = np.argmax(np.isfinite(values), axis=0)
        return values - np.take_along_axis(values, first[None], axis=0)

    def column(self, metric: str) -> Vector:
        """(records,) number of each record, NaN where it has none."""
        numbers = (figures.number(record, metric) if metric in record else None for record in self.records)
        return np.array([np.nan if number is None else number for number in numbers], dtype=np.float64)

    def lines(self, metric: str, by: By) -> dict[str, Vector]:
        """(sources,) means of `metric` for each role, block or matrix that has any, in the order of the records."""
        values = self.latest(metric)
        groups: dict[str, list[int]] = {}
        for j in _ordered(self.matrices, by):
            groups.setdefault(group_of(self.matrices[j], by), []).append(j)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # of a mean of nothing, which is NaN as it should be
            lines = {name: np.nanmean(values[:, members], axis=1) for name, members in groups.items()}
        return {name: line for name, line in lines.items() if np.isfinite(line).any()}


def pivot(records: Sequence[Record]) -> Pivot:
    """The records of a trajectory by ``source`` and ``name``; where two agree in both, the later one counts.

    Args:
        records: records with ``source``, ``name``, ``role``, ``block``, perhaps ``step``, and metrics.

    Examples:
        >>> from htsr.reporting.trajectories import pivot
        >>> point = {"source": "a", "step": 0, "name": "up", "role": "mlp.up", "block": 0, "alpha": 3.0}
        >>> found = pivot([point, point | {"source": "b", "step": 9, "alpha": 2.0}])
        >>> found.steps, found.lines("alpha", "role")
        ((0, 9), {'mlp.up': array([3., 2.])})
    """
    steps = {record["source"]: record.get("step") for record in records}
    matrices: dict[str, Record] = {}
    for record in records:
        matrices.setdefault(record["name"], record)
    known = [step for step in steps.values() if step is not None]
    if own := len(set(known)) == len(steps):
        steps, known = dict(sorted(steps.items(), key=lambda item: item[1] or 0)), sorted(known)
    sources = {source: i for i, source in enumerate(steps)}
    names = {name: j for j, name in enumerate(matrices)}
    places = np.array([(sources[r["source"]], names[r["name"]]) for r in records], dtype=np.int64).reshape(-1, 2)
    return Pivot(tuple(sources), tuple(known) if own else None, tuple(matrices.values()), places, records)


def group_of(record: Record, by: By) -> str:
    """The name of the group that a record belongs to."""
    if by == "block":
        return "no block" if record["block"] is None else f"block {record['block']}"
    return str(record["role" if by == "role" else "name"])


def _ordered(matrices: Sequence[Record], by: By) -> list[int]:
    """Positions of the matrices; by block in the order of depth."""
    if by != "block":
        return list(range(len(matrices)))
    return sorted(range(len(matrices)), key=lambda j: -1 if (block := matrices[j]["block"]) is None else block)
