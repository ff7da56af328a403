"""Every number of one weight matrix: what can be asked for (`Options`) and the row it gives (`LayerMetrics`)."""

from __future__ import annotations

from dataclasses import dataclass, fields
from numbers import Real
from typing import get_args

import numpy as np

from htsr.errors import UsageError
from htsr.spectra.esd import Precision, Route
from htsr.spectra.tail import FitMethod
from htsr.spectra.windows import Windows

LEAST = 10  # resamples; p of fewer is no multiple of a tenth, and cannot be held against 0.1
_WHOLE = (
    ("bootstrap", f"a number of resamples, 0 or at least {LEAST}", LEAST),
    ("gof", f"a number of samples, 0 or at least {LEAST}", LEAST),
    ("seed", "a whole number from 0", 0),
)
_SWITCHES = ("null", "bulk", "permuted", "alternatives", "quality")


@dataclass(frozen=True, kw_only=True)
class Options:
    """What is computed for each matrix, and how.

    Attributes:
        fit: how λ_min is chosen (`htsr.spectra.tail`).
        xmin: value of λ_min, in units of the eigenvalues, where it is not to be chosen; else None.
        xmax: largest eigenvalue that takes part in the fit; None for all.
        route: how eigenvalues are computed (`htsr.spectra.esd`).
        dtype: precision of that computation; ``auto`` is float64. A row in float32 is computed again in
            float64 where its fit might be another there, and where float32 does not resolve all eigenvalues
            (`htsr.spectra.certainty`); histogram fits, `xmax`, `alternatives`, `bootstrap` and `gof` take float64.
        device: device that computes: ``cpu``, ``cuda``, ``cuda:1`` and so on.
        windows: FARMS windows; None decomposes whole matrices.
        null: whether to compare α with its shape null (`htsr.spectra.null`).
        bulk: whether to fit the Marchenko-Pastur bulk and count spikes.
        permuted: whether to decompose the permuted matrix, too, for traps and the distance to random.
        alternatives: whether to compare the power law with other laws.
        quality: whether to compute SETOL's (experimental) quality estimates.
        bootstrap: number of resamples of the bootstrap interval of α, at least 10; 0 for no interval. On the Lanczos
            route it does not hold the error of the probes, which is `LayerMetrics.alpha_error`.
        gof: number of samples for the p-value of the goodness of fit, at least 10; 0 for none. The Lanczos route has
            no p-value, since its eigenvalues are no sample: a note of the row says so.
        seed: seed of all that is random but the null: permutation, bootstrap, goodness of fit, Lanczos probes.

    Raises:
        UsageError: there is no such `fit`, `route` or `dtype`, or a number has no meaning.

    Examples:
        >>> import htsr
        >>> htsr.Options(fit="hill", bulk=True).fit
        'hill'
        >>> htsr.Options(fit="hil")
        Traceback (most recent call last):
        htsr.errors.UsageError: unknown fit 'hil': ks, hill, hill_paper, fix_fingers, clip_xmax
    """

    fit: FitMethod = "ks"
    xmin: float | None = None
    xmax: float | None = None
    route: Route = "auto"
    dtype: Precision = "auto"
    device: str = "cpu"
    windows: Windows | None = None
    null: bool = True
    bulk: bool = False
    permuted: bool = False
    alternatives: bool = False
    quality: bool = False
    bootstrap: int = 0
    gof: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, kind in (("fit", FitMethod), ("route", Route), ("dtype", Precision)):
            if getattr(self, name) not in get_args(kind):
                raise UsageError(f"unknown {name} {getattr(self, name)!r}: {', '.join(get_args(kind))}")
        for name, what, least in _WHOLE:
            value = getattr(self, name)
            if type(value) is not int or not (value == 0 or least <= value < 2**63):  # True is an int, and no number
                raise UsageError(f"{name} is {what}, not {value!r}")
        for name in ("xmin", "xmax"):
            value = getattr(self, name)
            number = isinstance(value, Real) and not isinstance(value, bool)
            if value is not None and not (number and 0 < value < np.inf):
                raise UsageError(f"{name} is an eigenvalue, a positive number, not {value!r}")
        for name in _SWITCHES:
            if not isinstance(getattr(self, name), bool):
                raise UsageError(f"{name} is True or False, not {getattr(self, name)!r}")
        if not isinstance(self.device, str):
            raise UsageError(f"device is a name such as 'cuda:1', not {self.device!r}")
        if not isinstance(self.windows, Windows | None):
            raise UsageError(f"windows is htsr.Windows(rows, count) or None, not {self.windows!r}")


