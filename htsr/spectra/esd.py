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
``auto``    ``factors`` where there are some; else ``gram``, again in float64 where float32 has left eigenvalues
            unresolved; then ``svd`` where numbers stored in float64 have eigenvalues that the Gram matrix cannot
            resolve; and ``lanczos`` where M > 16384. The row of a matrix names the route that was taken.
=========== ========================================================================================================

What the stored numbers themselves do not resolve is 0 on every route: see `htsr.spectra.resolution`.

On a CPU the work is done by NumPy's LAPACK up to M = 2048 and by torch's beyond, whose reduction to tridiagonal form is
faster there where torch has MKL; on an accelerator by torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from htsr.arrays import Array, Product, as_numpy
from htsr.errors import MatrixError, UsageError
from htsr.spectra.attempts import attempted
from htsr.spectra.product import product_eigenvalues
from htsr.spectra.resolution import equal_within, is_coarse, require_tail, rounded_away, without_rounding
from htsr.spectra.windows import Windows

if TYPE_CHECKING:
    pass

Floats: TypeAlias = npt.NDArray[np.floating[Any]]
Route: TypeAlias = Literal["auto", "gram", "svd", "lanczos"]
Precision: TypeAlias = Literal["auto", "float32", "float64"]

LANCZOS_FROM = 16384
BATCH_UP_TO = 500
_TORCH_FROM = 2048
_CHUNK = 1 << 20  # elements that are up-cast at a time while a Gram matrix is accumulated
_SAFETY = 16  # eigenvalues below this many ulps of λ_max are rounding noise (measured: at most 2.4)


@dataclass(frozen=True)
class ESD:
    """Eigenvalues of one matrix, or of equal-shape pieces pooled (slices of a kernel, windows).

    Attributes:
        eigenvalues: (K,) float64, ascending, K = M · pieces; exactly 0 where below the resolution of the stored
            numbers or of the route.
        M: smaller side of a piece.
        N: larger side of a piece.
        pieces: matrices pooled in `eigenvalues`.
        route: what computed them, e.g. ``"gram/float64"``.
        error: standard error of the distribution function, largest over λ; None where the route is exact.
        replicates: (probes, K) leave-one-probe-out eigenvalues of the ``lanczos`` route, for jackknife errors.
        equal_within: relative difference of eigenvalues that are equal but for rounding.
    """

    eigenvalues: npt.NDArray[np.float64] = field(repr=False)
    M: int
    N: int
    pieces: int
    route: str
    error: float | None = None
    replicates: npt.NDArray[np.float64] | None = field(default=None, repr=False)
    equal_within: float = 1e-6

    @property
    def Q(self) -> float:
        """Aspect ratio N/M ≥ 1."""
        return self.N / self.M

    def require_tail(self) -> None:
        """Refuse a spectrum that has no tail to speak of, so that no exponent of it would mean anything.

        Raises:
            MatrixError: fewer than 8 eigenvalues above the resolution (status ``tiny``), or of those fewer that differ
                by more than rounding (``degenerate``), as of an orthogonal matrix.
        """
        require_tail(self.eigenvalues, self.equal_within)

    @property
    def positive(self) -> npt.NDArray[np.float64]:
        """The eigenvalues above the resolution, ascending."""
        return self.eigenvalues[np.searchsorted(self.eigenvalues, 0.0, side="right") :]


