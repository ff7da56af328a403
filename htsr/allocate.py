"""From scores to budgets: multipliers, probabilities, integer counts, sparsities.

Pure functions of numbers: they know neither models nor optimizers. A larger score gets a larger budget everywhere;
`reverse` reflects the scores in the middle of their range, max + min - score, and so turns that around.

What is not a number has a meaning of its own: NaN is "not known" and gets the neutral budget (a multiplier of
`missing`, an average share), ±inf counts as the largest or smallest finite score. In a map to multipliers so does a
wild score, lest it squeeze all others together: one of at least three that lies farther from their median than 10 times
the larger of the median size |score| and the range of the middle scores (the outermost tenth on each side, at least
one score, left out). A minority that differs as layers do, such as α = 2.7 among many of 2.0, is far within.

Maps from scores α to multipliers between the bounds s1 and s2, n scores, σ(x) = 1/(1+e^(-x)):

=================== ============================================================== ===========================
``linear``          s1 + (s2-s1)·(α-min)/(max-min); LLR, TempBalance, AlphaDecay   all equal: s1
``rank``            s1 + (s2-s1)·r/(n-1), r = 0 … n-1, equal scores share          all equal: s1
``sigmoid``         s1 + (s2-s1)·σ(4z), z = (α-mean)/(max-min)                     all equal: (s1+s2)/2
``sigmoid_std``     the same, z = (α-mean)/standard deviation; with (0, 2) it is   all equal: (s1+s2)/2
                    2/(1+e^(-4z)), as LLR's code has it
``sqrt``            n·√α/Σ√α, clipped to the bounds; needs α ≥ 0                    all equal: 1
``log2``            n·log2 α/Σ log2 α, clipped to the bounds; needs α ≥ 1           all equal: 1
``model_balancing`` s1·(s2/s1)^σ(10(α-mean)); 10^(s·(σ(10(α-mean))-½)) with         all equal: √(s1·s2)
                    bounds 10^(∓s/2)
=================== ============================================================== ===========================

Sources: LLR (arXiv 2605.22297), TempBalance (arXiv 2312.00359), AlphaDecay, ModelBalancing (EMNLP 2024), AlphaLoRA,
AlphaPruning, OWL.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Literal, TypeAlias, get_args

import numpy as np
import numpy.typing as npt

from htsr.arrays import Vector
from htsr.errors import UsageError

Map: TypeAlias = Literal["linear", "sqrt", "log2", "sigmoid", "sigmoid_std", "rank", "model_balancing"]
Bounds: TypeAlias = tuple[float, float]

_EQUAL = 1e-9  # relative differences below it are rounding, not information
_BISECTIONS = 200
_WILD = 10.0  # how many times the usual size or range a score may lie from the median
_OUTER = 0.1  # share of the scores, on each side, that says nothing on what is usual


def multipliers(
    scores: npt.ArrayLike,
    *,
    map: Map = "linear",
    bounds: Bounds = (1.0, 5.0),
    reverse: bool = False,
    units: Sequence[Hashable] | None = None,
    pin: Sequence[float | None] | None = None,
    missing: float = 1.0,
) -> Vector:
    """A multiplier for each score.

    Args:
        scores: (n,) scores of any sign; NaN, ±inf and wild scores are treated as the module's text says.
        map: name of the map, a row of the table in the module's text.
        bounds: smallest and largest multiplier (s1, s2), s1 ≤ s2; s1 > 0 for ``model_balancing``.
        reverse: whether the largest score gets what the smallest would get.
        units: (n,) labels; scores with the same label are averaged (NaN left out) and count as one.
        pin: (n,) given multipliers; those that are not None take no part in the map. Exclusion is a pin of 1.
        missing: multiplier of a NaN score.

    Returns:
        (n,) float64 multipliers.

    Raises:
        UsageError: the map is unknown, the bounds have no meaning, or the map is not defined for the scores.

    Examples:
        Layers with a larger α, the undertrained ones, get a larger multiplier; what is not known gets 1:

        >>> from htsr.allocate import multipliers
        >>> multipliers([2.0, 3.0, 6.0, float("nan")], bounds=(1.0, 5.0))
        array([1., 2., 5., 1.])
        >>> multipliers([2.0, 3.0, 6.0], map="rank", bounds=(1.0, 5.0), reverse=True)
        array([5., 3., 1.])
    """
    if map not in get_args(Map):
        raise UsageError(f"unknown map {map!r}: {', '.join(get_args(Map))}")
    low, high = bounds
    if not low <= high or (map == "model_balancing" and not low > 0):
        raise UsageError(f"bounds are (s1, s2) with s1 ≤ s2 (and s1 > 0 for model_balancing), not {bounds}")
    values = _vector(scores)
    result = np.full(values.size, float(missing))
    given = [None] * values.size if pin is None else list(pin)
    labels = list(range(values.size)) if units is None else list(units)
    if len(given) != values.size or len(labels) != values.size:
        raise UsageError(f"{values.size} scores need as many units and pins, not {len(labels)} and {len(given)}")

    members: dict[Hashable, list[int]] = {}
    for i, label in enumerate(labels):
        if given[i] is not None:
            result[i] = given[i]
        elif not np.isnan(values[i]):
            members.setdefault(label, []).append(i)
    if members:
        finite = _finite(values)
        means = _tamed(np.array([finite[indices].mean() for indices in members.values()]))
        if reverse:
            means = means.max() + means.min() - means
        for indices, value in zip(members.values(), _MAPS[map](means, low, high), strict=True):
            result[indices] = value
    return result


def _vector(scores: npt.ArrayLike) -> Vector:
    values = np.asarray(scores, dtype=np.float64)
    if values.ndim != 1:
        raise UsageError(f"scores are a vector, not an array of shape {values.shape}")
    return values


def _finite(values: Vector) -> Vector:
    """`values` with ±inf as the largest and smallest finite one (as ±1 where there is none); NaN stays."""
    finite = values[np.isfinite(values)]
    largest, smallest = (finite.max(), finite.min()) if finite.size else (1.0, -1.0)
    return np.where(values == np.inf, largest, np.where(values == -np.inf, smallest, values))


def _tamed(values: Vector) -> Vector:
    """`values` with the wild ones, as the module's text defines them, as the largest or smallest of the others."""
    n = values.size
    if n < 3:
        return values
    ordered, median = np.sort(values), np.median(values)
    outer = max(1, int(np.ceil(_OUTER * (n - 1))))
    usual = max(float(np.median(np.abs(values))), float(ordered[n - 1 - outer] - ordered[outer]))
    if usual == 0.0:  # nothing to compare with
        return values
    others = values[np.abs(values - median) <= _WILD * usual]
    return np.clip(values, others.min(), others.max())


