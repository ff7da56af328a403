"""What of a spectrum is rounding, judged by the precision that the numbers were stored in.

Numbers stored with a machine epsilon ε (of bfloat16 2⁻⁷) carry independent errors of standard deviation

    ρ·rms,   ρ = ε·√(0.541/12) = 0.212·ε,

0.541 being the mean of (power of two below x / x)² over mantissas. Where W has the rank M - k, these errors alone make
the k smallest eigenvalues of WᵀW: they are those of a k × (N-M+k) matrix of noise, and end at the Marchenko-Pastur edge

    ρ²·(1 + r/2)·rms²·(√(N-M+k) + √k)²,   r = M - k,

where r/2 stands for a product of float32 factors that was summed up over r terms (with float32's ε, or float64's where
W is stored so). So the `k` smallest are taken for rounding, and set to 0, where

- the k-th lies below 16 times that edge: entries of unequal size have uneven errors, whose largest singular value is up
  to 4 times as large; and
- k ≥ 32ρ·M, six times as many as a Gaussian matrix of full rank has below that edge, which grows with k. In float32
  that is any k, in bfloat16 5 % of M. Fewer small eigenvalues are what full rank looks like, and stay.

In bfloat16 and float16, errors are not much smaller than what training leaves, and what the rule above finds there is
held to more. A row or column of small entries has small errors, and scaling rows and columns changes no rank: W is
scaled so that the errors, known from the entries' exponents, are alike in all rows and columns. In that matrix the k
smallest eigenvalues must end within 1.5² of the edge of errors, and singular values jump to twice as much from there;
k ≥ 8, or M/4 of a small matrix, is then enough. Noise beside signals is told from rounding where it is larger than
1.2 times ρ·rms (in bfloat16 0.2 % of the rms). A spectrum that runs on through the edge stays whole.

max(m, n)·ε·σ_max, the usual threshold, is a bound on errors that conspire. In bfloat16 it exceeds σ_max itself from
N = 128 on, and in float32 it takes true eigenvalues away from a Gaussian matrix of N = 4096.

Whatever computed the numbers did so in float32 at least, with errors in the direction of the largest singular value: so
λ ≤ 2⁻⁴⁸·λ_max, below float32's unit roundoff for singular values, is not resolved, unless stored in float64. That is
also what a Gram matrix in float64 resolves.

The difference of two stored matrices carries the errors of both, and a base with an adapter added to it those of the
base, which their entries know and its own do not: a reader that computes says how large they are (`Difference`). Errors
are then often no smaller than the smaller changes, and k may also be any number from 8 on above whose eigenvalues the
singular values jump to twice as much, as at the rank of a merged adapter; a spectrum that runs on through the edge
stays whole.

De-quantised weights (integers with scales, float8, 4 bits) are products in float32 and judged as such. Their steps are
no smaller than the bulk that training leaves: noise of that size cannot be told from true eigenvalues.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from htsr.arrays import EPSILON, MANTISSAS, Array, Vector, epsilon
from htsr.errors import MatrixError

if TYPE_CHECKING:
    import torch

MIN_EIGENVALUES = 8  # with fewer there is no tail to speak of
_SMALLEST = {"float16": 2.0**-24, "bfloat16": 2.0**-133}  # steps of subnormal numbers
_BALANCING = 4
_NO_ERROR = -(2**14)  # 2 to the power of it is 0
_CHUNK = 1 << 22  # entries that are up-cast at a time
_UNEVEN = 4.0  # of the errors' singular values over those of even errors
_SHARE = 8.0  # of ρ·M times the unevenness: what k must reach
_EVEN = 1.5  # of the largest singular value of errors that were made even over its expectation
_JUMP = 2.0  # from the singular values of errors to the smallest of a change
_COMPUTED = 64.0  # ulps between eigenvalues of a matrix that was made orthogonal in float32 (measured: 31 at M = 1024)


def without_rounding(eigenvalues: Vector, N: int, stored: str, rounding: float | None = None) -> Vector:
    """The eigenvalues of single matrices, with those that are only rounding set to 0, as the module's text says.

    Args:
        eigenvalues: (…, M) ≥ 0, ascending along the last axis.
        N: larger side of the matrices.
        stored: dtype that their entries were stored in, as torch names it.
        rounding: mean square of their entries' errors, where that is known otherwise (`Difference`).

    Returns:
        (…, M) float64, in the same order.

    Examples:
        >>> import numpy as np
        >>> from htsr.spectra.resolution import without_rounding
        >>> random = np.random.default_rng(0)
        >>> W = random.standard_normal((400, 60)) @ random.standard_normal((60, 200))  # rank 60
        >>> stored = W.astype(np.float32).astype(np.float64)
        >>> eigenvalues = np.linalg.svd(stored, compute_uv=False)[::-1] ** 2
        >>> int(np.count_nonzero(eigenvalues)), int(np.count_nonzero(without_rounding(eigenvalues, 400, "float32")))
        (200, 60)
    """
    M = eigenvalues.shape[-1]
    eps = epsilon(stored)
    summed = min(eps, EPSILON["float32"])
    largest = eigenvalues[..., -1:]
    k = np.arange(1, M + 1)
    square = eigenvalues.sum(axis=-1, keepdims=True) / (M * N)
    # for each k at once: the errors of rank M - k, and whether the k smallest look like them
    stored_errors = MANTISSAS**2 * eps**2 * square if rounding is None else np.full_like(square, rounding)
    errors = stored_errors + MANTISSAS**2 * summed**2 * square * (M - k) / 2
    alike = eigenvalues <= _UNEVEN**2 * errors * (np.sqrt(N - M + k) + np.sqrt(k)) ** 2
    many = k >= _SHARE * _UNEVEN * M * np.sqrt(stored_errors / np.where(square > 0, square, 1.0))
    if rounding is not None:
        many |= (k >= MIN_EIGENVALUES) & _jumps(eigenvalues)
    noise = np.where(alike & many, k, 0).max(axis=-1, keepdims=True)
    lost = (k <= noise) | (eigenvalues <= (summed / 2) ** 2 * largest)
    return np.where(lost, 0.0, eigenvalues)


def is_coarse(stored: str) -> bool:
    """Whether errors of that dtype are not much smaller than what training leaves.

    Args:
        stored: dtype as torch names it.
    """
    return stored in _SMALLEST


def rounded_away(matrix: Array, stored: str) -> int:
    """How many eigenvalues of a matrix in a coarse dtype are rounding, judged with errors made even.

    It is computed in float64 where the matrix lies, which is not copied whole in a wider dtype.

    Args:
        matrix: (m, n), the numbers as stored, in any float dtype.
        stored: ``bfloat16`` or ``float16``.

    Returns:
        Their number k among the M = min(m, n) eigenvalues of the Gram matrix; zero rows and columns count, too.

    Examples:
        >>> import numpy as np, torch
        >>> from htsr.spectra.resolution import rounded_away
        >>> random = np.random.default_rng(0)
        >>> W = random.standard_normal((400, 60)) @ random.standard_normal((60, 200))  # rank 60
        >>> rounded_away(torch.from_numpy(W).bfloat16(), "bfloat16")
        140
    """
    import torch

    W = torch.as_tensor(matrix).detach()
    filled = W != 0
    rows, columns = filled.any(dim=1), filled.any(dim=0)
    N, M = int(rows.sum()), int(columns.sum())
    if N < M:
        W, filled, columns, N, M = W.mT, filled.mT, rows, M, N
    empty = min(matrix.shape) - M
    if M == 0:
        return empty
    across, down = _even_scales(W, filled, stored)
    gram = torch.zeros((W.shape[1], W.shape[1]), dtype=torch.float64, device=W.device)
    for part, scales in zip(torch.split(W, _rows(W)), torch.split(across, _rows(W)), strict=True):
        block = part.double() * scales[:, None].sqrt()
        gram.addmm_(block.mT, block)
    gram *= torch.outer(down, down).sqrt_()
    eigenvalues = torch.linalg.eigvalsh(gram[columns][:, columns] if empty else gram).cpu().numpy()
    k = np.arange(1, M + 1)
    alike = eigenvalues <= _EVEN**2 * (np.sqrt(N - M + k) + np.sqrt(k)) ** 2
    many = k >= min(MIN_EIGENVALUES, M / 4)
    return empty + int(np.where(alike & many & _jumps(eigenvalues), k, 0).max())


def _even_scales(W: torch.Tensor, filled: torch.Tensor, stored: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Factors of rows and of columns that make the errors' variances 1 on average in each; 0 where all entries are 0.

    An error is uniform in the spacing of the stored numbers about its entry. Rows and columns are scaled in turn
    (Sinkhorn): scaling either unsettles the other a little.
    """
    import torch

    spacing = torch.frexp(W.float()).exponent.to(torch.int16)  # as a power of two, until it has been scaled
    spacing += round(math.log2(epsilon(stored))) - 1
    spacing.clamp_(min=round(math.log2(_SMALLEST[stored]))).masked_fill_(~filled, _NO_ERROR)

    def variances(part: torch.Tensor) -> torch.Tensor:
        return torch.exp2(part.double().mul_(2)).div_(12)

    across = filled.any(dim=1).double()
    down = filled.any(dim=0).double()
    N, M = across.sum(), down.sum()
    parts = torch.split(spacing, _rows(W))
    for _ in range(_BALANCING):
        shares = zip(parts, torch.split(across, _rows(W)), strict=True)
        down = _inverse(torch.stack([variances(part).mT @ scales for part, scales in shares]).sum(dim=0) / N)
        across = _inverse(torch.cat([variances(part) @ down for part in parts]) / M)
    return across, down


