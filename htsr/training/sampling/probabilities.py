"""Probability of each block of a transformer to be drawn first, and to be among those drawn."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal, TypeAlias, get_args

import numpy as np
import numpy.typing as npt

from htsr import allocate
from htsr.analysis.result import Analysis
from htsr.arrays import Vector
from htsr.calibration.outliers import OWLORE_THRESHOLD, Outliers
from htsr.errors import UsageError
from htsr.matrices.blocks import Blocks
from htsr.spectra.bulk import signal_to_noise

Scores: TypeAlias = Outliers | Analysis
Strategy: TypeAlias = Literal[
    "owlore", "uniform", "alpha", "erg", "snr", "increase", "decrease", "reverse", "gradient_norm"
]

_NODES = 256


def block_probabilities(
    strategy: Strategy | Sequence[float],
    blocks: Blocks,
    scores: Scores | None = None,
    threshold: float = OWLORE_THRESHOLD,
) -> Vector:
    """Sampling probabilities of the blocks.

    ============ ===================================================================================================
    ``owlore``   p_l ∝ D_l, the layer outlier distribution at τ = `threshold`
    ``reverse``  p_l ∝ max D + min D - D_l: the blocks with outliers least
    ``uniform``  1/L, as in LISA
    ``alpha``    p_l ∝ LLR's multiplier of the mean α of the block's matrices, linear from 1 (lowest) to 5 (highest):
                 the less trained, the more often
    ``erg``      the same with the mean ⟨ln λ̃⟩ of the power-law tail in place of α
    ``snr``      p_l ∝ mean of `signal_to_noise`, with the edge λ₊ and divided by σ_max as Spectrum does (`htsr.select`
                 does not divide); needs an analysis with ``bulk=True``
    ``increase`` p_l ∝ l + 1 with depth l
    ``decrease`` p_l ∝ L - l
    ============ ===================================================================================================

    Args:
        strategy: one of the names above, or (L,) weights ≥ 0 themselves.
        blocks: blocks of the model, L of them.
        scores: `Outliers` for ``owlore`` and ``reverse``, an `Analysis` for ``alpha``, ``erg`` and ``snr``.
        threshold: τ of the outlier distribution.

    Returns:
        (L,) float64 probabilities with the sum 1.

    Raises:
        UsageError: the strategy is unknown, or the scores are missing, belong to another model, or are all zero.

    Examples:
        >>> import torch
        >>> from htsr.matrices.blocks import find_blocks
        >>> from htsr.training.sampling.probabilities import block_probabilities
        >>> layer = torch.nn.TransformerEncoderLayer(d_model=16, nhead=2, dim_feedforward=32)
        >>> model = torch.nn.TransformerEncoder(layer, num_layers=4, enable_nested_tensor=False)
        >>> block_probabilities("increase", find_blocks(model))
        array([0.1, 0.2, 0.3, 0.4])

    Sources: OwLore (arXiv 2405.18380), published as OWS (Findings of ACL 2025); LISA (arXiv 2403.17919); LLR (arXiv
    2605.22297) for the map of ``alpha``; Spectrum (arXiv 2406.06623).
    """
    L = len(blocks)
    if not isinstance(strategy, str):
        return _given(strategy, L, "block")
    if strategy == "uniform":
        return np.full(L, 1 / L)
    if strategy in ("increase", "decrease"):
        weights = np.arange(1.0, L + 1)
        return allocate.probabilities(weights, reverse=strategy == "decrease")
    if strategy in ("owlore", "reverse"):
        return _by_outliers(strategy, blocks, scores, threshold)
    if strategy in ("alpha", "erg", "snr"):
        values = block_means(_needed(strategy, scores), strategy, blocks)
        if strategy != "snr":
            values = allocate.multipliers(values, bounds=(1.0, 5.0), missing=3.0)
        return allocate.probabilities(values)
    if strategy == "gradient_norm":
        raise UsageError("gradient_norm goes by the gradients of a training, which `LayerSampler` alone has")
    raise UsageError(f"unknown strategy {strategy!r}: {', '.join(get_args(Strategy))}, or an array")


def _given(weights: Sequence[float], count: int, unit: str) -> Vector:
    """Probabilities from the weights themselves, `count` of them, one for each `unit`."""
    found = np.asarray(weights, dtype=np.float64)
    if found.shape != (count,) or not np.isfinite(found).all() or not found.any():
        raise UsageError(f"probabilities are {count} finite numbers ≥ 0 and not all zero, one for each {unit}")
    return allocate.probabilities(found)


def _by_outliers(strategy: str, blocks: Blocks, scores: Scores | None, threshold: float) -> Vector:
    if not isinstance(scores, Outliers):
        raise UsageError(f"{strategy} draws by outliers: give scores=Outliers.load(…), made by `htsr outliers`")
    D = scores.distribution(threshold)
    if D.size != len(blocks):
        raise UsageError(f"the outliers of {scores.label} are of {D.size} blocks, and this model has {len(blocks)}")
    strange = [name for i, name in enumerate(scores.blocks) if blocks.index_of(f"{name}.") != i]
    if strange:
        raise UsageError(
            f"the outliers of {scores.label} are of {strange[0]}, and this model's are {blocks.names[0]} …"
        )
    if not D.any():
        raise UsageError(
            f"no entry of {scores.label} exceeds {threshold:g} times its block's mean: "
            + lower_threshold(scores, threshold, 1, "some exceed")
        )
    return allocate.probabilities(D, reverse=strategy == "reverse")


def lower_threshold(scores: Outliers, threshold: float, count: int, which: str) -> str:
    """Advice where fewer than `count` blocks have `scores` at a `threshold`: a lower one, which `which` exceed."""
    lower = (t for t in scores.thresholds if t < threshold and (scores.distribution(t) > 0).sum() >= count)
    found = max(lower, default=None)
    to = "a lower one, measured with it" if found is None else f"{found:g}, which {which}"
    return f"set sampling.threshold (threshold=) to {to}, or sampling.strategy (strategy=) to uniform"


def _needed(strategy: str, scores: Scores | None) -> Analysis:
    if not isinstance(scores, Analysis):
        raise UsageError(f"{strategy} draws by spectra: give scores=htsr.analyze(…) or Analysis.load(…)")
    return scores


def block_means(analysis: Analysis, score: str, blocks: Blocks) -> Vector:
    """Mean score of the matrices of each block.

    Args:
        analysis: analysis of the model; with ``bulk=True`` for ``snr``.
        score: ``alpha``, ``erg`` (⟨ln λ̃⟩ of the power-law tail) or ``snr`` (`signal_to_noise`).
        blocks: blocks of the model, L of them.

    Returns:
        (L,) float64 means; NaN for a block without the score.

    Raises:
        UsageError: the analysis knows no block of this model, or lacks the score.

    Examples:
        The second of two blocks has a heavier tail, a lower α, than noise:

        >>> import htsr, torch
        >>> from htsr.matrices.blocks import find_blocks
        >>> from htsr.training.sampling.probabilities import block_means
        >>> _ = torch.manual_seed(0)
        >>> layer = torch.nn.TransformerEncoderLayer(d_model=64, nhead=2, dim_feedforward=64)
        >>> model = torch.nn.TransformerEncoder(layer, num_layers=2, enable_nested_tensor=False)
        >>> with torch.no_grad():
        ...     _ = model.layers[1].linear1.weight.mul_(torch.arange(1.0, 65.0) ** -1)
        >>> means = block_means(htsr.analyze(model), "alpha", find_blocks(model))
        >>> bool(means[1] < means[0])
        True
    """
    found: list[list[float]] = [[] for _ in blocks.names]
    for name, value in _scores_of_rows(analysis, score):
        index = blocks.index_of(f"{name}.")
        if index is not None:
            found[index].append(value)
    return _means(found, analysis, score)


def matrix_probabilities(
    strategy: Strategy | Sequence[float],
    names: Sequence[str],
    blocks: Blocks,
    scores: Scores | None = None,
    threshold: float = OWLORE_THRESHOLD,
) -> Vector:
    """Sampling probabilities of matrices, by the strategies of `block_probabilities`.

    Scores are the matrix's own: of ``owlore`` and ``reverse`` the share of its entries above τ times the mean of its
    block. ``increase`` and ``decrease`` go by the depth of the block.

    Args:
        strategy: one of the names, or (M,) weights ≥ 0 themselves.
        names: names of the modules of the matrices, M of them, all in blocks.
        blocks: blocks of the model.
        scores: scores that the strategy needs, as for `block_probabilities`.
        threshold: τ of the outlier distribution.

    Returns:
        (M,) float64 probabilities with the sum 1.

    Raises:
        UsageError: the strategy is unknown, or the scores are missing, belong to another model, or are all zero.

    Examples:
        >>> import torch
        >>> from htsr.matrices.blocks import find_blocks
        >>> from htsr.training.sampling.probabilities import matrix_probabilities
        >>> layer = torch.nn.TransformerEncoderLayer(d_model=16, nhead=2, dim_feedforward=32)
        >>> model = torch.nn.TransformerEncoder(layer, num_layers=2, enable_nested_tensor=False)
        >>> matrix_probabilities("increase", ["layers.0.linear1", "layers.1.linear1"], find_blocks(model)).round(3)
        array([0.333, 0.667])
    """
    M, depth = len(names), np.array([blocks.index_of(f"{name}.") or 0 for name in names])
    if not isinstance(strategy, str):
        return _given(strategy, M, "matrix")
    if strategy == "uniform":
        return np.full(M, 1 / M)
    by_block = block_probabilities(strategy, blocks, scores, threshold)  # refuses what does not go together
    if strategy in ("increase", "decrease"):
        return allocate.probabilities(by_block[depth])
    if isinstance(scores, Outliers):
        at = scores.thresholds.index(threshold)
        rows = [(row.name, row.block_counts[at] / row.parameters) for row in scores.rows if row.block is not None]
    else:
        rows = list(_scores_of_rows(_needed(strategy, scores), strategy))
    places = {_place(name, blocks): number for number, name in enumerate(names)}
    found: list[list[float]] = [[] for _ in names]
    for name, value in rows:
        block, inside = _place(name, blocks)
        while inside and (block, inside) not in places:  # a part of a fused matrix, or an expert
            inside = inside[: max(inside.rfind("."), inside.rfind("["), 0)]
        if (block, inside) in places:
            found[places[block, inside]].append(value)
    values = _means(found, scores, strategy)
    if isinstance(scores, Outliers):
        return allocate.probabilities(np.nan_to_num(values), reverse=strategy == "reverse")
    if strategy != "snr":
        values = allocate.multipliers(values, bounds=(1.0, 5.0), missing=3.0)
    return allocate.probabilities(values)


def _place(name: str, blocks: Blocks) -> tuple[int | None, str]:
    """The block of a matrix, and its name inside of the block, which files and modules agree in."""
    index = blocks.index_of(f"{name}.")
    if index is None:
        return None, ""
    own = ".".join(blocks.names[index].split(".")[-2:])
    return index, f".{name}".partition(f".{own}.")[2]


def _scores_of_rows(analysis: Analysis, score: str) -> Iterator[tuple[str, float]]:
    """Names and scores of the matrices that have one."""
    for row in analysis:
        value: float | None = row.alpha
        if score == "erg":
            value = row.trace_log
        elif score == "snr":
            value = None
            if row.lambda_plus is not None and row.name in analysis.eigenvalues:
                value = signal_to_noise(analysis.eigenvalues[row.name], row.lambda_plus)
        if value is not None and np.isfinite(value):
            yield row.name, value


def _means(found: list[list[float]], scores: Scores | None, score: str) -> Vector:
    if not any(found):
        need = "; it takes bulk=True" if score == "snr" else ""
        kind = "outliers" if isinstance(scores, Outliers) else "analysis"
        raise UsageError(
            f"the {kind} of {scores.label if scores else None} has no {score} of this model's blocks{need}"
        )
    return np.array([np.mean(values) if values else np.nan for values in found])


def inclusion_probabilities(p: npt.ArrayLike, draws: int) -> Vector:
    """Probability that each item is among `draws` successive draws without replacement with weights `p`.

    Item i arrives at a time with the law Exp(p_i), and the first arrivals are drawn; so P_i = ∫₀¹ P(fewer than `draws`
    of the others have come by t = -ln(u)/p_i) du, by Gauss-Legendre quadrature on 256 nodes.

    Args:
        p: (n,) weights ≥ 0, at least `draws` of them above 0.
        draws: number of items drawn.

    Returns:
        (n,) float64 probabilities with the sum `draws`.

    Examples:
        The heaviest of three is left out of two draws only if the other two come first, 2·(1/4)·(1/3) = 1/6:

        >>> from htsr.training.sampling.probabilities import inclusion_probabilities
        >>> inclusion_probabilities([1.0, 1.0, 2.0], draws=2).round(4)
        array([0.5833, 0.5833, 0.8333])
    """
    weights = np.asarray(p, dtype=np.float64)
    nodes, measure = np.polynomial.legendre.leggauss(_NODES)
    u, measure = (nodes + 1) / 2, measure / 2
    u, measure = u**3, measure * 3 * u**2  # puts more nodes near u = 0, where the integrand is steep
    result = np.zeros(weights.size)
    for i in np.flatnonzero(weights):
        t = -np.log(u) / weights[i]
        arrived = np.zeros((draws, u.size))  # arrived[k]: exactly k of the others have come
        arrived[0] = 1
        for j in np.flatnonzero(weights):
            if j != i:
                q = -np.expm1(-weights[j] * t)  # P(j has come by t); 1 - exp(…) would lose all digits of a small one
                arrived[1:] = arrived[1:] * (1 - q) + arrived[:-1] * q
                arrived[0] *= 1 - q
        result[i] = measure @ arrived.sum(axis=0)
    return result * draws / result.sum()
