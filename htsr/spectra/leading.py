"""Leading singular triplets of a matrix, with an error that was measured.

A matrix is given as a sum of matrices that lie in memory already, W = Σ c·T: a fine-tuned matrix less its base, or a
base with noise on it, is never put together; rows of it are summed in float64 as they are multiplied.

The Gram matrix of the smaller side gives its leading eigenvectors. One product with W, a QR decomposition and an SVD of
k × k (Rayleigh and Ritz) make triplets (σ, u, v) of them, whose residuals ‖Wᵀu - σv‖ are computed; where they are too
large, as where σ_k is many orders below σ_1, the SVD of W itself decides.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from htsr.arrays import MANTISSAS, Array, Vector, epsilon
from htsr.errors import MatrixError, UsageError
from htsr.spectra.checks import require_squares
from htsr.spectra.device import on_device, solving_device
from htsr.spectra.eigenvalues import symmetric_eigenvalues
from htsr.spectra.exact_products import exact_products

if TYPE_CHECKING:
    import torch

ACCURACY = 1e-9  # largest residual relative to σ_1 that is accepted of the route by the Gram matrix
_CHUNK = 1 << 20  # entries that are summed in float64 at a time


@dataclass(frozen=True)
class Sum:
    """A matrix as a sum of others, c_1·T_1 + c_2·T_2 + …, which is never put together.

    Attributes:
        terms: pairs of a factor c and a tensor T, (m, n), of any float dtype, all on one device.

    Examples:
        >>> import torch
        >>> from htsr.spectra.leading import Sum
        >>> change = Sum(((1.0, torch.full((2, 3), 5.0)), (-1.0, torch.ones(2, 3))))
        >>> change.shape, change.times(torch.ones(3, 1, dtype=torch.float64)).flatten().tolist()
        ((2, 3), [12.0, 12.0])
    """

    terms: tuple[tuple[float, torch.Tensor], ...]

    @classmethod
    def of(cls, matrix: Array, device: str = "auto") -> Sum:
        """One matrix alone.

        Args:
            matrix: (m, n), any float dtype.
            device: device that computes, as torch names it; ``auto`` is where the matrix lies.

        Raises:
            UsageError: the matrix has not 2 dimensions.
            MatrixError: it has no entries (status ``empty``).
        """
        if matrix.ndim != 2:
            raise UsageError(f"a weight matrix has 2 dimensions, not {matrix.ndim}")
        if 0 in matrix.shape:
            raise MatrixError("empty", f"the matrix has no entries (shape {tuple(matrix.shape)})")
        return cls(((1.0, on_device(matrix, solving_device(device, matrix))),))

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the matrix, (m, n)."""
        m, n = self.terms[0][1].shape
        return m, n

    @property
    def device(self) -> str:
        """The device on which it lies, as torch names it."""
        return str(self.terms[0][1].device)

    @property
    def T(self) -> Sum:
        """The transposed matrix."""
        return Sum(tuple((factor, term.mT) for factor, term in self.terms))

    def blocks(self) -> Iterator[torch.Tensor]:
        """Some rows at a time, (rows, n) float64."""
        m, n = self.shape
        rows = max(1, _CHUNK // n)
        for start in range(0, m, rows):
            (factor, first), *others = ((factor, term[start : start + rows]) for factor, term in self.terms)
            block = first.double() * factor if factor != 1 else first.double()
            for factor, term in others:
                block = block.add(term.double(), alpha=factor)
            yield block

    def times(self, vectors: torch.Tensor) -> torch.Tensor:
        """W X.

        Args:
            vectors: X, (n, k) float64.

        Returns:
            (m, k) float64.
        """
        import torch

        return torch.cat([block @ vectors for block in self.blocks()])

    def transposed_times(self, vectors: torch.Tensor) -> torch.Tensor:
        """Wᵀ Y.

        Args:
            vectors: Y, (m, k) float64.

        Returns:
            (n, k) float64.
        """
        import torch

        result = torch.zeros((self.shape[1], vectors.shape[1]), dtype=torch.float64, device=vectors.device)
        start = 0
        for block in self.blocks():
            result.addmm_(block.mT, vectors[start : start + len(block)])
            start += len(block)
        return result

    def gram(self) -> torch.Tensor:
        """WᵀW, (n, n) float64.

        Raises:
            MatrixError: entries are NaN, infinite or overflow (status ``nan``), or are so small that their squares
                vanish (``underflow``).
        """
        import torch

        total = torch.zeros((self.shape[1],) * 2, dtype=torch.float64, device=self.device)
        for block in self.blocks():
            total.addmm_(block.mT, block)
        require_squares(float(total.max()), "float64", lambda: any(bool(block.any()) for block in self.blocks()))
        return total


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


def leading(matrix: Array | Sum, k: int, *, device: str = "auto") -> Leading:
    """The k largest singular values of a matrix and their singular vectors.

    Args:
        matrix: (m, n), any float dtype, or a `Sum` of such.
        k: number of singular values, from 1 to min(m, n).
        device: device that computes, as torch names it; ``auto`` is where the matrix lies.

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
        found = leading(W.T, k)
        return Leading(found.values, found.right, found.left, found.following, found.norm, found.error)
    with exact_products(W.device):
        gram = W.gram()
        norm = float(gram.trace()) ** 0.5
        found = _ritz(W, _eigenvectors(gram, min(k + 1, W.shape[1])), k, norm)
        return found if found.error <= ACCURACY * max(found.gap, 1e-3) else _decomposed(W, k, norm)


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
        return torch.from_numpy(np.ascontiguousarray(vectors[:, ::-1]))
    return torch.linalg.eigh(gram)[1][:, M - k :].flip(1)


def _ritz(W: Sum, right: torch.Tensor, k: int, norm: float) -> Leading:
    """Singular triplets of W on the span of `right`, (n, at least k) with orthonormal columns."""
    import torch

    Q, R = torch.linalg.qr(W.times(right))
    left, values, rotation = torch.linalg.svd(R)
    return _measured(W, Q @ left, values, right @ rotation.mT, k, norm)


def _decomposed(W: Sum, k: int, norm: float) -> Leading:
    import torch

    left, values, right = torch.linalg.svd(torch.cat(list(W.blocks())), full_matrices=False)
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
