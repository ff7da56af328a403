"""Leading eigenvectors of WᵀW by block Krylov iteration: a few products with W in place of its Gram matrix.

From a block X of random vectors the space of X, AX, A²X, …, A = WᵀW, is built, orthogonalised twice at each step, and A
is diagonalised on it. When the space is full it is cut to its leading vectors and grows again (thick restart). It ends
where the residuals ‖Ax - λx‖ of the wanted vectors are so small that by the theorem of Davis and Kahan their space is
turned against the true one by no more than is asked for.

Sources: Musco & Musco (NeurIPS 2015) for random blocks; Wu & Simon (SIAM J. Matrix Anal. Appl. 22, 2000) for the thick
restart; Davis & Kahan (SIAM J. Numer. Anal. 7, 1970).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch

_OVERSAMPLED = 6  # random vectors beyond the wanted ones
_BLOCKS = 20  # blocks that the space grows to before it is cut
_PRODUCTS = 40  # blocks that are multiplied at most


def leading_eigenvectors(
    product: Callable[[torch.Tensor], torch.Tensor], size: int, k: int, *, turned: float, device: str, seed: int = 0
) -> torch.Tensor | None:
    """Orthonormal vectors whose first k span the leading eigenvectors of a positive semidefinite matrix A.

    Args:
        product: function that multiplies A with some vectors, (size, b) float64.
        size: number of rows of A.
        k: number of leading eigenvectors, well below `size`.
        turned: largest angle, in radians, by which their span may be turned against the true one.
        device: device that computes, as torch names it.
        seed: seed of the random block.

    Returns:
        (size, k + 1) float64, columns in the order of falling eigenvalues; None where 40 products do not suffice, as
        where the k-th and the next eigenvalue are all but equal.

    Examples:
        >>> import torch
        >>> from htsr.spectra.krylov import leading_eigenvectors
        >>> A = torch.diag(torch.arange(200.0, dtype=torch.float64) ** 2)
        >>> found = leading_eigenvectors(lambda x: A @ x, 200, 2, turned=1e-6, device="cpu")
        >>> found.abs().argmax(dim=0).tolist()
        [199, 198, 197]
    """
    import torch

    wide = k + 1 + _OVERSAMPLED
    random = np.random.default_rng(seed).standard_normal((size, wide))
    basis = torch.linalg.qr(torch.from_numpy(random).to(device))[0]
    images = product(basis)
    for _ in range(_PRODUCTS):
        projected = basis.mT @ images
        values, rotation = torch.linalg.eigh((projected + projected.mT) / 2)
        values, rotation = values.flip(0), rotation.flip(1)
        ritz, image = basis @ rotation[:, :wide], images @ rotation[:, :wide]
        errors = torch.linalg.vector_norm(image - ritz * values[:wide], dim=0)
        gap = float(values[k - 1] - values[k])
        if float(torch.linalg.vector_norm(errors[:k])) <= turned * gap:
            return ritz[:, : k + 1]
        if basis.shape[1] >= wide * _BLOCKS:
            basis, images, new = ritz, image, image - ritz * values[:wide]
        else:
            new = images[:, -wide:]
        for _again in (False, True):
            new = torch.linalg.qr(new - basis @ (basis.mT @ new))[0]
        basis, images = torch.cat([basis, new], dim=1), torch.cat([images, product(new)], dim=1)
    return None
