"""From one matrix to its row of numbers."""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np

from htsr.arrays import Array, Difference, Product, Vector, as_numpy
from htsr.errors import MatrixError, UsageError
from htsr.spectra.attempts import attempted
from htsr.spectra.certainty import fit_is_certain, is_single, is_unresolved, relative_errors
from htsr.spectra.density import ESD
from htsr.spectra.esd import Route, esd, esd_batch
from htsr.spectra.metrics import LayerMetrics, Options
from htsr.spectra.permutation import permute_entries
from htsr.spectra.statistics import permuted_statistics, statistics

_WITHIN = 1e-4  # relative error of an eigenvalue that a row shows


@dataclass(frozen=True)
class Measured:
    """A row and the spectra that it was computed from.

    Attributes:
        row: row with the numbers.
        eigenvalues: spectrum of the matrix, (K,) float64, ascending; None where it has none.
        permuted: spectrum of the permuted matrix, likewise (K,); None where it was not asked for.
    """

    row: LayerMetrics
    eigenvalues: Vector | None = field(default=None, repr=False)
    permuted: Vector | None = field(default=None, repr=False)


def measure(load: Callable[[], Array | Product], unmeasured: LayerMetrics, options: Options) -> Measured:
    """Fill in the numbers of one matrix.

    Args:
        load: function that returns the matrix, (m, n), or (pieces, m, n) to be pooled; or its factors.
        unmeasured: row with name, role and so on, whose numbers are still empty.
        options: options that say what to compute.

    Returns:
        The row with numbers; a matrix without a spectrum gets a status and a warning instead of an exception.

    Examples:
        >>> import numpy as np
        >>> from htsr.spectra.measure import measure
        >>> from htsr.spectra.metrics import LayerMetrics, Options
        >>> W = np.random.default_rng(0).standard_normal((300, 100))
        >>> row = measure(lambda: W, LayerMetrics(name="noise"), Options(fit="hill", bulk=True)).row
        >>> row.M, row.N, round(row.alpha, 2), round(row.alpha_null, 2), row.num_spikes
        (100, 300, 3.12, 3.13, 0)
    """
    return measure_batch([(load, unmeasured)], options)[0]


def measure_batch(
    jobs: Sequence[tuple[Callable[[], Array | Product], LayerMetrics]], options: Options
) -> list[Measured]:
    """`measure` for several matrices of one shape, decomposed together (`htsr.spectra.esd.esd_batch`).

    Args:
        jobs: `load` and `unmeasured` of `measure` for each matrix, all of one shape.
        options: options that say what to compute.

    Returns:
        One result for each of `jobs`, in their order; the time of all is shared evenly among their rows.

    Examples:
        >>> import numpy as np
        >>> from htsr.spectra.measure import measure_batch
        >>> from htsr.spectra.metrics import LayerMetrics, Options
        >>> random = np.random.default_rng(0)
        >>> matrices = [random.standard_normal((40, 60)), np.zeros((40, 60))]
        >>> jobs = [(lambda W=W: W, LayerMetrics(name=f"matrix {k}")) for k, W in enumerate(matrices)]
        >>> [(measured.row.status, measured.row.matrix_rank) for measured in measure_batch(jobs, Options())]
        [('ok', 40), ('zero', 0)]
    """
    started = time.perf_counter()
    results: dict[int, Measured] = {}

    def attempt(index: int, step: Callable[[], Any]) -> Any:
        """The step's value; None where it fails, and then a row that says so."""
        try:
            value = attempted(step)
        except UsageError as problem:  # options are checked before; this one is about the matrix
            value = MatrixError("failed", str(problem))
        if isinstance(value, MatrixError):
            results[index] = Measured(replace(jobs[index][1], status=value.status, warning=str(value)))
            return None
        return value

    def described(index: int, spectrum: ESD) -> Any:
        return attempt(index, partial(statistics, spectrum, options, _is_change(matrices[index])))

    matrices: dict[int, Array | Product] = {
        i: W for i, (load, _) in enumerate(jobs) if (W := attempt(i, load)) is not None
    }
    stored = {i: jobs[i][1].stored for i in matrices}
    double = replace(options, dtype="float64")
    options = double if _needs_float64(options) else options
    spectra = _decompose(matrices, stored, attempt, options)
    unresolved = {i: matrices[i] for i, spectrum in spectra.items() if is_unresolved(spectrum)}
    resolved = {i: spectrum for i, spectrum in spectra.items() if i not in unresolved}
    spectra = resolved | _decompose(unresolved, stored, attempt, double)
    others: dict[int, ESD] = {}
    if options.permuted:
        noise: dict[int, Array | Product] = {
            i: _noise(W, jobs[i][1].name, options) for i, W in matrices.items() if i in spectra
        }
        route: Route = "lanczos" if any(s.error is not None for s in spectra.values()) else "gram"
        # float32 will do: there is no tail to fit
        others = _decompose(noise, stored, attempt, replace(options, route=route, dtype="float32"))
    for i, first in spectra.items():
        if (found := described(i, first)) is None:
            continue
        spectrum = first
        if not _is_certain(first, found[0], options):
            again = _decompose({i: matrices[i]}, stored, attempt, double).get(i)
            if again is None or (found := described(i, again)) is None:
                continue
            spectrum = again
        numbers, warnings = found
        other = others.get(i)
        if other is not None and numbers["status"] != "zero":
            numbers |= permuted_statistics(matrices[i], spectrum, other, whole=options.windows is None)
        numbers, warnings = _finite(numbers, warnings)
        unmeasured = jobs[i][1]
        sentence = "; ".join([unmeasured.warning, *warnings] if unmeasured.warning else warnings)
        row = replace(unmeasured, **numbers, warning=sentence)
        results[i] = Measured(row, spectrum.eigenvalues, None if other is None else other.eigenvalues)
    seconds = (time.perf_counter() - started) / len(jobs)
    return [replace(results[i], row=replace(results[i].row, seconds=seconds)) for i in range(len(jobs))]


