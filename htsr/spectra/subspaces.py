"""What happened to the directions of a matrix: singular vectors of A (the base) beside those of B (the trained one).

Singular values say how much each direction stretches; training moves the directions themselves. U_A and V_A are the k
leading left and right singular vectors of A, (m, k) and (n, k), U_B and V_B those of B, Δ = B - A. Left vectors are
those of the rows: of a torch ``Linear``, stored (out, in), the directions of its output.

Every number stands beside its null, the same for A with a Gaussian change of the norm ‖Δ‖_F in place of Δ: by a closed
form where there is one, else by seeded draws.

Sources: overlaps and principal angles, Björck & Golub (Math. Comp. 27, 1973); intruder dimensions, Shuttleworth and
others (arXiv 2410.21228); effective rank, Roy & Vetterli (EUSIPCO 2007). Shares of the change, nulls and the treatment
of equal singular values are our own.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np

from htsr.arrays import MANTISSAS, Array, Vector, epsilon
from htsr.errors import MatrixError, UsageError
from htsr.spectra.bulk import mp_quantile
from htsr.spectra.device import on_device
from htsr.spectra.erg import erg
from htsr.spectra.exact_products import exact_products
from htsr.spectra.intruders import nearest_cosines
from htsr.spectra.leading import Leading, Sum, gram_eigenvalues, leading
from htsr.spectra.resolution import without_rounding
from htsr.spectra.tail import fit_power_law

if TYPE_CHECKING:
    import torch

Subspace: TypeAlias = Literal["erg", "tail"] | int
EPSILONS = (0.3, 0.5, 0.7, 0.9)  # cosines below which a direction is new; 0.5 is the paper's and PEFT's
EPSILON = 0.5
_DRAWN = (
    "overlap_left",
    "overlap_right",
    "angle_left",
    "angle_right",
    "largest_angle_left",
    "largest_angle_right",
    "intruders",
)
_EQUAL = 1e-6  # relative difference of singular values that are equal but for rounding


@dataclass(frozen=True)
class Directions:
    """The directions of B beside those of A. Nulls are None where nothing changed.

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


def directions(
    a: Array,
    b: Array,
    k: Subspace = 10,
    *,
    stored: tuple[str, str] | None = None,
    draws: int = 1,
    seed: int = 0,
    device: str = "auto",
) -> Directions:
    """The leading singular vectors of B beside those of A, and where the change lies.

    Args:
        a: base A, (m, n), any float dtype.
        b: trained matrix B, in the shape of `a`.
        k: number of leading directions; ``"erg"`` for those of A's effective correlation space, ``"tail"`` for those
            of the power-law tail of A's eigenvalues.
        stored: dtypes that the entries of A and of B were stored in, as torch names them; None for those they have.
        draws: number of Gaussian changes whose mean is the null where it has no closed form; 0 for none.
        seed: seed of the draws.
        device: device that computes, as torch names it; ``auto`` is where A lies.

    Returns:
        The `Directions`, computed in float64.

    Raises:
        MatrixError: entries are NaN, infinite or overflow (status ``nan``), are so small that their squares vanish
            (``underflow``), all of A or B are zero (``zero``), there are none (``empty``), or A has no power law
            (``degenerate``) or effective correlation space (``no_ecs``) that was asked for.
        UsageError: the shapes differ, or k is none of these.

    Examples:
        B turns the leading directions of A by 60° towards the next, on the left alone:

        >>> import numpy as np
        >>> from htsr.spectra.subspaces import directions
        >>> A = np.diag([4.0, 3.0, 1.0, 0.5])
        >>> turn = np.eye(4)
        >>> turn[np.ix_([0, 2], [0, 2])] = [[0.5, -(0.75**0.5)], [0.75**0.5, 0.5]]
        >>> found = directions(A, turn @ A, k=1)
        >>> round(found.overlap_left, 6), round(found.angle_left, 6), round(found.overlap_right, 6)
        (0.25, 60.0, 1.0)
    """
    if a.shape != b.shape:
        raise UsageError(
            f"directions are those of two matrices of one shape, not {tuple(a.shape)} and {tuple(b.shape)}"
        )
    A = Sum.of(a, device)
    B = Sum.of(b, A.device)
    with exact_products(A.device):
        return _compared(A, B, k, stored or (_dtype(a), _dtype(b)), draws, seed)


