"""Projection of a matrix on the leading directions of its spectrum.

Projection keeps the leading directions of W = U S Vᵀ and drops the others: W_k = W V_k V_kᵀ, the best approximation of
rank k (Eckart & Young 1936). Which k is a number, or is read from the spectrum:

======== ===============================================================================================
``tail`` the eigenvalues λ ≥ λ_min of the power-law fit (`htsr.spectra.tail`)
``erg``  the effective correlation space, the largest eigenvalues whose Σ ln λ̃ is 0 (`htsr.spectra.erg`)
K        the K largest
======== ===============================================================================================

SETOL (arXiv 2507.17912) tests its effective correlation space so: does the error survive the projection?

The choice of k is not idempotent, the projection is: a projected matrix has another spectrum, and so another tail.
Projecting it again on the same K changes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np

from htsr.arrays import Array, Vector
from htsr.errors import MatrixError, UsageError
from htsr.spectra.erg import erg
from htsr.spectra.resolution import equal_within, require_tail, without_rounding
from htsr.spectra.tail import FitMethod, fit_power_law

if TYPE_CHECKING:
    import torch

Keep: TypeAlias = Literal["erg", "tail"] | int
_CHUNK = 1 << 20  # elements that are up-cast at a time
_SAFETY = 16  # eigenvalues below this many ulps of λ_max are rounding noise, as in `htsr.spectra.eigenvalues`


@dataclass(frozen=True)
class Eigendecomposition:
    """Eigenvalues and eigenvectors of the smaller Gram matrix of W, one for each piece of a stack.

    Attributes:
        values: eigenvalues, (pieces, M) float64, ascending; exactly 0 where they lie below the resolution of the stored
            numbers or of the computation.
        vectors: eigenvectors, (pieces, M, M) float64, as columns in the same order: the right singular
            vectors of W where m ≥ n, else the left.
        equal_within: relative difference of eigenvalues that are equal but for rounding.
    """

    values: Vector
    vectors: torch.Tensor
    equal_within: float = 1e-6

    def require_tail(self) -> None:
        """Refuse a spectrum that has no tail to speak of.

        Raises:
            MatrixError: `htsr.spectra.resolution.require_tail` refuses the spectrum.
        """
        require_tail(np.sort(self.values, axis=None), self.equal_within)


@dataclass(frozen=True)
class ProjectedMatrix:
    """A matrix on some of its directions.

    Attributes:
        matrix: projected matrix, in shape, dtype and kind (NumPy or torch) of the one that was given.
        kept: number of directions that were kept, over all pieces.
        total: number of eigenvalues in all, K.
        norm_kept: share of ‖W‖_F² that was kept.
        lambda_min: smallest eigenvalue that was kept.
    """

    matrix: Array
    kept: int
    total: int
    norm_kept: float
    lambda_min: float


def project_tail(matrix: Array, keep: Keep, *, fit: FitMethod = "ks") -> ProjectedMatrix:
    """The matrix on its leading directions.

    Args:
        matrix: (m, n), or (pieces, m, n): a stack's tail is that of the pooled eigenvalues, K directions are kept of
            each piece. Any float dtype; computed in float64 where it lies (on a CPU in place of MPS).
        keep: ``"tail"`` for the eigenvalues of the power-law tail, ``"erg"`` for those of the effective correlation
            space, or the number of directions.
        fit: how the power law's λ_min is chosen, for ``"tail"``.

    Returns:
        A `ProjectedMatrix`.

    Raises:
        MatrixError: no eigenvalue differs from 0 (status ``zero``), entries are NaN or infinite (``nan``), there are no
            entries (``empty``), no power law (``degenerate``) or no crossing in the trace-log condition (``no_ecs``),
            or the matrix has fewer directions, M, than are to be kept (``too_small``).
        UsageError: `keep` is none of these, or below 1; or the matrix has other dimensions.

    Source: SETOL (arXiv 2507.17912) for the test; Eckart & Young (Psychometrika 1, 1936) for the projection.

    Examples:
        >>> import htsr, numpy as np
        >>> found = htsr.project_tail(np.diag([3.0, 2.0, 1.0]), keep=2)
        >>> found.matrix.diagonal().round(6).tolist(), found.kept, found.total
        ([3.0, 2.0, 0.0], 2, 3)
        >>> round(found.norm_kept, 6), round(13 / 14, 6)  # (3² + 2²) / (3² + 2² + 1²)
        (0.928571, 0.928571)
    """
    found = decompose(matrix)
    if keep == "tail" and found.values.any():
        found.require_tail()
    threshold = _threshold(found.values, keep, fit)
    chosen = found.values >= threshold
    total = float(found.values.sum())
    return ProjectedMatrix(
        matrix=rescaled(matrix, found.vectors, chosen.astype(np.float64)),
        kept=int(chosen.sum()),
        total=found.values.size,
        norm_kept=float(found.values[chosen].sum()) / total,
        lambda_min=float(found.values[chosen].min()),
    )


def _threshold(values: Vector, keep: Keep, fit: FitMethod) -> Any:
    """The smallest eigenvalue to keep, one for each piece or one for all."""
    pooled = np.sort(values.ravel())
    positive = pooled[pooled > 0]
    if positive.size == 0:
        raise MatrixError("zero", "all entries are zero, there is nothing to project on")
    if keep == "tail":
        return fit_power_law(positive, fit).lambda_min
    if keep == "erg":
        num = erg(pooled, float(pooled[-1])).num
        if num == 0:
            raise MatrixError("no_ecs", "the trace-log condition has no crossing, so there is no ECS to project on")
        return pooled[-num]
    if isinstance(keep, bool) or not isinstance(keep, int) or keep < 1:
        raise UsageError(f"keep is 'erg', 'tail' or a number of directions, not {keep!r}")
    if keep > (M := values.shape[1]):
        raise MatrixError("too_small", f"the matrix has {M} directions, fewer than the {keep} to be kept")
    return np.maximum(values[:, -keep], positive[0])[:, None]


def decompose(matrix: Array, *, rounding: bool = False) -> Eigendecomposition:
    """Eigenvalues and eigenvectors of the smaller Gram matrix, in float64 on the device of the matrix.

    On a device without float64 (MPS) they are computed on a CPU, and lie there.

    Args:
        matrix: (m, n), or (pieces, m, n); any float dtype.
        rounding: whether eigenvalues that may be rounding of the stored numbers are kept, too.

    Raises:
        MatrixError: entries are NaN, infinite or overflow (status ``nan``), or there are none (``empty``).
        UsageError: the matrix has neither 2 nor 3 dimensions.

    Examples:
        >>> import numpy as np
        >>> from htsr.spectra.directions import decompose
        >>> found = decompose(np.diag([1.0, 3.0, 2.0]))
        >>> found.values.round(6).tolist(), found.vectors[0].abs().argmax(0).tolist()
        ([[1.0, 4.0, 9.0]], [0, 2, 1])
    """
    import torch

    W = stack(matrix)
    if W.numel() == 0:
        raise MatrixError("empty", f"the matrix has no entries (shape {tuple(matrix.shape)})")
    W = W.cpu() if W.device.type == "mps" else W
    kind = torch.float64
    tall = W if W.shape[1] >= W.shape[2] else W.mT
    # summed over blocks of rows, so that no up-cast copy of the whole matrix is made
    gram = torch.zeros((len(W), tall.shape[2], tall.shape[2]), dtype=kind, device=W.device)
    for block in _blocks(tall):
        gram += block.to(kind).mT @ block.to(kind)
    if not bool(torch.isfinite(gram.sum())):
        raise MatrixError("nan", "the matrix has NaN, infinite or overflowing entries")
    found, vectors = torch.linalg.eigh(gram)  # the smaller side: M³ instead of M²N, and vectors of one side only
    values = found.double().cpu().numpy()
    resolution = _SAFETY * torch.finfo(kind).eps * values.max(axis=1, keepdims=True)
    values = np.where(values > resolution, values, 0.0)
    stored = str(W.dtype).removeprefix("torch.")
    M, N = sorted(W.shape[1:])
    values = values if rounding else without_rounding(values, N, stored)
    return Eigendecomposition(values, vectors, equal_within(M, N, stored))


def rescaled(matrix: Array, vectors: torch.Tensor, ratios: Vector) -> Array:
    """W with its singular values multiplied by `ratios`: W V diag(ratios) Vᵀ, or from the left where m < n.

    Args:
        matrix: (m, n) or (pieces, m, n).
        vectors: (pieces, M, M) eigenvectors from `decompose`.
        ratios: (pieces, M) factors of the singular values, in the order of the eigenvalues.

    Returns:
        The new matrix, in shape, dtype and kind (NumPy or torch) of `matrix`.
    """
    import torch

    W = stack(matrix)
    wide = W.shape[1] < W.shape[2]
    scale = torch.as_tensor(ratios, dtype=vectors.dtype, device=vectors.device)
    # W V diag(ratios) Vᵀ: no division by singular values, so that small ones do no harm
    change = (vectors * scale[:, None, :]) @ vectors.mT
    result = torch.empty_like(W)
    tall, target = (W.mT, result.mT) if wide else (W, result)
    for source, goal in zip(_blocks(tall), _blocks(target), strict=True):
        goal.copy_(source.to(change) @ change)
    result = result.reshape(tuple(matrix.shape))
    return result.numpy() if isinstance(matrix, np.ndarray) else result


def stack(matrix: Array) -> torch.Tensor:
    """A matrix as a stack of pieces, (pieces, m, n), that shares its memory.

    Args:
        matrix: matrix, (m, n) or (pieces, m, n).

    Raises:
        UsageError: it has other dimensions.
    """
    import torch

    if matrix.ndim not in (2, 3):
        raise UsageError(f"a weight matrix has 2 dimensions (3 for a stack of pieces), not {matrix.ndim}")
    W = torch.from_numpy(np.ascontiguousarray(matrix)) if isinstance(matrix, np.ndarray) else matrix.detach()
    return W[None] if W.ndim == 2 else W


def _blocks(tall: torch.Tensor) -> list[torch.Tensor]:
    """Views of some rows at a time."""
    pieces, length, width = tall.shape
    rows = max(_CHUNK // (pieces * width), width)
    return [tall[:, start : start + rows] for start in range(0, length, rows)]
