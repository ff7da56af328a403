"""What the spectrum of a change ΔW = W - W_base allows to take back of it, without data.

=========== ==========================================================================================================
denoise     the singular values of ΔW above the optimal hard threshold of Gavish & Donoho for noise of unknown size
intruders   leading singular vectors of W that are like none of W_base, their singular values multiplied by a factor
ECS, rank k ΔW on its leading directions: `htsr.spectra.directions.project_tail` of ΔW
=========== ==========================================================================================================

The threshold. Y = X + noise, (M, N) with β = M/N ≤ 1, independent entries of variance s². Of all hard thresholds of the
singular values of Y the one with the least asymptotic mean square error is τ = λ(β)·√N·s, with

    λ(β) = √(2(β + 1) + 8β / (β + 1 + √(β² + 14β + 1))),      4/√3 where β = 1.

Where s is not known, the median singular value of Y tells it, since the noise is most of them: τ = ω(β)·median(σ) with
ω(β) = λ(β)/√μ(β), where μ(β) is the median of the Marchenko-Pastur law. The paper's ω ≈ 0.56β³ - 0.95β² + 1.82β + 1.43
is a fit of it; here μ is taken from the law itself. Null: of a change that is noise alone nothing is kept, since τ lies
above the largest singular value, √N·s·(1 + √β). Where half of ΔW's singular values or more are 0, as with LoRA, there
is no noise to tell: a median below σ_max/2²⁴, which is not resolved, counts as that, and nothing of weight goes.

An intruder (arXiv 2410.21228) is one of the k leading left singular vectors of W whose largest |cosine| with all left
singular vectors of W_base is below ε. With factor f its singular value σ becomes f·σ: W + (f - 1)·Σ σ·u·vᵀ over the
intruders. Null: a Gaussian change makes an intruder only where it moves a leading singular vector by more than
arccos(ε), which takes a change whose largest singular value is like W's own.

Sources: Gavish & Donoho (IEEE Trans. Inf. Theory 60, 2014), eqs. 3 to 5; DG-Hard (arXiv 2605.20296) for its use on ΔW
and its code for what it leaves alone; Shuttleworth et al. (arXiv 2410.21228) and PEFT's `reduce_intruder_dimension`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from htsr.arrays import Array, Vector
from htsr.errors import MatrixError, UsageError
from htsr.spectra.bulk import mp_quantile
from htsr.spectra.directions import decompose, rescaled, stack
from htsr.spectra.intruders import LeftVectors
from htsr.spectra.leading import leading
from htsr.spectra.sums import Sum

if TYPE_CHECKING:
    import torch

_CHUNK = 1 << 20  # entries that are computed in float64 at a time
_RESOLVED = 2.0**-24  # of σ_max: what eigenvalues of a Gram matrix in float64 resolve


@dataclass(frozen=True)
class Denoised:
    """A change without what looks like noise.

    Attributes:
        matrix: the denoised change, in shape, dtype and kind (NumPy or torch) of the one that was given.
        kept: number of singular values above the threshold, over all pieces.
        total: number of singular values, over all pieces.
        norm_kept: share of ‖ΔW‖_F² that was kept.
        threshold: the threshold τ, in units of the singular values; the largest where there are several pieces.
    """

    matrix: Array
    kept: int
    total: int
    norm_kept: float
    threshold: float


@dataclass(frozen=True)
class Shrunk:
    """A matrix whose intruders have been made smaller.

    Attributes:
        matrix: the new matrix, in shape, dtype and kind (NumPy or torch) of the one that was given.
        intruders: number of intruders that were found, over all pieces.
    """

    matrix: Array
    intruders: int


def threshold_of_known_noise(beta: float) -> float:
    """The factor λ(β) of the optimal hard threshold τ = λ(β)·√N·s for noise of known standard deviation s.

    Args:
        beta: aspect ratio M/N of the matrix, in (0, 1].

    Source: Gavish & Donoho (IEEE Trans. Inf. Theory 60, 2014), eq. 3.

    Examples:
        >>> from htsr.spectra.denoising import threshold_of_known_noise
        >>> round(threshold_of_known_noise(1.0), 6), round(4 / 3**0.5, 6)
        (2.309401, 2.309401)
    """
    return float((2 * (beta + 1) + 8 * beta / (beta + 1 + (beta**2 + 14 * beta + 1) ** 0.5)) ** 0.5)


def noise_threshold(singular_values: Vector, M: int, N: int) -> float:
    """The optimal hard threshold τ = ω(β)·median(σ) for noise of unknown size.

    Args:
        singular_values: (M,) all singular values of a matrix, in any order.
        M: smaller side of the matrix.
        N: larger side of the matrix.

    Returns:
        The threshold in units of the singular values; 0 where half of them or more are 0.

    Source: Gavish & Donoho (IEEE Trans. Inf. Theory 60, 2014), eqs. 4 and 5.

    Examples:
        >>> import numpy as np
        >>> from htsr.spectra.denoising import noise_threshold, threshold_of_known_noise
        >>> noise = np.random.default_rng(0).standard_normal((200, 400))
        >>> found = noise_threshold(np.linalg.svd(noise, compute_uv=False), 200, 400)
        >>> round(found / (400**0.5 * threshold_of_known_noise(0.5)), 2)  # the size of the noise, which is 1
        1.0
    """
    median = float(np.median(singular_values))
    return threshold_of_known_noise(M / N) * median / float(mp_quantile(0.5, N / M)) ** 0.5


def denoise(change: Array) -> Denoised:
    """The change on the directions whose singular values exceed the optimal hard threshold.

    Args:
        change: (m, n), or (pieces, m, n), each piece with a threshold of its own; any float dtype. It is computed in
            float64 where it lies.

    Returns:
        A `Denoised`.

    Raises:
        MatrixError: all entries are zero (status ``zero``), some are NaN or infinite (``nan``), or there are none
            (``empty``).

    Source: Gavish & Donoho (IEEE Trans. Inf. Theory 60, 2014); DG-Hard (arXiv 2605.20296) for changes of weights.

    Examples:
        >>> import numpy as np
        >>> from htsr.spectra.denoising import denoise
        >>> random = np.random.default_rng(0)
        >>> signal = 80 * np.outer(np.ones(100) / 10, np.ones(64) / 8)  # σ = 80, and the noise ends at 18
        >>> found = denoise(signal + random.standard_normal((100, 64)))
        >>> found.kept, found.total, bool(np.linalg.norm(found.matrix - signal) < 20)
        (1, 64, True)
    """
    found = decompose(change, rounding=True)  # rounding is noise, too
    if not found.values.any():
        raise MatrixError("zero", "all entries of the change are zero")
    singular = np.sqrt(found.values)
    M, N = sorted(change.shape[-2:])
    resolved = np.maximum(singular, _RESOLVED * singular.max(axis=1, keepdims=True))
    thresholds = np.array([noise_threshold(values, M, N) for values in resolved])
    chosen = (singular > thresholds[:, None]) & (singular > 0)
    return Denoised(
        matrix=rescaled(change, found.vectors, chosen.astype(np.float64)),
        kept=int(chosen.sum()),
        total=chosen.size,
        norm_kept=float(found.values[chosen].sum() / found.values.sum()),
        threshold=float(thresholds.max()),
    )


def intruders(base: Array | tuple[LeftVectors, ...], tuned: Array, k: int = 10, epsilon: float = 0.5) -> int:
    """How many of the `k` leading left singular vectors of `tuned` are intruders, over all pieces.

    Args:
        base: (m, n) or (pieces, m, n), any float dtype, or what `left_vectors` gives of it.
        tuned: matrix after training, in the shape of `base`.
        k: number of leading singular vectors of `tuned` that are looked at.
        epsilon: cosine below which a vector is like none of the base.

    Raises:
        MatrixError: entries are NaN or infinite (status ``nan``), or there are none (``empty``).
        UsageError: `k` or `epsilon` has no meaning.

    Source: Shuttleworth et al. (arXiv 2410.21228), algorithm 1.

    Examples:
        >>> import numpy as np
        >>> from htsr.spectra.denoising import intruders
        >>> base = np.diag([3.0, 2.0, 1.0, 0.5])
        >>> direction = np.ones(4) / 2
        >>> intruders(base, base + 9 * np.outer(direction, direction), k=1, epsilon=0.8)
        1
    """
    return sum(left.shape[1] for left, _ in _intruding(base, tuned, k, epsilon))


def shrink_intruders(
    base: Array | tuple[LeftVectors, ...], tuned: Array, factor: float = 0.75, k: int = 10, epsilon: float = 0.5
) -> Shrunk:
    """The matrix after training with the singular values of its intruders multiplied by `factor`.

    Args:
        base: (m, n) or (pieces, m, n), any float dtype, or what `left_vectors` gives of it.
        tuned: matrix after training, in the shape of `base`.
        factor: factor of the intruders' singular values; 1 changes nothing, 0 removes them.
        k: number of leading singular vectors of `tuned` that are looked at.
        epsilon: cosine below which a vector is like none of the base.

    Returns:
        A `Shrunk`.

    Raises:
        MatrixError: entries are NaN or infinite (status ``nan``), or there are none (``empty``).
        UsageError: `k` or `epsilon` has no meaning.

    Source: Shuttleworth et al. (arXiv 2410.21228), where intruders are scaled down; the default is PEFT's.

    Examples:
        >>> import numpy as np
        >>> from htsr.spectra.denoising import shrink_intruders
        >>> base = np.diag([3.0, 2.0, 1.0, 0.5])
        >>> direction = np.ones(4) / 2
        >>> found = shrink_intruders(base, base + 9 * np.outer(direction, direction), factor=0.0, k=1, epsilon=0.8)
        >>> found.intruders, bool(np.linalg.norm(found.matrix, 2) < 3)
        (1, True)
    """
    import torch

    found = _intruding(base, tuned, k, epsilon)
    result = stack(tuned).clone()
    for piece, (left, right) in zip(result, found, strict=True):
        rows = max(1, _CHUNK // piece.shape[1])
        for block, u in zip(torch.split(piece, rows), torch.split(left, rows), strict=True):
            block.add_(((factor - 1) * (u @ right.mT)).to(block))
    result = result.reshape(tuple(tuned.shape))
    matrix = result.numpy() if isinstance(tuned, np.ndarray) else result
    return Shrunk(matrix, sum(left.shape[1] for left, _ in found))


def left_vectors(base: Array) -> tuple[LeftVectors, ...]:
    """The left singular vectors of each piece of a base, computed once they are needed, and once.

    Args:
        base: (m, n) or (pieces, m, n), any float dtype.
    """
    return tuple(
        LeftVectors(one, one.terms[0][1].new_zeros((one.shape[0], 1)).double()) for one in map(Sum.of, stack(base))
    )


def _intruding(
    base: Array | tuple[LeftVectors, ...], tuned: Array, k: int, epsilon: float
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The intruders of each piece: left vectors u (m, count) and σ·v (n, count), float64."""
    import torch

    if isinstance(k, bool) or not isinstance(k, int) or k < 1:
        raise UsageError(f"k is a number of singular vectors, not {k!r}")
    if not 0 <= epsilon <= 1:
        raise UsageError(f"epsilon is a cosine between 0 and 1, not {epsilon!r}")
    found = []
    for known, W in zip(base if isinstance(base, tuple) else left_vectors(base), stack(tuned), strict=True):
        first = leading(W, min(k, *W.shape))
        chosen = first.values > _RESOLVED * first.values[0]
        if chosen.any():
            chosen[chosen] = known.nearest(first.left[:, torch.from_numpy(chosen)]) < epsilon
        which = torch.from_numpy(chosen)
        values = torch.from_numpy(first.values[chosen]).to(first.right)
        found.append((first.left[:, which], first.right[:, which] * values))
    return found
