"""What training has changed: the numbers of every weight matrix at several points of a run, or of several models.

trajectory = htsr.track("runs/mine")
trajectory.to_pandas()
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

from htsr.analysis.movement import Move, moves
from htsr.analysis.result import means_of
from htsr.analysis.trajectory_file import Header, Point, Points, read_trajectory, write_trajectory
from htsr.analysis.trajectory_tables import LINES, moved_table, shown_table, sources_table
from htsr.errors import UsageError
from htsr.results import Record, Table, Tabular, column_types, counted
from htsr.spectra.metrics import NUMERIC, LayerMetrics, Options

_SHOWN = 10  # matrices that have moved most
_SURE = 2  # standard errors from which on α has moved
_RANKING = (
    "models are in the order of their mean α ({fit}); smaller is heavier-tailed, which HT-SR takes for better trained "
    "among models of one architecture, and α depends on shapes: others do not compare"
)


@dataclass(frozen=True, repr=False)
class Trajectory(Tabular):
    """The rows of several checkpoints of a run, or of several models, all measured by the same options.

    Attributes:
        label: name of the run.
        points: matrices of all sources, one `Point` each; a matrix has one point in a source.
        options: options that say what was computed, and how.
        against: label of the model that was subtracted, where spectra are those of changes; None where they are those
            of the weights themselves.
        reference: label of the model that `Point.relative` is relative to; None where there is none.
        problems: sentence on each source that could not be read when this was measured, by its name; files do not keep
            them.
        run: absolute path of the folder of the run, or its hub id; None where the sources are no steps of a run.
        wanted: number of matrices that a monitor was to measure, of which it may not have come to some; None where all
            are measured in each source.

    Iteration and `len` go by points.

    Examples:
        >>> import torch
        >>> from htsr import Options
        >>> from htsr.analysis.trajectory import Trajectory
        >>> from htsr.analysis.trajectory_file import Point
        >>> from htsr.spectra.metrics import LayerMetrics
        >>> rows = [LayerMetrics(name="up_proj", alpha=alpha) for alpha in (4.0, 3.5)]
        >>> points = [Point(f"checkpoint-{step}", row, step) for step, row in zip((100, 200), rows)]
        >>> trajectory = Trajectory("run", tuple(points), Options())
        >>> trajectory.sources, trajectory.steps
        (('checkpoint-100', 'checkpoint-200'), (100, 200))
        >>> trajectory.at("checkpoint-200")[0].alpha
        3.5
    """

    label: str
    points: tuple[Point, ...]
    options: Options
    against: str | None = None
    reference: str | None = None
    problems: Mapping[str, str] = field(default_factory=dict)
    run: str | None = None
    wanted: int | None = None

    def __repr__(self) -> str:
        return f"<Trajectory of {self.label!r}: {self._size('step')}>"

    def _repr_html_(self) -> str:
        from htsr.reporting.html import table_html

        return table_html(repr(self)[1:-1], self.tables()[0])

    def __iter__(self) -> Iterator[Point]:
        return iter(self.points)

    def __len__(self) -> int:
        return len(self.points)

    @property
    def sources(self) -> tuple[str, ...]:
        """Names of the sources: by step where all have one, else in their order."""
        steps = {point.source: point.step for point in self.points}
        if None in steps.values():
            return tuple(steps)
        return tuple(sorted(steps, key=lambda source: steps[source] or 0))

    @property
    def steps(self) -> tuple[int, ...]:
        """Step of each of `sources`; empty where they are models and no steps of a run."""
        steps = {point.source: point.step for point in self.points}
        found = tuple(step for source in self.sources if (step := steps[source]) is not None)
        return found if len(found) == len(steps) else ()

    def _in_order(self) -> list[Point]:
        place = {source: i for i, source in enumerate(self.sources)}
        return sorted(self.points, key=lambda point: place[point.source])

    def at(self, source: str) -> tuple[LayerMetrics, ...]:
        """The rows of one source.

        Args:
            source: name of the source, one of `sources`.

        Raises:
            UsageError: there is no such source.
        """
        if rows := tuple(point.row for point in self.points if point.source == source):
            return rows
        raise UsageError(f"{self.label} has no {source!r}; there are {', '.join(self.sources)}")

    def summary(self) -> dict[str, dict[str, float]]:
        """Mean of every metric and of ``relative`` over the matrices that have it, by source.

        A monitor measures few matrices at a time. At a step, a matrix counts with what was measured of it last by then.
        """
        by_source: dict[str, dict[str, Point]] = {source: {} for source in self.sources}
        for point in self.points:
            by_source[point.source][point.row.name] = point
        found, latest, of_a_run = {}, dict[str, Point](), bool(self.steps)
        for source, points in by_source.items():
            latest = {**latest, **points} if of_a_run else points
            changes = [point.relative for point in latest.values() if point.relative is not None]
            found[source] = means_of([point.row for point in latest.values()])
            if changes:
                found[source]["relative"] = sum(changes) / len(changes)
        return found

    def records(self) -> list[Record]:
        """One dictionary a point: ``source`` and ``step``, all fields of `LayerMetrics`, and ``relative``."""
        return [
            {"source": point.source, "step": point.step, **asdict(point.row), "relative": point.relative}
            for point in self._in_order()
        ]

    def types(self) -> dict[str, type]:
        """The types of all columns."""
        return {"source": str, "step": int, **column_types(LayerMetrics), "relative": float}

    def moved(self, metric: str = "alpha") -> tuple[Move, ...]:
        """How far each matrix has come from its first number to its last, the farthest first.

        Args:
            metric: numeric field of `LayerMetrics`, or ``relative``. Moves of α are ordered in units of their standard
                error (`Move.beyond`), others as they are.

        Raises:
            UsageError: the sources are no steps of a run, or rows have no such number.
        """
        if not self.steps:
            raise UsageError(
                f"{self.label} are models and no steps of a run: htsr.compare tells how two of them differ"
            )
        _require_number(metric)
        return moves(self._in_order(), metric)

    def tables(self) -> tuple[Table, ...]:
        """Means of the sources, then the matrices whose α has moved most, from two standard errors on.

        Models are in the order of their mean α; of more than 40 checkpoints, as many are shown, evenly spaced.
        """
        means = shown_table(self.summary(), self.steps)
        far = [move for move in self.moved() if _has_moved(move)] if self.steps else []
        return (means, moved_table(far[:_SHOWN])) if far else (means,)

    def remarks(self) -> tuple[str, ...]:
        """How much was measured, what the tables say, and which sources could not be read."""
        said = [f"{self.label}: {self._size('checkpoint')}", *self._findings()]
        if len(self.steps) > LINES:
            said.append(f"the table shows {LINES} of the {len(self.steps)} checkpoints; --format csv has all")
        if self.problems:
            said.append(f"could not be read: {', '.join(self.problems)}")
        return tuple(said)

    def _size(self, point: str) -> str:
        matrices = counted(len({point.row.name for point in self.points}), "matrix", "matrices")
        kinds = (point, f"{point}s") if self.steps else ("model", "models")
        return f"{matrices}, {counted(len(self.sources), *kinds)}"

    def _alphas(self) -> list[float]:
        return [point.row.alpha for point in self.points if point.row.alpha is not None]

    def _findings(self) -> Iterator[str]:
        """What the numbers say, and what they are of."""
        measured = len({point.row.name for point in self.points})
        if self.wanted is not None and measured < self.wanted:
            yield (
                f"{self.wanted - measured} of {self.wanted} matrices were never measured, and means are without them: "
                "a monitor measures more with a larger share="
            )
        if not self.steps and len(self.sources) > 1:
            yield _RANKING.format(fit=self.options.fit)
        moved = self.moved() if self.steps else ()
        if moved:
            first, last = (fmean(getattr(move, end) for move in moved) for end in ("first", "last"))
            over = counted(len(moved), "matrix", "matrices")
            yield f"mean α ({self.options.fit}) {first:.3f} → {last:.3f} over {over}, from the first number to the last"
            known = [move for move in moved if move.beyond is not None]
            far, over = sum(map(_has_moved, known)), counted(len(known), "matrix", "matrices")
            yield f"the α of {far} of {over} has moved by two standard errors or more"
        elif (self.steps or len(self.sources) == 1) and (alphas := self._alphas()):
            yield f"mean α ({self.options.fit}) {fmean(alphas):.3f} over {counted(len(alphas), 'matrix', 'matrices')}"
        if self.reference and any(point.relative is not None for point in self.points):
            yield f"‖ΔW‖/‖W‖ is against {self.reference}"

    def facts(self) -> dict[str, Any]:
        """Run, options, what changes are against, means by source, and the sources that could not be read."""
        return {
            "model": self.label,
            "options": asdict(self.options),
            "against": self.against,
            "reference": self.reference,
            "summary": self.summary(),
            "problems": dict(self.problems),
        }

    def to_html(self, path: str | os.PathLike[str]) -> None:
        """Write the trajectory as a page: one self-contained HTML file. Needs the ``report`` extra.

        Args:
            path: file to write.

        Raises:
            HtsrError: the file cannot be written.
            MissingDependencyError: plotly is not installed.
        """
        from htsr.analysis.trajectory_report import page_of
        from htsr.reporting.trajectory_page import write_trajectory_page

        said = [*self._findings(), *(f"{source}: {problem}" for source, problem in self.problems.items())]
        page = page_of(self._header(), self.records(), sources_table(self.summary(), self.steps), said)
        write_trajectory_page(page, Path(path))

    def plot(self, metric: str = "alpha", by: Literal["role", "block", "matrix"] = "role", *, ax: Any = None) -> Any:
        """Plot a metric over the steps, or from model to model.

        Args:
            metric: numeric field of `LayerMetrics`, or ``relative``.
            by: what a line stands for: the mean of each ``role`` or ``block``, or each ``matrix``.
            ax: matplotlib axes to draw on; new ones by default.

        Returns:
            The matplotlib axes. Needs the ``report`` extra.

        Raises:
            UsageError: no matrix has the metric, or there is no such `by`.
            MissingDependencyError: matplotlib is not installed.
        """
        from htsr.reporting.plots import plot_trajectory

        _require_number(metric)
        return plot_trajectory(self.records(), metric, by, ax=ax)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the trajectory as lines of JSON, by way of a temporary file.

        Args:
            path: file to write, with the suffix .jsonl, which is not added.

        Raises:
            UsageError: the file has another suffix, or is one of a model.
            HtsrError: the file cannot be written.
        """
        write_trajectory(Path(path), self._header(), self.points)

    def _header(self) -> Header:
        return Header(self.label, self.options, self.against, self.reference, self.run, self.wanted)

    @staticmethod
    def load(path: str | os.PathLike[str]) -> Trajectory:
        """Read what `save`, `htsr track` or an `htsr.SpectralMonitor` wrote, also while it is being written.

        Args:
            path: file to read.

        Raises:
            SourceError: the file is no trajectory, or is damaged; the message says in which line.
        """
        return trajectory_of(*read_trajectory(Path(path)))


def trajectory_of(header: Header, points: Points, problems: Mapping[str, str] | None = None) -> Trajectory:
    """The trajectory of the `points` below a `header`, and the `problems` of sources that have none."""
    return Trajectory(points=tuple(points), problems=problems or {}, **vars(header))


def _require_number(metric: str) -> None:
    if metric not in (*NUMERIC, "relative"):
        raise UsageError(f"rows have no number {metric!r}; among others alpha, trace_log, stable_rank, relative")


def _has_moved(move: Move) -> bool:
    return move.beyond is not None and move.beyond >= _SURE
