"""Which matrices have moved most along a trajectory, and whether that is more than the error of the number."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from htsr.analysis.trajectory_file import Point


@dataclass(frozen=True)
class Move:
    """How far a metric of one matrix has come, from the first point where it has a number to the last.

    Attributes:
        name: name of the matrix.
        role: role of the matrix.
        block: index of its block; None outside of blocks.
        first: number at the first point.
        last: number at the last point.
        change: difference last - first.
        beyond: distance |change| in standard errors of the difference of two α, √(σ_first² + σ_last²); None for other
            metrics, whose error is not known. Two fits of nearly the same eigenvalues err alike, so that α of a matrix
            that did not move differs by less than that; where another λ_min is chosen, by more.
        relative: length of the change of the weights at the last point, `Point.relative`; None where it is not known.
    """

    name: str
    role: str
    block: int | None
    first: float
    last: float
    change: float
    beyond: float | None = None
    relative: float | None = None


def moves(points: Iterable[Point], metric: str) -> tuple[Move, ...]:
    """The moves of all matrices that have a `metric` at two points at least, the farthest first.

    Args:
        points: points in the order of their steps.
        metric: numeric field of `LayerMetrics`, or ``relative``. Moves of α go by `Move.beyond`, others by |change|.

    Examples:
        >>> from htsr.analysis.movement import moves
        >>> from htsr.analysis.trajectory_file import Point
        >>> from htsr.spectra.metrics import LayerMetrics
        >>> numbers = ((1, "up", 3, 0.3), (1, "o", 5, 3.0), (9, "up", 2, 0.4), (9, "o", 2, 4.0))
        >>> points = [
        ...     Point(f"checkpoint-{step}", LayerMetrics(name=name, alpha=alpha, sigma=sigma), step)
        ...     for step, name, alpha, sigma in numbers
        ... ]
        >>> [(move.name, move.change, move.beyond) for move in moves(points, "alpha")]
        [('up', -1, 2.0), ('o', -3, 0.6)]
    """
    by_name: dict[str, list[Point]] = {}
    for point in points:
        if _number(point, metric) is not None:
            by_name.setdefault(point.row.name, []).append(point)
    found = [_move(those[0], those[-1], metric) for those in by_name.values() if len(those) > 1]
    return tuple(sorted(found, key=lambda move: -((move.beyond or 0) if metric == "alpha" else abs(move.change))))


def _number(point: Point, metric: str) -> float | None:
    value: float | None = point.relative if metric == "relative" else getattr(point.row, metric)
    return value


def _move(a: Point, b: Point, metric: str) -> Move:
    first, last = _number(a, metric), _number(b, metric)
    assert first is not None
    assert last is not None
    error = math.hypot(a.row.sigma or 0, b.row.sigma or 0) if metric == "alpha" else 0
    beyond = abs(last - first) / error if error > 0 else None
    row = b.row
    return Move(row.name, row.role, row.block, first, last, last - first, beyond, b.relative)
