"""What the directions of two matrices are compared by: the numbers of `htsr.spectra.subspaces`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np

from htsr.arrays import Vector

EPSILONS = (0.3, 0.5, 0.7, 0.9)  # cosines below which a direction is new; 0.5 is the paper's and PEFT's
EPSILON = 0.5
_SUMMED = ("intruders", "intruders_null", "intruder_counts", "intruder_counts_null")
_LARGEST = (
    "error",
    "largest_angle_left",
    "largest_angle_left_null",
    "largest_angle_right",
    "largest_angle_right_null",
)


@dataclass(frozen=True)
class Directions:
    """The directions of B beside those of A. Nulls are None where nothing changed.

    The nulls of overlaps, angles and intruders are those of seeded draws, one by default. Draws scatter (standard
    deviation over draws, on matrices of SmolLM2): the median angle by 2 to 8 %, 1 - overlap and the largest angle by
    15 to 40 %, since they hang on the gap between the k-th singular value and the next. Only what is a few times its
    null, or several draws, says something of one matrix; means over many matrices need one draw. Where the k-th and
    the next singular value are so close that the null scatters more, `notes` say so.

    Of a stack of matrices, such as the kernel of a convolution, numbers are means over its pieces; counts of intruders
    are sums, largest angles and errors the largest, the gap is the smallest; what is listed for each direction is
    listed for all of all pieces, one piece after the other, and the cosines are (pieces, k, k).

    Attributes:
        k: number of leading singular vectors that are compared: what was asked for, but no more than A and B have
            above the rounding errors of their entries.
        overlap_left: overlap of the leading left subspaces, ‖U_AᵀU_B‖_F² / k, in [0, 1]; 1 where they are the same.
        overlap_left_null: `overlap_left` of a Gaussian change of the same norm.
        overlap_right: overlap of the leading right subspaces, ‖V_AᵀV_B‖_F² / k.
        overlap_right_null: `overlap_right` of a Gaussian change of the same norm.
        chance_left: overlap of unrelated left subspaces, k/m.
        chance_right: overlap of unrelated right subspaces, k/n.
        angle_left: median principal angle between the left subspaces, in degrees, in [0, 90].
        angle_left_null: `angle_left` of a Gaussian change of the same norm.
        angle_right: median principal angle between the right subspaces, in degrees.
        angle_right_null: `angle_right` of a Gaussian change of the same norm.
        largest_angle_left: largest principal angle between the left subspaces, in degrees.
        largest_angle_left_null: `largest_angle_left` of a Gaussian change of the same norm.
        largest_angle_right: largest principal angle between the right subspaces, in degrees.
        largest_angle_right_null: `largest_angle_right` of a Gaussian change of the same norm.
        intruders: number of intruder dimensions at ε = 0.5: leading left singular vectors of B whose |cosine| with
            every left singular vector of A is below ε.
        intruders_null: `intruders` of a Gaussian change of the same norm.
        intruder_counts: the same number for each ε of `EPSILONS`.
        intruder_counts_null: `intruder_counts` of a Gaussian change of the same norm.
        share_both: share of ‖Δ‖_F² within the leading left and right subspaces of A, ‖U_AᵀΔV_A‖² / ‖Δ‖².
        share_both_null: the same of a Gaussian change, k²/(mn).
        share_left: share of ‖Δ‖_F² within the leading left subspace of A, ‖U_AᵀΔ‖² / ‖Δ‖².
        share_left_null: the same of a Gaussian change, k/m.
        share_right: share of ‖Δ‖_F² within the leading right subspace of A, ‖ΔV_A‖² / ‖Δ‖².
        share_right_null: the same of a Gaussian change, k/n.
        share_scaling: share of ‖Δ‖_F² that only rescales leading directions of A, Σ_j (u_jᵀΔv_j)² / ‖Δ‖².
        share_scaling_null: the same of a Gaussian change, k/(mn).
        effective_rank: effective rank of Δ, the exponential of the entropy of its singular values over their sum.
        effective_rank_null: effective rank of a Gaussian matrix, by the Marchenko-Pastur law.
        change_stable_rank: stable rank of Δ, ‖Δ‖_F² / σ_1².
        change_stable_rank_null: stable rank of a Gaussian matrix, mn / (√m + √n)².
        relative: size of the change, ‖Δ‖_F / ‖A‖_F.
        gap: distance of the k-th from the next singular value over the k-th, (σ_k - σ_{k+1}) / σ_k, the smaller one of
            A and B. The leading subspace is less sure the smaller it is, and undefined at 0.
        error: largest residual of the singular vectors, ‖Wᵀu - σv‖ / σ_1.
        nearest: largest |cosine| of each leading left singular vector of B with any left singular vector of A, (k,).
        values: leading singular values of B, (k,), largest first, in the unit of the entries; those of intruders are
            where `nearest` is below ε.
        base_values: leading singular values of A, (k,).
        cosines: |U_AᵀU_B|, (k, k) float64: rows are vectors of A, columns those of B.
        notes: sentences about numbers that cannot be relied on.
    """

    k: int
    overlap_left: float
    overlap_right: float
    angle_left: float
    angle_right: float
    largest_angle_left: float
    largest_angle_right: float
    intruders: int
    intruder_counts: tuple[int, ...]
    chance_left: float
    chance_right: float
    relative: float
    gap: float
    error: float
    nearest: tuple[float, ...]
    values: tuple[float, ...]
    base_values: tuple[float, ...]
    cosines: Vector = field(repr=False, compare=False)
    share_both: float | None = None
    share_left: float | None = None
    share_right: float | None = None
    share_scaling: float | None = None
    effective_rank: float | None = None
    change_stable_rank: float | None = None
    overlap_left_null: float | None = None
    overlap_right_null: float | None = None
    angle_left_null: float | None = None
    angle_right_null: float | None = None
    largest_angle_left_null: float | None = None
    largest_angle_right_null: float | None = None
    intruders_null: float | None = None
    intruder_counts_null: tuple[float, ...] | None = None
    share_both_null: float | None = None
    share_left_null: float | None = None
    share_right_null: float | None = None
    share_scaling_null: float | None = None
    effective_rank_null: float | None = None
    change_stable_rank_null: float | None = None
    notes: tuple[str, ...] = ()


def pooled(pieces: Sequence[Directions]) -> Directions:
    """One `Directions` of a stack of matrices, as `Directions` says.

    Args:
        pieces: those of its pieces, at least one.
    """

    def of_all(name: str) -> Any:
        found = [getattr(piece, name) for piece in pieces if getattr(piece, name) is not None]
        if name == "cosines":
            k = min(piece.k for piece in pieces)
            return np.stack([piece.cosines[:k, :k] for piece in pieces])
        if name == "notes":
            return tuple(dict.fromkeys(note for notes in found for note in notes))
        if not found or name in ("nearest", "values", "base_values"):
            return tuple(value for values in found for value in values) if found else None
        if name in _SUMMED:
            return tuple(np.sum(found, axis=0).tolist()) if isinstance(found[0], tuple) else sum(found)
        return min(found) if name in ("k", "gap") else max(found) if name in _LARGEST else float(np.mean(found))

    return Directions(**{one.name: of_all(one.name) for one in fields(Directions)})