def by_head(
    a: Array,
    b: Array,
    heads: int,
    axis: Literal[0, 1],
    k: int = 10,
    *,
    stored: tuple[str, str] | None = None,
    draws: int = 1,
    seed: int = 0,
    device: str = "auto",
) -> tuple[Directions, ...]:
    """The same for each head of an attention matrix.

    Args:
        a: base A, (m, n), any float dtype.
        b: trained matrix B, in the shape of `a`.
        heads: number of heads; of k and v that of key and value heads, of which grouped-query attention has fewer.
        axis: axis that the heads divide: 0 for q, k, v, whose rows are the heads' outputs, 1 for o; of a GPT-2 style
            ``Conv1D``, which is stored transposed, the other one.
        k: number of leading directions of each head.
        stored: dtypes that the entries of A and of B were stored in, as torch names them; None for those they have.
        draws: number of Gaussian changes whose mean is the null where it has no closed form; 0 for none.
        seed: seed of the draws.
        device: device that computes, as torch names it; ``auto`` is where A lies.

    Returns:
        One `Directions` for each head, in their order.

    Raises:
        MatrixError: see `directions`.
        UsageError: the axis does not divide into that many heads, or see `directions`.

    Examples:
        >>> import numpy as np
        >>> from htsr.spectra.subspaces import by_head
        >>> A = np.random.default_rng(0).standard_normal((8, 6))
        >>> B = A.copy()
        >>> B[:4] = B[3::-1]  # only the first of two heads changed
        >>> [round(found.relative, 6) > 0 for found in by_head(A, B, heads=2, axis=0, k=1)]
        [True, False]
    """
    side = a.shape[axis]
    if heads < 1 or side % heads:
        raise UsageError(f"{side} {'columns' if axis else 'rows'} do not divide into {heads} heads")
    width = side // heads
    cut: list[Any] = [np.s_[i : i + width] if axis == 0 else np.s_[:, i : i + width] for i in range(0, side, width)]
    return tuple(
        directions(a[i], b[i], k, stored=stored, draws=draws, seed=seed + head, device=device)
        for head, i in enumerate(cut)
    )


def _compared(A: Sum, B: Sum, k: Subspace, stored: tuple[str, str], draws: int, seed: int) -> Directions:
    m, n = A.shape
    wanted = min(_number(A, k), m, n)
    base, tuned = leading(A, wanted), leading(B, wanted)
    ranks = base.resolved(stored[0]), tuned.resolved(stored[1])
    kept = min(ranks)
    if kept == 0:
        name = "A" if ranks[0] == 0 else "B"
        raise MatrixError("zero", f"{name} is zero but for the rounding errors of its entries, it has no directions")
    notes = []
    if kept < wanted:
        name = "A" if ranks[0] == kept else "B"
        notes.append(f"{name} has {kept} singular values above the rounding of its entries, {wanted} were asked for")
    base, tuned = _first(base, kept), _first(tuned, kept)
    gap = min(base.gap, tuned.gap)
    if gap < _EQUAL:
        notes.append("the last leading singular value and the next are equal: the leading subspace is undefined")
    change = Sum((*B.terms, *((-factor, term) for factor, term in A.terms)))
    rounding = sum((MANTISSAS * epsilon(s) * x.norm) ** 2 for s, x in zip(stored, (base, tuned), strict=True)) / (m * n)
    where = _shares(change, base, rounding)
    norm = where.pop("norm", 0.0)
    nulls: dict[str, Any] = {}
    if where:
        nulls = _closed_nulls(m, n, kept) | (_drawn_nulls(A, base, norm, draws, seed) if draws else {})
        if where["effective_rank"] is None:
            notes.append("the change is no larger than the rounding errors of the entries")
    return Directions(
        k=kept,
        **(_beside(A, base, tuned) if where else _unchanged(base)),
        **where,
        **nulls,
        chance_left=kept / m,
        chance_right=kept / n,
        relative=norm / base.norm,
        gap=gap,
        error=max(base.error, tuned.error),
        values=tuple(tuned.values.tolist()),
        base_values=tuple(base.values.tolist()),
        notes=tuple(notes),
    )


def _unchanged(base: Leading) -> dict[str, Any]:
    """What a `Directions` has where B is A."""
    k = len(base.values)
    angles = ("angle_left", "angle_right", "largest_angle_left", "largest_angle_right")
    return {
        **dict.fromkeys(("overlap_left", "overlap_right"), 1.0),
        **dict.fromkeys(angles, 0.0),
        "intruders": 0,
        "intruder_counts": (0,) * len(EPSILONS),
        "nearest": (1.0,) * k,
        "cosines": (base.left.mT @ base.left).abs().cpu().numpy(),
    }


def _number(A: Sum, k: Subspace) -> int:
    """How many leading directions are asked for."""
    if k in ("erg", "tail"):
        W = A if A.shape[0] >= A.shape[1] else A.T
        values = np.maximum(gram_eigenvalues(W.gram()), 0.0)
        if not values[-1] > 0:
            raise MatrixError("zero", "all entries of A are zero, it has no directions")
        if k == "tail":
            return fit_power_law(values).num_tail
        if not (num := erg(values, float(values[-1])).num):
            raise MatrixError("no_ecs", "the trace-log condition has no crossing, so there is no ECS to compare")
        return num
    if isinstance(k, bool) or not isinstance(k, int) or k < 1:
        raise UsageError(f"k is 'erg', 'tail' or a number of directions, not {k!r}")
    return k


