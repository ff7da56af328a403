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

A null is drawn once: `htsr.spectra.known_nulls` has those of common shapes, and keeps the others.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from htsr.spectra.known_nulls import keep_null, known_null
from htsr.spectra.tail import FitMethod, fit_power_law

DRAWS = 16
_TOGETHER = 1024  # eigenvalues that are drawn at a time: LAPACK then works without the interpreter's lock
_BANK = 4  # draws of pooled matrices that are wholly independent
_DENSE = 128  # up to here the dense solver is as fast as the tridiagonal one
_KEPT_FROM = 128  # eigenvalues of an ESD; the null of fewer is drawn in a few milliseconds


@dataclass(frozen=True)
class ShapeNull:
    """α of pure noise of one shape.

    Attributes:
        alpha: median of α over the draws.
        sd: standard deviation of α over the draws.
    """

    alpha: float
    sd: float


def gaussian_eigenvalues(M: int, N: int, random: np.random.Generator, draws: int = 1) -> npt.NDArray[np.float64]:
    """Eigenvalues of WᵀW for N × M matrices W of standard normal entries.

    Args:
        M: smaller side of the matrices.
        N: larger side of the matrices.
        random: generator of the χ-variables.
        draws: number of matrices.

    Returns:
        (draws, M) float64, each row ascending.

    Source: Dumitriu & Edelman (J. Math. Phys. 43, 2002).

    Examples:
        >>> import numpy as np
        >>> from htsr.spectra.null import gaussian_eigenvalues
        >>> gaussian_eigenvalues(3, 5, np.random.default_rng(0)).round(2)
        array([[0.94, 3.93, 9.13]])
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
        M: one side of the products.
        N: the other side of the products.
        rank: side that both factors share, at most M and N.
        random: generator of their entries.
        draws: number of products.

    Returns:
        (draws, rank) float64, each row ascending.

    Source: Bartlett (Proc. R. Soc. Edinb. 53, 1933) for the triangles.

    Examples:
        >>> import numpy as np
        >>> from htsr.spectra.null import product_eigenvalues
        >>> product_eigenvalues(6, 8, 2, np.random.default_rng(0)).round(2)
        array([[ 3.47, 45.2 ]])
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
    """The null of a fit's α, the same for the same arguments: as `draw_alpha_null` has it, drawn at most once.

    Args:
        M: smaller side of a matrix.
        N: larger side of a matrix.
        pieces: number of matrices pooled in one ESD.
        fit: how the tail is chosen (`htsr.spectra.tail`).
        rank: rank of the matrix, where it is below M.
        product: whether it is the product of two factors of that rank.

    Examples:
        >>> from htsr.spectra.null import alpha_null
        >>> round(alpha_null(768, 768, 1, "hill").alpha, 3), round(alpha_null(768, 3072, 1, "hill").alpha, 3)
        (2.123, 3.463)
    """
    key = null_key(M, N, pieces, fit, rank, product)
    if (known := known_null(key)) is not None:
        return ShapeNull(*known)
    null = draw_alpha_null(M, N, pieces, fit, rank, product)
    if (M if rank is None else rank) * pieces >= _KEPT_FROM:
        keep_null(key, null.alpha, null.sd)
    return null


def null_key(M: int, N: int, pieces: int, fit: FitMethod, rank: int | None = None, product: bool = False) -> str:
    """What a null depends on, as a name. Arguments are those of `alpha_null`: `M`, `N`, `pieces`, `fit`, `rank`,
    `product`.

    Examples:
        >>> from htsr.spectra.null import null_key
        >>> null_key(384, 1536, 1, "ks"), null_key(384, 1536, 9, "hill", 16, True)
        ('ks-384x1536', 'hill-384x1536x9-product16')
    """
    shape = f"{M}x{N}" if pieces == 1 else f"{M}x{N}x{pieces}"
    kind = "" if rank is None else f"-product{rank}" if product else f"-rank{rank}"
    return f"{fit}-{shape}{kind}"


def draw_alpha_null(
    M: int, N: int, pieces: int, fit: FitMethod, rank: int | None = None, product: bool = False
) -> ShapeNull:
    """`alpha_null`, drawn. Arguments are the same: `M`, `N`, `pieces`, `fit`, `rank`, `product`.

    Returns:
        The `ShapeNull` of 4 draws for ``hill``, which is sharp at full rank, and for large matrices; up to 16 for
        the others.

    Examples:
        >>> from htsr.spectra.null import draw_alpha_null
        >>> null = draw_alpha_null(24, 48, 1, "hill")
        >>> round(null.alpha, 3), round(null.sd, 3)
        (2.769, 0.106)
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
        N: larger side of a matrix.
        pieces: number of matrices pooled in one ESD.
        alpha_of: function that gives the α of (pieces·M,) ascending eigenvalues.
        draws: number of ESDs to fit.
        seed: seed of the draws, which depend on it and the shape alone.
        other: side of a further factor: the matrices are products of `other` × M and M × N matrices; None for single
            M × N matrices.

    Examples:
        >>> from htsr.spectra.null import shape_null
        >>> from htsr.spectra.tail import fit_power_law
        >>> null = shape_null(24, 48, 1, lambda values: fit_power_law(values, "hill").alpha, draws=4)
        >>> round(null.alpha, 3), round(null.sd, 3)
        (2.769, 0.106)
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
