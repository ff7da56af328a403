"""Look here first: which matrices of an analysis stand out against their peers and against noise, by how much, and why.

Peers are the matrices of one role and shape. On the scale of the table below, on which layers scatter alike, a number
stands out by

    score = |x - median of the peers| / scale

where the scale is the largest of four: the spread of the peers (1.4826 times their median absolute deviation), the
spread of all matrices of the model about the medians of their peers, the number's own standard error, and the least
difference that is worth a look. So nothing stands out because a few peers happen to be close together, because an α
has a short tail, or because the matrices of a freshly drawn model differ by a certain per cent or two.

================= ============================== ============== ================
number            scale                          standard error least difference
================= ============================== ============== ================
``alpha``         ln(α - 1)                      1/√n           0.1
``stable_rank``   ln                                            0.1
``norm``          ln ‖W‖_F²                                     0.1
``entropy``       ln(1 - entropy)                               0.1
``matrix_rank``   share of the K eigenvalues                    0.01
``max_rand_eval`` ln(max_rand_eval / threshold)                 0.1
================= ============================== ============== ================

All numbers of all matrices are looked at, so a score must exceed what the largest of as many t variables exceeds with
a probability of 5 % (Bonferroni). Their degrees of freedom are 0.37 times those of the matrices, 0.37 being the
efficiency of the median absolute deviation (Rousseeuw & Croux, J. Am. Stat. Assoc. 88, 1993). So at most one model in
twenty has a standout by chance, where peers scatter as Gaussian variables do; layers of trained networks scatter more.

A matrix stands out against noise where it has no spike while most matrices of the model have some (note
``random-like``). Its score is the distance in ln(λ_max / edge of noise) from the median of those, in standard
deviations of the largest eigenvalue of noise of its shape (Tracy-Widom; `htsr.spectra.bulk`).

What could not be analyzed because it is broken (NaN, zeros, an unreadable tensor) comes before all others.

The choice of numbers, scales and least differences is ours. A standout is where to look, and no verdict on training.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from htsr.arrays import Vector
from htsr.spectra.bulk import TW1_99, tw_threshold
from htsr.spectra.metrics import LayerMetrics

ERROR_RATE = 0.05
LEAST_PEERS = 5
BROKEN = ("nan", "zero", "unreadable", "underflow", "degenerate", "failed")
_TO_SD = 1.4826  # median absolute deviation to standard deviation, of a Gaussian
_EFFICIENCY = 0.37
_TW1_SD = 1.268


@dataclass(frozen=True)
class Standout:
    """A matrix that stands out, by the number that does so most.

    Attributes:
        name: name of the matrix.
        role: role of the matrix.
        metric: field of `LayerMetrics` that stands out; ``status`` where the matrix is broken.
        value: value of that field; None where the matrix is broken.
        expected: value that the field would have at the median of the peers; for ``lambda_max`` the edge of noise of
            the same variance and shape; None where the matrix is broken.
        score: how far apart the two are, in units of the scale of the module's text; infinite where the matrix is
            broken.
        reason: why, in a few words.
    """

    name: str
    role: str
    metric: str
    value: float | None
    expected: float | None
    score: float
    reason: str


@dataclass(frozen=True)
class _Number:
    """A number that is held against that of the peers.

    Attributes:
        field: its field of `LayerMetrics`.
        scaled: function that reads it from a row, on its scale; None where the row has none.
        unscaled: function that gives it back in units of its field, for a row.
        told: how the value and that of the peers are told; ``role`` is theirs.
        least: least difference that is worth a look, on the scale.
        error: function that gives its standard error for a row, on the scale.
    """

    field: str
    scaled: Callable[[LayerMetrics], float | None]
    unscaled: Callable[[LayerMetrics, float], float]
    told: str
    least: float = 0.1
    error: Callable[[LayerMetrics], float] = lambda row: 0.0


def _logarithm(value: float | None) -> float | None:
    return math.log(value) if value is not None and 0 < value < math.inf else None


def _ratio(value: float | None, of: float | None) -> float | None:
    return value / of if value is not None and of else None


def _alpha_error(row: LayerMetrics) -> float:
    probes = (row.alpha_error or 0.0) / (row.alpha - 1) if row.alpha else 0.0
    return math.hypot((row.num_pl_tail or 1) ** -0.5, probes)


_NUMBERS = (
    _Number(
        "alpha",
        lambda row: None if row.alpha is None else _logarithm(row.alpha - 1),
        lambda row, x: 1 + math.exp(x),
        "α {value:.2f}; {role} has {usual:.2f}",
        error=_alpha_error,
    ),
    _Number(
        "stable_rank",
        lambda row: _logarithm(row.stable_rank),
        lambda row, x: math.exp(x),
        "stable rank {value:.1f}; {role} has {usual:.1f}",
    ),
    _Number(
        "norm",
        lambda row: _logarithm(row.norm),
        lambda row, x: math.exp(x),
        "‖W‖² {ratio} times that of {role}",
    ),
    _Number(
        "entropy",
        lambda row: None if row.entropy is None else _logarithm(1 - row.entropy),
        lambda row, x: 1 - math.exp(x),
        "entropy {value:.3f}; {role} has {usual:.3f}",
    ),
    _Number(
        "matrix_rank",
        lambda row: _ratio(row.matrix_rank, row.num_eigenvalues),
        lambda row, x: x * (row.num_eigenvalues or 0),
        "rank {value:.0f}; {role} has {usual:.0f}",
        least=0.01,
    ),
    _Number(
        "max_rand_eval",
        lambda row: _logarithm(_ratio(row.max_rand_eval, row.rand_threshold)),
        lambda row, x: (row.rand_threshold or 0.0) * math.exp(x),
        "λ_max permuted {ratio} times that of {role}",
    ),
)


def standouts(rows: Iterable[LayerMetrics]) -> tuple[Standout, ...]:
    """The matrices that stand out, the clearest first; one entry a matrix. Empty where none does.

    Args:
        rows: rows of one analysis.

    Examples:
        >>> import numpy as np, htsr
        >>> from htsr.analysis.standouts import standouts
        >>> random = np.random.default_rng(0)
        >>> state = {f"layers.{i}.mlp.up_proj.weight": random.standard_normal((40, 80)) for i in range(12)}
        >>> standouts(htsr.analyze(state, null=False))  # all alike
        ()
        >>> state["layers.7.mlp.up_proj.weight"] *= 10
        >>> [found] = standouts(htsr.analyze(state, null=False))
        >>> found.name, found.metric, found.reason
        ('layers.7.mlp.up_proj', 'norm', '‖W‖² 96 times that of mlp.up')
    """
    rows = list(rows)
    found = [
        Standout(row.name, row.role, "status", None, None, math.inf, f"{row.status}: {row.warning}")
        for row in rows
        if row.status in BROKEN
    ]
    scored = [(number, *_against_peers(rows, number)) for number in _NUMBERS]
    tests = sum(len(peers) for _, peers, *_ in scored)
    clear = _against_noise(rows)
    for number, peers, scores, freedom in scored:
        clear += [_told(number, *peers[i], scores[i]) for i in np.flatnonzero(scores > _limit(tests, freedom))]
    best: dict[str, Standout] = {}
    for standout in sorted(clear, key=lambda each: -each.score):
        best.setdefault(standout.name, standout)
    return (*found, *best.values())


def by_kind(found: Iterable[Standout]) -> list[list[Standout]]:
    """Standouts grouped: those of one role that stand out by the same number, in the order of the clearest of each.

    Args:
        found: standouts, the clearest first.
    """
    kinds: dict[tuple[str, str], list[Standout]] = {}
    for standout in found:
        kinds.setdefault((standout.role, standout.metric), []).append(standout)
    return list(kinds.values())


def _against_peers(
    rows: Sequence[LayerMetrics], number: _Number
) -> tuple[list[tuple[LayerMetrics, float]], Vector, float]:
    """Rows with peers, each with the median of those on the scale; their scores; the degrees of freedom."""
    groups: dict[object, list[tuple[LayerMetrics, float]]] = defaultdict(list)
    for row in rows:
        if (value := number.scaled(row)) is not None:
            groups[row.role, row.rows, row.columns, row.pieces].append((row, value))
    peers = [group for group in groups.values() if len(group) >= LEAST_PEERS]
    if not peers:
        return [], np.zeros(0), 1.0
    values = [np.array([value for _, value in group]) for group in peers]
    medians = [float(np.median(each)) for each in values]
    residuals = [each - median for each, median in zip(values, medians, strict=True)]
    everywhere = _spread(np.concatenate([each * _small(each.size) for each in residuals]))
    scores = []
    for group, beside in zip(peers, residuals, strict=True):
        spread = max(_spread(beside) * _small(beside.size), everywhere, number.least)
        scores.append(np.abs(beside) / np.maximum(spread, [number.error(row) for row, _ in group]))
    found = [(row, median) for group, median in zip(peers, medians, strict=True) for row, _ in group]
    return found, np.concatenate(scores), _EFFICIENCY * (len(found) - len(peers))


def _told(number: _Number, row: LayerMetrics, median: float, score: float) -> Standout:
    value, usual = float(getattr(row, number.field)), number.unscaled(row, median)
    ratio = value / (usual or 1)
    times = f"{ratio:,.0f}" if ratio > 10 else f"{ratio:.2g}"
    reason = number.told.format(value=value, usual=usual, ratio=times, role=row.role)
    return Standout(row.name, row.role, number.field, value, usual, float(score), reason)


def _against_noise(rows: Sequence[LayerMetrics]) -> list[Standout]:
    """Matrices without a spike, in a model where most have some."""
    fitted = [
        row for row in rows if row.status == "ok" and row.M and row.N and row.pieces and row.norm and row.lambda_max
    ]
    edges = [noise_edge(row) for row in fitted]
    excess = np.log([row.lambda_max / edge for row, (edge, _) in zip(fitted, edges, strict=True)])  # type: ignore[operator]
    spiked = excess[excess > 0]
    if len(spiked) < max(LEAST_PEERS, len(excess) / 2):
        return []
    usual = float(np.median(spiked))
    return [
        Standout(
            row.name, row.role, "lambda_max", float(row.lambda_max or 0), edge, (usual - own) / sd,
            f"random-like: λ_max at {math.exp(own):.2f} of the edge",
        )
        for row, (edge, sd), own in zip(fitted, edges, map(float, excess), strict=True)
        if own <= 0
    ]  # fmt: skip


def noise_edge(row: LayerMetrics) -> tuple[float, float]:
    """What λ_max of noise of the matrix's shape and variance exceeds with a probability of 1 %, and the scatter of it.

    Args:
        row: row of a matrix that has been decomposed.

    Returns:
        The edge, in units of the eigenvalues, and the standard deviation of the noise's ln λ_max.
    """
    M, N, pieces = row.M or 1, row.N or 1, row.pieces or 1
    centre = (max(N - 1, 1) ** 0.5 + M**0.5) ** 2
    scale = (tw_threshold(1.0, M, N) - centre) / TW1_99
    variance = (row.norm or 0.0) / (pieces * M * N)
    return tw_threshold(variance**0.5, M, N, pieces), _TW1_SD * scale / centre


def _spread(residuals: Vector) -> float:
    return _TO_SD * float(np.median(np.abs(residuals)))


def _small(peers: int) -> float:
    """Correction of a spread about the median of few peers (Croux & Rousseeuw, COMPSTAT 1992, from 10 on)."""
    return peers / (peers - 0.8)


def _limit(tests: int, freedom: float) -> float:
    """The score that one of so many t variables exceeds in absolute value with a probability of `ERROR_RATE`."""
    from scipy.special import stdtrit

    return float(stdtrit(freedom, 1 - ERROR_RATE / (2 * max(tests, 1))))
