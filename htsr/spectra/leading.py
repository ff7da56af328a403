"""Leading singular triplets of a matrix, with an error that was measured.

The Gram matrix of the smaller side gives its leading eigenvectors, up to M = 2048 by LAPACK, beyond by a few products
with W (`htsr.spectra.krylov`). One product more, a QR decomposition and an SVD of k × k (Rayleigh, Ritz) make triplets
(σ, u, v) of them, whose residuals r = ‖Wᵀu - σv‖ are computed. They bound how far the subspace is turned from the true
one, by sin θ ≤ √k·r / (σ_k - σ_{k+1}) (Wedin, BIT 12, 1972). Where that is more than 1e-6, as where σ_k is many orders
below σ_1, the next slower route is taken: LAPACK, then the SVD of W itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from htsr.arrays import MANTISSAS, Array, Vector, epsilon
from htsr.errors import UsageError
from htsr.spectra.eigenvalues import symmetric_eigenvalues
from htsr.spectra.exact_products import exact_products
from htsr.spectra.krylov import leading_eigenvectors
from htsr.spectra.sums import Sum

if TYPE_CHECKING:
    import torch

TURNED = 1e-6  # radians by which computing may turn a leading subspace
_SMALLEST = 1e-13  # residual relative to σ_1 than which none is smaller
_DENSE_UP_TO = 2048  # M up to which LAPACK decomposes the Gram matrix
_FEW = 16  # a k above M over it is decomposed by LAPACK, too


@dataclass(frozen=True)
class Leading:
    """The k largest singular values of a matrix W, (m, n), and their vectors.

    Attributes:
        values: singular values σ_1 ≥ … ≥ σ_k, (k,) float64, in the unit of the entries.
        left: left singular vectors as columns, (m, k) float64.
        right: right singular vectors as columns, (n, k) float64, with W v_j = σ_j u_j.
        following: singular value σ_{k+1}; 0 where k = min(m, n).
        norm: Frobenius norm ‖W‖_F.
        error: largest residual ‖Wᵀu_j - σ_j v_j‖ over σ_1; 0 for a matrix of zeros.
    """

    values: Vector
    left: torch.Tensor
    right: torch.Tensor
    following: float
    norm: float
    error: float

    @property
    def gap(self) -> float:
        """How far the k-th singular value is above the next, (σ_k - σ_{k+1}) / σ_k.

        The subspace of the k leading vectors is undefined where it is 0, and moves by about the size of a change over
        (σ_k - σ_{k+1}) where it is not.
        """
        last = float(self.values[-1])
        return 1 - self.following / last if last > 0 else 0.0

    @property
    def turned(self) -> float:
        """Bound of the angle between these subspaces and the true ones, in radians; infinite where there is no gap."""
        gap = float(self.values[-1]) - self.following
        residual = self.error * float(self.values[0]) * len(self.values) ** 0.5
        return residual / gap if gap > 0 else float("inf")

    def resolved(self, stored: str) -> int:
        """How many of the k singular values are larger than those that rounding errors of the entries have.

        Args:
            stored: dtype that the entries were stored in, as torch names it.

        Source: the Marchenko-Pastur edge of rounding errors, as in `htsr.spectra.resolution`.
        """
        m, n = len(self.left), len(self.right)
        rounding = MANTISSAS * epsilon(stored) * self.norm * (m**-0.5 + n**-0.5)
        computed = 2.0 ** (-24 if stored != "float64" else -46) * float(self.values[0])
        return int(np.count_nonzero(self.values > max(rounding, computed)))


def leading(matrix: Array | Sum, k: int, *, exact: bool = False, device: str = "auto", seed: int = 0) -> Leading:
    """The k largest singular values of a matrix and their singular vectors.

    Args:
        matrix: (m, n), any float dtype, or a `Sum` of such.
        k: number of singular values, from 1 to min(m, n).
        exact: whether LAPACK decomposes a large matrix, too; else a few products do, as long as they are accurate.
        device: device that computes, as torch names it; ``auto`` is where the matrix lies.
        seed: seed of the vectors from which products start.

    Returns:
        The `Leading` triplets, computed in float64 on that device. The same matrix gives the same signs.

    Raises:
        MatrixError: entries are NaN, infinite or overflow (status ``nan``), are so small that their squares vanish
            (``underflow``), or there are none (``empty``).
        UsageError: k is below 1 or above min(m, n), or the matrix has not 2 dimensions.

    Examples:
        >>> import numpy as np
        >>> from htsr.spectra.leading import leading
        >>> found = leading(np.diag([1.0, 5.0, 3.0]), 2)
        >>> found.values.round(6).tolist(), round(found.following, 6), found.left.abs().argmax(0).tolist()
        ([5.0, 3.0], 1.0, [1, 2])
    """
    W = matrix if isinstance(matrix, Sum) else Sum.of(matrix, device)
    if not 1 <= k <= min(W.shape):
        raise UsageError(f"k is from 1 to {min(W.shape)}, the smaller side of the matrix, not {k}")
    if W.shape[0] < W.shape[1]:
        found = leading(W.T, k, exact=exact, seed=seed)
        return Leading(found.values, found.right, found.left, found.following, found.norm, found.error)
    with exact_products(W.device):
        if not exact and W.shape[1] > max(_DENSE_UP_TO, _FEW * k) and (by_products := _iterated(W, k, seed)):
            return by_products
        gram = W.gram()
        norm = float(gram.trace()) ** 0.5
        found = _ritz(W, _eigenvectors(gram, min(k + 1, W.shape[1])), k, norm)
        return found if _is_accurate(found) else _decomposed(W, k, norm)


def _is_accurate(found: Leading) -> bool:
    return found.turned <= TURNED or found.error <= _SMALLEST


def _iterated(W: Sum, k: int, seed: int) -> Leading | None:
    """Leading triplets by products with W alone; None where they are not accurate enough, or all of W is zero."""
    norm = W.norm()
    if norm == 0:
        return None

    vectors = leading_eigenvectors(W.gram_times, W.shape[1], k, turned=TURNED / 10, device=W.device, seed=seed)
    found = None if vectors is None else _ritz(W, vectors, k, norm)
    return found if found and _is_accurate(found) else None


def gram_eigenvalues(gram: torch.Tensor) -> Vector:
    """All eigenvalues of a Gram matrix, computed where it lies.

    Args:
        gram: (M, M) float64; overwritten.

    Returns:
        (M,) float64, ascending.

    Examples:
        >>> import torch
        >>> from htsr.spectra.leading import gram_eigenvalues
        >>> gram_eigenvalues(torch.tensor([[2.0, 1.0], [1.0, 2.0]], dtype=torch.float64))
        array([1., 3.])
    """
    import torch

    if gram.device.type == "cpu":
        return symmetric_eigenvalues(gram.numpy()).astype(np.float64, copy=False)
    return np.asarray(torch.linalg.eigvalsh(gram).cpu().numpy())


def _eigenvectors(gram: torch.Tensor, k: int) -> torch.Tensor:
    """Eigenvectors of the k largest eigenvalues as columns, largest first."""
    import torch

    M = len(gram)
    if gram.device.type == "cpu":
        from scipy.linalg import eigh

        vectors = eigh(gram.numpy(), subset_by_index=[M - k, M - 1], overwrite_a=True, check_finite=False)[1]
        return torch.from_numpy(vectors[:, ::-1].copy())  # of 1 × 1, ascontiguousarray would keep the stride
    return torch.linalg.eigh(gram)[1][:, M - k :].flip(1)


def _ritz(W: Sum, right: torch.Tensor, k: int, norm: float) -> Leading:
    """Singular triplets of W on the span of `right`, (n, at least k) with orthonormal columns."""
    import torch

    Q, R = torch.linalg.qr(W.times(right))
    left, values, rotation = torch.linalg.svd(R)
    return _measured(W, Q @ left, values, right @ rotation.mT, k, norm)


def _decomposed(W: Sum, k: int, norm: float) -> Leading:
    import torch

    left, values, right = torch.linalg.svd(W.dense(), full_matrices=False)
    return _measured(W, left, values, right.mT, k, norm)


def _measured(W: Sum, left: torch.Tensor, values: torch.Tensor, right: torch.Tensor, k: int, norm: float) -> Leading:
    """The first k triplets, with their residuals and with signs that do not depend on the route."""
    import torch

    u, s, v = left[:, :k], values[:k], right[:, :k]
    sign = u.gather(0, u.abs().argmax(dim=0, keepdim=True)).sign()
    residuals: Any = torch.linalg.vector_norm(W.transposed_times(u) - v * s, dim=0)
    error = float(residuals.max() / s[0]) if s[0] > 0 else 0.0
    following = float(values[k]) if len(values) > k else 0.0
    return Leading(s.cpu().numpy(), u * sign, v * sign, following, norm, error)