def _spread(values: Vector) -> float:
    """max - min, 0 where that is rounding."""
    spread = float(values.max() - values.min())
    return spread if spread > _EQUAL * float(np.abs(values).max()) else 0.0


def _linear(values: Vector, low: float, high: float) -> Vector:
    spread = _spread(values)
    return low + (high - low) * ((values - values.min()) / spread if spread else np.zeros_like(values))


def _rank(values: Vector, low: float, high: float) -> Vector:
    if not _spread(values):
        return np.full(values.size, low)
    below = (values[None] < values[:, None]).sum(axis=1)
    equal = (values[None] == values[:, None]).sum(axis=1)
    return low + (high - low) * (below + (equal - 1) / 2) / (values.size - 1)


def _sigmoid(values: Vector, low: float, high: float) -> Vector:
    spread = _spread(values)
    z = (values - values.mean()) / spread if spread else np.zeros_like(values)
    return low + (high - low) / (1 + np.exp(-4 * z))


def _sigmoid_std(values: Vector, low: float, high: float) -> Vector:
    z = (values - values.mean()) / values.std() if _spread(values) else np.zeros_like(values)
    return low + (high - low) / (1 + np.exp(-4 * z))


def _mean_one(values: Vector, low: float, high: float) -> Vector:
    total = values.sum()
    return np.clip(values * values.size / total if total > 0 else np.ones_like(values), low, high)


def _sqrt(values: Vector, low: float, high: float) -> Vector:
    if values.min() < 0:
        raise UsageError(f"the map sqrt needs scores ≥ 0, and one is {values.min():g}; linear takes any")
    return _mean_one(np.sqrt(values), low, high)


def _log2(values: Vector, low: float, high: float) -> Vector:
    if values.min() < 1:
        raise UsageError(f"the map log2 needs scores ≥ 1, and one is {values.min():g}; linear takes any")
    return _mean_one(np.log2(values), low, high)


def _model_balancing(values: Vector, low: float, high: float) -> Vector:
    steep = np.clip(10 * (values - values.mean()), -700, 700)  # exp overflows float64 above 709
    return low * (high / low) ** (1 / (1 + np.exp(-steep)))


