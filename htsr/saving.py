"""Analyses on disk: one .npz file, a header of JSON and an array per spectrum.

Files come from strangers, or from a disk that was full: everything is held against what `write` writes, sizes against
the file, before it is believed.
"""

from __future__ import annotations

import io
import json
import os
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from htsr._version import __version__
from htsr.errors import SourceError
from htsr.files import written
from htsr.schema import from_json
from htsr.spectra.metrics import LayerMetrics, Options

Vector = npt.NDArray[np.float64]
Spectra = Mapping[str, Vector]

_KINDS = ("eigenvalues", "permuted")


def write_parts(
    path: Path,
    label: str,
    rows: Sequence[LayerMetrics],
    options: Options,
    spectra: Mapping[str, Spectra],
    meta: Mapping[str, Any],
) -> None:
    """Write the parts of an analysis to `path`, whole or not at all.

    Raises:
        HtsrError: it cannot be written.
    """
    header = {
        "htsr": __version__,
        "label": label,
        "rows": [asdict(row) for row in rows],
        "options": asdict(options),
        "meta": dict(meta),
    }
    arrays: dict[str, npt.NDArray[Any]] = {"header": np.frombuffer(json.dumps(header).encode(), dtype=np.uint8)}
    for i, row in enumerate(rows):
        arrays |= {f"{kind}/{i}": spectra[kind][row.name] for kind in _KINDS if row.name in spectra[kind]}
    with written(path) as temporary, temporary.open("wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]


def read_parts(path: Path) -> dict[str, Any]:
    """Label, rows, options, spectra and meta as the fields of `htsr.Analysis`.

    Raises:
        SourceError: `path` is not what `write_parts` wrote.
    """
    if os.path.exists(path) and not path.is_file():
        raise SourceError(f"{path} is not an analysis that htsr saved: it is no file")
    try:
        with zipfile.ZipFile(path) as archive:
            return _parts(archive, path.stat().st_size)
    except OSError as error:
        raise SourceError(f"{path} is not an analysis that htsr saved: {error.strerror or error}") from error
    except Exception as error:  # a damaged file makes zipfile, NumPy and json raise whatever they like
        raise SourceError(f"{path} is not an analysis that htsr saved: {_one_line(error)}") from error


def _parts(archive: zipfile.ZipFile, size: int) -> dict[str, Any]:
    members = archive.infolist()
    if sum(member.file_size for member in members) > size:
        raise ValueError("its members claim to be larger than the file")
    arrays = {member.filename.removesuffix(".npy"): _array(archive.read(member)) for member in members}
    if len(arrays) != len(members) or "header" not in arrays:
        raise ValueError("it has no header, or two members of one name")
    header = json.loads(arrays.pop("header").tobytes())
    if not isinstance(header, dict):
        raise ValueError("its header is no JSON object")
    rows = tuple(from_json(LayerMetrics, row) for row in _field(header, "rows", list))
    if len({row.name for row in rows}) != len(rows):
        raise ValueError("two of its rows have one name")
    spectra: dict[str, dict[str, Vector]] = {kind: {} for kind in _KINDS}
    for key, values in arrays.items():
        kind, _, index = key.partition("/")
        if kind not in _KINDS or not (index.isascii() and index.isdecimal() and int(index) < len(rows)):
            raise ValueError(f"{key!r} is no spectrum of one of its {len(rows)} rows")
        row = rows[int(index)]
        spectra[kind][row.name] = _spectrum(values, row)
    for row in rows:
        _check_fit(row, spectra["eigenvalues"].get(row.name))
    meta = _field(header, "meta", dict)
    if not isinstance(meta.get("seconds", 0.0), (int, float)):
        raise ValueError("meta: seconds is no number")
    options = from_json(Options, _field(header, "options", dict))
    return {"label": _field(header, "label", str), "rows": rows, "options": options, "meta": meta, **spectra}


def _field(header: Mapping[str, Any], name: str, kind: type) -> Any:
    if not isinstance(header.get(name), kind):
        raise ValueError(f"its header has no {kind.__name__} called {name}")
    return header[name]


def _array(content: bytes) -> npt.NDArray[Any]:
    """What a .npy member holds, one axis of numbers; nothing is allocated before its size is known to be right."""
    stream = io.BytesIO(content)
    version = np.lib.format.read_magic(stream)
    read: dict[tuple[int, int], Callable[..., Any]] = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    shape, _, dtype = read[version](stream)
    if dtype not in (np.uint8, np.float64) or shape != ((len(content) - stream.tell()) // dtype.itemsize,):
        raise ValueError("a member is no array of the size that it states")
    return np.frombuffer(content, dtype, shape[0], stream.tell()).astype(dtype.newbyteorder("="))


def _spectrum(values: npt.NDArray[Any], row: LayerMetrics) -> Vector:
    if values.dtype != np.float64 or values.size == 0 or not np.isfinite(values).all():
        raise ValueError(f"the eigenvalues of {row.name!r} are no finite numbers")
    if values[0] < 0 or (np.diff(values) < 0).any():
        raise ValueError(f"the eigenvalues of {row.name!r} do not ascend from 0")
    return values


def _check_fit(row: LayerMetrics, eigenvalues: Vector | None) -> None:
    """That the counts of a row are those of its eigenvalues."""
    if eigenvalues is None:
        return
    size = eigenvalues.size
    counts = (row.num_pl_tail, row.num_fingers, row.matrix_rank)
    if row.num_eigenvalues != size or any(count is not None and not 0 <= count <= size for count in counts):
        raise ValueError(f"{row.name!r} counts other eigenvalues than the {size} it has")


def _one_line(error: Exception) -> str:
    return str(error).partition("\n")[0] or type(error).__name__
