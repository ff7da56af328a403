"""Low-rank projection of a gradient (GaLore, arXiv 2403.03507): the subspace, the way in, the way back.

G is m×n. Where m ≥ n it is projected on the right, R = G·P with P the top r right singular vectors (n×r), so R is m×r;
else on the left, R = Pᵀ·G with the top r left singular vectors (m×r), so R is r×n. All functions take plain tensors and
DTensors; of a DTensor gradient, P is sharded as the side of G that it multiplies.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch
from torch import Tensor

from htsr.errors import HtsrError, UsageError

Method: TypeAlias = Literal["svd", "randomized"]

_OVERSAMPLING = 8
_COLD_ITERATIONS, _WARM_ITERATIONS = 3, 1


def projects_right(shape: torch.Size) -> bool:
    """Whether a gradient of this `shape`, (m, n), is projected on the right: m ≥ n."""
    return shape[0] >= shape[1]


def projector(
    G: Tensor,
    rank: int,
    method: Method = "svd",
    previous: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Orthonormal basis of the top singular subspace of a gradient, best direction first.

    ``svd`` takes LAPACK's vectors as they come, signs included. ``randomized`` is subspace iteration on GᵀG (or GGᵀ)
    with oversampling 8 and a Rayleigh-Ritz step at the end: one iteration from the previous basis where there is one,
    three from a Gaussian start; each direction takes the sign that agrees with the previous one at its place.

    Args:
        G: (m, n) gradient; a DTensor is gathered.
        rank: r, cut to min(m, n).
        method: ``svd`` or ``randomized``.
        previous: the last basis, (min(m, n), any rank), for a warm start of ``randomized``.
        generator: of the Gaussian numbers of ``randomized``, on the CPU.

    Returns:
        (min(m, n), r), in the dtype of G. Inside float32 at least, but for the products with a bfloat16 gradient, which
        is not copied.

    Raises:
        HtsrError: G has NaN or Inf.
        UsageError: no such method.

    Source: GaLore (arXiv 2403.03507), §3; Halko, Martinsson & Tropp (SIAM Rev. 53, 2011), algorithm 4.4.
    """
    whole = _whole(G)
    if not all(bool(torch.isfinite(extreme)) for extreme in torch.aminmax(whole)):
        raise HtsrError("a gradient has NaN or Inf, so it has no singular vectors; lower the learning rate or clip")
    right = projects_right(G.shape)
    rank = min(rank, *G.shape)
    if method == "svd":
        U, _, Vh = torch.linalg.svd(_widened(whole), full_matrices=False)
        P = Vh[:rank].mT if right else U[:, :rank]
    elif method == "randomized":
        start = None if previous is None else _widened(_whole(previous))
        A = _widened(whole) if whole.dtype == torch.float16 else whole  # its squares would underflow
        P = _subspace_iteration(A if right else A.mT, rank, start, generator)
    else:
        raise UsageError(f"unknown method {method!r}: a projector is computed by svd or randomized")
    return _sharded_like(P.to(G.dtype).contiguous(), G, side=1 if right else 0)


def _subspace_iteration(A: Tensor, rank: int, previous: Tensor | None, generator: torch.Generator | None) -> Tensor:
    """Products in A's dtype, bases in float32 at least."""
    dtype = torch.promote_types(A.dtype, torch.float32)
    width = min(A.shape[1], rank + _OVERSAMPLING)
    known = torch.empty(A.shape[1], 0, dtype=dtype) if previous is None else previous[:, :width]
    noise = torch.randn(A.shape[1], width - known.shape[1], generator=generator, dtype=dtype)
    Q = torch.linalg.qr(torch.cat([known.to(A.device), noise.to(A.device)], 1))[0]
    for _ in range(_COLD_ITERATIONS if previous is None else _WARM_ITERATIONS):
        Q = torch.linalg.qr((A.mT @ (A @ Q.to(A.dtype))).to(dtype))[0]
    B = (A @ Q.to(A.dtype)).to(dtype)
    _, V = torch.linalg.eigh(B.mT @ B)
    P = Q @ V.flip(-1)[:, :rank]
    if previous is not None:
        common = min(rank, previous.shape[1])
        agreement = (P[:, :common] * previous[:, :common]).sum(0)
        P[:, :common] *= torch.where(agreement < 0, -1.0, 1.0)
    return P