_MAPS: dict[str, Callable[[Vector, float, float], Vector]] = {
    "linear": _linear,
    "rank": _rank,
    "sigmoid": _sigmoid,
    "sigmoid_std": _sigmoid_std,
    "sqrt": _sqrt,
    "log2": _log2,
    "model_balancing": _model_balancing,
}


def _importance(scores: npt.ArrayLike, reverse: bool) -> Vector:
    """Non-negative scores without gaps: NaN as the mean of the known ones, all-zero as all equal."""
    values = _finite(_vector(scores))
    known = values[~np.isnan(values)]
    values = np.where(np.isnan(values), known.mean() if known.size else 1.0, values)
    if values.size and values.min() < 0:
        raise UsageError(f"shares need scores ≥ 0, and one is {values.min():g}; shift or map them first")
    if reverse and values.size:
        values = values.max() + values.min() - values
    return values if values.any() else np.ones_like(values)


def probabilities(scores: npt.ArrayLike, *, minimum: float = 0.0, reverse: bool = False) -> Vector:
    """Sampling probabilities in proportion to the scores, p_l = D_l/ΣD (OwLore).

    Args:
        scores: (n,) scores ≥ 0; if all are zero, the probabilities are equal.
        minimum: least probability of each; what is left is shared in proportion to the scores.
        reverse: whether the largest score gets what the smallest would get.

    Returns:
        (n,) float64 probabilities with the sum 1.

    Raises:
        UsageError: a score is negative, or the minimum is below 0 or above 1/n.

    Examples:
        >>> from htsr.allocate import probabilities
        >>> probabilities([1.0, 1.0, 2.0])
        array([0.25, 0.25, 0.5 ])
        >>> probabilities([0.0, 0.0, 2.0], minimum=0.1)
        array([0.1, 0.1, 0.8])

    Source: OwLore (arXiv 2405.18380).
    """
    values = _importance(scores, reverse)
    if not 0 <= minimum * values.size <= 1:
        raise UsageError(f"{values.size} probabilities cannot all be at least {minimum}")
    shares = values / values.sum() if values.size else values
    return minimum + (1 - minimum * values.size) * shares


def counts(
    scores: npt.ArrayLike,
    *,
    total: int,
    minimum: int = 0,
    maximum: int | Sequence[int] | None = None,
    costs: npt.ArrayLike | None = None,
    reverse: bool = False,
) -> npt.NDArray[np.int64]:
    """Whole numbers in proportion to the scores within an exact total: experts per layer, ranks per adapter.

    The real-valued answer is clip(t·score, minimum, maximum) with the one t that spends the total; it is rounded down,
    and what is left goes to the largest remainders.

    Args:
        scores: (n,) scores ≥ 0.
        total: budget to be spent: Σ counts, or Σ counts·costs.
        minimum: least count of each.
        maximum: largest count, one for all or one for each.
        costs: (n,) cost > 0 of one count; 1 by default.
        reverse: whether the largest score gets what the smallest would get.

    Returns:
        (n,) int64 counts. Without costs their sum is `total`; with costs they spend at most `total`, and what is left
        is too little for one count more.

    Raises:
        UsageError: a score is negative, a cost is not positive, or the bounds do not allow the total.

    Examples:
        >>> from htsr.allocate import counts
        >>> counts([1.0, 2.0, 4.0], total=8)
        array([1, 2, 5])
        >>> counts([1.0, 2.0, 4.0], total=8, minimum=2, maximum=3)
        array([2, 3, 3])
    """
    values = _importance(scores, reverse)
    price = np.ones(values.size) if costs is None else _vector(costs)
    least = np.full(values.size, minimum, dtype=np.float64)
    most = (
        np.full(values.size, np.inf)
        if maximum is None
        else np.broadcast_to(np.asarray(maximum, np.float64), values.shape)
    )
    if price.size != values.size or (price.size and not price.min() > 0):
        raise UsageError("costs are one positive number for each score")
    if (least > most).any() or float(price @ least) > total:
        raise UsageError(
            f"a total of {total} is less than the minimum of each, {price @ least:g}, or that is too large"
        )
    if costs is None and float(most.sum()) < total:
        raise UsageError(f"a total of {total} is more than the maximum of each, {most.sum():g}")

    wanted = _water_fill(values, float(total), least, most, price)
    result = np.floor(wanted + _EQUAL)
    left = total - float(price @ result)
    for i in np.argsort(result - wanted, kind="stable"):  # the largest remainder first
        if price[i] <= left and result[i] < most[i]:
            result[i] += 1
            left -= price[i]
    while (fits := np.flatnonzero((price <= left) & (result < most))).size:  # small change of unequal costs
        i = fits[np.argmax((wanted - result)[fits])]
        result[i] += 1
        left -= price[i]
    return result.astype(np.int64)