def _beside(A: Sum, base: Leading, tuned: Leading) -> dict[str, Any]:
    """What a `Directions` has of two sets of leading vectors."""
    k = len(base.values)
    left, right = base.left.mT @ tuned.left, base.right.mT @ tuned.right
    angles = [
        _angles(x, y, cosines) for x, y, cosines in ((base.left, tuned.left, left), (base.right, tuned.right, right))
    ]
    nearest = nearest_cosines(A, tuned.left)
    counts = tuple(int(np.count_nonzero(nearest < epsilon)) for epsilon in EPSILONS)
    return {
        "overlap_left": min(float((left**2).sum()) / k, 1.0),
        "overlap_right": min(float((right**2).sum()) / k, 1.0),
        "angle_left": float(np.median(angles[0])),
        "angle_right": float(np.median(angles[1])),
        "largest_angle_left": float(angles[0].max()),
        "largest_angle_right": float(angles[1].max()),
        "intruders": counts[EPSILONS.index(EPSILON)],
        "intruder_counts": counts,
        "nearest": tuple(nearest.tolist()),
        "cosines": left.abs().cpu().numpy(),
    }


def _angles(x: torch.Tensor, y: torch.Tensor, cosines: torch.Tensor) -> Vector:
    """Principal angles in degrees, ascending: by their cosines where those are small, by their sines elsewhere."""
    import torch

    cosine = torch.linalg.svdvals(cosines).clamp(max=1.0)
    sine = torch.linalg.svdvals(y - x @ cosines).clamp(max=1.0).flip(0)
    angles = torch.where(cosine**2 < 0.5, torch.arccos(cosine), torch.arcsin(sine))
    return np.degrees(angles.cpu().numpy())


def _shares(change: Sum, base: Leading, rounding: float) -> dict[str, Any]:
    """Where the change lies in the leading subspaces of the base, and what rank it has; empty where there is none."""
    m, n = change.shape
    values = np.maximum(gram_eigenvalues((change if m >= n else change.T).gram()), 0.0)
    square = float(values.sum())
    if square == 0:
        return {}
    right, left = change.times(base.right), change.transposed_times(base.left)  # ΔV_A and ΔᵀU_A
    both = base.left.mT @ right
    resolved = np.sqrt(without_rounding(values, max(m, n), "float64", rounding))
    return {
        "norm": square**0.5,
        "share_both": float((both**2).sum()) / square,
        "share_left": float((left**2).sum()) / square,
        "share_right": float((right**2).sum()) / square,
        "share_scaling": float((both.diagonal() ** 2).sum()) / square,
        "effective_rank": _effective_rank(resolved) if resolved.any() else None,
        "change_stable_rank": square / float(values[-1]),
    }


def _effective_rank(values: Vector) -> float:
    """The exponential of the entropy of singular values over their sum (Roy & Vetterli)."""
    shares = values[values > 0] / values.sum()
    return float(np.exp(-(shares * np.log(shares)).sum()))


def _closed_nulls(m: int, n: int, k: int) -> dict[str, float]:
    """What a Gaussian change gives wherever that has a closed form."""
    M, N = sorted((m, n))
    return {
        "share_both_null": k * k / (m * n),
        "share_left_null": k / m,
        "share_right_null": k / n,
        "share_scaling_null": k / (m * n),
        "effective_rank_null": _effective_rank(np.sqrt(mp_quantile((np.arange(M) + 0.5) / M, N / M))),
        "change_stable_rank_null": m * n / (m**0.5 + n**0.5) ** 2,
    }


def _drawn_nulls(A: Sum, base: Leading, norm: float, draws: int, seed: int) -> dict[str, Any]:
    """Means over Gaussian changes of the same norm."""
    found = []
    for draw in range(draws):
        noise = np.random.default_rng((seed, draw)).standard_normal(A.shape, dtype=np.float32)
        scale = norm / float(np.linalg.norm(noise.astype(np.float64)))
        changed = Sum((*A.terms, (scale, on_device(noise, A.device))))
        found.append(_beside(A, base, leading(changed, len(base.values))))
    nulls: dict[str, Any] = {f"{name}_null": float(np.mean([one[name] for one in found])) for name in _DRAWN}
    nulls["intruder_counts_null"] = tuple(np.mean([one["intruder_counts"] for one in found], axis=0).tolist())
    return nulls


def _first(found: Leading, k: int) -> Leading:
    """The first k triplets."""
    if k == len(found.values):
        return found
    following = float(found.values[k])
    return Leading(found.values[:k], found.left[:, :k], found.right[:, :k], following, found.norm, found.error)


def _dtype(matrix: Array) -> str:
    return str(matrix.dtype).removeprefix("torch.")
