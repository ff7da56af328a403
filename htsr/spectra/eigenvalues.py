"""Solvers: the eigenvalues of the smaller Gram matrix of W, and what of them the precision of the computation resolves.

Of an m × n matrix, M = min(m, n) and N = max(m, n), by one of two routes:

======== ========================================================================================================
``gram`` `eigvalsh` of the Gram matrix. In float64 it resolves eigenvalues down to about 4e-15·λ_max, in float32 to
         about 2e-6·λ_max; what lies below is set to exactly 0 and takes no part in any fit.
``svd``  singular values of W itself: 3 to 10 times slower, resolves singular values (not eigenvalues) to machine
         precision.
======== ========================================================================================================

On a CPU, float64 is worked on by NumPy's LAPACK up to M = 2048 and by torch's beyond, whose reduction to tridiagonal
form is faster there where torch has MKL; float32 by SciPy's (`htsr.spectra.tridiagonal`). What an accelerator does is
in `htsr.spectra.device`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from htsr.arrays import Array, Vector, as_numpy
from htsr.errors import MatrixError
from htsr.spectra.checks import require_finite, require_squares
from htsr.spectra.device import device_eigenvalues, on_device
from htsr.spectra.resolution import is_coarse, rounded_away, without_rounding
from htsr.spectra.tridiagonal import float32_eigenvalues

Floats: TypeAlias = npt.NDArray[np.floating[Any]]
WorkingPrecision: TypeAlias = Literal["float32", "float64"]

_TORCH_FROM = 2048
_CHUNK = 1 << 20  # elements that are up-cast at a time while a Gram matrix is accumulated
_SAFETY = 16  # eigenvalues below this many ulps of λ_max are rounding noise (measured: at most 2.4)


def piece_eigenvalues(
    parts: Sequence[Array], route: str, dtype: WorkingPrecision, device: str, stored: str, rounding: float | None
) -> Vector:
    """Eigenvalues of several matrices of one shape, those below the resolution of their own matrix set to 0.

    Args:
        parts: matrices (m, n), or stacks (pieces, m, n) of them, all of one shape.
        route: ``gram`` or ``svd``.
        dtype: precision of the computation.
        device: device that computes, as torch names it: ``cpu``, ``cuda``, ``cuda:1``.
        stored: dtype that the entries were stored in, as torch names it.
        rounding: mean square of the entries' rounding errors, where that is known otherwise (`Difference`).

    Returns:
        (pieces, M), ascending in each row, in units of squared entries.

    Raises:
        MatrixError: entries are NaN, infinite or overflow (status ``nan``), or are so small that their squares vanish
            (``underflow``).

    Examples:
        >>> import numpy as np
        >>> from htsr.spectra.eigenvalues import piece_eigenvalues
        >>> parts = [np.diag([2.0, 3.0]), np.diag([1.0, 4.0])]
        >>> piece_eigenvalues(parts, "gram", "float64", "cpu", "float64", None)
        array([[ 4.,  9.],
               [ 1., 16.]])
    """

    def solve(part: Array) -> Vector:
        if device == "cpu":
            return _solve_cpu(part, route, dtype)
        return device_eigenvalues(on_device(part, device), route, dtype)

    found = [resolved(solve(part), route, dtype, part, stored, rounding) for part in parts]
    return np.concatenate([np.atleast_2d(values) for values in found])


def resolved(
    values: Vector,
    route: str,
    dtype: WorkingPrecision,
    matrix: Array,
    stored: str,
    rounding: float | None,
) -> Vector:
    """The eigenvalues, with 0 for those that computation or stored numbers (`htsr.spectra.resolution`) do not resolve.

    Args:
        values: (M,) or (pieces, M), ascending along the last axis.
        route: ``gram`` or ``svd``.
        dtype: precision of the computation.
        matrix: matrix that they belong to, (m, n) or (pieces, m, n).
        stored: dtype that its entries were stored in, as torch names it.
        rounding: mean square of the entries' rounding errors, where that is known otherwise (`Difference`).

    Returns:
        Eigenvalues in the shape of `values`.

    Raises:
        MatrixError: `values` are not all finite (status ``nan``).

    Examples:
        >>> import numpy as np
        >>> from htsr.spectra.eigenvalues import resolved
        >>> resolved(np.array([1e-9, 1.0]), "gram", "float32", np.diag([3e-5, 1.0]), "float64", None)
        array([0., 1.])
    """
    shape = matrix.shape
    if not np.isfinite(values).all():
        raise MatrixError("nan", "the matrix has NaN, infinite or overflowing entries")
    eps = float(np.finfo(dtype).eps)
    smallest = (max(shape[-2:]) * eps) ** 2 if route == "svd" else _SAFETY * eps
    found = np.where(values > smallest * values.max(axis=-1, keepdims=True), values, 0.0)
    without = without_rounding(found, max(shape[-2:]), stored, rounding)
    if rounding is not None or not is_coarse(stored) or np.count_nonzero(without) == np.count_nonzero(found):
        return without
    kept = zip(found.reshape(-1, found.shape[-1]), matrix.reshape(-1, *shape[-2:]), strict=True)
    return np.stack([np.where(np.arange(v.size) < rounded_away(W, stored), 0.0, v) for v, W in kept]).reshape(
        found.shape
    )


@np.errstate(over="ignore", invalid="ignore")  # `require_squares` says so
def batch_eigenvalues(matrices: Sequence[Array], dtype: WorkingPrecision) -> Vector:
    """Eigenvalues of several matrices of one shape by the route ``gram`` on a CPU, in one call of LAPACK.

    Args:
        matrices: matrices of one shape, each (m, n), any float dtype.
        dtype: precision of the computation.

    Returns:
        (len(matrices), M) ascending along the last axis, nothing set to 0 yet.

    Raises:
        MatrixError: `piece_eigenvalues` would refuse one of them; one bad matrix spoils the batch.

    Examples:
        >>> import numpy as np
        >>> from htsr.spectra.eigenvalues import batch_eigenvalues
        >>> batch_eigenvalues([np.eye(2), np.diag([2.0, 3.0])], "float64")
        array([[1., 1.],
               [4., 9.]])
    """
    grams = np.stack([gram(as_numpy(matrix), dtype) for matrix in matrices])
    for own, matrix in zip(grams, matrices, strict=True):
        require_squares(own.max(), dtype, lambda matrix=matrix: as_numpy(matrix).any())  # type: ignore[misc]
    return symmetric_eigenvalues(grams)


def gram(matrix: npt.NDArray[Any], dtype: WorkingPrecision = "float64") -> Floats:
    """The smaller Gram matrix, (M, M) in `dtype`, accumulated over blocks so that W is never copied whole.

    Args:
        matrix: (m, n), any float dtype.
        dtype: ``float32`` or ``float64``.

    Examples:
        >>> import numpy as np
        >>> from htsr.spectra.eigenvalues import gram
        >>> gram(np.array([[3.0, 0.0], [0.0, 1.0], [4.0, 0.0]]))
        array([[25.,  0.],
               [ 0.,  1.]])
    """
    m, n = matrix.shape
    tall = matrix if m >= n else matrix.T
    N, M = tall.shape
    rows = max(_CHUNK // M, M)
    if rows >= N:
        block = tall.astype(dtype, copy=False)
        return block.T @ block
    total = np.zeros((M, M), dtype=dtype)
    for start in range(0, N, rows):
        block = tall[start : start + rows].astype(dtype, copy=False)
        total += block.T @ block
    return total


@np.errstate(over="ignore", invalid="ignore")  # what overflows is refused, in words
def _solve_cpu(matrix: Array, route: str, dtype: WorkingPrecision) -> Vector:
    values = as_numpy(matrix)
    if route == "svd":
        values = values.astype(dtype, copy=False)
        require_finite(values.sum(dtype=np.float64))
        singular = np.linalg.svd(values, compute_uv=False)
        return np.sort(singular.astype(np.float64) ** 2)
    if values.ndim == 3:
        tall = values if values.shape[1] >= values.shape[2] else values.swapaxes(1, 2)
        tall = tall.astype(dtype, copy=False)
        grams = tall.swapaxes(1, 2) @ tall
    else:
        grams = gram(values, dtype)
    require_squares(grams.max(), dtype, values.any)
    return symmetric_eigenvalues(grams)


def symmetric_eigenvalues(grams: Floats) -> Vector:
    """Eigenvalues of positive semidefinite matrices on the CPU, computed in their dtype.

    Args:
        grams: (…, M, M) float32 or float64, contiguous; overwritten.

    Returns:
        (…, M) ascending.

    Examples:
        >>> import numpy as np
        >>> from htsr.spectra.eigenvalues import symmetric_eigenvalues
        >>> symmetric_eigenvalues(np.array([[2.0, 1.0], [1.0, 2.0]]))
        array([1., 3.])
    """
    if grams.dtype == np.float32:
        flat = grams.reshape(-1, *grams.shape[-2:])
        return np.stack([float32_eigenvalues(own) for own in flat]).reshape(grams.shape[:-1])
    if grams.shape[-1] >= _TORCH_FROM:
        import torch

        return np.asarray(torch.linalg.eigvalsh(torch.from_numpy(grams)).numpy())
    return np.linalg.eigvalsh(grams).astype(np.float64, copy=False)