def _water_fill(values: Vector, total: float, least: Vector, most: Vector, price: Vector) -> Vector:
    """clip(t·values, least, most) with the t at which it costs `total`.

    The cost grows with t, so bisection finds t whatever the bounds cut off.
    """
    weights = np.maximum(values, values.max(initial=0.0) * 1e-12)  # a zero score gets the last of a large total too
    most = np.minimum(most, total / price) if price.size else most
    most = np.maximum(most, least)
    low, high = 0.0, float((most / weights).max(initial=0.0))
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        if float(price @ np.clip(middle * weights, least, most)) > total:
            high = middle
        else:
            low = middle
    return np.clip(low * weights, least, most)


def ranks(
    scores: npt.ArrayLike,
    *,
    total: int,
    minimum: int = 1,
    maximum: int | Sequence[int] | None = None,
    costs: npt.ArrayLike | None = None,
    reverse: bool = False,
) -> npt.NDArray[np.int64]:
    """Adapter ranks: `counts` of at least 1 by default.

    Args:
        scores: (n,) scores ≥ 0.
        total: sum of the ranks; with costs the number of parameters that they may take.
        minimum: least rank.
        maximum: largest rank, one for all or one for each.
        costs: (n,) parameters > 0 that one more rank takes, m + n for LoRA on an m × n matrix.
        reverse: whether the largest score gets what the smallest would get.

    Returns:
        (n,) int64 ranks, with the sums that `counts` states.

    Raises:
        UsageError: `counts` refuses the arguments.

    Examples:
        Two 64 × 64 matrices, 64 + 64 parameters per rank, and 2,048 parameters in all:

        >>> from htsr.allocate import ranks
        >>> ranks([2.0, 6.0], total=2048, costs=[128, 128])
        array([ 4, 12])

    Source: AlphaLoRA (arXiv 2410.10054), which allots experts of LoRA by α.
    """
    return counts(scores, total=total, minimum=minimum, maximum=maximum, costs=costs, reverse=reverse)


def sparsities(
    scores: npt.ArrayLike, *, mean: float, spread: float, sizes: Sequence[int], reverse: bool = False
) -> Vector:
    """Sparsity of each layer, higher where the score is higher, with an exact number of entries pruned in all.

    Linear in the scores over a range of `spread` (AlphaPruning: α, higher α is pruned more; OWL: outliers, `reverse`),
    shifted so that the mean over all entries is `mean`.

    Args:
        scores: (n,) scores of any sign.
        mean: share of all entries to prune, in [0, 1].
        spread: highest minus lowest sparsity, before what would leave [0, 1] is cut.
        sizes: (n,) number of entries of each layer.
        reverse: whether the layer with the largest score is pruned least.

    Returns:
        (n,) float64 sparsities in [0, 1]; sparsity·size is a whole number, and these have the sum round(mean·Σ sizes).

    Raises:
        UsageError: the mean is outside [0, 1], the spread is negative, or the sizes are not one positive number for
            each score.

    Examples:
        >>> from htsr.allocate import sparsities
        >>> sparsities([2.0, 3.0, 4.0], mean=0.5, spread=0.4, sizes=[100, 100, 100])
        array([0.3, 0.5, 0.7])

    Sources: AlphaPruning (NeurIPS 2024); OWL (ICML 2024).
    """
    if not 0 <= mean <= 1 or spread < 0:
        raise UsageError(f"a mean sparsity lies in [0, 1] and a spread is not negative, not {mean} and {spread}")
    values, size = _vector(scores), np.asarray(sizes, dtype=np.float64)
    if size.shape != values.shape or (size.size and not size.min() > 0):
        raise UsageError("sizes are one positive number of entries for each score")
    if not values.size:
        return values
    offsets = multipliers(values, bounds=(0.0, spread), reverse=reverse, missing=spread / 2)
    low, high = -spread, 1.0
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        low, high = (low, middle) if size @ np.clip(middle + offsets, 0, 1) > mean * size.sum() else (middle, high)
    wanted = np.clip((low + high) / 2 + offsets, 0, 1) * size
    pruned = np.floor(wanted + _EQUAL)
    left = round(mean * size.sum()) - int(pruned.sum())
    for i in np.argsort(pruned - wanted, kind="stable"):
        step = min(max(left, 0), 1) if pruned[i] < size[i] else 0
        pruned[i] += step
        left -= step
    return pruned / size
