"""Finished rows on disk, so that an interrupted analysis goes on where it stopped."""

from __future__ import annotations

import base64
import hashlib
import json
import logging
import os
from dataclasses import asdict
from pathlib import Path
from typing import IO

import numpy as np
import numpy.typing as npt

from htsr._version import __version__
from htsr.matrices.sources import Model
from htsr.spectra.measure import Measured
from htsr.spectra.metrics import LayerMetrics, Options

logger = logging.getLogger(__name__)


def cache_folder() -> Path:
    """Where journals lie unless told otherwise: $HTSR_CACHE, else htsr in the user's cache folder."""
    if folder := os.environ.get("HTSR_CACHE"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "htsr"


class Journal:
    """One JSON object a line, written as each matrix is done; every rank has a file of its own.

    The first line says what is analyzed and how; rows of anything else are not taken up.
    """

    def __init__(self, model: Model, options: Options, path: Path | None = None) -> None:
        names = hashlib.sha256("\n".join(matrix.name for matrix in model).encode()).hexdigest()
        header = {
            "htsr": __version__,
            "source": model.fingerprint or model.label,
            "names": names[:16],
            "options": asdict(options),
        }
        self._header = json.dumps(header, sort_keys=True)
        key = hashlib.sha256(self._header.encode()).hexdigest()[:24]
        self.path = path or cache_folder() / f"{key}.jsonl"
        self._file: IO[str] | None = None

    def _files(self) -> list[Path]:
        return [self.path, *sorted(self.path.parent.glob(f"{self.path.stem}.rank*{self.path.suffix}"))]

    def load(self) -> dict[str, Measured]:
        """Rows by name that an interrupted run of the same analysis, on any number of ranks, has left."""
        found: dict[str, Measured] = {}
        for file in self._files():
            lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
            if lines and lines[0] != self._header:
                logger.warning("%s belongs to another analysis; its rows are not taken up", file)
                continue
            for line in lines[1:]:
                try:
                    record = json.loads(line)
                except ValueError:  # the line that was being written
                    continue
                row = LayerMetrics(**record["row"])
                found[row.name] = Measured(row, _decode(record["eigenvalues"]), _decode(record["permuted"]))
        return found

    def discard(self) -> None:
        """Forget earlier rows."""
        for file in self._files():
            file.unlink(missing_ok=True)

    def open(self, rank: int = 0) -> None:
        """Go on writing after what is there, or begin."""
        file = self.path.with_stem(f"{self.path.stem}.rank{rank}") if rank else self.path
        file.parent.mkdir(parents=True, exist_ok=True)
        old = file.read_text(encoding="utf-8") if file.is_file() else ""
        if old.partition("\n")[0] == self._header:
            self._file = file.open("a", encoding="utf-8")
            if not old.endswith("\n"):
                self._write("")
        else:
            self._file = file.open("w", encoding="utf-8")
            self._write(self._header)

    def add(self, result: Measured) -> None:
        """Append one row, at once."""
        record = {
            "row": asdict(result.row),
            "eigenvalues": _encode(result.eigenvalues),
            "permuted": _encode(result.permuted),
        }
        self._write(json.dumps(record))

    def close(self) -> None:
        """Leave the journal for a later run."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _write(self, line: str) -> None:
        assert self._file is not None
        self._file.write(line + "\n")
        self._file.flush()


def _encode(values: npt.NDArray[np.float64] | None) -> str | None:
    return None if values is None else base64.b64encode(values.astype("<f8").tobytes()).decode()


def _decode(text: str | None) -> npt.NDArray[np.float64] | None:
    return None if text is None else np.frombuffer(base64.b64decode(text), dtype="<f8").copy()