def _inverse(values: torch.Tensor) -> torch.Tensor:
    return values.reciprocal().masked_fill_(values == 0, 0.0)


def _rows(W: torch.Tensor) -> int:
    """How many rows are up-cast at a time."""
    return max(1, _CHUNK // W.shape[1])


def _jumps(eigenvalues: npt.NDArray[np.floating[Any]]) -> npt.NDArray[np.bool_]:
    """Whether singular values jump from one to the next."""
    jumps: npt.NDArray[np.bool_] = np.zeros(eigenvalues.shape, dtype=np.bool_)
    jumps[..., :-1] = eigenvalues[..., 1:] >= _JUMP**2 * eigenvalues[..., :-1]
    return jumps


def equal_within(M: int, N: int, stored: str) -> float:
    """Relative difference of eigenvalues that are equal but for rounding: all those of an orthogonal matrix.

    Errors E of a matrix of equal singular values s change WᵀW by s·(E + Eᵀ), whose eigenvalues span
    4·√(2M)·s·ρ·rms, which is 1.2·ε·√(M/N) of s² (measured: the same to 5 %); twice that, and what computing adds.

    Args:
        M: smaller side of the matrix.
        N: larger side of the matrix.
        stored: dtype that the entries were stored in, as torch names it.
    """
    return 2.4 * epsilon(stored) * (M / N) ** 0.5 + _COMPUTED * EPSILON["float32"]


def distinct(values: Vector, within: float, enough: int) -> int:
    """How many of `values` differ by more than `within`, counted up to `enough`.

    Args:
        values: (K,) positive, ascending.
        within: relative difference up to which two values count as one.
        enough: number at which counting stops.

    Examples:
        >>> import numpy as np
        >>> from htsr.spectra.resolution import distinct
        >>> distinct(np.array([1.0, 1.0 + 1e-9, 2.0, 3.0]), within=1e-6, enough=8)
        3
    """
    found = start = 0
    while start < values.size and found < enough:
        start = int(np.searchsorted(values, values[start] * (1 + within), side="right"))
        found += 1
    return found


def require_tail(eigenvalues: Vector, within: float) -> None:
    """Refuse a spectrum that has no tail to speak of, so that no exponent of it would mean anything.

    Args:
        eigenvalues: (K,) ≥ 0, ascending; those that are only rounding are 0.
        within: relative difference up to which two values count as one.

    Raises:
        MatrixError: fewer than `MIN_EIGENVALUES` eigenvalues are above the resolution (status ``tiny``), or fewer than
            that differ by more than rounding (``degenerate``), as for an orthogonal matrix.
    """
    positive = eigenvalues[eigenvalues > 0]
    if (rank := positive.size) < MIN_EIGENVALUES:
        beyond = "" if rank == eigenvalues.size else " above the resolution"
        raise MatrixError("tiny", f"{rank} eigenvalue{'' if rank == 1 else 's'}{beyond}, too few for a fit")
    if (found := distinct(positive, within, MIN_EIGENVALUES)) < MIN_EIGENVALUES:
        are = "all eigenvalues are equal" if found == 1 else f"{found} distinct eigenvalues"
        raise MatrixError("degenerate", f"{are} but for rounding, so there is no tail to fit")
