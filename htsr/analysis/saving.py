"""Analyses on disk: one .npz file, a header of JSON and an array per spectrum.

Files come from strangers, or from a disk that was full: before anything is believed, contents are held against what
`write_parts` writes, and sizes against the file.
"""

from __future__ import annotations

import io
import json
import math
import os
import re
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

import numpy as np
import numpy.typing as npt

from htsr._version import __version__
from htsr.analysis.schema import from_json
from htsr.arrays import Vector
from htsr.errors import SourceError, UsageError
from htsr.files import check_writable, is_stream, written
from htsr.spectra.metrics import LayerMetrics, Options
from htsr.spectra.tail import FitMethod

Spectra = Mapping[str, Vector]

_KINDS = ("eigenvalues", "permuted")
_FITS = (*get_args(FitMethod), "fixed")
_NEAR = 1e-3  # relative: other versions add up in another order
_SHARES = (
    *("D", "gof_p", "entropy", "mp_distance"),
    *("tpl_p", "exponential_p", "stretched_exponential_p", "lognormal_p"),
)
_COUNTS = (
    *(
        "block",
        "rows",
        "columns",
        "num_eigenvalues",
        "num_pl_tail",
        "num_fingers",
        "erg_num",
        "matrix_rank",
        "rank_loss",
    ),
    *("num_spikes", "num_traps", "sigma", "lambda_min", "lambda_max", "norm", "spectral_norm", "stable_rank"),
    *("alpha_null_sd", "alpha_error", "sigma_mp", "lambda_plus", "seconds"),
)


def check_saved_to(path: Path) -> None:
    """Refuse a path that an analysis cannot be saved to; a file is found again by its suffix.

    Raises:
        UsageError: the file has another suffix than .npz, or is one of a model.
        HtsrError: the file cannot be written.
    """
    check_writable(path)
    if not is_saved(path) and not is_stream(path):
        raise UsageError(f"an analysis is saved as .npz, not as {path.name}: {path.with_suffix('.npz')}")


def is_saved(path: Path) -> bool:
    """Whether `path` is named as a saved analysis is."""
    return path.suffix.lower() == ".npz"


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
        UsageError: the file has another suffix than .npz, or is one of a model.
        HtsrError: the file cannot be written.
    """
    check_saved_to(path)
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
        SourceError: `path` is not a file that `write_parts` wrote, or is damaged.
    """
    if os.path.exists(path) and not path.is_file():
        raise SourceError(f"{path} is not an analysis that htsr saved: it is no file")
    try:
        with path.open("rb") as file:
            if not zipfile.is_zipfile(file):
                raise ValueError("it is no .npz file, or its end is missing")
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
        spectra[kind][row.name] = values
    options = from_json(Options, _field(header, "options", dict))
    for row in rows:
        check(row, options.xmax, *(spectra[kind].get(row.name) for kind in _KINDS))
    meta = _field(header, "meta", dict)
    if not isinstance(meta.get("seconds", 0.0), (int, float)):
        raise ValueError("meta: seconds is no number")
    return {"label": _field(header, "label", str), "rows": rows, "options": options, "meta": meta, **spectra}


def check(row: LayerMetrics, xmax: float | None, eigenvalues: Vector | None, permuted: Vector | None) -> None:
    """Hold a row that comes from a file against what a row can be, and against its own spectrum.

    Args:
        row: row of a matrix.
        xmax: largest eigenvalue that took part in the fit; None for all.
        eigenvalues: spectrum of the matrix, (K,) ascending; None where it has none.
        permuted: spectrum of the permuted matrix, likewise (K,).

    Raises:
        ValueError: a number is none that the row can have; the message names it.
    """
    for values in (eigenvalues, permuted):
        if values is not None:
            _check_spectrum(values, row)
    _check_row(row)
    if eigenvalues is not None:
        _check_fit(row, eigenvalues, xmax)


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


def _check_spectrum(values: npt.NDArray[Any], row: LayerMetrics) -> None:
    if values.dtype != np.float64 or values.size == 0 or not np.isfinite(values).all():
        raise ValueError(f"the eigenvalues of {row.name!r} are no finite numbers")
    if values[0] < 0 or (np.diff(values) < 0).any():
        raise ValueError(f"the eigenvalues of {row.name!r} do not ascend from 0")


def _check_row(row: LayerMetrics) -> None:
    """That the numbers of a row are some that it can have."""
    for name, value in asdict(row).items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{row.name!r}: {name} is {value}, no finite number")
    for name in _COUNTS:
        _require(row, name, 0)
    for name in ("M", "N", "Q", "pieces"):
        _require(row, name, 1)
    for name in _SHARES:
        _require(row, name, 0, 1)
    _require(row, "alpha", 1)
    if row.fit is not None and row.fit not in _FITS:
        raise ValueError(f"{row.name!r}: fit is {row.fit!r}, none of {', '.join(_FITS)}")
    if not re.fullmatch("[a-z_]+", row.status):
        raise ValueError(f"{row.name!r}: status is {row.status!r}, no word of htsr's")


def _require(row: LayerMetrics, name: str, least: float, most: float = math.inf) -> None:
    value = getattr(row, name)
    if value is not None and not least <= value <= most:
        raise ValueError(
            f"{row.name!r}: {name} is {value}, not {least} {'or more' if most == math.inf else f'to {most}'}"
        )


def _check_fit(row: LayerMetrics, eigenvalues: Vector, xmax: float | None) -> None:
    """That counts, ends and exponent of a row are those of its eigenvalues."""
    size = eigenvalues.size
    counts = (row.num_pl_tail, row.num_fingers, row.matrix_rank)
    if row.num_eigenvalues != size or any(count is not None and count > size for count in counts):
        raise ValueError(f"{row.name!r} counts other eigenvalues than the {size} it has")
    own = {"lambda_max": float(eigenvalues[-1]), "norm": float(eigenvalues.sum())}
    kept = eigenvalues if xmax is None else eigenvalues[eigenvalues <= xmax]
    tail = kept[: kept.size - (row.num_fingers or 0)][-(row.num_pl_tail or 0) :]
    if row.alpha is not None and row.num_pl_tail and row.lambda_min:
        if tail.size == 0 or not 0 < row.lambda_min <= tail[0] * (1 + _NEAR):
            raise ValueError(
                f"{row.name!r}: lambda_min is {row.lambda_min}, not where a tail of its eigenvalues begins"
            )
        excess = float(np.log(tail / row.lambda_min).sum())
        own["alpha"] = 1 + row.num_pl_tail / excess if excess > 0 else math.inf
        own["sigma"] = (row.alpha - 1) / row.num_pl_tail**0.5
    for name, right in own.items():
        value = getattr(row, name)
        if value is not None and not math.isclose(value, right, rel_tol=_NEAR):
            raise ValueError(f"{row.name!r}: {name} is {value}, and {right} by its eigenvalues")


def _one_line(error: Exception) -> str:
    return str(error).partition("\n")[0] or type(error).__name__
