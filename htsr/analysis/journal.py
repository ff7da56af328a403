"""Finished rows on disk, so that an interrupted analysis goes on where it stopped."""

from __future__ import annotations

import base64
import glob
import hashlib
import json
import logging
from dataclasses import asdict
from pathlib import Path
from typing import IO

import numpy as np
import numpy.typing as npt

from htsr._version import __version__
from htsr.analysis.saving import check
from htsr.analysis.schema import from_json
from htsr.cache import cache_folder
from htsr.errors import UsageError
from htsr.matrices.checksums import checksum
from htsr.matrices.models import Model
from htsr.spectra.measure import Measured
from htsr.spectra.metrics import LayerMetrics, Options

logger = logging.getLogger(__name__)


class Journal:
    """One JSON object a line, written as each matrix is done; every rank has a file of its own.

    The first line says what is analyzed and how, but not on which device, which changes no number; rows of anything
    else are not taken over. Files are known by path, size and date. Each row of a model in memory
    has a checksum of its matrix, and is taken over for that matrix only.

    A journal is a convenience: where it cannot be written or read, the analysis goes on without it and warns.

    Args:
        model: model that is analyzed.
        options: options of the analysis.
        path: file of the journal; one in `htsr.cache.cache_folder` by default.
        fresh: whether to forget what an earlier run has left.

    Raises:
        UsageError: `path` is a file, and no journal: it would be overwritten, and removed at the end.
    """

    def __init__(self, model: Model, options: Options, path: Path | None = None, *, fresh: bool = False) -> None:
        names = hashlib.sha256("\n".join(m.name for m in model).encode("utf-8", "surrogateescape")).hexdigest()
        header = {
            "htsr": __version__,
            "source": model.fingerprint or model.label,
            "names": names[:16],
            "options": {name: value for name, value in asdict(options).items() if name != "device"},
        }
        self._header = json.dumps(header, sort_keys=True)
        self._matrices = {matrix.name: matrix for matrix in model}
        self._xmax = options.xmax
        self._in_memory = model.fingerprint is None
        self._fresh = fresh
        self._file: IO[str] | None = None
        self.path = path
        if path is not None and not _may_be_journal(path):
            raise UsageError(f"{path} is a file, and no journal of an analysis; take another name")
        if path is None:
            key = hashlib.sha256(self._header.encode()).hexdigest()[:24]
            try:
                self.path = cache_folder() / f"{key}.jsonl"
            except RuntimeError as error:
                self._give_up(error)

    def load(self) -> dict[str, Measured]:
        """The rows by name that an interrupted run of the same analysis, on any number of ranks, has left."""
        if self._fresh:
            self.discard()
        found: dict[str, Measured] = {}
        for file in self._files():
            try:
                lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
            except (OSError, ValueError) as error:
                logger.warning("%s cannot be read, and its rows are not taken up: %s", file, error)
                continue
            if lines and lines[0] != self._header:
                logger.warning("%s belongs to another analysis; its rows are not taken up", file)
                continue
            for line in lines[1:]:
                if (result := self._taken_up(line)) is not None:
                    found[result.row.name] = result
        return found

    def discard(self) -> None:
        """Forget earlier rows, those of all ranks that this one sees."""
        for file in self._files():
            try:
                file.unlink(missing_ok=True)
            except OSError as error:
                logger.info("%s stays: %s", file, error)

    def open(self, rank: int = 0) -> None:
        """Go on writing after what is there, or begin."""
        if self.path is None:
            return
        file = self.path.with_stem(f"{self.path.stem}.rank{rank}") if rank else self.path
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            old = file.read_text(encoding="utf-8") if file.is_file() else ""
            goes_on = old.partition("\n")[0] == self._header
            self._file = file.open("a" if goes_on else "w", encoding="utf-8")
        except (OSError, ValueError) as error:
            self._give_up(error)
            return
        if not goes_on:
            self._write(self._header)
        elif not old.endswith("\n"):
            self._write("")

    def add(self, result: Measured) -> None:
        """Append one row, at once."""
        if self._file is None:
            return
        record = {
            "row": asdict(result.row),
            "eigenvalues": _encode(result.eigenvalues),
            "permuted": _encode(result.permuted),
        }
        if self._in_memory:
            record["content"] = checksum(self._matrices[result.row.name])
        self._write(json.dumps(record))

    def close(self) -> None:
        """Leave the journal for a later run."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _files(self) -> list[Path]:
        if self.path is None:
            return []
        others = f"{glob.escape(self.path.stem)}.rank*{glob.escape(self.path.suffix)}"
        try:
            return [self.path, *sorted(self.path.parent.glob(others))]
        except OSError as error:
            self._give_up(error)
            return []

    def _taken_up(self, line: str) -> Measured | None:
        try:
            record = json.loads(line)
            row = from_json(LayerMetrics, record["row"])
            result = Measured(row, _decode(record["eigenvalues"]), _decode(record["permuted"]))
            check(row, self._xmax, result.eigenvalues, result.permuted)
            content = record.get("content")
        except (ValueError, TypeError, KeyError, AttributeError):  # the line that was being written, or no row
            return None
        matrix = self._matrices.get(row.name)
        if matrix is None or (self._in_memory and (content is None or checksum(matrix) != content)):
            return None
        return result

    def _write(self, line: str) -> None:
        assert self._file is not None
        try:
            self._file.write(line + "\n")
            self._file.flush()
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        logger.warning("the journal cannot be written, so that --resume will find no rows: %s", error)
        self.path, self._file = None, None


_LONGEST_HEADER = 1 << 20


def _may_be_journal(path: Path) -> bool:
    """Whether `path` is a journal, an empty file or none; what cannot be read is found out when it is written to."""
    try:
        if not path.is_file():
            return True
        with path.open("rb") as file:
            first = file.readline(_LONGEST_HEADER)
    except (OSError, ValueError):
        return True
    try:
        return not first or {"htsr", "names", "options"} <= json.loads(first).keys()
    except (ValueError, AttributeError):
        return False


def _encode(values: npt.NDArray[np.float64] | None) -> str | None:
    return None if values is None else base64.b64encode(values.astype("<f8").tobytes()).decode()


def _decode(text: str | None) -> npt.NDArray[np.float64] | None:
    return None if text is None else np.frombuffer(base64.b64decode(text), dtype="<f8").copy()
