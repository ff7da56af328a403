"""What a monitor keeps on disk: the trajectory, and beside it the sketches of the weights at its start."""

from __future__ import annotations

import logging
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import numpy as np

from htsr.analysis.trajectory_file import (
    Header,
    Point,
    TrajectoryFile,
    check_saved_to,
    read_header,
    read_trajectory,
    write_trajectory,
)
from htsr.errors import HtsrError, SourceError, UsageError, reason_of
from htsr.files import written
from htsr.spectra.metrics import Options
from htsr.spectra.sketch import SIZE, Sketch
from htsr.training.monitoring.measuring import Start

logger = logging.getLogger(__name__)

_UNREADABLE = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile)


@dataclass(frozen=True)
class Earlier:
    """What the same run has left behind before it was resumed.

    Attributes:
        points: its measurements up to the step of the resumption, in the order in which they were written.
        start: what was kept of the weights at its start, by matrix; empty where that is lost.
        reference: step of that start, as in ``step-0``.
    """

    points: Sequence[Point]
    start: Mapping[str, Start]
    reference: str | None


class Record:
    """A trajectory file that a run goes on with; the process that speaks for all has one.

    A run that begins anew puts a file of the same name aside. One that is resumed from step s drops what was measured
    after s, by a future that was lost.

    Args:
        path: file of the trajectory, with the suffix .jsonl; its folder is made.
        label: name of the run.
        options: options that say what is computed.
        step: optimizer steps that the run has done before.
        since: step whose weights ``relative`` is relative to, where there is no file of the run.
        device: kind of the device that makes sketches, such as ``cpu``: those of another kind do not compare.
        wanted: number of matrices that are to be measured.

    Attributes:
        earlier: what the same run has left behind; None where it has no file.

    Raises:
        UsageError: the file has another suffix, is no trajectory, or one that was measured in another way.
        HtsrError: the file cannot be read or written.
    """

    def __init__(
        self, path: Path, label: str, options: Options, step: int, since: int, device: str, wanted: int
    ) -> None:
        self._path, self._start, self._device = path, path.with_suffix(".start"), device
        there = is_of_a_run(path)
        if there and step == 0:
            there = False
            _put_aside(path)
        self.earlier = self._taken_up(path, step) if there else None
        reference = self.earlier.reference if self.earlier else f"step-{since}"
        header = Header(label, options, reference=reference, wanted=wanted)
        self._file: TrajectoryFile | None = TrajectoryFile(path, header)
        self._file.points.by_source.clear()

    def append(self, points: Sequence[Point]) -> None:
        """Write `points` at once. Training goes on where that fails, without a record, and says so."""
        if self._file is None:
            return
        problem = None if self._path.exists() else f"{self._path} has been removed"
        try:
            if problem is None:
                self._file.append(points)
        except HtsrError as error:
            problem = str(error)
        if problem is not None:
            logger.warning("the monitor goes on without its file: %s", problem)
            self._file = None
            return
        self._file.points.by_source.clear()  # they are on disk

    def close(self) -> None:
        """Leave the file to readers and to a later run."""
        if self._file is not None:
            self._file.close()

    def _taken_up(self, path: Path, step: int) -> Earlier:
        header, points = read_trajectory(path)
        kept = [point for point in points if point.step is None or point.step <= step]
        if lost := len(list(points)) - len(kept):
            logger.warning(
                "%s: %d measurements after step %d, where this run is resumed, are dropped", path, lost, step
            )
            write_trajectory(path, header, kept)
        return Earlier(kept, self._kept(), header.reference)

    def keep(self, start: Mapping[str, Start]) -> None:
        """Write down `start`, what is kept of the weights at the start of the run.

        Raises:
            HtsrError: the file beside the trajectory cannot be written.
        """
        made = [one.sketch for one in start.values()]
        with written(self._start) as temporary, temporary.open("wb") as file:
            np.savez(
                file,
                device=np.array(self._device),
                names=np.array(list(start), dtype=np.str_),
                shapes=np.array(["x".join(map(str, one.shape)) for one in made], dtype=np.str_),
                norms=np.array([one.norm for one in made], dtype=np.float64),
                ranks=np.array([one.stable_rank or np.nan for one in start.values()], dtype=np.float64),
                sums=np.array([one.sums for one in made], dtype=np.float64).reshape(-1, SIZE),
            )

    def _kept(self) -> dict[str, Start]:
        try:
            with np.load(self._start) as file:
                if str(file["device"]) != self._device or file["sums"].shape[1:] != (SIZE,):
                    raise ValueError("they were made by another kind of device")
                names, shapes, norms, ranks = (file[key].tolist() for key in ("names", "shapes", "norms", "ranks"))
                return {
                    name: Start(Sketch(sums, norm, tuple(map(int, shape.split("x")))), rank if rank > 0 else None)
                    for name, shape, norm, rank, sums in zip(names, shapes, norms, ranks, file["sums"], strict=True)
                }
        except _UNREADABLE as error:
            why = reason_of(error, self._start)
            logger.warning("the change since the start of this run is not known any more, %s: %s", self._start, why)
            return {}


def is_of_a_run(path: Path) -> bool:
    """Whether a run has left its trajectory at `path`; its folder is made.

    Raises:
        UsageError: the file, or the one beside it for the weights at the start, is somebody else's.
        HtsrError: the file cannot be read or written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        check_saved_to(path)
        if path.is_file() and path.stat().st_size:
            read_header(path)
            return True
    except SourceError as error:
        raise UsageError(f"{error}; the monitor does not write there: take another path") from error
    except OSError as error:
        raise HtsrError(f"{path} cannot be written: {reason_of(error, path)}") from error
    beside = path.with_suffix(".start")
    if beside.exists() and not _is_a_start(beside):
        raise UsageError(f"{beside} is not of htsr, and the monitor would write there: take another path")
    return False


def _is_a_start(path: Path) -> bool:
    try:
        with np.load(path) as file:
            return {"names", "norms", "sums"} <= set(file.files)
    except (*_UNREADABLE, AttributeError, TypeError):  # an array alone has no files
        return False


def _put_aside(path: Path) -> None:
    """Give the files that another run has left other names, the first ones that are free."""
    asides = (path.with_stem(f"{path.stem}-{number}") for number in count(1))
    aside = next(one for one in asides if not one.exists() and not one.with_suffix(".start").exists())
    try:
        path.rename(aside)
        if (start := path.with_suffix(".start")).exists():
            start.rename(aside.with_suffix(".start"))
    except OSError as error:
        raise HtsrError(f"{path} cannot be written: {reason_of(error, path)}") from error
    logger.warning("%s is of a run before this one, and is now called %s", path, aside.name)
