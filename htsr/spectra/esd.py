"""The empirical spectral density (ESD) of one weight matrix.

The ESD of an m × n matrix W is the set of the M = min(m, n) eigenvalues of its smaller Gram matrix
(WWᵀ or WᵀW), which are the squared singular values of W. Nothing is divided by N = max(m, n).

The routes to it:

=========== ========================================================================================================
``gram``    `eigvalsh` of the Gram matrix. In float64 it resolves eigenvalues down to about 4e-15·λ_max, in float32
            to about 2e-6·λ_max; what lies below is set to exactly 0 and takes no part in any fit.
``svd``     singular values of W itself: 3 to 10 times slower, resolves singular values (not eigenvalues) to machine
            precision.
``lanczos`` stochastic Lanczos quadrature (`htsr.spectra.lanczos`), for matrices too large for the others; an
            approximation that states its error.
``factors`` a matrix that is known as a product (`htsr.spectra.product`), from its factors; not to be asked for.
``auto``    ``factors`` where there are some; else ``gram``; then ``svd`` where numbers stored in float64 have
            eigenvalues that the Gram matrix cannot resolve; and ``lanczos`` where M > 16384. The row of a matrix
            names the route that was taken.
=========== ========================================================================================================

What the stored numbers themselves do not resolve is 0 on every route: see `htsr.spectra.resolution`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal, TypeAlias

import numpy as np

from htsr.arrays import Array, Product, Vector
from htsr.errors import MatrixError, UsageError
from htsr.spectra.attempts import Result, attempted
from htsr.spectra.checks import require_finite
from htsr.spectra.density import ESD
from htsr.spectra.device import BATCHED_UP_TO, batch_on_device, on_device, solving_device, usable_device
from htsr.spectra.eigenvalues import WorkingPrecision, batch_eigenvalues, piece_eigenvalues, resolved
from htsr.spectra.lanczos import lanczos_esd
from htsr.spectra.product import product_eigenvalues
from htsr.spectra.resolution import equal_within
from htsr.spectra.windows import Windows

Route: TypeAlias = Literal["auto", "gram", "svd", "lanczos"]
Precision: TypeAlias = Literal["auto", "float32", "float64"]

LANCZOS_FROM = 16384
BATCH_UP_TO = 500


def esd(
    matrix: Array | Product,
    *,
    route: Route = "auto",
    dtype: Precision = "auto",
    device: str = "auto",
    windows: Windows | None = None,
    seed: int = 0,
    stored: str | None = None,
) -> ESD:
    """Eigenvalues of the smaller Gram matrix of `matrix`.

    Args:
        matrix: (m, n) real, or (pieces, m, n) whose ESDs are pooled. Any float dtype; up-cast as `dtype` says. Of a
            `Product` the route ``auto`` takes the factors; the others, and windows, multiply it out.
        route: name of the way to compute them: ``auto``, ``gram``, ``svd`` or ``lanczos``, as in the table above.
        dtype: precision of the computation; ``auto`` is float64 on every device, so that no number depends on it.
        device: device that computes: ``cpu``, ``cuda``, ``cuda:1`` and so on, and the CPU in the place of ``mps``,
            which has no float64; ``auto`` is where the matrix lies. It holds the matrix, as it is stored, and its Gram
            matrix.
        windows: FARMS windows, whose ESDs (in each piece) are pooled; None for the whole matrix.
        seed: seed of the random probes of the ``lanczos`` route.
        stored: dtype that the numbers were stored in, as torch names it; that of `matrix` by default.

    Returns:
        The `ESD`, in units of squared entries (singular values squared).

    Raises:
        MatrixError: the matrix is empty (status ``empty``), has NaN, infinite or overflowing entries (``nan``), or
            entries so small that their squares vanish (``underflow``); the route does not apply to it
            (``unsupported``); or the computation fails, as for lack of memory (``failed``).
        UsageError: there is no such route or device, or the matrix is neither 2-D nor 3-D.

    Examples:
        >>> import htsr, numpy as np
        >>> spectrum = htsr.esd(np.diag([3.0, 1.0, 2.0]))
        >>> spectrum.eigenvalues, spectrum.route
        (array([1., 4., 9.]), 'gram/float64')
    """
    if matrix.ndim not in (2, 3):
        raise UsageError(f"a weight matrix has 2 dimensions (3 for a stack of pieces), not {matrix.ndim}")
    if 0 in matrix.shape:
        raise MatrixError("empty", f"the matrix has no entries (shape {tuple(matrix.shape)})")
    if route not in ("auto", "gram", "svd", "lanczos"):
        raise UsageError(f"unknown route {route!r}: auto, gram, svd or lanczos")
    device = solving_device(device, matrix)
    stored, rounding = stored or _dtype(matrix), getattr(matrix, "rounding", None)

    if isinstance(matrix, Product):
        if route == "auto" and windows is None:
            values = product_eigenvalues(matrix)
            require_finite(values.sum())
            M, N = sorted(matrix.shape[-2:])
            within = equal_within(M, M, stored)
            return ESD(values, M, N, values.size // M, route="factors/float64", equal_within=within)
        matrix = matrix.dense()

    if device != "cpu":
        moved = attempted(partial(on_device, matrix, device))  # once, for all windows and routes
        if isinstance(moved, MatrixError):
            usable_device(device)  # else the fault is no matrix's
            raise moved
        matrix = moved
    parts = _pieces(matrix, windows)
    M, N = sorted(parts[0].shape[-2:])
    refine = route == "auto"
    if route == "auto":
        route = "lanczos" if M > LANCZOS_FROM else "gram"
    if route == "lanczos":
        if len(parts) != 1 or parts[0].ndim != 2:
            raise MatrixError("unsupported", "the lanczos route takes one whole matrix, without windows or pieces")
        return lanczos_esd(parts[0], device=device, seed=seed)

    working = _working(dtype)
    values = _solved(parts, route, working, device, stored, rounding)
    if refine and working == stored == "float64" and _unresolved(values):
        route = "svd"
        values = _solved(parts, route, working, device, stored, rounding)
    within = equal_within(M, N, stored)
    rank = int(np.median(np.count_nonzero(values, axis=1)))
    pooled = np.sort(values, axis=None)
    return ESD(pooled, M, N, len(values), route=f"{route}/{working}", equal_within=within, piece_rank=rank)


def _solved(
    parts: Sequence[Array], route: str, working: WorkingPrecision, device: str, stored: str, rounding: float | None
) -> Vector:
    return _value(attempted(lambda: piece_eigenvalues(parts, route, working, device, stored, rounding)))


def _value(found: Result | MatrixError) -> Result:
    if isinstance(found, MatrixError):
        raise found
    return found


def _working(dtype: Precision) -> WorkingPrecision:
    return "float64" if dtype == "auto" else dtype


def _dtype(matrix: Array | Product) -> str:
    numbers = matrix.left if isinstance(matrix, Product) else matrix
    return str(numbers.dtype).removeprefix("torch.")


def _unresolved(values: Vector) -> bool:
    return bool(values.min() == 0.0 and values.max() > 0.0)


def esd_batch(
    matrices: Sequence[Array | Product],
    *,
    route: Route = "auto",
    dtype: Precision = "auto",
    device: str = "auto",
    windows: Windows | None = None,
    seed: int = 0,
    stored: Sequence[str | None] | None = None,
) -> list[ESD | MatrixError]:
    """`esd` of several matrices of one shape; what cannot be decomposed gives its error, and the others their ESD.

    The Gram matrices of plain matrices are solved in one call. On a CPU that pays up to M = `BATCH_UP_TO`: below that
    size LAPACK, called for a single matrix, keeps the interpreter's lock, and threads would wait for each other. On an
    accelerator it is done up to M = 32, from where on torch would solve them one by one.

    Args:
        matrices: matrices of one shape, each (m, n), or each (pieces, m, n).
        route: name of the way to compute the eigenvalues, as in `esd`.
        dtype: precision of the computation, as in `esd`.
        device: device that computes, as in `esd`; ``auto`` is where the first of them lies.
        windows: FARMS windows, as in `esd`; None for whole matrices.
        seed: seed of the random probes, the same for each matrix.
        stored: dtype that the numbers of each matrix were stored in, as torch names it; None for its own.

    Returns:
        An `ESD`, or the `MatrixError` that `esd` would raise, for each matrix in their order.

    Raises:
        UsageError: there is no such route or device, or the matrices are neither 2-D nor 3-D.

    Examples:
        >>> import numpy as np
        >>> from htsr.spectra.esd import esd_batch
        >>> [spectrum.eigenvalues.tolist() for spectrum in esd_batch([np.eye(2), np.diag([2.0, 3.0])])]
        [[1.0, 1.0], [4.0, 9.0]]
    """
    kinds = [kind or _dtype(matrix) for kind, matrix in zip(stored or [None] * len(matrices), matrices, strict=True)]
    plain = [matrix for matrix in matrices if matrix.ndim == 2 and not isinstance(matrix, Product)]
    device = solving_device(device, matrices[0]) if matrices else "cpu"
    if (
        len(plain) == len(matrices) > 1
        and (device == "cpu" or min(plain[0].shape) <= BATCHED_UP_TO)
        and windows is None
        and (route == "gram" or (route == "auto" and min(plain[0].shape) <= LANCZOS_FROM))
    ):
        working = _working(dtype)
        M, N = sorted(plain[0].shape)
        values = attempted(
            lambda: batch_eigenvalues(plain, working) if device == "cpu" else batch_on_device(plain, working, device)
        )
        if not isinstance(values, MatrixError):
            rows = [
                resolved(row, "gram", working, matrix, own, getattr(matrix, "rounding", None))
                for row, own, matrix in zip(values, kinds, plain, strict=True)
            ]
            if route == "gram" or "float64" not in kinds or not any(_unresolved(row) for row in rows):
                return [
                    ESD(row, M, N, 1, route=f"gram/{working}", equal_within=equal_within(M, N, own))
                    for row, own in zip(rows, kinds, strict=True)
                ]

    how: dict[str, Any] = {"route": route, "dtype": dtype, "device": device, "windows": windows, "seed": seed}
    return [attempted(partial(esd, matrix, stored=own, **how)) for matrix, own in zip(matrices, kinds, strict=True)]


def _pieces(matrix: Array, windows: Windows | None) -> list[Array]:
    if windows is None:
        return [matrix]
    return [matrix[..., rows, columns] for rows, columns in windows.slices((matrix.shape[-2], matrix.shape[-1]))]