def esd(
    matrix: Array | Product,
    *,
    route: Route = "auto",
    dtype: Precision = "auto",
    device: str = "cpu",
    windows: Windows | None = None,
    seed: int = 0,
    stored: str | None = None,
) -> ESD:
    """Eigenvalues of the smaller Gram matrix of `matrix`.

    Args:
        matrix: (m, n) real, or (pieces, m, n) whose ESDs are pooled. Any float dtype; up-cast as `dtype` says. Of a
            `Product` the route ``auto`` takes the factors; the others, and windows, multiply it out.
        route: see the module's text.
        dtype: precision of the computation; ``auto`` is float64 on a CPU and float32 on an accelerator.
        device: where it runs: ``cpu``, ``cuda``, ``cuda:1``, ``mps``.
        windows: pool the ESDs of these windows (of each piece) instead.
        seed: of the random probes of the ``lanczos`` route.
        stored: dtype that the numbers were stored in, as torch names it; that of `matrix` by default.

    Returns:
        The `ESD`, in units of squared entries (singular values squared).

    Raises:
        MatrixError: the matrix is empty (status ``empty``), has NaN, infinite or overflowing entries (``nan``), or so
            small ones that their squares vanish (``underflow``), the route does not apply to it (``unsupported``), or
            the computation fails, as for lack of memory (``failed``).
        UsageError: unknown route, or a matrix that is neither 2-D nor 3-D.
    """
    if matrix.ndim not in (2, 3):
        raise UsageError(f"a weight matrix has 2 dimensions (3 for a stack of pieces), not {matrix.ndim}")
    if 0 in matrix.shape:
        raise MatrixError("empty", f"the matrix has no entries (shape {tuple(matrix.shape)})")
    if route not in ("auto", "gram", "svd", "lanczos"):
        raise UsageError(f"unknown route {route!r}: auto, gram, svd or lanczos")
    automatic, dtype = dtype == "auto", _precision(dtype, device)
    stored, rounding = stored or _dtype(matrix), getattr(matrix, "rounding", None)

    if isinstance(matrix, Product):
        if route == "auto" and windows is None:
            values = product_eigenvalues(matrix)
            _require_finite(values.sum())
            M, N = sorted(matrix.shape[-2:])
            within = equal_within(M, M, stored)
            return ESD(values, M, N, values.size // M, route="factors/float64", equal_within=within)
        matrix = matrix.dense()

    parts = _pieces(matrix, windows)
    M, N = sorted(parts[0].shape[-2:])
    refine = route == "auto"
    if route == "auto":
        route = "lanczos" if M > LANCZOS_FROM else "gram"
    if route == "lanczos":
        from htsr.spectra.lanczos import lanczos_esd

        if len(parts) != 1 or parts[0].ndim != 2:
            raise MatrixError("unsupported", "the lanczos route takes one whole matrix, without windows or pieces")
        return lanczos_esd(parts[0], device=device, seed=seed)

    found = attempted(lambda: _eigenvalues(parts, route, dtype, device, stored, rounding))
    if automatic and dtype == "float32" and (isinstance(found, MatrixError) or _unresolved(found)):
        dtype = "float64"
        found = attempted(lambda: _eigenvalues(parts, route, dtype, device, stored, rounding))
    if isinstance(found, MatrixError):
        raise found
    values = found
    if refine and dtype == stored == "float64" and _unresolved(values):
        route = "svd"
        values = _eigenvalues(parts, route, dtype, device, stored, rounding)
    within = equal_within(M, N, stored)
    return ESD(values, M, N, values.size // M, route=f"{route}/{dtype}", equal_within=within)


def _precision(dtype: Precision, device: str) -> Literal["float32", "float64"]:
    if dtype == "auto":
        return "float64" if device == "cpu" else "float32"
    return dtype


def _dtype(matrix: Array | Product) -> str:
    numbers = matrix.left if isinstance(matrix, Product) else matrix
    return str(numbers.dtype).removeprefix("torch.")


def _unresolved(values: npt.NDArray[np.float64]) -> bool:
    return bool(values[0] == 0.0 and values[-1] > 0.0)


def esd_batch(
    matrices: Sequence[Array | Product],
    *,
    route: Route = "auto",
    dtype: Precision = "auto",
    device: str = "cpu",
    windows: Windows | None = None,
    seed: int = 0,
    stored: Sequence[str | None] | None = None,
) -> list[ESD | MatrixError]:
    """`esd` of several matrices of one shape; what cannot be decomposed gives its error, and the others their ESD.

    On a CPU, the Gram matrices of plain matrices are solved in one call, which pays up to M = `BATCH_UP_TO`: below that
    size LAPACK, called for a single matrix, keeps the interpreter's lock, and threads would wait for each other.

    Args:
        matrices: each (m, n), or each (pieces, m, n).
        route: as in `esd`.
        dtype: as in `esd`.
        device: as in `esd`.
        windows: as in `esd`.
        seed: as in `esd`, the same for each.
        stored: as in `esd`, one for each.

    Returns:
        In the order of `matrices`, an `ESD` or the `MatrixError` that `esd` would raise.

    Raises:
        UsageError: as `esd`.
    """
    kinds = [kind or _dtype(matrix) for kind, matrix in zip(stored or [None] * len(matrices), matrices, strict=True)]
    if (
        len(matrices) > 1
        and device == "cpu"
        and windows is None
        and route in ("auto", "gram")
        and matrices[0].ndim == 2
        and not any(isinstance(matrix, Product) for matrix in matrices)
    ):
        kind = _precision(dtype, device)
        M, N = sorted(matrices[0].shape)
        values = attempted(lambda: _together(matrices, kind))
        if not isinstance(values, MatrixError):
            rows = [
                _resolved(row, "gram", kind, matrix, own, getattr(matrix, "rounding", None))
                for row, own, matrix in zip(values, kinds, matrices, strict=True)
            ]
            if route == "gram" or "float64" not in kinds or not any(_unresolved(row) for row in rows):
                return [
                    ESD(row, M, N, 1, route=f"gram/{kind}", equal_within=equal_within(M, N, own))
                    for row, own in zip(rows, kinds, strict=True)
                ]

    how: dict[str, Any] = {"route": route, "dtype": dtype, "device": device, "windows": windows, "seed": seed}
    return [attempted(partial(esd, matrix, stored=own, **how)) for matrix, own in zip(matrices, kinds, strict=True)]


def _together(matrices: Sequence[Any], dtype: Precision) -> npt.NDArray[np.float64]:
    grams = np.stack([gram(as_numpy(matrix), dtype) for matrix in matrices])
    for own, matrix in zip(grams, matrices, strict=True):
        _require_squares(own.max(), dtype, lambda matrix=matrix: as_numpy(matrix).any())  # type: ignore[misc]
    return np.linalg.eigvalsh(grams).astype(np.float64)


def _pieces(matrix: Array, windows: Windows | None) -> list[Array]:
    if windows is None:
        return [matrix]
    return [matrix[..., rows, columns] for rows, columns in windows.slices((matrix.shape[-2], matrix.shape[-1]))]


def _eigenvalues(
    parts: list[Array], route: str, dtype: str, device: str, stored: str, rounding: float | None
) -> npt.NDArray[np.float64]:
    """All eigenvalues of all parts, ascending, those below the resolution of their own part set to 0."""
    if device.startswith("mps") and dtype == "float64":  # which is not known there
        device = "cpu"
    solve = _solve_cpu if device == "cpu" else _solve_torch
    pooled = [_resolved(solve(part, route, dtype, device), route, dtype, part, stored, rounding) for part in parts]
    return np.sort(np.concatenate([values.ravel() for values in pooled]))


def _resolved(
    values: npt.NDArray[np.float64],
    route: str,
    dtype: str,
    matrix: Array | Product,
    stored: str,
    rounding: float | None,
) -> npt.NDArray[np.float64]:
    shape = matrix.shape
    if not np.isfinite(values).all():
        raise MatrixError("nan", "the matrix has NaN, infinite or overflowing entries")
    eps = float(np.finfo(dtype).eps)
    smallest = (max(shape[-2:]) * eps) ** 2 if route == "svd" else _SAFETY * eps
    found = np.where(values > smallest * values.max(axis=-1, keepdims=True), values, 0.0)
    without = without_rounding(found, max(shape[-2:]), stored, rounding)
    if rounding is not None or not is_coarse(stored) or np.count_nonzero(without) == np.count_nonzero(found):
        return without
    kept = zip(found.reshape(-1, found.shape[-1]), as_numpy(matrix).reshape(-1, *shape[-2:]), strict=True)
    return np.stack([np.where(np.arange(v.size) < rounded_away(W, stored), 0.0, v) for v, W in kept]).reshape(
        found.shape
    )


def gram(matrix: npt.NDArray[Any], dtype: Precision = "float64") -> Floats:
    """The smaller Gram matrix, (M, M) in `dtype`, accumulated over blocks so that W is never copied whole.

    Args:
        matrix: (m, n), any float dtype.
        dtype: ``float32`` or ``float64``.
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


def _solve_cpu(matrix: Array, route: str, dtype: str, _device: str) -> npt.NDArray[np.float64]:
    values = as_numpy(matrix)
    if route == "svd":
        _require_finite(values.sum(dtype=np.float64))
        singular = np.linalg.svd(values.astype(dtype), compute_uv=False)
        return np.sort(singular.astype(np.float64) ** 2)
    if values.ndim == 3:
        tall = values if values.shape[1] >= values.shape[2] else values.swapaxes(1, 2)
        tall = tall.astype(dtype, copy=False)
        grams = tall.swapaxes(1, 2) @ tall
    else:
        grams = gram(values, dtype)  # type: ignore[arg-type]
    _require_squares(grams.max(), dtype, values.any)
    if grams.shape[-1] >= _TORCH_FROM:
        import torch

        return np.asarray(torch.linalg.eigvalsh(torch.from_numpy(grams)).double().numpy())
    return np.linalg.eigvalsh(grams).astype(np.float64)


def _solve_torch(matrix: Array, route: str, dtype: str, device: str) -> npt.NDArray[np.float64]:
    import torch

    kind = getattr(torch, dtype)
    W = torch.as_tensor(matrix).to(device)
    if route == "svd":
        _require_finite(float(W.to(kind).sum()))
        singular = torch.linalg.svdvals(W.to(kind))
        return np.sort(singular.double().cpu().numpy() ** 2)
    tall = W if W.shape[-2] >= W.shape[-1] else W.mT
    rows = max(_CHUNK // tall.shape[-1], tall.shape[-1])
    grams = torch.zeros((*tall.shape[:-2], tall.shape[-1], tall.shape[-1]), dtype=kind, device=W.device)
    for start in range(0, tall.shape[-2], rows):
        block = tall[..., start : start + rows, :].to(kind)
        grams += block.mT @ block
    _require_squares(float(grams.max()), dtype, W.any)
    if W.device.type == "mps":  # no eigensolver there yet
        grams = grams.cpu()
    return torch.linalg.eigvalsh(grams).double().cpu().numpy()


def _require_finite(total: float) -> None:
    if not np.isfinite(total):
        raise MatrixError("nan", "the matrix has NaN, infinite or overflowing entries")


def _require_squares(largest: float, dtype: str, has_entries: Callable[[], Any]) -> None:
    """That the Gram matrix, whose largest entry lies on its diagonal, is one of numbers that `dtype` can hold."""
    _require_finite(largest)
    if largest < np.finfo(dtype).tiny / np.finfo(dtype).eps and bool(has_entries()):
        raise MatrixError("underflow", f"its entries are so small that {dtype} cannot hold their squares")