@dataclass(frozen=True, kw_only=True, repr=False)
class LayerMetrics:
    """The numbers of one weight matrix. None where a number was not asked for or has no meaning.

    λ are eigenvalues of the smaller Gram matrix, K of them, M ≤ N the sides of the matrix; logarithms named `log` are
    to base 10, as in the reference tools. `trace_log`, `log_lambda_ratio` and `erg_logdet` use natural ones.

    Attributes:
        name: name of the matrix in the checkpoint, with ``[q]``, ``[3]`` … for a part of a fused tensor.
        role: what the matrix does: ``embed``, ``attn.q``, ``mlp.up``, ``conv`` … (`htsr.matrices.roles`).
        block: index of its transformer block or stage.
        kind: kind of the layer: ``linear``, ``embedding``, ``conv``, ``expert``, ``adapter``.
        stored: dtype that the matrix is stored in.
        rows: number of rows, the first dimension of the matrix (out).
        columns: number of columns, the second dimension (in).
        M: smaller side of what was decomposed (of a window, if windowed).
        N: larger side of what was decomposed.
        Q: aspect ratio N/M.
        pieces: number of matrices whose eigenvalues are pooled (kernel offsets, windows).
        num_eigenvalues: number of eigenvalues, K = M · pieces.
        status: ``ok``, or in one word why there is no fit.
        warning: notes on what to be careful about.
        alpha: power-law exponent α of the ESD's tail.
        sigma: standard error of α, (α-1)/√n.
        D: Kolmogorov-Smirnov distance of the fit.
        lambda_min: smallest eigenvalue of the tail, λ_min.
        num_pl_tail: number of eigenvalues in the tail, n.
        fit: method that chose λ_min.
        num_fingers: number of largest eigenvalues that ``clip_xmax`` dropped.
        gof_p: p-value of the goodness of fit (`htsr.spectra.resampling`); 0.1 or less rules out the power law.
        alpha_low: lower bound of the 95 % bootstrap interval of α.
        alpha_high: upper bound of that interval.
        alpha_error: standard error of α from the probes of the Lanczos route.
        alpha_null: median α of pure noise of the same shape under the same fit.
        alpha_null_sd: standard deviation of α of that noise.
        alpha_minus_null: difference α - alpha_null.
        trace_log: mean of ln λ̃ over the power-law tail, the primary ERG number; 0 is ideal.
        erg_num: number of eigenvalues in the effective correlation space (ECS).
        lambda_erg: smallest eigenvalue of the ECS, λ_ERG.
        lambda_erg_rescaled: smallest eigenvalue of the ECS where the mean of all is 1, λ̃_ERG.
        delta_lambda_min: difference λ̃_min - λ̃_ERG.
        log_lambda_ratio: logarithm ln(λ_min / λ_ERG).
        erg_gap: difference erg_num - num_pl_tail.
        erg_gap_fraction: ratio erg_gap / K.
        erg_logdet: sum Σ ln λ̃ over the power-law tail.
        erg_crossing: whether the trace-log condition can be met at all.
        norm: squared Frobenius norm ‖W‖_F² = Σλ.
        log_norm: logarithm log10 ‖W‖_F².
        spectral_norm: largest eigenvalue λ_max, the square of the largest singular value.
        log_spectral_norm: logarithm log10 λ_max.
        lambda_max: largest eigenvalue λ_max.
        alpha_hat: weighted exponent α·log10 λ_max, with eigenvalues as they are.
        log_alpha_norm: logarithm log10 Σ λ^α.
        stable_rank: stable rank Σλ / λ_max.
        entropy: matrix entropy -Σ p ln p / ln(rank), p = λ/Σλ.
        matrix_rank: number of eigenvalues above the resolution of the stored numbers (`htsr.spectra.resolution`).
        rank_loss: number of eigenvalues below that resolution, K - matrix_rank.
        sigma_mp: standard deviation of the entries of the Marchenko-Pastur bulk.
        lambda_plus: upper edge of that bulk, λ₊.
        lambda_minus: lower edge of that bulk, λ₋.
        bulk_threshold: value that a spike exceeds: the Tracy-Widom 99 % quantile of a pure-noise matrix.
        num_spikes: number of spikes, eigenvalues above `bulk_threshold`.
        mp_softrank: Marchenko-Pastur soft rank λ₊ / λ_max.
        mp_distance: Kolmogorov-Smirnov distance between the bulk and the Marchenko-Pastur law.
        num_traps: number of correlation traps: spikes of the permuted matrix.
        max_rand_eval: largest eigenvalue of the permuted matrix.
        rand_threshold: value that spikes of the permuted matrix exceed.
        rand_distance: Jensen-Shannon distance between the ESDs of W and of the permuted W.
        mean_shift: ratio |mean W| / standard deviation of W.
        mean_shift_threshold: value of `mean_shift` above which the mean alone makes a trap, (N·M)^(-1/4).
        best_law: ``power_law``, or the law that is significantly better on the same tail.
        tpl_alpha: exponent α of the truncated power law on the same tail.
        tpl_Lambda: cut-off rate Λ of the truncated power law, in 1/λ units.
        tpl_R: log-likelihood ratio of power law and truncated power law; negative favours the truncated one.
        tpl_p: significance of `tpl_R`.
        exponential_R: log-likelihood ratio of power law and exponential.
        exponential_p: significance of `exponential_R`.
        stretched_exponential_R: log-likelihood ratio of power law and stretched exponential.
        stretched_exponential_p: significance of `stretched_exponential_R`.
        lognormal_R: log-likelihood ratio of power law and lognormal.
        lognormal_p: significance of `lognormal_R`.
        e_tpl_alpha: exponent α of the extended truncated power law (tail of ``fix_fingers``).
        e_tpl_Lambda: cut-off rate Λ of the extended truncated power law, in 1/λ units.
        quality_tail_norm: experimental quality estimate, tail-norm form (`htsr.spectra.quality`).
        quality_log: experimental quality estimate, inverse Marchenko-Pastur form.
        quality_schatten: experimental quality estimate, Lévy-Wigner form.
        quality_cumulant: experimental quality estimate, free-cumulant form.
        route: how the eigenvalues were computed, and in which precision.
        esd_error: standard error of the distribution function, where the route is approximate.
        seconds: time spent on this matrix, in seconds.

    Examples:
        >>> import htsr, torch
        >>> (row,) = htsr.analyze({"layers.0.mlp.up_proj.weight": torch.diag(torch.arange(1.0, 31.0))}, null=False)
        >>> row.norm, row.spectral_norm, row.stable_rank == row.norm / row.spectral_norm, row.matrix_rank
        (9455.0, 900.0, True, 30)
        >>> row.num_spikes is None  # not asked for
        True
    """

    name: str
    role: str = "other"
    block: int | None = None
    kind: str = "linear"
    stored: str | None = None
    rows: int | None = None
    columns: int | None = None
    M: int | None = None
    N: int | None = None
    Q: float | None = None
    pieces: int | None = None
    num_eigenvalues: int | None = None
    status: str = "ok"
    warning: str = ""
    alpha: float | None = None
    sigma: float | None = None
    D: float | None = None
    lambda_min: float | None = None
    num_pl_tail: int | None = None
    fit: str | None = None
    num_fingers: int | None = None
    gof_p: float | None = None
    alpha_low: float | None = None
    alpha_high: float | None = None
    alpha_error: float | None = None
    alpha_null: float | None = None
    alpha_null_sd: float | None = None
    alpha_minus_null: float | None = None
    trace_log: float | None = None
    erg_num: int | None = None
    lambda_erg: float | None = None
    lambda_erg_rescaled: float | None = None
    delta_lambda_min: float | None = None
    log_lambda_ratio: float | None = None
    erg_gap: int | None = None
    erg_gap_fraction: float | None = None
    erg_logdet: float | None = None
    erg_crossing: bool | None = None
    norm: float | None = None
    log_norm: float | None = None
    spectral_norm: float | None = None
    log_spectral_norm: float | None = None
    lambda_max: float | None = None
    alpha_hat: float | None = None
    log_alpha_norm: float | None = None
    stable_rank: float | None = None
    entropy: float | None = None
    matrix_rank: int | None = None
    rank_loss: int | None = None
    sigma_mp: float | None = None
    lambda_plus: float | None = None
    lambda_minus: float | None = None
    bulk_threshold: float | None = None
    num_spikes: int | None = None
    mp_softrank: float | None = None
    mp_distance: float | None = None
    num_traps: int | None = None
    max_rand_eval: float | None = None
    rand_threshold: float | None = None
    rand_distance: float | None = None
    mean_shift: float | None = None
    mean_shift_threshold: float | None = None
    best_law: str | None = None
    tpl_alpha: float | None = None
    tpl_Lambda: float | None = None
    tpl_R: float | None = None
    tpl_p: float | None = None
    exponential_R: float | None = None
    exponential_p: float | None = None
    stretched_exponential_R: float | None = None
    stretched_exponential_p: float | None = None
    lognormal_R: float | None = None
    lognormal_p: float | None = None
    e_tpl_alpha: float | None = None
    e_tpl_Lambda: float | None = None
    quality_tail_norm: float | None = None
    quality_log: float | None = None
    quality_schatten: float | None = None
    quality_cumulant: float | None = None
    route: str | None = None
    esd_error: float | None = None
    seconds: float | None = None

    def __repr__(self) -> str:
        found = self.status if self.alpha is None else f"alpha {self.alpha:.3f}"
        return f"<LayerMetrics of {self.name!r}: {found}{f', {self.warning}' if self.warning else ''}>"


NUMERIC = tuple(
    f.name
    for f in fields(LayerMetrics)
    if any(kind in str(f.type) for kind in ("int", "float", "bool")) and f.name not in ("block", "seconds")
)
