"""From one matrix to its row of numbers."""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeAlias

import numpy as np

from htsr.arrays import Array, Difference, Product, Vector, as_numpy
from htsr.errors import MatrixError, UsageError
from htsr.spectra.attempts import Result, attempted
from htsr.spectra.certainty import fit_is_certain, is_single, is_unresolved, relative_errors
from htsr.spectra.density import ESD
from htsr.spectra.esd import Route, esd, esd_batch
from htsr.spectra.metrics import LayerMetrics, Options
from htsr.spectra.permutation import permute_entries
from htsr.spectra.statistics import permuted_statistics, statistics

Described: TypeAlias = tuple[dict[str, Any], list[str]]

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
        One result for each of `jobs`, in their order; the time that they took together is shared evenly among them.

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
    return [decomposed.measured(options) for decomposed in decompose_batch(jobs, options)]


@dataclass(frozen=True)
class Decomposed:
    """A matrix that is no longer needed: its row follows from these eigenvalues, in any thread.

    Attributes:
        unmeasured: row whose numbers are still empty.
        change: whether the matrix is the change of a model (`htsr.spectra.statistics.statistics`).
        spectrum: spectrum of the matrix; None where there is none.
        problem: why there is none.
        described: statistics of the spectrum where they are known already, or why there are none.
        permuted: spectrum of the permuted matrix, (K,); None where it was not asked for.
        beside: numbers that compare the two.
        note: word of caution that belongs to them; empty where there is none.
        seconds: time that it took so far.
    """

    unmeasured: LayerMetrics
    change: bool = False
    spectrum: ESD | None = None
    problem: MatrixError | None = None
    described: Described | MatrixError | None = None
    permuted: Vector | None = None
    beside: dict[str, Any] = field(default_factory=dict)
    note: str = ""
    seconds: float = 0.0

    def measured(self, options: Options) -> Measured:
        """The row with its numbers.

        Args:
            options: options that the matrix was decomposed with.
        """
        started = time.perf_counter()
        found: Described | MatrixError | None = self.problem or self.described
        if found is None and self.spectrum is not None:
            found = _attempt(partial(statistics, self.spectrum, options, self.change))
        if self.spectrum is None or found is None or isinstance(found, MatrixError):
            assert isinstance(found, MatrixError)  # what has no spectrum has a problem
            row = replace(self.unmeasured, status=found.status, warning=str(found))
            return Measured(replace(row, seconds=self.seconds + time.perf_counter() - started))
        numbers, warnings = _finite(found[0] | self.beside, found[1])
        sentence = "; ".join(filter(None, [self.unmeasured.warning, *warnings, self.note]))
        numbers |= {"warning": sentence, "seconds": self.seconds + time.perf_counter() - started}
        return Measured(replace(self.unmeasured, **numbers), self.spectrum.eigenvalues, self.permuted)


def decompose_batch(
    jobs: Sequence[tuple[Callable[[], Array | Product], LayerMetrics]], options: Options
) -> list[Decomposed]:
    """The first half of `measure_batch`: all that needs the matrices, and the device that `options` name.

    Args:
        jobs: `load` and `unmeasured` of `measure` for each matrix, all of one shape.
        options: options that say what to compute.

    Returns:
        One for each of `jobs`, in their order.

    Examples:
        >>> import numpy as np
        >>> from htsr.spectra.measure import decompose_batch
        >>> from htsr.spectra.metrics import LayerMetrics, Options
        >>> (decomposed,) = decompose_batch([(lambda: np.eye(20), LayerMetrics(name="identity"))], Options())
        >>> decomposed.measured(Options()).row.status
        'degenerate'
    """
    started = time.perf_counter()
    problems: dict[int, MatrixError] = {}
    attempt = _recording(problems)
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
    lost: dict[int, MatrixError] = {}
    if options.permuted:
        noise: dict[int, Array | Product] = {
            i: _noise(W, jobs[i][1].name, options) for i, W in matrices.items() if i in spectra
        }
        route: Route = "lanczos" if any(s.error is not None for s in spectra.values()) else "gram"
        # float32 will do: there is no tail to fit
        others = _decompose(noise, stored, _recording({}), replace(options, route=route, dtype="float32"))
        small = {i: W for i, W in noise.items() if i not in others}  # whose squares float32 does not hold
        others |= _decompose(small, stored, _recording(lost), replace(double, route=route))
    described: dict[int, Described | MatrixError] = {}
    for i, spectrum in list(spectra.items()):
        if is_single(spectrum):  # whether that will do is seen from what follows from it
            found = _attempt(partial(statistics, spectrum, options, _is_change(matrices[i])))
            if isinstance(found, MatrixError) or _is_certain(spectrum, found[0], options):
                described[i] = found
            elif (again := _decompose({i: matrices[i]}, stored, attempt, double).get(i)) is not None:
                spectra[i] = again
    beside: dict[int, dict[str, Any]] = {}
    for i, other in others.items():
        if i not in problems and spectra[i].positive.size:
            compared = partial(permuted_statistics, matrices[i], spectra[i], other, whole=options.windows is None)
            beside[i] = attempt(i, compared) or {}
    seconds = (time.perf_counter() - started) / len(jobs)
    return [
        Decomposed(
            unmeasured,
            i in matrices and _is_change(matrices[i]),
            None if i in problems else spectra[i],
            problems.get(i),
            described.get(i),
            others[i].eigenvalues if i in others else None,
            beside.get(i, {}),
            f"no permuted weights: {lost[i]}" if i in lost else "",
            seconds,
        )
        for i, (_, unmeasured) in enumerate(jobs)
    ]


def _recording(problems: dict[int, MatrixError]) -> Callable[[int, Callable[[], Any]], Any]:
    """A function that gives what the step of a matrix gives, and None where it fails, which is then its problem."""

    def attempt(index: int, step: Callable[[], Any]) -> Any:
        value = _attempt(step)
        if isinstance(value, MatrixError):
            problems[index] = value
            return None
        return value

    return attempt


def _attempt(step: Callable[[], Result]) -> Result | MatrixError:
    try:
        return attempted(step)
    except UsageError as problem:  # options are checked before; this one is about the matrix
        return MatrixError("failed", str(problem))


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
