"""The shape null: what a fit finds in pure noise of the same shape.

The ESD of an i.i.d. Gaussian matrix depends only on its shape, and so does the α that a fit finds in it. For ``hill``
it is sharp (Q = 1: 2.12, Q = 4: 3.46), and much of the difference between layer types is that shape. For ``ks`` it is
high and wide, because noise has no tail to settle on; a trained layer's α lies far below it.

The eigenvalues of a Gaussian matrix are drawn without ever making the matrix, from the bidiagonal model of the Laguerre
ensemble (Dumitriu & Edelman, J. Math. Phys. 43, 2002): M χ-variables on each diagonal, and a tridiagonal eigenproblem.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

DRAWS = 16
_TOGETHER = 1024  # eigenvalues that are drawn at a time: LAPACK then works without the interpreter's lock
_DENSE = 640  # up to here the dense solver costs less than the import of SciPy's tridiagonal one


@dataclass(frozen=True)
class ShapeNull:
    """α of pure noise of one shape.

    Attributes:
        alpha: median over the draws.
        sd: standard deviation over them.
    """

    alpha: float
    sd: float


def gaussian_eigenvalues(M: int, N: int, random: np.random.Generator, draws: int = 1) -> npt.NDArray[np.float64]:
    """Eigenvalues of WᵀW for N × M matrices W of standard normal entries.

    Args:
        M: smaller side.
        N: larger side.
        random: generator of the χ-variables.
        draws: matrices.

    Returns:
        (draws, M) float64, each row ascending.

    Source: Dumitriu & Edelman (J. Math. Phys. 43, 2002).
    """
    diagonal = np.sqrt(random.chisquare(N - np.arange(M), (draws, M)))
    lower = np.sqrt(random.chisquare(M - 1 - np.arange(M - 1), (draws, M - 1)))
    main = diagonal**2
    main[:, 1:] += lower**2
    beside = diagonal[:, :-1] * lower
    if M <= _DENSE:
        dense = np.zeros((draws, M, M))
        step = np.arange(M)
        dense[:, step, step] = main
        dense[:, step[1:], step[:-1]] = beside  # the lower triangle is all that is read
        values = np.linalg.eigvalsh(dense)
    else:
        from scipy.linalg import eigvalsh_tridiagonal

        pairs = zip(main, beside, strict=True)
        values = np.sort([eigvalsh_tridiagonal(d, e, check_finite=False) for d, e in pairs])
    return np.maximum(values, 0.0)


def shape_null(
    M: int,
    N: int,
    pieces: int,
    alpha_of: Callable[[npt.NDArray[np.float64]], float],
    *,
    draws: int = DRAWS,
    seed: int = 0,
) -> ShapeNull:
    """Median and spread of a fit's α over ESDs of pooled Gaussian matrices.

    Args:
        M: smaller side of a matrix.
        N: larger side.
        pieces: matrices pooled in one ESD.
        alpha_of: α of (pieces·M,) ascending eigenvalues.
        draws: ESDs to fit.
        seed: of the draws, which depend on it and the shape alone.
    """
    random = np.random.default_rng((seed, M, N, pieces))
    per_draw = max(pieces, _TOGETHER // M)  # enough to draw at a time
    alphas: list[float] = []
    while len(alphas) < draws:
        pooled = gaussian_eigenvalues(M, N, random, per_draw // pieces * pieces).reshape(-1, pieces * M)
        alphas += [alpha_of(values) for values in np.sort(pooled)]
    return ShapeNull(float(np.median(alphas[:draws])), float(np.std(alphas[:draws])))
