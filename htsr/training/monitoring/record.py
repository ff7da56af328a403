"""What a monitor keeps on disk: the trajectory, and beside it the sketches of the weights at its start."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from htsr.analysis.trajectory_file import Header, Point, TrajectoryFile, read_trajectory, write_trajectory
from htsr.errors import HtsrError, reason_of
from htsr.files import written
from htsr.spectra.metrics import Options
from htsr.spectra.sketch import SIZE, Sketch

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Earlier:
    """What the same run has left behind before it was resumed.

    Attributes:
        points: its measurements up to the step of the resumption, in the order in which they were written.
        start: sketches of the weights at its start, by matrix; empty where they are lost.
        reference: step of that start, as in ``step-0``.
    """

    points: Sequence[Point]
    start: Mapping[str, Sketch]
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
        start: sketches of the weights as they are now.
        device: kind of the device that has made them, such as ``cpu``: those of another kind do not compare.

    Attributes:
        earlier: what the same run has left behind; None where it has no file.

    Raises:
        UsageError: the file has another suffix, is no trajectory, or one that was measured in another way.
        HtsrError: the file cannot be read or written.
    """

    def __init__(
        self, path: Path, label: str, options: Options, step: int, start: Mapping[str, Sketch], device: str
    ) -> None:
        self._start = path.with_suffix(".start")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            there = path.is_file() and path.stat().st_size > 0
            if there and step == 0:
                there = False
                _put_aside(path)
        except OSError as error:
            raise HtsrError(f"{path} cannot be written: {reason_of(error, path)}") from error
        self.earlier = self._taken_up(path, step, device) if there else None
        if self.earlier is None:
            self._keep(start, device)
        header = Header(label, options, reference=self.earlier.reference if self.earlier else f"step-{step}")
        self._file: TrajectoryFile | None = TrajectoryFile(path, header)
        self._file.points.by_source.clear()

    def append(self, points: Sequence[Point]) -> None:
        """Write `points` at once. Training goes on where that fails, without a record, and says so."""
        if self._file is None:
            return
        try:
            self._file.append(points)
        except HtsrError as error:
            logger.warning("the monitor goes on without its file: %s", error)
            self._file = None
            return
        self._file.points.by_source.clear()  # they are on disk

    def close(self) -> None:
        """Leave the file to readers and to a later run."""
        if self._file is not None:
            self._file.close()

    def _taken_up(self, path: Path, step: int, device: str) -> Earlier:
        header, points = read_trajectory(path)
        kept = [point for point in points if point.step is None or point.step <= step]
        if lost := len(list(points)) - len(kept):
            logger.warning(
                "%s: %d measurements after step %d, where this run is resumed, are dropped", path, lost, step
            )
            write_trajectory(path, header, kept)
        return Earlier(kept, self._kept(device), header.reference)

    def _keep(self, start: Mapping[str, Sketch], device: str) -> None:
        with written(self._start) as temporary, temporary.open("wb") as file:
            np.savez(
                file,
                device=np.array(device),
                names=np.array(list(start), dtype=np.str_),
                norms=np.array([one.norm for one in start.values()], dtype=np.float64),
                sums=np.array([one.sums for one in start.values()], dtype=np.float64).reshape(-1, SIZE),
            )

    def _kept(self, device: str) -> dict[str, Sketch]:
        try:
            with np.load(self._start) as file:
                if str(file["device"]) != device or file["sums"].shape[1:] != (SIZE,):
                    raise ValueError("they were made by another kind of device")
                parts = zip(file["names"].tolist(), file["sums"], file["norms"].tolist(), strict=True)
                return {name: Sketch(sums, norm) for name, sums, norm in parts}
        except (OSError, ValueError, KeyError, EOFError) as error:
            why = reason_of(error, self._start)
            logger.warning("the change since the start of this run is not known any more, %s: %s", self._start, why)
            return {}


def _put_aside(path: Path) -> None:
    """Give the file that another run has left another name, the first one that is free."""
    number = 1
    while (aside := path.with_stem(f"{path.stem}-{number}")).exists():
        number += 1
    path.rename(aside)
    logger.warning("%s is of a run before this one, and is now called %s", path, aside.name)
