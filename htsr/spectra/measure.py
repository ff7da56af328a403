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
from htsr.spectra.alternatives import best_law, compare_laws, fit_truncated
from htsr.spectra.attempts import attempted
from htsr.spectra.bulk import fit_bulk, jensen_shannon_distance, permute_entries
from htsr.spectra.certainty import fit_is_certain, is_single
from htsr.spectra.density import ESD
from htsr.spectra.erg import erg
from htsr.spectra.esd import LANCZOS_FROM, Route, esd, esd_batch
from htsr.spectra.metrics import LayerMetrics, Options
from htsr.spectra.notes import notes
from htsr.spectra.null import alpha_null
from htsr.spectra.quality import quality
from htsr.spectra.resampling import bootstrap_alpha, goodness_of_fit
from htsr.spectra.tail import PowerLawFit, fit_power_law


@dataclass(frozen=True)
class Measured:
    """A row and the spectra it was computed from.

    Attributes:
        row: the numbers.
        eigenvalues: (K,) float64, ascending; None where the matrix has no spectrum.
        permuted: (K,) the same of the permuted matrix; None where not asked for.
    """

    row: LayerMetrics
    eigenvalues: Vector | None = field(default=None, repr=False)
    permuted: Vector | None = field(default=None, repr=False)


def measure(load: Callable[[], Array | Product], unmeasured: LayerMetrics, options: Options) -> Measured:
    """Fill in the numbers of one matrix.

    Args:
        load: returns the matrix, (m, n), or (pieces, m, n) to be pooled; or its factors.
        unmeasured: a row with name, role and so on, whose numbers are still empty.
        options: what to compute.

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
        options: what to compute.

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

    matrices: dict[int, Array | Product] = {
        i: W for i, (load, _) in enumerate(jobs) if (W := attempt(i, load)) is not None
    }
    stored = {i: jobs[i][1].stored for i in matrices}
    spectra = _decompose(matrices, stored, attempt, options)
    others: dict[int, ESD] = {}
    if options.permuted:
        noise: dict[int, Array | Product] = {
            i: _noise(W, jobs[i][1].name, options) for i, W in matrices.items() if i in spectra
        }
        route: Route = "lanczos" if any(s.error is not None for s in spectra.values()) else "gram"
        others = _decompose(noise, stored, attempt, replace(options, route=route, dtype="float32"))
    for i, spectrum in spectra.items():
        if (found := attempt(i, partial(_numbers, spectrum, options, _is_change(matrices[i])))) is None:
            continue
        if not _is_certain(spectrum, found[0], options):
            again = _decompose({i: matrices[i]}, stored, attempt, replace(options, dtype="float64"))
            if (spectrum := again.get(i)) is None:  # type: ignore[assignment]
                continue
            if (found := attempt(i, partial(_numbers, spectrum, options, _is_change(matrices[i])))) is None:
                continue
        numbers, warnings = found
        other = others.get(i)
        if other is not None and numbers["status"] != "zero":
            numbers |= _permuted_numbers(matrices[i], spectrum, other, options)
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


def _is_certain(spectrum: ESD, numbers: dict[str, Any], options: Options) -> bool:
    """Whether numbers of a spectrum that was computed in float32 would be those of float64."""
    if not is_single(spectrum):
        return True
    if numbers["status"] != "ok" or options.xmax is not None:
        return False
    alpha, D, lambda_min = (numbers[name] for name in ("alpha", "D", "lambda_min"))
    return fit_is_certain(spectrum, numbers["fit"], alpha, D, lambda_min, options.device)


def _numbers(spectrum: ESD, options: Options, change: bool) -> tuple[dict[str, Any], list[str]]:
    values, positive = spectrum.eigenvalues, spectrum.positive
    numbers: dict[str, Any] = {
        "status": "ok",
        "M": spectrum.M,
        "N": spectrum.N,
        "Q": spectrum.Q,
        "pieces": spectrum.pieces,
        "num_eigenvalues": values.size,
        "route": spectrum.route,
        "esd_error": spectrum.error,
    }
    if positive.size == 0:
        return numbers | {"status": "zero", "matrix_rank": 0, "rank_loss": values.size, "norm": 0.0}, [
            "all entries are zero"
        ]
    numbers |= scalar_metrics(values)
    warnings = []
    try:
        spectrum.require_tail()
        fit = fit_power_law(positive, options.fit, xmin=options.xmin, xmax=options.xmax)
    except MatrixError as problem:
        return numbers | {"status": problem.status}, [str(problem)]
    except UsageError as problem:
        return numbers | {"status": "degenerate"}, [str(problem)]
    numbers |= _fit_numbers(fit, positive)
    numbers |= _erg_numbers(values, fit)
    warnings += notes(numbers, spectrum)

    if options.null and options.xmin is None and options.xmax is None and spectrum.M <= LANCZOS_FROM:
        null = alpha_null(spectrum.M, spectrum.N, spectrum.pieces, options.fit, _low_rank(spectrum), change)
        numbers |= {
            "alpha_null": null.alpha,
            "alpha_null_sd": null.sd,
            "alpha_minus_null": fit.alpha - null.alpha,
        }
    if spectrum.replicates is not None:
        numbers["alpha_error"] = _jackknife(spectrum.replicates, options)
    if options.bootstrap:
        numbers["alpha_low"], numbers["alpha_high"] = bootstrap_alpha(
            positive,
            options.fit,
            resamples=options.bootstrap,
            seed=options.seed,
            xmin=options.xmin,
            xmax=options.xmax,
        )
    if options.gof and spectrum.error is None:
        numbers["gof_p"] = goodness_of_fit(
            positive,
            options.fit,
            resamples=options.gof,
            seed=options.seed,
            xmin=options.xmin,
            xmax=options.xmax,
        )
    if options.bulk:
        bulk = fit_bulk(values, spectrum.M, spectrum.N, spectrum.pieces)
        numbers |= {
            "sigma_mp": bulk.sigma,
            "lambda_plus": bulk.lambda_plus,
            "lambda_minus": bulk.lambda_minus,
            "bulk_threshold": bulk.threshold,
            "num_spikes": bulk.num_spikes,
            "mp_softrank": bulk.mp_softrank,
            "mp_distance": bulk.distance,
        }
    if options.alternatives:
        numbers |= _alternative_numbers(positive, fit)
    if options.quality and numbers["erg_num"]:
        estimates = quality(values, numbers["erg_num"], fit.alpha)
        numbers |= {
            "quality_tail_norm": estimates.tail_norm,
            "quality_log": estimates.log,
            "quality_schatten": estimates.schatten,
            "quality_cumulant": estimates.cumulant,
        }
    return numbers, warnings


def scalar_metrics(eigenvalues: Vector) -> dict[str, float | int | None]:
    """Norms, ranks and entropy of an ESD, as the fields of `LayerMetrics` of these names define them.

    Args:
        eigenvalues: (K,) float64, ascending, not all 0.

    Examples:
        >>> import numpy as np
        >>> from htsr.spectra.measure import scalar_metrics
        >>> found = scalar_metrics(np.array([0.0, 1.0, 1.0, 8.0]))
        >>> found["norm"], found["stable_rank"], found["matrix_rank"], found["rank_loss"]
        (10.0, 1.25, 3, 1)
    """
    positive = eigenvalues[eigenvalues > 0]
    total, largest, rank = float(positive.sum()), float(positive[-1]), int(positive.size)
    p = positive / total
    return {
        "norm": total,
        "log_norm": float(np.log10(total)),
        "spectral_norm": largest,
        "log_spectral_norm": float(np.log10(largest)),
        "lambda_max": largest,
        "stable_rank": total / largest,
        "entropy": float(-(p * np.log(p)).sum() / np.log(rank)) if rank > 1 else None,
        "matrix_rank": rank,
        "rank_loss": int(eigenvalues.size - rank),
    }


def _fit_numbers(fit: PowerLawFit, positive: Vector) -> dict[str, Any]:
    log = np.log10(positive)
    return {
        "alpha": fit.alpha,
        "sigma": fit.sigma,
        "D": fit.D,
        "lambda_min": fit.lambda_min,
        "num_pl_tail": fit.num_tail,
        "fit": fit.method,
        "num_fingers": fit.num_fingers if fit.method == "clip_xmax" else None,
        "alpha_hat": fit.alpha * float(log[-1]),
        "log_alpha_norm": fit.alpha * float(log[-1]) + float(np.log10((10.0 ** (fit.alpha * (log - log[-1]))).sum())),
    }


def _erg_numbers(values: Vector, fit: PowerLawFit) -> dict[str, Any]:
    condition = erg(values, fit.lambda_min)
    numbers = {
        "trace_log": condition.trace_log,
        "erg_num": condition.num,
        "lambda_erg": condition.lambda_erg,
        "lambda_erg_rescaled": condition.lambda_erg_rescaled,
        "delta_lambda_min": condition.delta_lambda_min,
        "log_lambda_ratio": condition.log_lambda_ratio,
        "erg_gap": condition.gap,
        "erg_gap_fraction": condition.gap_fraction,
        "erg_logdet": condition.logdet,
        "erg_crossing": condition.crossing,
    }
    return {k: None if isinstance(v, float) and np.isnan(v) else v for k, v in numbers.items()}


def _low_rank(spectrum: ESD) -> int | None:
    """Rank of a piece of a matrix that is not of full rank: its noise is that of this rank."""
    rank = spectrum.positive.size // spectrum.pieces
    return rank if 0 < rank < spectrum.M else None


def _is_change(matrix: Array | Product) -> bool:
    """Whether it is the change of a model, as two factors or multiplied out; where it is of low rank, it was made as
    a product, and one null serves for both.
    """
    return isinstance(matrix, (Product, Difference))


def _jackknife(replicates: Vector, options: Options) -> float:
    alphas = np.array([fit_power_law(v, options.fit, xmin=options.xmin, xmax=options.xmax).alpha for v in replicates])
    n = alphas.size
    return float(((n - 1) / n * ((alphas - alphas.mean()) ** 2).sum()) ** 0.5)


def _alternative_numbers(positive: Vector, fit: PowerLawFit) -> dict[str, Any]:
    tail = positive[(positive >= fit.lambda_min) & (positive <= fit.lambda_max)]
    laws = compare_laws(tail)
    truncated = laws["truncated_power_law"]
    peaked = fit_power_law(positive, "fix_fingers")
    e_alpha, e_Lambda = fit_truncated(positive[positive >= peaked.lambda_min])
    numbers: dict[str, Any] = {
        "best_law": best_law(laws),
        "tpl_alpha": truncated.parameters["alpha"],
        "tpl_Lambda": truncated.parameters["Lambda"] / fit.lambda_min,
        "e_tpl_alpha": e_alpha,
        "e_tpl_Lambda": e_Lambda,
    }
    for law, comparison in laws.items():
        short = "tpl" if law == "truncated_power_law" else law
        numbers |= {f"{short}_R": comparison.R, f"{short}_p": comparison.p}
    return numbers


def _noise(matrix: Array | Product, name: str, options: Options) -> Array:
    """The permuted matrix; the permutation depends on the seed and the name alone, not on the order of the work."""
    return permute_entries(as_numpy(matrix), (options.seed, zlib.crc32(name.encode())))


def _permuted_numbers(matrix: Array | Product, spectrum: ESD, other: ESD, options: Options) -> dict[str, Any]:
    """Traps, distance to random and mean shift, `other` being the ESD of the permuted matrix.

    That one is computed in float32: it has no tail to fit.
    """
    values = as_numpy(matrix)
    bulk = fit_bulk(other.eigenvalues, other.M, other.N, other.pieces)
    mean = float(values.mean(dtype=np.float64))
    if options.windows is None:
        sd = max(float(spectrum.eigenvalues.sum()) / values.size - mean**2, 0.0) ** 0.5
    else:
        sd = float(values.std(dtype=np.float64))
    return {
        "num_traps": bulk.num_spikes,
        "max_rand_eval": float(other.eigenvalues[-1]),
        "rand_threshold": bulk.threshold,
        "rand_distance": jensen_shannon_distance(spectrum.eigenvalues, other.eigenvalues),
        "mean_shift": abs(mean) / sd if sd > 0 else None,
        "mean_shift_threshold": float(spectrum.N * spectrum.M) ** -0.25,
    }
