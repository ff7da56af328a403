"""The shape null: what a fit finds in pure noise of the same shape.

The ESD of an i.i.d. Gaussian matrix depends only on its shape, and so does the α that a fit finds in it. For ``hill``
it is sharp (Q = 1: 2.12, Q = 4: 3.46), and much of the difference between layer types is that shape. For ``ks`` it is
high and wide, because noise has no tail to settle on; a trained layer's α lies far below it.

The eigenvalues of a Gaussian matrix are drawn without ever making the matrix, from the bidiagonal model of the Laguerre
ensemble (Dumitriu & Edelman, J. Math. Phys. 43, 2002): M χ-variables on each diagonal, and a tridiagonal eigenproblem.

Where matrices are pooled (slices of a kernel, windows), more than 4 draws come from a bank for 4: two draws share a
quarter, and the median's standard error is at most two thirds of the standard deviation that is given beside it.

A matrix of rank r < M is held against noise of its rank: the change of a model, be it the two factors of a LoRA adapter
or one stored model less another, against the product of two Gaussian factors (M × r and r × N, drawn as the triangles
of their QR decompositions: Bartlett, Proc. R. Soc. Edinb. 53, 1933), else against a Gaussian matrix on r directions,
r × N.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from htsr.spectra.tail import FitMethod, fit_power_law

DRAWS = 16
_TOGETHER = 1024  # eigenvalues that are drawn at a time: LAPACK then works without the interpreter's lock
_BANK = 4  # draws of pooled matrices that are wholly independent
_DENSE = 128  # up to here the dense solver is as fast as the tridiagonal one


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
        values = np.sort([eigvalsh_tridiagonal(*p, check_finite=False, lapack_driver="sterf") for p in pairs])
    return np.maximum(values, 0.0)


def product_eigenvalues(
    M: int, N: int, rank: int, random: np.random.Generator, draws: int = 1
) -> npt.NDArray[np.float64]:
    """The eigenvalues that are not 0 of WᵀW for products W of standard normal M × rank and rank × N matrices.

    Args:
        M: one side.
        N: the other.
        rank: the side that both factors share, at most M and N.
        random: generator of their entries.
        draws: products.

    Returns:
        (draws, rank) float64, each row ascending.

    Source: Bartlett (Proc. R. Soc. Edinb. 53, 1933) for the triangles.
    """

    def triangles(side: int) -> npt.NDArray[np.float64]:
        upper = np.triu(random.standard_normal((draws, rank, rank)), 1)
        step = np.arange(rank)
        upper[:, step, step] = np.sqrt(random.chisquare(side - step, (draws, rank)))
        return upper

    return np.sort(np.linalg.svd(triangles(M) @ triangles(N).swapaxes(1, 2), compute_uv=False) ** 2)


@lru_cache(maxsize=512)
def alpha_null(
    M: int, N: int, pieces: int, fit: FitMethod, rank: int | None = None, product: bool = False
) -> ShapeNull:
    """The null of a fit's α, the same for the same arguments.

    Args:
        M: smaller side of a matrix.
        N: larger side.
        pieces: matrices pooled in one ESD.
        fit: how the tail is chosen (`htsr.spectra.tail`).
        rank: of the matrix, where it is below M.
        product: it is the product of two factors of that rank.

    Returns:
        From 4 draws for ``hill``, which is sharp at full rank, and for large matrices; up to 16 for the others.
    """

    def alpha_of(values: npt.NDArray[np.float64]) -> float:
        return fit_power_law(values, fit).alpha

    size = M if rank is None else rank
    sharp = fit.startswith("hill") and rank is None
    draws = 4 if sharp else int(np.clip(DRAWS * (2048 / (size * pieces)) ** 2, 4, DRAWS))
    return shape_null(size, N, pieces, alpha_of, draws=draws, other=M if product and rank is not None else None)


def shape_null(
    M: int,
    N: int,
    pieces: int,
    alpha_of: Callable[[npt.NDArray[np.float64]], float],
    *,
    draws: int = DRAWS,
    seed: int = 0,
    other: int | None = None,
) -> ShapeNull:
    """Median and spread of a fit's α over ESDs of pooled Gaussian matrices.

    Args:
        M: smaller side of a matrix.
        N: larger side.
        pieces: matrices pooled in one ESD.
        alpha_of: α of (pieces·M,) ascending eigenvalues.
        draws: ESDs to fit.
        seed: of the draws, which depend on it and the shape alone.
        other: the matrices are products of `other` × M and M × N factors, not M × N themselves.
    """
    random = np.random.default_rng((seed, M, N, pieces) if other is None else (seed, M, N, pieces, other))

    def drawn(count: int) -> npt.NDArray[np.float64]:
        if other is None:
            return gaussian_eigenvalues(M, N, random, count)
        return product_eigenvalues(other, N, M, random, count)

    wanted = pieces * (draws if pieces == 1 else min(draws, _BANK))
    together = max(pieces, _TOGETHER // M)  # enough to draw at a time
    bank = np.concatenate([drawn(together) for _ in range(-(-wanted // together))])[:wanted]
    if wanted == draws * pieces:
        chosen = np.arange(wanted).reshape(draws, pieces)
    else:
        chosen = np.stack([random.permutation(wanted)[:pieces] for _ in range(draws)])
    alphas = [alpha_of(values) for values in np.sort(bank[chosen].reshape(draws, -1))]
    return ShapeNull(float(np.median(alphas)), float(np.std(alphas)))
