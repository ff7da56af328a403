"""Where a change of a matrix lies, and what rank it has, each beside what a Gaussian change gives.

Source: effective rank, Roy & Vetterli (EUSIPCO 2007); the shares of the change are our own.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from htsr.arrays import Vector
from htsr.spectra.bulk import mp_quantile
from htsr.spectra.leading import Leading, gram_eigenvalues
from htsr.spectra.resolution import without_rounding
from htsr.spectra.sums import Sum


def shares(change: Sum, base: Leading, rounding: float) -> dict[str, Any]:
    """Where the change lies in the leading subspaces of the base, and what rank it has, by the names of `Directions`.

    Args:
        change: Δ, (m, n).
        base: leading singular vectors of the base.
        rounding: mean square of the rounding errors of Δ's entries.

    Returns:
        Numbers by name, with ``norm``, ‖Δ‖_F; nothing where there is no change.
    """
    m, n = change.shape
    values = np.maximum(gram_eigenvalues((change if m >= n else change.T).gram()), 0.0)
    square = float(values.sum())
    if square == 0:
        return {}
    right, left = change.times(base.right), change.transposed_times(base.left)  # ΔV_A and ΔᵀU_A
    both = base.left.mT @ right
    resolved = np.sqrt(without_rounding(values, max(m, n), "float64", rounding))
    return {
        "norm": square**0.5,
        "share_both": float((both**2).sum()) / square,
        "share_left": float((left**2).sum()) / square,
        "share_right": float((right**2).sum()) / square,
        "share_scaling": float((both.diagonal() ** 2).sum()) / square,
        "effective_rank": effective_rank(resolved) if resolved.any() else None,
        "change_stable_rank": square / float(values[-1]),
    }


def effective_rank(values: Vector) -> float:
    """The exponential of the entropy of singular values over their sum.

    Args:
        values: singular values, (M,), not all zero.

    Examples:
        >>> import numpy as np
        >>> from htsr.spectra.changes import effective_rank
        >>> round(effective_rank(np.array([2.0, 2.0, 0.0])), 6)
        2.0
    """
    shares = values[values > 0] / values.sum()
    return float(np.exp(-(shares * np.log(shares)).sum()))


def closed_nulls(m: int, n: int, k: int) -> dict[str, float]:
    """What a Gaussian change gives wherever that has a closed form, by the names of `Directions`.

    Args:
        m: number of rows.
        n: number of columns.
        k: number of leading directions.

    Examples:
        >>> from htsr.spectra.changes import closed_nulls
        >>> closed_nulls(20, 10, k=5)["share_left_null"]
        0.25
    """
    M, N = sorted((m, n))
    return {
        "share_both_null": k * k / (m * n),
        "share_left_null": k / m,
        "share_right_null": k / n,
        "share_scaling_null": k / (m * n),
        "effective_rank_null": effective_rank(np.sqrt(mp_quantile((np.arange(M) + 0.5) / M, N / M))),
        "change_stable_rank_null": m * n / (m**0.5 + n**0.5) ** 2,
    }
