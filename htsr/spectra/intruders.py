"""Intruder dimensions: leading singular vectors of a trained matrix that its base did not have (arXiv 2410.21228).

One of the k leading left singular vectors of B is an intruder where its |cosine| with every left singular vector of A
is below ε. All of A's vectors are asked, not only leading ones: a direction that A had and used little is no intruder.
A square A has a full basis of them, in which the largest of m squared cosines is at least 1/m, and about 2·ln(m)/m of a
random direction; what informs is how the count depends on ε.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from htsr.arrays import Array, Vector
from htsr.spectra.exact_products import exact_products
from htsr.spectra.leading import Sum

if TYPE_CHECKING:
    import torch

_RESOLVED = (
    2.0**-48
)  # eigenvalues below this share of the largest have no left vectors, as in `htsr.spectra.resolution`


def nearest_cosines(base: Array | Sum, vectors: torch.Tensor) -> Vector:
    """The largest |cosine| of each vector with any left singular vector of a matrix.

    Args:
        base: A, (m, n), any float dtype, or a `Sum` of such; vectors of singular value 0 are none of its directions.
        vectors: vectors of length 1 as columns, (m, k) float64, on the device of A.

    Returns:
        (k,) float64, in [0, 1].

    Raises:
        MatrixError: entries of A are NaN, infinite or overflow (status ``nan``), are so small that their squares vanish
            (``underflow``), or there are none (``empty``).

    Source: Shuttleworth, Andreas, Torralba & Sharma (arXiv 2410.21228), algorithm 1.

    Examples:
        >>> import numpy as np, torch
        >>> from htsr.spectra.intruders import nearest_cosines
        >>> u = torch.tensor([[0.6, 0.8, 0.0], [0.0, 0.0, 1.0]], dtype=torch.float64).T
        >>> nearest_cosines(np.diag([3.0, 2.0, 0.0]), u)
        array([0.8, 0. ])
    """
    import torch

    A = base if isinstance(base, Sum) else Sum.of(base, str(vectors.device))
    with exact_products(A.device):
        if A.shape[0] <= A.shape[1]:
            values, basis = torch.linalg.eigh(A.T.gram())
            cosines = basis.mT @ vectors
        else:  # u_i = A v_i / ‖A v_i‖
            values, basis = torch.linalg.eigh(A.gram())
            cosines = basis.mT @ A.transposed_times(vectors) / values.clamp(min=0).sqrt()[:, None]
        known = values > _RESOLVED * values[-1]
        found = torch.where(known[:, None], cosines.abs(), 0.0).amax(dim=0)
    return np.asarray(found.clamp(max=1.0).cpu().numpy())
