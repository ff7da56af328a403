"""Intruder dimensions: leading singular vectors of a trained matrix that its base did not have (arXiv 2410.21228).

One of the k leading left singular vectors of B is an intruder where its |cosine| with every left singular vector of A
is below ε. All of A's vectors are asked, not only leading ones: a direction that A had and used little is no intruder.
A square A has a full basis of them, in which the largest of m squared cosines is at least 1/m, and about 2·ln(m)/m of a
random direction; what informs is how the count depends on ε.

Squared cosines of one vector sum to 1 at most. So where the largest that is known is no smaller than what the known
ones leave, it is the largest of all, and A's leading vectors decide alone; only elsewhere A is decomposed whole.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from htsr.arrays import Vector
from htsr.spectra.sums import Sum

if TYPE_CHECKING:
    import torch

_RESOLVED = 2.0**-48  # share of the largest eigenvalue below which one has no left vector (`htsr.spectra.resolution`)


@dataclass(frozen=True)
class LeftVectors:
    """The left singular vectors of a matrix, of which those beyond the leading ones are computed once they are needed.

    Attributes:
        matrix: A, (m, n).
        leading: leading left singular vectors that are known, (m, k) float64.
    """

    matrix: Sum
    leading: torch.Tensor

    def nearest(self, vectors: torch.Tensor) -> Vector:
        """The largest |cosine| of each vector with any left singular vector of A.

        Args:
            vectors: vectors of length 1 as columns, (m, j) float64, on the device of A.

        Returns:
            (j,) float64, in [0, 1].

        Examples:
            >>> import numpy as np, torch
            >>> from htsr.spectra.denoising import left_vectors
            >>> (known,) = left_vectors(np.diag([3.0, 2.0, 0.0]))  # vectors of singular value 0 are none
            >>> known.nearest(torch.tensor([[0.6, 0.8, 0.0], [0.0, 0.0, 1.0]], dtype=torch.float64).T)
            array([0.8, 0. ])
        """
        squares = (self.leading.mT @ vectors) ** 2
        largest = squares.amax(dim=0)
        if bool((largest < 1 - squares.sum(dim=0)).any()):
            largest = (self._with_all(vectors) ** 2).amax(dim=0)
        return np.asarray(largest.sqrt().clamp(max=1.0).cpu().numpy())

    def _with_all(self, vectors: torch.Tensor) -> torch.Tensor:
        """Cosines with all left singular vectors, (min(m, n), j); 0 for those whose singular value is 0."""
        import torch

        values, basis = self._decomposed
        if self.matrix.shape[0] <= self.matrix.shape[1]:
            cosines = basis.mT @ vectors
        else:  # u_i = A v_i / ‖A v_i‖
            cosines = basis.mT @ self.matrix.transposed_times(vectors) / values.clamp(min=0).sqrt()[:, None]
        known = values > _RESOLVED * values[-1]  # none of a matrix of zeros
        return torch.where(known[:, None], cosines, 0.0)

    @cached_property
    def _decomposed(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Eigenvalues and eigenvectors of the smaller Gram matrix."""
        import torch

        wide = self.matrix.shape[0] <= self.matrix.shape[1]
        values, basis = torch.linalg.eigh((self.matrix.T if wide else self.matrix).gram())
        return values, basis