def project(G: Tensor, P: Tensor) -> Tensor:
    """R = G·P, (m, r), where m ≥ n; else R = Pᵀ·G, (r, n).

    Args:
        G: (m, n) gradient.
        P: (min(m, n), r) from `projector`.
    """
    return _product(G, P) if projects_right(G.shape) else _product(P.mT, G)


def project_back(R: Tensor, P: Tensor, shape: torch.Size) -> Tensor:
    """R·Pᵀ where m ≥ n, else P·R: (m, n).

    Args:
        R: (m, r) where m ≥ n, else (r, n).
        P: (min(m, n), r).
        shape: (m, n).
    """
    return R @ P.mT if projects_right(shape) else P @ R


def add_projected_back(W: Tensor, R: Tensor, P: Tensor, factor: float) -> None:
    """W += factor · (R projected back), in place, without a matrix of W's size in between.

    The sum runs over r, which is never sharded, so every process does its own part.

    Args:
        W: (m, n), changed.
        R: (m, r) where m ≥ n, else (r, n), in the dtype of W.
        P: (min(m, n), r).
        factor: of what is added.
    """
    right = projects_right(W.shape)
    W, R, P = local(W), local(R), local(P)
    W.addmm_(*((R, P.mT) if right else (P, R)), alpha=factor)


def rotated(exp_avg: Tensor, exp_avg_sq: Tensor, old: Tensor, new: Tensor, shape: torch.Size) -> tuple[Tensor, Tensor]:
    """Adam's moments in the coordinates of a new basis: with C = newᵀ·old, C·exp_avg and (C∘C)·exp_avg_sq.

    The first is the projection of the old first moment on the new subspace. The second is what the squares would be if
    the old coordinates were uncorrelated; it is never negative. What lies outside the new subspace is dropped.

    Args:
        exp_avg: (m, r) where m ≥ n, else (r, n); of a sharded matrix, this process's part.
        exp_avg_sq: in the same shape.
        old: (min(m, n), r) basis that the moments are in.
        new: (min(m, n), r') basis to go to.
        shape: (m, n) of the whole matrix.

    Returns:
        Both moments with r' in place of r, in their dtype.
    """
    C = local(_product(new.mT, old)).to(exp_avg.dtype)
    if projects_right(shape):
        return exp_avg @ C.mT, exp_avg_sq @ (C * C).mT
    return C @ exp_avg, (C * C) @ exp_avg_sq


def local(tensor: Tensor) -> Tensor:
    """This process's part of a `tensor` of any shape if it is a DTensor, sharing its memory; else the tensor itself."""
    return tensor.to_local() if is_distributed(tensor) else tensor  # type: ignore[attr-defined]


def is_distributed(tensor: Tensor) -> bool:
    """Whether `tensor`, of any shape, is a DTensor."""
    return hasattr(tensor, "device_mesh")


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if is_distributed(tensor) else tensor  # type: ignore[attr-defined]


def _widened(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _sharded_like(P: Tensor, G: Tensor, side: int) -> Tensor:
    if not is_distributed(G):
        return P
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    placements = [Shard(0) if placement.is_shard(side) else Replicate() for placement in G.placements]  # type: ignore[attr-defined]
    return distribute_tensor(P, G.device_mesh, placements)  # type: ignore[attr-defined]


def _product(A: Tensor, B: Tensor) -> Tensor:
    """A·B, summed over the processes where the inner side is sharded."""
    C = A @ B
    if not is_distributed(C):
        return C
    from torch.distributed.tensor import Replicate

    settled = [Replicate() if placement.is_partial() else placement for placement in C.placements]  # type: ignore[attr-defined]
    return C.redistribute(placements=settled)  # type: ignore[attr-defined,no-any-return]
