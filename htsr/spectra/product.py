"""Eigenvalues of a matrix that is kept as the two factors it is the product of, such as the change of a LoRA adapter.

ΔW = left · right of rank r has r eigenvalues and no more. Multiplied out in float32 it has M of them, all but r made of
rounding; from the factors they are the squared singular values of R_left · R_rightᵀ, an r × r matrix, where
left = Q_left R_left and rightᵀ = Q_right R_right.
"""

from __future__ import annotations

import numpy as np

from htsr.arrays import Numbers, Product, Vector


def product_eigenvalues(product: Product) -> Vector:
    """Squared singular values of all pieces of a product.

    Args:
        product: one product, or a stack of them.

    Returns:
        (pieces · M,) float64, ascending, M = min(m, n). At most `rank` of each piece are not 0: what lies below
        float64's resolution of the r × r problem is 0.

    Examples:
        >>> import numpy as np
        >>> from htsr.arrays import Product
        >>> from htsr.spectra.product import product_eigenvalues
        >>> B, A = np.array([[3.0], [4.0]]), np.array([[1.0, 0.0, 0.0]])  # ΔW of rank 1 and norm 5
        >>> product_eigenvalues(Product(B, A)).round(6).tolist()
        [0.0, 25.0]
    """
    factors = (product.left, product.right)
    stacks = [x.astype(np.float64) if x.ndim == 3 else x[None].astype(np.float64) for x in factors]
    pieces = [_singular(left, right) for left, right in zip(*stacks, strict=True)]
    M = min(product.shape[-2:])
    padded = [np.pad(values[:M], (0, max(0, M - values.size))) for values in pieces]
    return np.sort(np.concatenate(padded) ** 2)


def _singular(left: Numbers, right: Numbers) -> Numbers:
    """Singular values of left · right: orthogonal Q_left and Q_right change none, so those of the small core."""
    if not (np.isfinite(left).all() and np.isfinite(right).all()):
        return np.full(1, np.nan)
    r_left, r_right = (np.asarray(np.linalg.qr(x, mode="r")) for x in (left, right.T))
    core = r_left @ r_right.T
    values = np.linalg.svd(core, compute_uv=False)
    smallest = max(*left.shape, *right.shape) * np.finfo(np.float64).eps * values.max(initial=0.0)
    return np.where(values > smallest, values, 0.0)
