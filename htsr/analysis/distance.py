"""How far two weight matrices of one shape are apart."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from htsr.arrays import Array, as_numpy
from htsr.spectra.device import on_device
from htsr.spectra.exact_products import exact_products

_AT_ONCE = 1 << 15  # entries, which stay in the cache


@dataclass(frozen=True)
class Distance:
    """How far two matrices A and B of the same shape are apart.

    Attributes:
        frobenius: distance ‖A - B‖_F, in the unit of the weights.
        relative: relative distance ‖A - B‖_F / ‖A‖_F.
        cosine: cosine similarity ⟨A, B⟩ / (‖A‖_F ‖B‖_F), in [-1, 1].
        cka: linear centred kernel alignment of the Gram matrices of the smaller side (Kornblith et al. 2019); 1 where B
            is A times a rotation.
    """

    frobenius: float
    relative: float
    cosine: float
    cka: float


def distance(a: Array, b: Array, device: str = "cpu") -> Distance | None:
    """Distances between two matrices, computed in float32, or float64 where one is stored so, with sums in float64.

    Args:
        a: first matrix, (m, n) or (pieces, m, n), any float dtype.
        b: second matrix, in the shape of `a`.
        device: device that multiplies the two, as torch names it.

    Returns:
        The distances; None where a matrix is zero or not finite.

    Examples:
        >>> import numpy as np
        >>> from htsr.analysis.distance import distance
        >>> found = distance(np.eye(3), -np.eye(3))
        >>> round(found.relative, 6), round(found.cosine, 6)
        (2.0, -1.0)
    """
    A, B = as_numpy(a), as_numpy(b)
    wide = np.float64 if np.float64 in (A.dtype, B.dtype) else np.float32
    A, B = (x.astype(wide, copy=False).reshape(-1, *x.shape[-2:]) for x in (A, B))
    largest = [float(np.abs(x).max(initial=0.0)) for x in (A, B)]
    if 0 in largest or not np.isfinite(largest).all():
        return None
    exponent = _exponent(*largest)
    frobenius = float(np.ldexp(_norm(np.ldexp(A, -exponent) - np.ldexp(B, -exponent)), exponent))
    A, B = (np.ldexp(x, -_exponent(size)) for x, size in zip((A, B), largest, strict=True))
    inner, norm_a, norm_b = float(np.einsum("pij,pij->", A, B, dtype=np.float64)), _norm(A), _norm(B)
    relative = frobenius / float(np.ldexp(norm_a, _exponent(largest[0])))
    cosine = min(max(inner / (norm_a * norm_b), -1.0), 1.0)
    return Distance(frobenius, relative, cosine, cka(A, B, device))


def squared_norm(matrix: Array, minus: Array | None = None) -> float:
    """‖A‖_F² or ‖A - B‖_F², with all sums in float64, some entries at a time: no copy is made.

    Args:
        matrix: A, (m, n) or (pieces, m, n), any float dtype.
        minus: B, in the shape of `matrix`; None for nothing.

    Returns:
        The square; not finite where a matrix is not.

    Examples:
        >>> import numpy as np
        >>> from htsr.analysis.distance import squared_norm
        >>> squared_norm(np.full((2, 2), 3.0)), squared_norm(np.full((2, 2), 3.0), np.ones((2, 2)))
        (36.0, 16.0)
    """
    A = matrix.reshape(-1)
    B = None if minus is None else minus.reshape(-1)
    total = 0.0
    with np.errstate(over="ignore", invalid="ignore"):
        for start in range(0, math.prod(A.shape), _AT_ONCE):
            some = slice(start, start + _AT_ONCE)
            part = as_numpy(A[some]).astype(np.float64)
            if B is not None:
                part -= as_numpy(B[some])
            total += float(np.dot(part, part))
    return total


def _exponent(*numbers: float) -> int:
    """Exponent of the power of two above all `numbers`: scaling by it rounds nothing, and no square overflows."""
    return int(np.frexp(max(numbers))[1])


def _norm(x: Any) -> float:
    """‖x‖_F of entries of any size."""
    largest = float(np.abs(x).max())
    exponent = _exponent(largest)
    return float(np.ldexp(np.sqrt(np.square(np.ldexp(x, -exponent), dtype=np.float64).sum()), exponent))


def cka(A: Any, B: Any, device: str = "cpu") -> float:
    """Linear CKA, ‖AᵀB‖_F² / (‖AᵀA‖_F ‖BᵀB‖_F) for centred columns, summed over pieces; the long side is contracted.

    Args:
        A: first matrix, (pieces, m, n), NumPy, of any scale.
        B: second matrix, in the shape of `A`.
        device: device that multiplies the two, as torch names it.

    Returns:
        A number in [0, 1]; NaN where a matrix is constant along its long side.

    Source: Kornblith, Norouzi, Lee & Hinton (ICML 2019), eq. 4.

    Examples:
        >>> import numpy as np
        >>> from htsr.analysis.distance import cka
        >>> random = np.random.default_rng(0)
        >>> A = random.standard_normal((1, 20, 5))
        >>> rotation, _ = np.linalg.qr(random.standard_normal((5, 5)))
        >>> round(cka(A, A @ rotation), 6), cka(A, random.standard_normal((1, 20, 5))) < 0.5
        (1.0, True)
    """
    # an exact power of two: CKA does not feel the scale, but the fourth powers in it would overflow
    A, B = (np.ldexp(X, -_exponent(float(np.abs(X).max()))) for X in (A, B))
    cross = own_a = own_b = 0.0
    for x, y in zip(A, B, strict=True):
        x, y = (z if z.shape[0] >= z.shape[1] else z.T for z in (x, y))
        x, y = x - x.mean(axis=0), y - y.mean(axis=0)
        cross += _squared_product(x, y, device)
        own_a += _squared_product(x, x, device)
        own_b += _squared_product(y, y, device)
    scale = (own_a * own_b) ** 0.5
    return min(cross / scale, 1.0) if scale > 0 else float("nan")


def _squared_product(x: Any, y: Any, device: str) -> float:
    """‖xᵀy‖_F²."""
    if device == "cpu":
        return float(np.square(x.T @ y, dtype=np.float64).sum())
    import torch

    with exact_products(device):
        product = on_device(x, device).mT @ on_device(y, device)
        return float(torch.linalg.vector_norm(product, dtype=torch.float64)) ** 2
