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
_DENSE = 640  # up to here the dense solver costs less than the import of SciPy's tridiagonal one


@dataclass(frozen=True)
class ShapeNull:
    """α of pure noise of one shape: median and standard deviation over the draws."""

    alpha: float
    sd: float


def gaussian_eigenvalues(M: int, N: int, random: np.random.Generator) -> npt.NDArray[np.float64]:
    """Eigenvalues (M,), ascending, of WᵀW for one N × M matrix of standard normal entries."""
    diagonal = np.sqrt(random.chisquare(N - np.arange(M)))
    lower = np.sqrt(random.chisquare(M - 1 - np.arange(M - 1)))
    main = diagonal**2
    main[1:] += lower**2
    beside = diagonal[:-1] * lower
    if M <= _DENSE:
        values = np.linalg.eigvalsh(np.diag(main) + np.diag(beside, -1))
    else:
        from scipy.linalg import eigvalsh_tridiagonal

        values = np.sort(eigvalsh_tridiagonal(main, beside, check_finite=False))
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
    """Median and spread of `alpha_of` over ESDs of `pieces` pooled N × M Gaussian matrices."""
    random = np.random.default_rng((seed, M, N, pieces))
    alphas = [
        alpha_of(np.sort(np.concatenate([gaussian_eigenvalues(M, N, random) for _ in range(pieces)])))
        for _ in range(draws)
    ]
    return ShapeNull(float(np.median(alphas)), float(np.std(alphas)))