def _finite(numbers: dict[str, Any], warnings: list[str]) -> tuple[dict[str, Any], list[str]]:
    """Numbers that are none become None, and the row says so."""
    odd = [name for name, value in numbers.items() if isinstance(value, float) and not np.isfinite(value)]
    if not odd:
        return numbers, warnings
    why = f"{', '.join(odd)}: no finite number"
    return numbers | dict.fromkeys(odd) | {"status": "failed"}, [why, *warnings]


def _decompose(
    matrices: dict[int, Array | Product],
    stored: dict[int, str | None],
    attempt: Callable[[int, Callable[[], Any]], Any],
    options: Options,
) -> dict[int, ESD]:
    """ESDs by index; `attempt` takes down what fails."""
    if not matrices:
        return {}
    how: dict[str, Any] = {
        "route": options.route,
        "dtype": options.dtype,
        "device": options.device,
        "windows": options.windows,
        "seed": options.seed,
    }
    if len(matrices) == 1:
        ((index, matrix),) = matrices.items()
        found = {index: attempt(index, partial(esd, matrix, stored=stored[index], **how))}
    else:
        batch = esd_batch(list(matrices.values()), stored=[stored[index] for index in matrices], **how)
        found = {index: attempt(index, partial(batch.__getitem__, k)) for k, index in enumerate(matrices)}
    return {index: spectrum for index, spectrum in found.items() if spectrum is not None}


def _needs_float64(options: Options) -> bool:
    """Whether numbers are asked for whose certainty in float32 cannot be told from a few tails (`certainty`)."""
    counts = options.xmin is None and options.fit in ("fix_fingers", "clip_xmax")
    return counts or options.xmax is not None or bool(options.alternatives or options.bootstrap or options.gof)


def _is_certain(spectrum: ESD, numbers: dict[str, Any], options: Options) -> bool:
    """Whether numbers of a spectrum that was computed in float32 would be those of float64."""
    if not is_single(spectrum):
        return True
    if numbers["status"] != "ok":
        return False
    alpha, D, lambda_min = (numbers[name] for name in ("alpha", "D", "lambda_min"))
    shown = min(lambda_min, numbers["lambda_erg"] or lambda_min) * (1 - 1e-9)  # the smallest eigenvalue of the row
    first = np.searchsorted(spectrum.positive, shown)
    if relative_errors(spectrum, options.device)[first] > _WITHIN:
        return False
    return fit_is_certain(spectrum, numbers["fit"], alpha, D, lambda_min, options.device)


def _is_change(matrix: Array | Product) -> bool:
    """Whether it is the change of a model, as two factors or multiplied out; where it is of low rank, it was made as
    a product, and one null serves for both.
    """
    return isinstance(matrix, (Product, Difference))


def _noise(matrix: Array | Product, name: str, options: Options) -> Array:
    """The permuted matrix; the permutation depends on the seed and the name alone, not on the order of the work."""
    return permute_entries(as_numpy(matrix), (options.seed, zlib.crc32(name.encode())))
