"""A matrix given as a sum of matrices that lie in memory already.

A fine-tuned matrix less its base, or a base with noise on it, is never put together: some rows of it are summed in
float64 as they are multiplied.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from htsr.arrays import Array
from htsr.errors import MatrixError, UsageError
from htsr.spectra.checks import require_squares
from htsr.spectra.device import on_device, solving_device

if TYPE_CHECKING:
    import torch

_CHUNK = 1 << 20  # entries that are summed in float64 at a time


@dataclass(frozen=True)
class Sum:
    """A matrix as a sum of others, c_1·T_1 + c_2·T_2 + …, which is never put together.

    Attributes:
        terms: pairs of a factor c and a tensor T, all of one shape, of any float dtype and on one device.
        transposed: whether the matrix is the transposed sum. Rows are then columns of the tensors, but whatever is read
            is read by rows of the tensors, as they lie in memory.

    Examples:
        >>> import torch
        >>> from htsr.spectra.sums import Sum
        >>> change = Sum(((1.0, torch.full((2, 3), 5.0)), (-1.0, torch.ones(2, 3))))
        >>> change.shape, change.times(torch.ones(3, 1, dtype=torch.float64)).flatten().tolist()
        ((2, 3), [12.0, 12.0])
    """

    terms: tuple[tuple[float, torch.Tensor], ...]
    transposed: bool = False

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
        return (n, m) if self.transposed else (m, n)

    @property
    def device(self) -> str:
        """The device on which it lies, as torch names it."""
        return str(self.terms[0][1].device)

    @property
    def T(self) -> Sum:
        """The transposed matrix."""
        return Sum(self.terms, not self.transposed)

    def plus(self, other: Sum, factor: float) -> Sum:
        """This matrix and another.

        Args:
            other: matrix in the shape of this one, transposed as this one is.
            factor: factor of the other.
        """
        return Sum((*self.terms, *((factor * own, term) for own, term in other.terms)), self.transposed)

    def times(self, vectors: torch.Tensor) -> torch.Tensor:
        """W X.

        Args:
            vectors: X, (n, k) float64.

        Returns:
            (m, k) float64.
        """
        return self._summed(vectors) if self.transposed else self._stacked(vectors)

    def transposed_times(self, vectors: torch.Tensor) -> torch.Tensor:
        """Wᵀ Y.

        Args:
            vectors: Y, (m, k) float64.

        Returns:
            (n, k) float64.
        """
        return self._stacked(vectors) if self.transposed else self._summed(vectors)

    def norm(self) -> float:
        """Frobenius norm ‖W‖_F.

        Raises:
            MatrixError: see `gram`.
        """
        square = sum(float((block**2).sum()) for block in self._blocks())
        self._require_squares(square)
        return square**0.5

    def gram(self) -> torch.Tensor:
        """WᵀW, (n, n) float64, its lower triangle alone: solvers read no more, and it is half of the work.

        Raises:
            MatrixError: entries are NaN, infinite or overflow (status ``nan``), or are so small that their squares
                vanish (``underflow``).
        """
        import torch

        total = torch.zeros((self.shape[1],) * 2, dtype=torch.float64, device=self.device)
        for block in self._blocks(axis=int(self.transposed)):
            _add_gram(total, block, self.transposed)
        self._require_squares(float(total.max()))
        return total

    def gram_times(self, vectors: torch.Tensor) -> torch.Tensor:
        """WᵀW X, in one pass over W.

        Args:
            vectors: X, (n, k) float64.

        Returns:
            (n, k) float64.
        """
        import torch

        result = torch.zeros_like(vectors.mT)  # few rows are multiplied several times faster than few columns
        for block in self._blocks(axis=int(self.transposed)):
            rows = block.mT if self.transposed else block
            result.addmm_(vectors.mT @ rows.mT, rows)
        return result.mT

    def dense(self) -> torch.Tensor:
        """The matrix put together, (m, n) float64."""
        import torch

        whole = torch.cat(list(self._blocks()))
        return whole.mT if self.transposed else whole

    def _blocks(self, axis: int = 0) -> Iterator[torch.Tensor]:
        """Some rows of the tensors at a time, or with axis 1 some columns, summed in float64."""
        length, width = self.terms[0][1].shape[axis], self.terms[0][1].shape[1 - axis]
        step = max(1, _CHUNK // width)
        for start in range(0, length, step):
            (factor, first), *others = (
                (c, term.narrow(axis, start, min(step, length - start))) for c, term in self.terms
            )
            block = first.double() * factor if factor != 1 else first.double()
            for factor, term in others:
                block = block.add(term, alpha=factor)
            yield block

    def _stacked(self, vectors: torch.Tensor) -> torch.Tensor:
        """The sum of the tensors times some vectors."""
        import torch

        return torch.cat([vectors.mT @ block.mT for block in self._blocks()], dim=1).mT

    def _summed(self, vectors: torch.Tensor) -> torch.Tensor:
        """The transposed sum of the tensors times some vectors."""
        import torch

        columns = self.terms[0][1].shape[1]
        result = torch.zeros((vectors.shape[1], columns), dtype=torch.float64, device=vectors.device)
        start = 0
        for block in self._blocks():
            result.addmm_(vectors[start : start + len(block)].mT, block)
            start += len(block)
        return result.mT

    def _require_squares(self, largest: float) -> None:
        require_squares(largest, "float64", lambda: any(bool(block.any()) for block in self._blocks()))


def _add_gram(total: torch.Tensor, block: torch.Tensor, transposed: bool) -> None:
    """Add XᵀX of a block X of rows, or XXᵀ of one of columns, to the lower triangle of `total`."""
    if total.device.type != "cpu":
        total.addmm_(*((block, block.mT) if transposed else (block.mT, block)))
        return
    from scipy.linalg.blas import dsyrk

    # one triangle, which is half of the work; what is C-contiguous here is Fortran's transposed
    dsyrk(1.0, block.contiguous().numpy().T, beta=1.0, c=total.numpy().T, trans=transposed, overwrite_c=True)
