"""Trajectories on disk: lines of JSON that are only ever appended to, so that a run can be watched while it goes on.

The first line is a `Header`. Each further one is a `Point`, one matrix in one source: its ``source`` and ``step``, the
fields of `LayerMetrics` that are not None, ``relative``, ``fingerprint`` and ``reference`` where they are known. Of two
lines on one matrix in one source the later one counts; of a source whose files have changed, only what was measured
since; and of a reference whose files have changed, only lengths against what it is now. A last line that does not end
is being written, and is not read.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import IO, Any

from htsr._version import __version__
from htsr.analysis.saving import check
from htsr.analysis.schema import from_json
from htsr.errors import HtsrError, SourceError, UsageError, reason_of
from htsr.files import check_writable, is_stream, written
from htsr.spectra.metrics import LayerMetrics, Options

logger = logging.getLogger(__name__)

SUFFIX = ".jsonl"
_FORM = 1  # of these lines
_LONGEST = 1 << 20  # of a header


@dataclass(frozen=True)
class Header:
    """What holds for a whole trajectory.

    Attributes:
        label: name of the run.
        options: options that say what is computed, and how.
        against: label of the model that is subtracted, where spectra are those of changes; None where they are those of
            the weights themselves.
        reference: label of the model that `Point.relative` is relative to; None where there is none.
        run: absolute path of the folder of the run, or its hub id; None where the sources are no steps of a run, and
            in files that do not say it.
        wanted: number of matrices that a monitor is to measure, of which it may not have come to some; None where all
            are measured at each point.
    """

    label: str
    options: Options
    against: str | None = None
    reference: str | None = None
    run: str | None = None
    wanted: int | None = None


@dataclass(frozen=True)
class Point:
    """One matrix at one point of a trajectory.

    Attributes:
        source: name of the checkpoint or model that the matrix is in.
        row: numbers of the matrix.
        step: number of optimizer steps that its training had done; None where the source is no step of a run.
        relative: length of the change, ‖W - W_ref‖_F / ‖W_ref‖_F, against the reference of the trajectory; None where
            that is not known.
        fingerprint: text that changes when the files of the source do; None for a model in memory.
        reference: the same text of the model that `relative` is relative to.
    """

    source: str
    row: LayerMetrics
    step: int | None = None
    relative: float | None = None
    fingerprint: str | None = None
    reference: str | None = None


@dataclass
class Points:
    """What has been measured so far, of each matrix in each source the latest.

    Attributes:
        by_source: points by source and name of the matrix.
        reference: `Point.reference` of all points whose ``relative`` is known.
    """

    by_source: dict[str, dict[str, Point]] = field(default_factory=dict)
    reference: str | None = None

    def __iter__(self) -> Iterator[Point]:
        for points in self.by_source.values():
            yield from points.values()

    def add(self, point: Point) -> None:
        """Take up one more `point`.

        Older ones of its source go where its files were others then, and all older lengths where those of the reference
        were.
        """
        if point.relative is not None and point.reference != self.reference:
            self.reference = point.reference
            for source, older in self.by_source.items():
                self.by_source[source] = {name: replace(one, relative=None) for name, one in older.items()}
        points = self.by_source.setdefault(point.source, {})
        if points and next(iter(points.values())).fingerprint != point.fingerprint:
            points.clear()
        points[point.row.name] = point


class TrajectoryFile:
    """A trajectory on disk that points are appended to, each at once; one process alone writes it.

    Args:
        path: file that is begun, or gone on with; its suffix is .jsonl.
        header: what holds for the whole trajectory.

    Attributes:
        points: what is in the file.

    Raises:
        UsageError: the file has another suffix, is no trajectory, or one that was measured in another way.
        SourceError: the file is damaged.
        HtsrError: the file cannot be written.

    Examples:
        >>> from pathlib import Path
        >>> from htsr import Options
        >>> from htsr.analysis.trajectory_file import Header, Point, TrajectoryFile
        >>> from htsr.spectra.metrics import LayerMetrics
        >>> for step, alpha in ((100, 4.0), (200, 3.5)):
        ...     with TrajectoryFile(Path("run.jsonl"), Header("run", Options())) as file:
        ...         file.append([Point(f"checkpoint-{step}", LayerMetrics(name="up_proj", alpha=alpha), step)])
        >>> [(point.source, point.row.alpha) for point in file.points]
        [('checkpoint-100', 4.0), ('checkpoint-200', 3.5)]
    """

    def __init__(self, path: Path, header: Header) -> None:
        check_saved_to(path)
        self.points = Points()
        self._path = path
        try:
            if not is_stream(path) and path.is_file() and path.stat().st_size:
                before, self.points, end = _read(path)
                _insist_on_one(path, before, header)
            else:
                write_trajectory(path, header, ())
                end = None
            self._file: IO[bytes] = path.open("ab")
            if end is not None:
                self._file.truncate(end)  # a line whose writer was killed
        except OSError as error:
            raise _unwritable(path, error) from error

    def __enter__(self) -> TrajectoryFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def append(self, points: Iterable[Point]) -> None:
        """Write `points`, all of them before anything else is written.

        Raises:
            HtsrError: the file cannot be written.
        """
        points = list(points)
        self._write([_line(point) for point in points])
        for point in points:
            self.points.add(point)

    def close(self) -> None:
        """Leave the file to readers and to a later run."""
        self._file.close()

    def _write(self, lines: list[str]) -> None:
        try:
            self._file.write("".join(f"{line}\n" for line in lines).encode())
            self._file.flush()
        except OSError as error:
            raise _unwritable(self._path, error) from error


def check_saved_to(path: Path) -> None:
    """Refuse a `path` that a trajectory cannot be saved to; a file is found again by its suffix.

    Raises:
        UsageError: the file has another suffix than .jsonl.
        HtsrError: the file cannot be written.
    """
    check_writable(path)
    if not is_trajectory(path) and not is_stream(path):
        raise UsageError(f"a trajectory is saved as {SUFFIX}, not as {path.name}: {path.with_suffix(SUFFIX)}")


def is_trajectory(path: Path) -> bool:
    """Whether `path` is named as a saved trajectory is."""
    return path.suffix.lower() == SUFFIX


def write_trajectory(path: Path, header: Header, points: Iterable[Point]) -> None:
    """Write a whole trajectory to `path`, or nothing.

    Args:
        path: file to write; its suffix is .jsonl.
        header: what holds for the whole trajectory.
        points: points in their order.

    Raises:
        UsageError: the file has another suffix.
        HtsrError: the file cannot be written.
    """
    check_saved_to(path)
    with written(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        start = {"htsr": __version__, "trajectory": _FORM}
        file.write(json.dumps(start | asdict(header)) + "\n")
        file.writelines(f"{_line(point)}\n" for point in points)


def read_header(path: Path) -> Header:
    """What the first line of the trajectory file `path` says.

    Raises:
        SourceError: the file is no trajectory, or cannot be read.
    """
    try:
        with path.open("rb") as file:
            return _header(path, file.readline(_LONGEST))
    except OSError as error:
        raise SourceError(f"{path} cannot be read: {reason_of(error, path)}") from error


def read_trajectory(path: Path) -> tuple[Header, Points]:
    """What the trajectory file `path` holds; a last line that does not end is not read.

    Raises:
        SourceError: the file is no trajectory, or is damaged; the message says in which line.
    """
    try:
        header, points, _ = _read(path)
    except OSError as error:
        raise SourceError(f"{path} cannot be read: {reason_of(error, path)}") from error
    return header, points


def _read(path: Path) -> tuple[Header, Points, int]:
    """Header, points, and the number of bytes that whole lines take."""
    points, end = Points(), 0
    with path.open("rb") as file:
        header = _header(path, file.readline(_LONGEST))
        end = file.tell()
        for number, line in enumerate(file, 2):
            if not line.endswith(b"\n"):
                break
            end += len(line)
            try:
                _take_up(json.loads(line), points, header.options)
            except (ValueError, TypeError, AttributeError, RecursionError) as error:
                raise SourceError(f"{path} is damaged: line {number} is no point, {reason_of(error)}") from error
    return header, points, end


def _header(path: Path, line: bytes) -> Header:
    try:
        content = json.loads(line)
        form, version = content.pop("trajectory"), content.pop("htsr")
    except (ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
        raise SourceError(f"{path} is no trajectory of htsr: its first line says nothing of one") from error
    if form != _FORM:
        raise SourceError(f"{path} is a trajectory of htsr {version}, in a form that this version does not read")
    try:
        header = from_json(Header, content)
    except ValueError as error:
        raise SourceError(f"{path} is damaged: its first line has {reason_of(error)}") from error
    if version != __version__:
        logger.warning("%s was begun by htsr %s, and numbers may have been mended since", path, version)
    return header


def _take_up(record: Any, points: Points, options: Options) -> None:
    source, step = record.pop("source", None), record.pop("step", None)
    more = {name: record.pop(name, None) for name in ("relative", "fingerprint", "reference")}
    point = from_json(Point, {"source": source, "step": step, **more, "row": record})
    check(point.row, options.xmax, None, None)
    if point.relative is not None and not 0 <= point.relative < math.inf:
        raise ValueError(f"relative is {point.relative}, no length")
    points.add(point)


def _line(point: Point) -> str:
    known = {name: value for name, value in asdict(point.row).items() if value is not None}
    more = {"relative": point.relative, "fingerprint": point.fingerprint, "reference": point.reference}
    known |= {name: value for name, value in more.items() if value is not None}
    return json.dumps({"source": point.source, "step": point.step, **known})


def _insist_on_one(path: Path, there: Header, here: Header) -> None:
    """Refuse to mix numbers that do not compare; on which device they were computed changes none."""
    then, now = ({**asdict(header), **asdict(header.options)} for header in (there, here))
    for name in then.keys() - {"label", "run", "options", "device", "wanted"}:
        if then[name] != now[name]:
            raise UsageError(
                f"{path} was measured with {name} {then[name]}, not {now[name]}: take the same, or another file"
            )


def _unwritable(path: Path, error: OSError) -> HtsrError:
    return HtsrError(f"{path} cannot be written: {reason_of(error, path)}")
