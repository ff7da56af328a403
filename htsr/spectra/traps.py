"""Removal of correlation traps: a shifted mean is subtracted, single large entries are clipped.

Sources: SETOL (arXiv 2507.17912) for traps; Benaych-Georges & Nadakuditi (J. Multivar. Anal. 111, 2012) for the size at
which a perturbation of rank one leaves the bulk.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from htsr.arrays import Array, as_numpy
from htsr.spectra.bulk import fit_bulk
from htsr.spectra.esd import esd
from htsr.spectra.permutation import permute_entries

CLIP_STEP = 0.8
CLIP_ROUNDS = 4


@dataclass(frozen=True)
class CleanedMatrix:
    """A matrix without its correlation traps, as far as they could be removed.

    Attributes:
        matrix: cleaned matrix, in shape, dtype and kind of the one that was given; that one where nothing was done.
        traps_before: number of eigenvalues of the permuted matrix beyond its bulk edge.
        traps_after: the same number for the cleaned matrix under the same permutation.
        mean_removed: mean that was subtracted from every entry; 0.0 where nothing was.
        limit: size beyond which entries were clipped to ± this size; infinite where none were.
        clipped: number of entries that were clipped.
    """

    matrix: Array
    traps_before: int
    traps_after: int
    mean_removed: float
    limit: float
    clipped: int


def remove_traps(matrix: Array, *, seed: int | tuple[int, ...] = 0) -> CleanedMatrix:
    """The matrix without the two things that make correlation traps.

    A trap is a spike of the *permuted* matrix: it stems from the entries, not from where they stand, so W has no
    direction that is the trap. Both causes act as a perturbation of rank one, which leaves the bulk of a matrix with
    entries of standard deviation σ once its singular value exceeds σ·(N·M)^¼ (Benaych-Georges & Nadakuditi 2012):

    - a **shifted mean** has the singular value |mean|·√(N·M). Where that is beyond, the mean is subtracted from every
      entry.
    - a **single large entry** has its own size as singular value. Where traps remain, entries are clipped at
      ±σ·(N·M)^¼, then at 0.8 of that, up to four times, until no trap is left: two large entries in a row or column
      count together.

    σ is that of the permuted matrix's Marchenko-Pastur bulk. Both steps change what the layer computes, the first by a
    multiple of the sum of its inputs; whether the model is better for it is a question to its error, not to the
    spectrum. Traps of many moderately large entries (a heavy-tailed entry distribution) remain, and are reported.

    Args:
        matrix: (m, n), or (pieces, m, n) with one mean and σ of all pieces; NumPy or torch, any float dtype. It is
            changed in float64, and permuted and decomposed in float32, on a CPU wherever it lies.
        seed: seed of the permutation, the same before and after.

    Returns:
        A `CleanedMatrix`, whose matrix has shape, dtype and kind of the one that was given.

    Raises:
        MatrixError: entries are NaN, infinite or overflow (status ``nan``), or there are none (``empty``).
        UsageError: the matrix has other dimensions.

    Sources: SETOL (arXiv 2507.17912) for traps; Benaych-Georges & Nadakuditi (J. Multivar. Anal. 111, 2012).

    Examples:
        >>> import htsr, numpy as np
        >>> W = np.random.default_rng(0).standard_normal((200, 100))
        >>> W[3, 5] = 40.0
        >>> found = htsr.remove_traps(W)
        >>> found.traps_before, found.traps_after, found.clipped, round(found.limit, 1)  # 20000^¼ = 11.9
        (1, 0, 1, 11.8)
    """
    W = as_numpy(matrix)
    before, sigma = _traps(W, seed)
    if before == 0 or sigma == 0:
        return CleanedMatrix(matrix, before, before, 0.0, np.inf, 0)
    size = float(W.shape[-2] * W.shape[-1])
    values = W.astype(np.float64)
    mean = float(values.mean())
    removed = mean if abs(mean) > sigma * size**-0.25 else 0.0
    values -= removed
    after, sigma = _traps(values, seed) if removed else (before, sigma)
    limit, clipped, edge = np.inf, 0, sigma * size**0.25
    for round_ in range(CLIP_ROUNDS):
        if after == 0:
            break
        beyond = int(np.count_nonzero(np.abs(values) > edge * CLIP_STEP**round_))
        if beyond:
            limit, clipped = edge * CLIP_STEP**round_, beyond
            np.clip(values, -limit, limit, out=values)
            after, _ = _traps(values, seed)
    if removed == 0.0 and clipped == 0:
        return CleanedMatrix(matrix, before, before, 0.0, np.inf, 0)
    return CleanedMatrix(_like(values, matrix), before, after, removed, limit, clipped)


def _traps(W: npt.NDArray[Any], seed: int | tuple[int, ...]) -> tuple[int, float]:
    """Traps, and σ of the permuted matrix's bulk."""
    spectrum = esd(permute_entries(W, seed), route="gram", dtype="float32")
    if spectrum.eigenvalues[-1] == 0.0:
        return 0, 0.0
    bulk = fit_bulk(spectrum.eigenvalues, spectrum.M, spectrum.N, spectrum.pieces)
    return bulk.num_spikes, bulk.sigma


def _like(values: npt.NDArray[np.float64], matrix: Array) -> Array:
    """`values` in dtype, kind and place of `matrix`."""
    if isinstance(matrix, np.ndarray):
        return values.astype(matrix.dtype)
    import torch

    return torch.from_numpy(values).to(matrix)
