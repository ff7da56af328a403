"""Eigenvalues of a symmetric matrix in float32, in half the time of float64 and without the interpreter's lock.

The matrix is reduced to tridiagonal form (LAPACK's `sytrd`), whose eigenvalues follow by the root-free QL iteration
(`sterf`). `numpy.linalg.eigvalsh` computes in float64 whatever it is given. SciPy has both routines in float32, but its
wrappers keep the interpreter's lock, so that threads would wait for each other; a call through `ctypes` lets go of it.
The addresses are those that SciPy publishes for Cython and Numba (`scipy.linalg.cython_lapack`).
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache

import numpy as np
import numpy.typing as npt

from htsr.arrays import Vector

_BLOCK = 32  # columns that are reduced before the rest is updated in one product
_SHIFT = 2.0**16  # times the largest eigenvalue: the iteration then ends at 1/100 ulp of float32, a fifth sooner


def load_solver() -> None:
    """Load SciPy's LAPACK, so that a limit of the number of threads that is set from now on holds for it too.

    Examples:
        >>> from htsr.spectra.tridiagonal import load_solver
        >>> load_solver()
    """
    _routine("ssytrd", 10)


def float32_eigenvalues(matrix: npt.NDArray[np.float32]) -> Vector:
    """Eigenvalues of a positive semidefinite matrix, with errors of about one ulp of the largest.

    As NumPy's solvers do, it raises LinAlgError where the iteration does not converge.

    Args:
        matrix: (M, M) float32, symmetric and contiguous; one triangle is enough. It is overwritten.

    Returns:
        (M,) float64, ascending.

    Examples:
        >>> import numpy as np
        >>> from htsr.spectra.tridiagonal import float32_eigenvalues
        >>> float32_eigenvalues(np.array([[2, 1], [1, 2]], dtype=np.float32)).round(6)
        array([1., 3.])
    """
    M = matrix.shape[0]
    scale = np.float32(2.0) ** -np.frexp(matrix.diagonal().max())[1]  # of a semidefinite matrix, the largest entry
    matrix *= scale  # far from overflow, as LAPACK's drivers do; a power of two changes no digit
    diagonal, off, tau = (np.zeros(M, np.float32) for _ in range(3))
    work = np.empty(_BLOCK * M, np.float32)
    size, length, info = ctypes.c_int(M), ctypes.c_int(work.size), ctypes.c_int(0)
    reduce, iterate = _routine("ssytrd", 10), _routine("dsterf", 4)
    by = ctypes.byref
    addresses = [array.ctypes.data for array in (diagonal, off, tau, work)]
    reduce(b"U", by(size), matrix.ctypes.data, by(size), *addresses, by(length), by(info))
    # In float32 the iteration would add M/10 ulps to the largest eigenvalues; the reduction has added but one.
    diagonal64, off64 = diagonal.astype(np.float64), off.astype(np.float64)
    # It ends when what is off the diagonal is small beside the diagonal: a shift keeps it from going on beyond float32.
    shift = _SHIFT * float(diagonal64.max())
    diagonal64 += shift
    iterate(by(size), diagonal64.ctypes.data, off64.ctypes.data, by(info))
    if info.value != 0:
        raise np.linalg.LinAlgError("Eigenvalues did not converge")
    return (diagonal64 - shift) / float(scale)


@cache
def _routine(name: str, arguments: int) -> Callable[..., None]:
    """A routine of SciPy's LAPACK; all its arguments are addresses."""
    from scipy.linalg import cython_lapack

    capsule = cython_lapack.__pyx_capi__[name]
    name_of = ctypes.PYFUNCTYPE(ctypes.c_char_p, ctypes.py_object)(("PyCapsule_GetName", ctypes.pythonapi))
    address_of = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(
        ("PyCapsule_GetPointer", ctypes.pythonapi)
    )
    return ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * arguments)(address_of(capsule, name_of(capsule)))
