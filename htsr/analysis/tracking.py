"""Measure the checkpoints of a run, or several models, one after the other: what was measured is not measured again.

trajectory = htsr.track("runs/mine", save="runs/mine/spectra.jsonl")
trajectory.plot("alpha", by="role")
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from htsr.analysis.analyze import Progress, analyze_model, make_options
from htsr.analysis.checkpoints import Checkpoint, Sources, checkpoints_of, label_of, run_of
from htsr.analysis.comparing import FIT
from htsr.analysis.journal import Journal
from htsr.analysis.reference import Reference
from htsr.analysis.trajectory import Trajectory, trajectory_of
from htsr.analysis.trajectory_file import (
    Header,
    Point,
    Points,
    TrajectoryFile,
    check_saved_to,
    is_trajectory,
    read_trajectory,
)
from htsr.errors import SourceError, UsageError
from htsr.matrices.models import Filter, Model, WeightMatrix, as_filter
from htsr.matrices.sources import Source, adapter_of, open_changes, open_model
from htsr.ranks import Ranks
from htsr.spectra.metrics import Options
from htsr.spectra.tail import FitMethod

logger = logging.getLogger(__name__)

Made = TypeVar("Made")

_CALL, _ADVICE = "htsr.track", ", or one alone with distributed=False"
_UNREADABLE = "unreadable"  # status of rows that another attempt may give numbers


def track(
    sources: Sources,
    *,
    against: Source | None = None,
    save: str | os.PathLike[str] | None = None,
    where: Filter | None = None,
    full: bool = False,
    progress: Callable[[Progress], None] | None = None,
    distributed: bool = True,
    **options: Any,
) -> Trajectory:
    """The spectra of a run's checkpoints, or of several models, matrix by matrix.

    Args:
        sources: a folder with checkpoints, as the Trainer, Lightning or a loop of one's own leaves them
            (``checkpoint-500``, ``step_500``, ``epoch=1-step=500.ckpt`` …; the final model in it counts, too, where it
            is a later one), whole models or adapters; or a list of models as `htsr.analyze` takes them, hub ids also as
            ``owner/name@revision``; or models by label, or by their step as a whole number. The path of a saved
            trajectory (.jsonl) is read as it is.
        against: base model that is subtracted: spectra are then those of the changes, as in `htsr.analyze`. A ΔW that
            an adapter holds is such a change already. Without it adapters are measured as ΔW, but beside whole models
            as base + ΔW, on the base that each names.
        save: trajectory file (.jsonl) that measurements are appended to, each checkpoint when it is done. What is in it
            already is not measured again, as long as the files of the checkpoint are the same (path, size, date), and
            stays in it when they are deleted; a checkpoint that was interrupted goes on where it stopped.
        where: filter of the matrices that are wanted; all by default.
        full: whether to add bulk, permuted weights and alternatives to the power law.
        progress: function that is called after each matrix; its `Progress.fraction` is that of all checkpoints.
        distributed: whether the ranks of `accelerate launch` or `torchrun` share the matrices; each of them then has to
            call this with the same sources. Only the first one writes.
        **options: fields of `htsr.Options`, as in `htsr.analyze`, but `fit` is by default that of the file where `save`
            goes on, and for steps of one run ``hill``, as in `htsr.compare`: its α, an index of one shape, tells two
            states of a matrix apart where that of ``ks`` does not.

    Returns:
        A `Trajectory`; with `save`, of all that is in the file. A checkpoint that cannot be read is in its `problems`,
        and one that is still being written is left out, each with a warning in the log. The reference of ``relative``
        is `against`, or else the first checkpoint of a run; for different models there is none, nor for adapters
        without `against`.

    Raises:
        SourceError: no source can be read, or `save` is a damaged file.
        UsageError: an option has no meaning, no matrix passes the filter, `save` was measured by other options; or
            other ranks do not call this.
        HtsrError: `save` cannot be written.

    Examples:
        >>> import htsr, torch
        >>> noise = torch.randn(40, 60, generator=torch.Generator().manual_seed(0))
        >>> run = {step: {"layers.0.up_proj.weight": (1 + step / 100) * noise} for step in (0, 10, 20)}
        >>> trajectory = htsr.track(run, null=False)
        >>> trajectory.steps, [round(point.relative, 6) for point in trajectory]
        ((0, 10, 20), [0.0, 0.1, 0.2])
        >>> trajectory.to_pandas()[["source", "name"]].iloc[-1].tolist()  # one row for each point
        ['20', 'layers.0.up_proj']
    """
    if isinstance(sources, (str, os.PathLike)) and is_trajectory(path := Path(sources)):
        if options or full or (against, save, where) != (None, None, None):
            raise UsageError(f"{path} is a trajectory: it is read as it is, and takes no options")
        return Trajectory.load(path)
    if save is not None:
        check_saved_to(Path(save))
    ranks = Ranks.launched(_CALL, _ADVICE) if distributed else Ranks()
    ranks.meet(_CALL, _ADVICE)
    checkpoints = checkpoints_of(sources)
    if all(isinstance(checkpoint.source, (str, os.PathLike)) for checkpoint in checkpoints):
        checkpoints = ranks.of_first(lambda: checkpoints)  # another rank may see one more that has just been written
    header, points, file = _begun(
        checkpoints, options | {"full": full}, against, Path(save) if save is not None else None, ranks
    )
    settings = _options(checkpoints, header.options.fit, options | {"full": full})
    reference = _reference(checkpoints, header, against, ranks)
    if reference is not None and ranks.is_first:
        _say_if_changed(reference, header, points)
    merges = against is None and ranks.of_first(partial(_are_mixed, checkpoints, points))
    run = _Run(settings, as_filter(where), against, merges, reference, ranks)
    problems: dict[str, str] = {}
    failures: list[SourceError] = []
    with file or nullcontext():
        for number, checkpoint in enumerate(checkpoints):
            report = (
                None if progress is None else partial(_report, progress, number / len(checkpoints), len(checkpoints))
            )
            try:
                found = run.measured(checkpoint, points, report, in_journal=save is not None)
            except SourceError as error:
                if len(checkpoints) == 1 and checkpoint.label not in points.by_source:
                    raise
                failures.append(error)
                is_last = checkpoint is checkpoints[-1]
                if ranks.of_first(partial(_is_problem, checkpoint, is_last, str(error), points)):
                    problems[checkpoint.label] = str(error)
                continue
            ranks.of_first(partial(_append, file, found))
            for point in found:
                points.add(point)
    if failures and not points.by_source:
        raise failures[0]
    return trajectory_of(header, points, problems)


def _begun(
    checkpoints: Sequence[Checkpoint], given: Mapping[str, Any], against: Source | None, save: Path | None, ranks: Ranks
) -> tuple[Header, Points, TrajectoryFile | None]:
    """Header, what was measured before, and on the first rank the file that more is appended to."""
    file: TrajectoryFile | None = None

    def begin() -> tuple[Header, Points]:
        nonlocal file
        base = None if against is None else label_of(checkpoints_of([against]))
        of_one_run = checkpoints[0].step is not None
        fit: FitMethod = FIT if of_one_run else Options.fit
        reference = base or (checkpoints[0].label if of_one_run else None)
        label, run = label_of(checkpoints), run_of(checkpoints)
        if save is not None and save.is_file() and save.stat().st_size:
            before, there = read_trajectory(save)
            reference = before.reference  # what was first then may be gone by now
            fit = before.options.fit
            _insist_on_one_run(save, before, there, run, label)
        header = Header(label, _options(checkpoints, fit, given), base, reference, run)
        if save is None:
            return header, Points()
        file = TrajectoryFile(save, header)
        return header, file.points

    header, points = ranks.of_first(begin)
    return header, points, file


def _options(checkpoints: Sequence[Checkpoint], fit: FitMethod, given: Mapping[str, Any]) -> Options:
    """The options that are `given`, with this `fit` where none is."""
    return make_options(checkpoints[0].source, **{"fit": fit} | dict(given))


def _insist_on_one_run(save: Path, before: Header, points: Points, run: str | None, label: str) -> None:
    """Refuse to put checkpoints of two runs into one file, which may bear the same names; models may be added."""
    known = before.run
    if known is None:  # an older file has the label alone, which may be a path from where one was then
        known = os.path.realpath(before.label) if run and os.path.isabs(run) else before.label
    if {known if point.step is not None else None for point in points} - {run}:
        raise UsageError(f"{save} is of {before.run or before.label}, and not of {run or label}: take another file")


def _reference(
    checkpoints: Sequence[Checkpoint], header: Header, against: Source | None, ranks: Ranks
) -> Reference | None:
    """What changes are relative to; None where it is not known, or cannot be read any more."""
    if against is not None:
        return Reference(_on_all(ranks, lambda: open_model(against)))
    first = next((checkpoint for checkpoint in checkpoints if checkpoint.label == header.reference), None)
    if first is None:
        if header.reference is not None and ranks.is_first:
            logger.warning(
                "%s is not among the checkpoints any more: how far later ones are from it stays open", header.reference
            )
        return None

    def weights() -> Model | None:
        return (
            None
            if adapter_of(first.source, first.revision) is not None
            else open_model(first.source, revision=first.revision)
        )

    try:
        model = _on_all(ranks, weights)
    except SourceError:
        return None  # said when its turn comes
    return None if model is None else Reference(model)


def _say_if_changed(reference: Reference, header: Header, points: Points) -> None:
    """Say that lengths of changes are measured again, since the files of the `reference` are others than before."""
    if any(point.relative is not None and point.reference != reference.model.fingerprint for point in points):
        logger.warning(
            "%s may have changed since: how far others are from it is measured again, and of those that are gone it "
            "is not known any more",
            header.reference,
        )


def _on_all(ranks: Ranks, make: Callable[[], Made]) -> Made:
    """What `make` makes on this rank; what it raises on one is raised on all."""
    made: list[Made] = []

    def work() -> list[None]:
        made.append(make())
        return []

    ranks.gather_from(work)
    return made[0]


@dataclass(frozen=True)
class _Run:
    """How all checkpoints are measured.

    Attributes:
        options: options of all measurements.
        where: filter of the matrices that are wanted.
        against: model that is subtracted; None for the weights themselves.
        merges: whether adapters are measured as base + ΔW, since whole models are beside them.
        reference: model that changes are relative to; None where there is none.
        ranks: processes that share the work.
    """

    options: Options
    where: Filter
    against: Source | None
    merges: bool
    reference: Reference | None
    ranks: Ranks

    def measured(
        self, checkpoint: Checkpoint, points: Points, progress: Callable[[Progress], None] | None, *, in_journal: bool
    ) -> list[Point]:
        """What `points` do not have yet of a checkpoint."""
        model, weights = self._opened(checkpoint)
        before = points.by_source.get(checkpoint.label, {})
        known = {name: point for name, point in before.items() if _is_known(point, model.fingerprint)}
        todo = [matrix for matrix in model if matrix.name not in known]
        far: list[WeightMatrix] = []  # known, but for the length of the change
        lengths, origin = dict[str, float](), None
        if self.reference and weights:
            origin = self.reference.model.fingerprint
            far = [m for m in model if m.name in known and (origin is None or known[m.name].reference != origin)]
            lengths = self.reference.relative([*todo, *far], weights, self.ranks)
        moved = [replace(known[m.name], relative=lengths.get(m.name), reference=origin) for m in far]
        if not todo:
            return moved
        part = replace(model, matrices=tuple(todo))
        journal = Journal(part, self.options) if in_journal and model.fingerprint else None
        rows = analyze_model(part, self.options, journal, progress, ranks=self.ranks).rows
        if all(row.status == _UNREADABLE for row in rows):
            raise SourceError(rows[0].warning)
        return moved + [
            Point(checkpoint.label, row, checkpoint.step, lengths.get(row.name), model.fingerprint, origin)
            for row in rows
        ]

    def _opened(self, checkpoint: Checkpoint) -> tuple[Model, Model | None]:
        """The matrices that are measured, and those of the whole weights; what fails on one rank fails on all."""
        source, revision, against = checkpoint.source, checkpoint.revision, self.against

        def open_both() -> tuple[Model, Model | None]:
            adapter = adapter_of(checkpoint.source, checkpoint.revision)
            if adapter is None:
                model = open_model(source, revision=revision, against=against)
                weights = model if against is None else open_model(source, revision=revision)
            elif against is not None:
                model = open_changes(source, against, revision)
                weights = open_model(source, revision=revision, base=against)
            elif self.merges:
                model = weights = open_model(source, revision=revision, base="auto")
            else:
                model, weights = open_model(source, revision=revision), None
            return model.filtered(self.where), weights

        return _on_all(self.ranks, open_both)


def _are_mixed(checkpoints: Sequence[Checkpoint], points: Points) -> bool:
    """Whether whole models are among the `checkpoints` or what was measured, and adapters among the `checkpoints`."""
    adapted = []
    for checkpoint in checkpoints:
        try:
            adapted.append(adapter_of(checkpoint.source, checkpoint.revision) is not None)
        except SourceError:
            continue  # said when its turn comes
    before = [any(point.row.kind == "adapter" for point in known.values()) for known in points.by_source.values()]
    mixed = any(adapted) and not all([*adapted, *before])
    if mixed:
        logger.warning("adapters among whole models are measured as base + ΔW, on the base that each names")
    return mixed


def _is_known(point: Point | None, fingerprint: str | None) -> bool:
    """Whether what was measured is still true: of models in memory nobody knows."""
    return point is not None and None is not fingerprint == point.fingerprint and point.row.status != _UNREADABLE


def _append(file: TrajectoryFile | None, points: Sequence[Point]) -> None:
    if file is not None and points:
        file.append(points)


def _is_problem(checkpoint: Checkpoint, is_last: bool, why: str, points: Points) -> bool:
    """Say that a checkpoint cannot be read; whether that is a problem, and not a matter of time."""
    problem = False
    if checkpoint.run is not None and not os.path.exists(str(checkpoint.source)):
        what = "was deleted before it was measured"
    elif checkpoint.label in points.by_source:
        what = f"is not measured again, and stays as it was: {why}"
    elif is_last and checkpoint.is_unfinished:
        what = f"is not complete, and is left out for now: {why}"
    else:
        what, problem = f"is left out: {why}", True
    logger.warning("%s %s", checkpoint.label, what)
    return problem


def _report(progress: Callable[[Progress], None], done: float, count: int, now: Progress) -> None:
    """Tell how far all checkpoints are, of which there are `count`."""
    progress(replace(now, fraction=done + now.fraction / count))
