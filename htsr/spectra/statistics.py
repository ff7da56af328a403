"""Every number of one spectrum, by the names that a row (`htsr.spectra.metrics.LayerMetrics`) gives them."""

from __future__ import annotations

from typing import Any

import numpy as np

from htsr.arrays import Array, Product, Vector, as_numpy
from htsr.errors import MatrixError, UsageError
from htsr.spectra.alternatives import best_law, compare_laws, fit_truncated
from htsr.spectra.bulk import fit_bulk, jensen_shannon_distance
from htsr.spectra.density import ESD
from htsr.spectra.erg import erg
from htsr.spectra.esd import LANCZOS_FROM
from htsr.spectra.metrics import Options
from htsr.spectra.notes import notes
from htsr.spectra.null import alpha_null
from htsr.spectra.quality import quality
from htsr.spectra.resampling import bootstrap_alpha, goodness_of_fit
from htsr.spectra.tail import PowerLawFit, fit_power_law, fit_rows


def statistics(spectrum: ESD, options: Options, change: bool = False) -> tuple[dict[str, Any], list[str]]:
    """The numbers of one spectrum.

    Args:
        spectrum: eigenvalues of the matrix.
        options: options that say what to compute.
        change: whether the matrix is the change of a model, which has another shape null where its rank is low.

    Returns:
        Fields of `LayerMetrics` with their values, and the words of caution that belong to them. Without a tail, the
        status says why, and the numbers are those that need none.

    Raises:
        MatrixError: a statistic that was asked for cannot be computed of this spectrum.

    Examples:
        >>> import numpy as np
        >>> from htsr.spectra.esd import esd
        >>> from htsr.spectra.metrics import Options
        >>> from htsr.spectra.statistics import statistics
        >>> spectrum = esd(np.random.default_rng(0).standard_normal((300, 100)))
        >>> numbers, words = statistics(spectrum, Options(fit="hill", bulk=True))
        >>> numbers["status"], numbers["Q"], round(numbers["alpha"], 2), numbers["num_spikes"]
        ('ok', 3.0, 3.12, 0)
    """
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
    resamples: dict[str, Any] = {"seed": options.seed, "xmin": options.xmin, "xmax": options.xmax}
    if options.bootstrap:
        low, high = bootstrap_alpha(positive, options.fit, resamples=options.bootstrap, **resamples)
        numbers |= {"alpha_low": low, "alpha_high": high}
    if options.gof and spectrum.error is not None:
        warnings.append("no p of the fit")
    elif options.gof:
        numbers["gof_p"] = goodness_of_fit(positive, options.fit, resamples=options.gof, **resamples)
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
        >>> from htsr.spectra.statistics import scalar_metrics
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
    """Rank of most pieces of a matrix, where that is not full: its noise is that of this rank."""
    rank = -(-spectrum.positive.size // spectrum.pieces) if spectrum.piece_rank is None else spectrum.piece_rank
    return rank if 0 < rank < spectrum.M else None


def _jackknife(replicates: Vector, options: Options) -> float:
    most = np.inf if options.xmax is None else options.xmax
    tails = np.sort(np.where((replicates > 0) & (replicates <= most), replicates, np.inf), axis=1)
    alphas = fit_rows(tails, options.fit, xmin=options.xmin).alpha
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


def permuted_statistics(matrix: Array | Product, spectrum: ESD, other: ESD, *, whole: bool = True) -> dict[str, Any]:
    """Traps, distance to random and mean shift of a matrix.

    Args:
        matrix: (m, n), or (pieces, m, n) that were pooled.
        spectrum: spectrum of the matrix.
        other: eigenvalues of the permuted matrix.
        whole: whether `spectrum` is that of the whole matrix, whose trace then gives the entries' variance; windows
            overlap.

    Examples:
        >>> import numpy as np
        >>> from htsr.spectra.permutation import permute_entries
        >>> from htsr.spectra.esd import esd
        >>> from htsr.spectra.statistics import permuted_statistics
        >>> W = np.random.default_rng(0).standard_normal((300, 100)) + 0.2
        >>> found = permuted_statistics(W, esd(W), esd(permute_entries(W, 0)))
        >>> found["num_traps"], found["mean_shift"] > found["mean_shift_threshold"]
        (1, True)
    """
    values = as_numpy(matrix)
    bulk = fit_bulk(other.eigenvalues, other.M, other.N, other.pieces)
    mean = float(values.mean(dtype=np.float64))
    variance = float(spectrum.eigenvalues.sum()) / values.size - mean**2
    if not whole or variance < mean**2 / 100:  # where what the difference leaves is rounding
        constant = values.size == 0 or values.min() == values.max()
        variance = 0.0 if constant else float(values.var(dtype=np.float64))
    sd = variance**0.5
    return {
        "num_traps": bulk.num_spikes,
        "max_rand_eval": float(other.eigenvalues[-1]),
        "rand_threshold": bulk.threshold,
        "rand_distance": jensen_shannon_distance(spectrum.eigenvalues, other.eigenvalues),
        "mean_shift": abs(mean) / sd if sd > 0 else None,
        "mean_shift_threshold": float(spectrum.N * spectrum.M) ** -0.25,
    }
