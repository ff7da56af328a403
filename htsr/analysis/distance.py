"""How far two weight matrices of one shape are apart."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np

from htsr.arrays import Array, Numbers, as_numpy
from htsr.spectra.device import on_device
from htsr.spectra.exact_products import exact_products

_AT_ONCE = 1 << 15  # entries, which stay in the cache
_PLAIN = 100  # exponents of two below which a power is one of float32 and its inverse, too
_SMALL = 1 << 22  # entries of a matrix of which a copy is no matter


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
    A, B = (_stack(x) for x in (a, b))
    largest = [max((_largest(x) for x in _blocks(X)), default=0.0) for X in (A, B)]
    if 0 in largest or not np.isfinite(largest).all():
        return None
    wide = np.float64 if any(x.dtype == np.float64 for x in (next(_blocks(A)), next(_blocks(B)))) else np.float32
    both, own_a, own_b = _exponent(*largest), _exponent(largest[0]), _exponent(largest[1])

    def pairs() -> Iterator[tuple[Numbers, Numbers]]:
        for x, y in zip(_blocks(A), _blocks(B), strict=True):
            yield x.astype(wide, copy=False), y.astype(wide, copy=False)

    def differences() -> Iterator[Numbers]:
        for x, y in pairs():
            yield _scaled(x, -both) - _scaled(y, -both)

    apart = _exponent(max(map(_largest, differences())))
    squares = sum(_square(_scaled(d, -apart)) for d in differences())
    inner = norm_a = norm_b = 0.0
    for x, y in pairs():
        x, y = _scaled(x, -own_a), _scaled(y, -own_b)
        inner += float(np.einsum("ij,ij->", x, y, dtype=np.float64))
        norm_a, norm_b = norm_a + _square(x), norm_b + _square(y)
    frobenius = float(np.ldexp(np.sqrt(squares), apart + both))
    relative = frobenius / float(np.ldexp(np.sqrt(norm_a), own_a))
    cosine = min(max(inner / float(np.sqrt(norm_a * norm_b)), -1.0), 1.0)
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


def _stack(matrix: Array) -> Array:
    """(pieces, m, n); a small matrix at once as the numbers that every pass over it would make of it."""
    stack = matrix if matrix.ndim == 3 else matrix[None]
    return stack if math.prod(stack.shape) > _SMALL else as_numpy(stack)


def _exponent(*numbers: float) -> int:
    """Exponent of the power of two above all `numbers`: scaling by it rounds nothing, and no square overflows."""
    return int(np.frexp(max(numbers))[1])


def _scaled(x: Numbers, exponent: int) -> Numbers:
    """x · 2^exponent; `ldexp` takes several times as long, and is only needed where the power itself overflows."""
    return x * x.dtype.type(2.0**exponent) if abs(exponent) < _PLAIN else np.ldexp(x, exponent)


def _largest(x: Numbers) -> float:
    return float(np.abs(x).max(initial=0.0))


def _square(x: Numbers) -> float:
    """‖x‖_F² of entries of at most 1."""
    return float(np.square(x, dtype=np.float64).sum())


def _blocks(stack: Any, square: bool = False) -> Iterator[Numbers]:
    """Some rows of each piece of a stack at a time, NumPy; as many as there are columns where `square`, or more."""
    for tall in stack:
        step = max(tall.shape[1] if square else 1, _AT_ONCE // max(1, tall.shape[1]))
        for start in range(0, tall.shape[0], step):
            yield as_numpy(tall[start : start + step])


def cka(A: Any, B: Any, device: str = "cpu") -> float:
    """Linear CKA, ‖AᵀB‖_F² / (‖AᵀA‖_F ‖BᵀB‖_F) for centred columns, summed over pieces; the long side is contracted.

    Args:
        A: first matrix, (pieces, m, n), of any scale.
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
    cross = own_a = own_b = 0.0
    for X, Y in zip(A, B, strict=True):
        x, y = _centred(X), _centred(Y)
        cross += _squared_product(x, y, device)
        own_a += _squared_product(x, x, device)
        own_b += _squared_product(y, y, device)
    scale = (own_a * own_b) ** 0.5
    return min(cross / scale, 1.0) if scale > 0 else float("nan")


Blocks = Callable[[], Iterator[Numbers]]


def _centred(piece: Any) -> Blocks:
    """Blocks of the long side of a matrix, its columns centred, scaled by a power of two.

    CKA does not feel the scale, but the fourth powers in it would overflow.
    """
    tall = piece if piece.shape[0] >= piece.shape[1] else piece.swapaxes(0, 1)

    def blocks() -> Iterator[Numbers]:
        for x in _blocks([tall], square=True):  # a product of fewer rows takes longer to add than to compute
            yield x if x.dtype == np.float64 else x.astype(np.float32, copy=False)

    exponent = _exponent(max(map(_largest, blocks())))
    mean = sum(_scaled(x, -exponent).sum(axis=0, dtype=np.float64) for x in blocks()) / len(tall)

    def centred() -> Iterator[Numbers]:
        return (_scaled(x, -exponent) - mean.astype(x.dtype) for x in blocks())

    if math.prod(tall.shape) > _SMALL:
        return centred
    kept = list(centred())
    return lambda: iter(kept)


def _squared_product(x: Blocks, y: Blocks, device: str) -> float:
    """‖xᵀy‖_F²."""
    if device == "cpu":
        product = reduce(np.add, (a.T @ b for a, b in zip(x(), y(), strict=True)))
        return sum(_square(rows) for rows in _blocks([product]))
    import torch

    with exact_products(device):
        total = reduce(
            torch.add, (on_device(a, device).mT @ on_device(b, device) for a, b in zip(x(), y(), strict=True))
        )
        return float(torch.linalg.vector_norm(total, dtype=torch.float64)) ** 2
