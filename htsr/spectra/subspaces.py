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

from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np

from htsr.arrays import MANTISSAS, Array, Vector, epsilon
from htsr.errors import MatrixError, UsageError
from htsr.spectra.changes import closed_nulls, shares
from htsr.spectra.direction_numbers import EPSILON, EPSILONS, Directions, pooled
from htsr.spectra.erg import erg
from htsr.spectra.exact_products import exact_products
from htsr.spectra.intruders import LeftVectors
from htsr.spectra.leading import Leading, gram_eigenvalues, leading
from htsr.spectra.sums import Sum
from htsr.spectra.tail import fit_power_law

if TYPE_CHECKING:
    import torch

__all__ = ["EPSILON", "EPSILONS", "Directions", "Subspace", "by_head", "directions"]

Subspace: TypeAlias = Literal["erg", "tail"] | int
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
_MIXED = 8**-0.5  # standard deviation of sin² of an angle of which nothing is known


def directions(
    a: Array,
    b: Array,
    k: Subspace = 10,
    *,
    stored: tuple[str, str] | None = None,
    draws: int = 1,
    seed: int = 0,
    exact: bool = False,
    device: str = "auto",
) -> Directions:
    """The leading singular vectors of B beside those of A, and where the change lies.

    Args:
        a: base A, (m, n) or (pieces, m, n), any float dtype.
        b: trained matrix B, in the shape of `a`.
        k: number of leading directions, at most min(m, n) of which are taken; ``"erg"`` for those of A's effective
            correlation space, ``"tail"`` for those of the power-law tail of A's eigenvalues,
            by ``ks``.
        stored: dtypes that the entries of A and of B were stored in, as torch names them; None for those they have.
        draws: number of Gaussian changes whose mean is the null where it has no closed form; 0 for none.
        seed: seed of the draws.
        exact: whether LAPACK decomposes large matrices, too (M above 2048), where else a few products do, as long as
            they turn no subspace by more than 1e-6.
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
    stored = stored or (_dtype(a), _dtype(b))
    if a.ndim == 3:
        if not len(a):
            raise MatrixError("empty", f"the matrix has no entries (shape {tuple(a.shape)})")
        own = [
            _compared(x, y, k, stored, draws, seed + i, exact, device)
            for i, (x, y) in enumerate(zip(a, b, strict=True))
        ]
        return pooled(own)
    return _compared(a, b, k, stored, draws, seed, exact, device)


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
    exact: bool = False,
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
        exact: whether LAPACK decomposes large matrices, too (M above 2048), where else a few products do, as long as
            they turn no subspace by more than 1e-6.
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
        directions(a[i], b[i], k, stored=stored, draws=draws, seed=seed + head, exact=exact, device=device)
        for head, i in enumerate(cut)
    )


def _compared(
    a: Array, b: Array, k: Subspace, stored: tuple[str, str], draws: int, seed: int, exact: bool, device: str
) -> Directions:
    """The `Directions` of one pair of matrices."""
    A = Sum.of(a, device)
    B = Sum.of(b, A.device)
    with exact_products(A.device):
        return _directions(A, B, k, stored, draws, seed, exact)


def _directions(A: Sum, B: Sum, k: Subspace, stored: tuple[str, str], draws: int, seed: int, exact: bool) -> Directions:
    m, n = A.shape
    wanted = min(_number(A, k), m, n)
    base, tuned = (leading(W, wanted, exact=exact) for W in (A, B))
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
    change = B.plus(A, -1.0)
    rounding = sum((MANTISSAS * epsilon(s) * x.norm) ** 2 for s, x in zip(stored, (base, tuned), strict=True)) / (m * n)
    where = shares(change, base, rounding)
    norm = where.pop("norm", 0.0)
    vectors = LeftVectors(A, base.left)
    nulls: dict[str, Any] = {}
    if where:
        nulls = closed_nulls(m, n, kept) | (_drawn_nulls(vectors, base, norm, draws, seed, exact) if draws else {})
        if norm**2 <= 2 * rounding * m * n:
            notes.append("the change is no larger than the rounding errors of the entries")
        if draws and kept < min(m, n) and _scatters(base, norm, nulls):
            notes.append(
                f"null scatters: singular values {kept} and {kept + 1} of A are so close that by them alone "
                "1 - overlap of a Gaussian change varies by more than half of itself from draw to draw"
            )
    return Directions(
        k=kept,
        **(_beside(vectors, base, tuned) if where else _unchanged(base)),
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


def _beside(vectors: LeftVectors, base: Leading, tuned: Leading) -> dict[str, Any]:
    """What a `Directions` has of two sets of leading vectors."""
    k = len(base.values)
    left, right = base.left.mT @ tuned.left, base.right.mT @ tuned.right
    angles = [
        _angles(x, y, cosines) for x, y, cosines in ((base.left, tuned.left, left), (base.right, tuned.right, right))
    ]
    nearest = vectors.nearest(tuned.left)
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


def _drawn_nulls(
    vectors: LeftVectors, base: Leading, norm: float, draws: int, seed: int, exact: bool
) -> dict[str, Any]:
    """Means over Gaussian changes of the same norm."""
    found = []
    for draw in range(draws):
        A = vectors.matrix
        noise = np.random.default_rng((seed, draw)).standard_normal(A.shape, dtype=np.float32)
        G = Sum.of(noise, A.device)
        changed = A.plus(G, norm / G.norm())
        found.append(_beside(vectors, base, leading(changed, len(base.values), exact=exact)))
    nulls: dict[str, Any] = {f"{name}_null": float(np.mean([one[name] for one in found])) for name in _DRAWN}
    nulls["intruder_counts_null"] = tuple(np.mean([one["intruder_counts"] for one in found], axis=0).tolist())
    return nulls


def _scatters(base: Leading, norm: float, nulls: dict[str, Any]) -> bool:
    """Whether the nulls of overlaps hang on how the k-th and the next singular vector happen to mix.

    To first order a Gaussian change, each entry with variance s², turns the one towards the other by an angle with
    variance c = s² (σ_k² + σ_{k+1}²) / (σ_k² - σ_{k+1}²)², on which 1 - overlap has the standard deviation √2 c / k.
    """
    m, n, k = len(base.left), len(base.right), len(base.values)
    last, following = float(base.values[-1]), base.following
    apart = (last**2 - following**2) ** 2
    mixed = norm**2 / (m * n) * (last**2 + following**2) / apart if apart > 0 else np.inf
    lost = 1 - min(nulls["overlap_left_null"], nulls["overlap_right_null"])
    return bool(min(2**0.5 * mixed, _MIXED) / k > lost / 2)


def _first(found: Leading, k: int) -> Leading:
    """The first k triplets."""
    if k == len(found.values):
        return found
    following = float(found.values[k])
    return Leading(found.values[:k], found.left[:, :k], found.right[:, :k], following, found.norm, found.error)


def _dtype(matrix: Array) -> str:
    return str(matrix.dtype).removeprefix("torch.")
